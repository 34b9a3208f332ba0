"""The reference: stage 1's step as it is taken where nobody has thought about its cost.

The same function of the same weights as `aam.model`: every occurrence of every ASV is encoded by itself, padded to the
longest sequence that the model can read; samples are padded to the token limit; memberships are a dense [B, S, P]
tensor with a masked maximum; UniFrac takes the minimum and maximum of [B, B, P] tensors. Where there is a nucleotide
stack, it is PyTorch's own, recomputes its activations in the backward pass, has dropout inside attention and
feed-forward too, and logits at all positions. Rows that are padding throughout are skipped in that stack alone.

Shape letters: B samples, S slots (the token limit), N occurrences, L tokens, D width, P clades, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aam.batch import Batch
from aam.config import UnifracMetric
from aam.model.asv_encoder import MASK, PAD, NucleotideEncoder
from aam.model.layers import Transformer
from aam.model.sequence_encoder import SequenceEncoder
from aam.training.step import Objective

CHUNK = 256
"""Slots of each sample that the nucleotide stack encodes at a time."""
LAYERS = 4
"""Layers of that stack whose activations are recomputed together."""
SAMPLES = 8
"""Samples of a chunk: those of a larger batch, all at once, take more than 24 GiB."""


@dataclass(frozen=True, kw_only=True)
class NaiveOutput:
    """Output of a NaiveEncoder for a batch."""

    presence: Tensor
    """float32 [B, P]"""
    share: Tensor
    """float32 [B, P]"""
    tips: Tensor
    """float32 [B, U]: lengths of the tips of the ASVs that a sample has."""
    tips_by_share: Tensor
    """float32 [B, U]: the same by their relative abundance."""
    logits: Tensor | None
    """float32 [N, L, V]: nucleotide logits of all occurrences, sample by sample; None without a nucleotide stack."""


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
        self.nucleotides: nn.TransformerEncoder | None = None
        stack = encoder.asv_encoder.nucleotides
        if stack is not None:
            sizes = encoder.sizes
            self.nucleotides = stock_transformer(stack.transformer, sizes.attention_heads, sizes.dropout)

    def forward(self, batch: Batch) -> NaiveOutput:
        """Profiles of the samples, and nucleotide logits of all occurrences."""
        L, padding = max(self.sizes.max_bp + 1, batch.tokens.shape[1]), self.slots - batch.slot.shape[1]
        tokens_UL = F.pad(batch.tokens.long(), (0, L - batch.tokens.shape[1]), value=PAD)
        seen_UL = tokens_UL
        if batch.masked_position is not None:
            seen_UL = tokens_UL.scatter(1, batch.masked_position, MASK)
        mask_BS = F.pad(batch.slot_mask, (0, padding))
        abundance_BS = F.pad(batch.log_abundance.exp(), (0, padding)) * mask_BS
        slot_BS = F.pad(batch.slot, (0, padding))
        vectors_BSD, logits_NLV = self._encode(tokens_UL[slot_BS], seen_UL[slot_BS], mask_BS, batch.kmers_kept)
        memberships_BSP = self.encoder.clades(vectors_BSD)
        tip_BS = self.encoder.clades.tip_lengths(vectors_BSD) * mask_BS
        empty_BU = tip_BS.new_zeros(len(tip_BS), len(tokens_UL))
        return NaiveOutput(
            tips=empty_BU.scatter_add(1, slot_BS, tip_BS),
            tips_by_share=empty_BU.scatter_add(1, slot_BS, tip_BS * abundance_BS),
            presence=memberships_BSP.masked_fill(~mask_BS[..., None], 0).max(dim=1).values,
            share=(memberships_BSP * abundance_BS[..., None]).sum(dim=1),
            logits=logits_NLV,
        )

    def _encode(
        self, tokens_BSL: Tensor, seen_BSL: Tensor, full_BS: Tensor, kmers_kept: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Vectors [B, S, D] of all slots, and nucleotide logits [N, L, V] of those that are full."""
        vectors_BSD, logits_NLV = torch.zeros((), device=full_BS.device), None
        stack, kmers = self.encoder.asv_encoder.nucleotides, self.encoder.asv_encoder.kmers
        if stack is not None:
            groups = [
                self._run_stack(stack, *group)
                for group in zip(*(t.split(SAMPLES) for t in (tokens_BSL, seen_BSL, full_BS)), strict=True)
            ]
            vectors_BSD, logits_NLV = (torch.cat(parts) for parts in zip(*groups, strict=True))
        if kmers is not None:
            vectors_BSD = vectors_BSD + kmers(tokens_BSL.flatten(0, 1), kmers_kept).unflatten(0, full_BS.shape)
        return vectors_BSD, logits_NLV

    def _run_stack(self, stack: NucleotideEncoder, *of_samples: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors [B, S, D], and nucleotide logits [N, L, V] of the slots that are full, of some samples."""
        chunks = zip(*(t.split(CHUNK, dim=1) for t in of_samples), strict=True)
        vectors, logits = zip(*(self._run_chunk(stack, *chunk) for chunk in chunks), strict=True)
        full_BS = of_samples[-1]
        return torch.cat(vectors, dim=1), torch.cat(logits, dim=1)[full_BS]

    def _run_chunk(
        self, stack: NucleotideEncoder, tokens_BCL: Tensor, seen_BCL: Tensor, full_BC: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Vectors [B, C, D] and nucleotide logits [B, C, L, V] of a chunk of slots; 0 in empty ones."""
        L, D, V = tokens_BCL.shape[2], self.sizes.embedding_dim, stack.head.out_features
        vector_BCD = torch.zeros(*full_BC.shape, D, device=full_BC.device)
        logits_BCLV = torch.zeros(*full_BC.shape, L, V, device=full_BC.device)
        if full_BC.any():
            key_mask_NL = tokens_BCL[full_BC] != PAD
            x_NLD = self._run_layers(stack.token(seen_BCL[full_BC]) + stack.position.weight[:L], key_mask_NL)
            vector_BCD[full_BC] = stack.norm(stack.pool(x_NLD, key_mask_NL)).float()
            logits_BCLV[full_BC] = stack.head(x_NLD).float()
        return vector_BCD, logits_BCLV

    def _run_layers(self, x_NLD: Tensor, key_mask_NL: Tensor) -> Tensor:
        assert self.nucleotides is not None
        for start in range(0, len(self.nucleotides.layers), LAYERS):
            layers = self.nucleotides.layers[start : start + LAYERS]

            def run(x_NLD: Tensor, empty_NL: Tensor, layers: Any = layers) -> Tensor:
                for layer in layers:
                    x_NLD = layer(x_NLD, src_key_padding_mask=empty_NL)
                return x_NLD

            if torch.is_grad_enabled():
                x_NLD = checkpoint(run, x_NLD, ~key_mask_NL, use_reentrant=False)
            else:
                x_NLD = run(x_NLD, ~key_mask_NL)
        assert self.nucleotides.norm is not None
        return self.nucleotides.norm(x_NLD)


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


def naive_unifrac(metric: UnifracMetric, output: NaiveOutput, model: NaiveEncoder) -> Tensor:
    """A metric of a batch that is all on this worker: distances [B, B], or Faith's PD [B]."""
    clades = model.encoder.clades
    # E: the branches of the batch, which are the clades and the tips.
    if metric == "weighted":
        of_samples_BE = torch.cat([clades.lengths * output.share, output.tips_by_share], dim=1)
    else:
        of_samples_BE = torch.cat([clades.lengths * output.presence, output.tips], dim=1)
    if metric == "faith_pd":
        return clades.log_pd_scale.exp() * of_samples_BE.sum(dim=-1)
    # Copies, as of a function that is given pairs of samples.
    pairs = (of_samples_BE.size(0), *of_samples_BE.shape)
    one_BBE = of_samples_BE[:, None].expand(pairs).contiguous()
    other_BBE = of_samples_BE[None].expand(pairs).contiguous()
    if metric == "unweighted":
        return 1 - torch.minimum(one_BBE, other_BBE).sum(dim=-1) / torch.maximum(one_BBE, other_BBE).sum(dim=-1)
    return (one_BBE - other_BBE).abs().sum(dim=-1) / (one_BBE + other_BBE).sum(dim=-1)


def naive_step(
    model: NaiveEncoder, batch: Batch, objective: Objective, autocast: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Mean losses by name, as `aam.training.step.step` has them, of a batch that is all on this worker."""
    device = batch.slot.device
    with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        output = model(batch)
    apart_BB = ~torch.eye(len(batch.slot), dtype=torch.bool, device=device)
    of_metrics = []
    for asked in objective.unifrac:
        squared = (naive_unifrac(asked.metric, output, model) - getattr(batch, asked.metric)).square()
        of_metrics.append((squared[apart_BB] if squared.ndim == 2 else squared).mean() / asked.variance)
    losses = {"base": torch.stack(of_metrics).mean()} if of_metrics else {}
    if output.logits is not None and batch.masked_position is not None:
        losses["nuc"] = _nucleotide_loss(output.logits, batch)
    return losses


def _nucleotide_loss(logits_NLV: Tensor, batch: Batch) -> Tensor:
    """Cross entropy of the masked nucleotides; an ASV counts once, at its first occurrence."""
    assert batch.masked_position is not None
    assert batch.masked_scored is not None
    asv_N = batch.slot[batch.slot_mask]
    first_U = torch.full((len(batch.tokens),), len(asv_N), device=asv_N.device)
    first_U = first_U.scatter_reduce(0, asv_N, torch.arange(len(asv_N), device=asv_N.device), "amin")
    where_UKV = batch.masked_position[..., None].expand(-1, -1, logits_NLV.shape[-1])
    logits_UKV = logits_NLV[first_U].gather(1, where_UKV)
    true_UK = batch.tokens.long().gather(1, batch.masked_position)
    return F.cross_entropy(logits_UKV[batch.masked_scored], true_UK[batch.masked_scored])
