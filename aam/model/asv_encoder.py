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


class ASVEncoder(nn.Module):
    """One vector for each distinct ASV, and the nucleotides behind its masked positions.

    Parameters
    ----------
    sizes : EncoderSizes
        Width, heads, layers.
    """

    def __init__(self, sizes: EncoderSizes) -> None:
        super().__init__()
        dim = sizes.embedding_dim
        self.kmer = sizes.kmer
        self.after_chunk: Callable[[], None] | None = None
        """Called after each chunk of ASVs: to hand GPU memory back, say."""
        self.token = nn.Embedding(VOCABULARY_SIZE, dim)
        self.position = nn.Embedding(sizes.max_bp + 1, dim)
        self.transformer = Transformer(dim, sizes.attention_heads, sizes.asv_layers, sizes.dropout)
        self.pool = AttentionPool(dim, sizes.attention_heads)
        self.norm = nn.LayerNorm(dim)
        self.nucleotide_head = nn.Linear(dim, VOCABULARY_SIZE)
        if self.kmer:
            self.kmer_head = nn.Linear(4**self.kmer, dim, bias=False)
            self.kmer_norm = nn.LayerNorm(dim)
            # New nucleotide states say little of an ASV, and at full size they drown what its k-mers say.
            nn.init.constant_(self.norm.weight, 0.1)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(
        self,
        tokens_UL: Tensor,
        *,
        padded: bool = True,
        masked_position_UK: Tensor | None = None,
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
        chunk_size : int, optional
            ASVs at a time, activations recomputed in the backward pass. The same results with less memory.

        Returns
        -------
        vectors_UD : Tensor
        logits_UKV : Tensor or None
            Scores of the tokens behind the masked positions; None where nothing is masked.
        """
        if chunk_size is None or len(tokens_UL) <= chunk_size:
            return self._encode(tokens_UL, padded, masked_position_UK)
        vectors, logits = [], []
        for start in range(0, len(tokens_UL), chunk_size):
            rows = slice(start, start + chunk_size)
            position = None if masked_position_UK is None else masked_position_UK[rows]
            arguments = (tokens_UL[rows], padded, position)
            if torch.is_grad_enabled():
                vector, logit = checkpoint(self._encode, *arguments, use_reentrant=False)
            else:
                vector, logit = self._encode(*arguments)
            vectors.append(vector)
            logits.append(logit)
            if self.after_chunk is not None:
                self.after_chunk()
        return torch.cat(vectors), None if masked_position_UK is None else torch.cat(logits)

    def _encode(
        self, tokens_UL: Tensor, padded: bool, masked_position_UK: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        tokens_UL = tokens_UL.long()
        seen_UL = tokens_UL if masked_position_UK is None else tokens_UL.scatter(1, masked_position_UK, MASK)
        key_mask_UL = tokens_UL != PAD if padded else None
        x_ULD = self.token(seen_UL) + self.position.weight[: tokens_UL.shape[1]]
        x_ULD = self.transformer(x_ULD, key_mask_UL)
        vectors_UD = self.norm(self.pool(x_ULD, key_mask_UL))
        if self.kmer:
            # The whole sequence, masked or not: the nucleotide head reads the states before this is added.
            frequencies = kmer_frequencies(tokens_UL, self.kmer, vectors_UD.dtype)
            vectors_UD = vectors_UD + self.kmer_norm(self.kmer_head(frequencies))
        if masked_position_UK is None:
            return vectors_UD, None
        where_UKD = masked_position_UK[..., None].expand(-1, -1, x_ULD.shape[-1])
        return vectors_UD, self.nucleotide_head(x_ULD.gather(1, where_UKD))


def kmer_frequencies(tokens_UL: Tensor, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Counts of the k-mers of each row over the square root of their number.

    Parameters
    ----------
    tokens_UL : Tensor of int64
        Rows of tokens; a k-mer with any token but A, C, G, T is not counted.
    k : int
        Length of the k-mers.
    dtype : torch.dtype
        Of the result.

    Returns
    -------
    Tensor [U, 4 ** k]
        Rows have about unit length where most k-mers occur once.
    """
    U, L = tokens_UL.shape
    if k > L:
        return torch.zeros(U, 4**k, dtype=dtype, device=tokens_UL.device)
    windows_UWk = (tokens_UL - 1).unfold(1, k, 1)
    valid_UW = ((windows_UWk >= 0) & (windows_UWk < 4)).all(dim=-1)
    powers_k = 4 ** torch.arange(k - 1, -1, -1, device=tokens_UL.device)
    code_UW = (windows_UWk.clamp(0, 3) * powers_k).sum(dim=-1)
    counts = torch.zeros(U, 4**k, dtype=torch.float32, device=tokens_UL.device)
    counts.scatter_add_(1, code_UW, valid_UW.float())
    return (counts / counts.sum(dim=1, keepdim=True).clamp(min=1).sqrt()).to(dtype)
