"""Nucleotides to ASV vectors.

Shape letters: U distinct ASVs, L tokens of an ASV, K masked positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aam.model.layers import AttentionPool, Transformer
from aam.model.sizes import EncoderSizes

# The codes of aam.data.tokens, which this package does not import; a test holds them together.
PAD, START, MASK, VOCABULARY_SIZE = 0, 5, 6, 8
LENGTH = 4.0
"""Root mean square of the length of a vector of k-mer frequencies, once they are standardised."""


class KmerEncoder(nn.Module):
    """Vectors of ASVs from the frequencies of their k-mers.

    Parameters
    ----------
    k : int
        Length of the k-mers.
    dim : int
        D.
    """

    def __init__(self, k: int, dim: int) -> None:
        super().__init__()
        self.k = k
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", torch.zeros(4**k))
        self.register_buffer("scale", torch.ones(()))
        self.mlp = nn.Sequential(nn.Linear(4**k, dim), nn.GELU(), nn.LayerNorm(dim))

    def forward(self, tokens_UL: Tensor, kept: Tensor | None = None) -> Tensor:
        """Vectors [U, D] of ASVs from their tokens, by all k-mers or by those kept, of all ASVs alike."""
        with torch.autocast(tokens_UL.device.type, enabled=False):
            frequencies = (kmer_frequencies(tokens_UL, self.k) - self.mean) * self.scale
            if kept is not None:
                frequencies = frequencies * (kept / kept.float().mean().clamp(min=1 / len(kept)))
        return self.mlp(frequencies)

    @torch.no_grad()
    def standardise(self, tokens_UL: Tensor) -> None:
        """Centre the frequencies on those of these ASVs, and bring them to a length of `LENGTH`.

        Parameters
        ----------
        tokens_UL : Tensor of uint8
            ASVs to train on.
        """
        frequencies = kmer_frequencies(tokens_UL, self.k)
        self.mean.copy_(frequencies.mean(dim=0))
        length = (frequencies - self.mean).square().sum(dim=1).mean().sqrt()
        if length > 1e-4:  # else all have the same k-mers, to rounding
            self.scale.fill_(LENGTH / length.item())


class ASVEncoder(nn.Module):
    """One vector for each distinct ASV, and the nucleotides behind its masked positions.

    Parameters
    ----------
    sizes : EncoderSizes
        Width, k-mers, layers of the nucleotide stack.
    """

    def __init__(self, sizes: EncoderSizes) -> None:
        super().__init__()
        dim = sizes.embedding_dim
        assert sizes.kmer or sizes.asv_layers, "nothing to read"
        self.after_chunk: Callable[[], None] | None = None
        """Called after each chunk of ASVs: to hand GPU memory back, say."""
        self.kmers = KmerEncoder(sizes.kmer, dim) if sizes.kmer else None
        self.nucleotides = NucleotideEncoder(sizes) if sizes.asv_layers else None
        if self.kmers is not None and self.nucleotides is not None:
            # New nucleotide vectors tell little of an ASV, and at full size they drown what its k-mers tell.
            nn.init.constant_(self.nucleotides.norm.weight, 0.1)

    def forward(
        self,
        tokens_UL: Tensor,
        *,
        padded: bool = True,
        masked_position_UK: Tensor | None = None,
        kmers_kept: Tensor | None = None,
        chunk_size: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Encode distinct ASVs.

        Parameters
        ----------
        tokens_UL : Tensor of uint8
            START first, PAD last; no row without START.
        padded : bool
            Whether any row has PAD. Known to the caller without looking at the device.
        masked_position_UK : Tensor of int64, optional
            Positions to mask and to predict.
        kmers_kept : Tensor of bool [4 ** k], optional
            K-mers to read; all by default.
        chunk_size : int, optional
            ASVs at a time, activations recomputed in the backward pass. The same results with less memory.

        Returns
        -------
        vectors_UD : Tensor
        logits_UKV : Tensor or None
            Logits of the tokens behind the masked positions; None where nothing is masked.
        """
        if chunk_size is None or len(tokens_UL) <= chunk_size:
            return self._encode(tokens_UL, padded, masked_position_UK, kmers_kept)
        vectors, logits = [], []
        for start in range(0, len(tokens_UL), chunk_size):
            rows = slice(start, start + chunk_size)
            position = None if masked_position_UK is None else masked_position_UK[rows]
            arguments = (tokens_UL[rows], padded, position, kmers_kept)
            if torch.is_grad_enabled():
                vector, logit = checkpoint(self._encode, *arguments, use_reentrant=False)
            else:
                vector, logit = self._encode(*arguments)
            vectors.append(vector)
            logits.append(logit)
            if self.after_chunk is not None:
                self.after_chunk()
        return torch.cat(vectors), None if logits[0] is None else torch.cat(logits)

    def _encode(
        self, tokens_UL: Tensor, padded: bool, masked_position_UK: Tensor | None, kmers_kept: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if self.nucleotides is None:
            assert self.kmers is not None
            return self.kmers(tokens_UL, kmers_kept), None
        vectors_UD, logits_UKV = self.nucleotides(tokens_UL, padded, masked_position_UK)
        if self.kmers is not None:
            # Of the whole sequence, masked or not: the nucleotide head reads states that know nothing of it.
            vectors_UD = vectors_UD + self.kmers(tokens_UL, kmers_kept)
        return vectors_UD, logits_UKV


class NucleotideEncoder(nn.Module):
    """A transformer over the nucleotides of an ASV, pooled to one vector, with a head for masked nucleotides."""

    def __init__(self, sizes: EncoderSizes) -> None:
        super().__init__()
        dim = sizes.embedding_dim
        self.token = nn.Embedding(VOCABULARY_SIZE, dim)
        self.position = nn.Embedding(sizes.max_bp + 1, dim)
        self.transformer = Transformer(dim, sizes.attention_heads, sizes.asv_layers, sizes.dropout)
        self.pool = AttentionPool(dim, sizes.attention_heads)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, VOCABULARY_SIZE)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(
        self, tokens_UL: Tensor, padded: bool, masked_position_UK: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """See `ASVEncoder.forward`."""
        tokens_UL = tokens_UL.long()
        seen_UL = tokens_UL if masked_position_UK is None else tokens_UL.scatter(1, masked_position_UK, MASK)
        key_mask_UL = tokens_UL != PAD if padded else None
        x_ULD = self.token(seen_UL) + self.position.weight[: tokens_UL.shape[1]]
        x_ULD = self.transformer(x_ULD, key_mask_UL)
        vectors_UD = self.norm(self.pool(x_ULD, key_mask_UL))
        if masked_position_UK is None:
            return vectors_UD, None
        where_UKD = masked_position_UK[..., None].expand(-1, -1, x_ULD.shape[-1])
        return vectors_UD, self.head(x_ULD.gather(1, where_UKD))


def kmer_frequencies(tokens_UL: Tensor, k: int) -> Tensor:
    """Counts of the k-mers of each row over the square root of their number.

    Parameters
    ----------
    tokens_UL : Tensor of integers
        Rows of tokens; a k-mer with any token but A, C, G, T is not counted.
    k : int
        Length of the k-mers.

    Returns
    -------
    Tensor of float32 [U, 4 ** k]
        Rows have about unit length where most k-mers occur once.
    """
    U, L = tokens_UL.shape
    kinds, windows = 4**k, max(0, L - k + 1)
    letter_UL = tokens_UL.long() - 1
    known_UL = (letter_UL >= 0) & (letter_UL < 4)
    code_UW = letter_UL.new_zeros(U, windows)
    whole_UW = torch.ones_like(code_UW, dtype=torch.bool)
    for start in range(k):
        code_UW = code_UW * 4 + letter_UL[:, start : start + windows]
        whole_UW = whole_UW & known_UL[:, start : start + windows]
    code_UW = torch.where(whole_UW, code_UW, kinds)
    counts = torch.zeros(U, kinds + 1, device=tokens_UL.device)
    counts.scatter_add_(1, code_UW, torch.ones_like(code_UW, dtype=counts.dtype))
    counts = counts[:, :kinds]
    return counts / counts.sum(dim=1, keepdim=True).clamp(min=1).sqrt()
