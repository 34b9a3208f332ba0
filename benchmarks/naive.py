"""The reference: stage 1's step as it is taken where nobody has thought about its cost.

The same function of the same weights as `aam.model`, built from PyTorch's stock transformer: every occurrence of
every ASV is encoded, padded to the longest sequence the model can read; samples are padded to the token limit;
each stack recomputes its activations in the backward pass; dropout also inside attention and feed-forward;
nucleotide scores at all positions. Rows that are padding throughout are skipped.

Shape letters: B samples, S slots (the token limit), N occurrences, L tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aam.batch import Batch
from aam.model.asv_encoder import MASK, PAD, kmer_frequencies
from aam.model.layers import Transformer
from aam.model.sequence_encoder import SequenceEncoder, unifrac_distances
from aam.training.step import Objective

CHUNK = 256
"""Slots of each sample that are encoded at a time."""
LAYERS = 4
"""Layers of a stack: two of them stand behind one another over the ASVs of a sample."""
SAMPLES = 8
"""Samples of a chunk: those of a larger batch, all at once, take more than 24 GiB."""


class NaiveEncoder(nn.Module):
    """A SequenceEncoder that runs the naive way.

    Parameters
    ----------
    encoder : SequenceEncoder
        Whose weights it takes over: use it no more.
    slots : int
        ASV slots that each sample is padded to.
    """

    def __init__(self, encoder: SequenceEncoder, slots: int) -> None:
        super().__init__()
        self.sizes, self.slots = encoder.sizes, slots
        self.encoder = encoder
        dropout, heads = encoder.sizes.dropout, encoder.sizes.attention_heads
        self.nucleotides = stock_transformer(encoder.asv_encoder.transformer, heads, dropout)
        self.asvs = stock_transformer(encoder.transformer, heads, dropout)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Embeddings [B, D], and nucleotide scores [N, L, V] of all occurrences, sample by sample."""
        assert batch.masked_position is not None
        L = self.sizes.max_bp + 1
        tokens_UL = F.pad(batch.tokens.long(), (0, L - batch.tokens.shape[1]), value=PAD)
        seen_UL = tokens_UL.scatter(1, batch.masked_position, MASK)
        padding = self.slots - batch.slot.shape[1]
        mask_BS = F.pad(batch.slot_mask, (0, padding))
        log_abundance_BS = F.pad(batch.log_abundance, (0, padding))
        slot_BS = F.pad(batch.slot, (0, padding))
        groups = [
            self._encode(*group)
            for group in zip(*(t.split(SAMPLES) for t in (tokens_UL[slot_BS], seen_UL[slot_BS], mask_BS)), strict=True)
        ]
        asvs_BSD, logits_NLV = (torch.cat(parts) for parts in zip(*groups, strict=True))
        states_BSD = self._run(self.asvs, asvs_BSD + self.encoder.abundance(log_abundance_BS), mask_BS)
        summary_BD = self.encoder.summary(states_BSD, mask_BS, log_abundance_BS)
        return self.encoder.embedding(summary_BD.float()), logits_NLV

    def _encode(self, *of_samples: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors [B, S, D], and nucleotide scores [N, L, V] of the slots that are full, of some samples."""
        chunks = zip(*(t.split(CHUNK, dim=1) for t in of_samples), strict=True)
        vectors, logits = zip(*(self._encode_chunk(*chunk) for chunk in chunks), strict=True)
        full_BS = of_samples[-1]
        return torch.cat(vectors, dim=1), torch.cat(logits, dim=1)[full_BS]

    def _encode_chunk(self, tokens_BCL: Tensor, seen_BCL: Tensor, full_BC: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors [B, C, D] and nucleotide scores [B, C, L, V] of a chunk of slots; 0 in empty ones."""
        asv_encoder = self.encoder.asv_encoder
        L, D, V = tokens_BCL.shape[2], self.sizes.embedding_dim, asv_encoder.nucleotide_head.out_features
        vector_BCD = torch.zeros(*full_BC.shape, D, device=full_BC.device)
        logits_BCLV = torch.zeros(*full_BC.shape, L, V, device=full_BC.device)
        if full_BC.any():
            tokens_NL = tokens_BCL[full_BC]
            key_mask_NL = tokens_NL != PAD
            x_NLD = asv_encoder.token(seen_BCL[full_BC]) + asv_encoder.position.weight[:L]
            x_NLD = self._run(self.nucleotides, x_NLD, key_mask_NL)
            vector_ND = asv_encoder.norm(asv_encoder.pool(x_NLD, key_mask_NL))
            if asv_encoder.kmer:
                frequencies = kmer_frequencies(tokens_NL, asv_encoder.kmer, vector_ND.dtype)
                vector_ND = vector_ND + asv_encoder.kmer_norm(asv_encoder.kmer_head(frequencies))
            vector_BCD[full_BC] = vector_ND.float()
            logits_BCLV[full_BC] = asv_encoder.nucleotide_head(x_NLD).float()
        return vector_BCD, logits_BCLV

    def _run(self, stack: nn.TransformerEncoder, x_NTD: Tensor, mask_NT: Tensor) -> Tensor:
        for start in range(0, len(stack.layers), LAYERS):
            layers = stack.layers[start : start + LAYERS]

            def run(x_NTD: Tensor, empty_NT: Tensor, layers: Any = layers) -> Tensor:
                for layer in layers:
                    x_NTD = layer(x_NTD, src_key_padding_mask=empty_NT)
                return x_NTD

            if torch.is_grad_enabled():
                x_NTD = checkpoint(run, x_NTD, ~mask_NT, use_reentrant=False)
            else:
                x_NTD = run(x_NTD, ~mask_NT)
        assert stack.norm is not None
        return stack.norm(x_NTD)


def stock_transformer(ours: Transformer, heads: int, dropout: float) -> nn.TransformerEncoder:
    """PyTorch's own stack with the weights of one of ours, which it takes over: `ours` is left without blocks."""
    dim = ours.norm.normalized_shape[0]
    layer = nn.TransformerEncoderLayer(
        dim, heads, 4 * dim, dropout=dropout, activation=nn.GELU(), batch_first=True, norm_first=True
    )
    stack = nn.TransformerEncoder(layer, len(ours.blocks), norm=ours.norm, enable_nested_tensor=False)
    for theirs, block in zip(stack.layers, ours.blocks, strict=True):
        theirs.load_state_dict(
            {
                "self_attn.in_proj_weight": block.attention.qkv.weight,
                "self_attn.in_proj_bias": block.attention.qkv.bias,
                "self_attn.out_proj.weight": block.attention.out.weight,
                "self_attn.out_proj.bias": block.attention.out.bias,
                "linear1.weight": block.mlp[0].weight,
                "linear1.bias": block.mlp[0].bias,
                "linear2.weight": block.mlp[2].weight,
                "linear2.bias": block.mlp[2].bias,
                "norm1.weight": block.attention_norm.weight,
                "norm1.bias": block.attention_norm.bias,
                "norm2.weight": block.mlp_norm.weight,
                "norm2.bias": block.mlp_norm.bias,
            }
        )
    ours.blocks = nn.ModuleList()
    return stack


def naive_step(
    model: NaiveEncoder, batch: Batch, objective: Objective, autocast: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Mean `base` and `nuc`, as `aam.training.step.step` has them, of a batch that is all on this worker."""
    assert batch.unifrac is not None
    assert batch.masked_position is not None
    assert batch.masked_scored is not None
    device = batch.slot.device
    with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        embedding_BD, logits_NLV = model(batch)
    offset, scale = model.encoder.distance_offset, model.encoder.distance_log_scale.exp()
    predicted_BB = unifrac_distances(embedding_BD, embedding_BD, offset, scale)
    apart_BB = ~torch.eye(len(embedding_BD), dtype=torch.bool, device=device)
    squared = (predicted_BB - batch.unifrac)[apart_BB].square()
    # An ASV counts once in the loss, at its first occurrence.
    asv_N = batch.slot[batch.slot_mask]
    first_U = torch.full((len(batch.tokens),), len(asv_N), device=device)
    first_U = first_U.scatter_reduce(0, asv_N, torch.arange(len(asv_N), device=device), "amin")
    where_UKV = batch.masked_position[..., None].expand(-1, -1, logits_NLV.shape[-1])
    logits_UKV = logits_NLV[first_U].gather(1, where_UKV)
    true_UK = batch.tokens.long().gather(1, batch.masked_position)
    return {
        "base": squared.mean() / objective.distance_variance,
        "nuc": F.cross_entropy(logits_UKV[batch.masked_scored], true_UK[batch.masked_scored]),
    }
