"""The one forward step of training, validation, prediction and sweeps."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from aam.batch import Batch
from aam.config import UnifracMetric
from aam.model.clades import DISTANCES, Tips, common_tips
from aam.model.sequence_encoder import EncoderOutput
from aam.training.collectives import all_gather_rows
from aam.training.losses import (
    Losses,
    LossTerm,
    LossWeights,
    count_loss,
    mean_term,
    nucleotide_loss,
    target_loss,
    unifrac_loss,
)
from aam.training.targets import Target, UnifracTarget


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a run learns. Facts live here: nothing is ever asked of the model, wrapped or not."""

    weights: LossWeights
    target: Target | None = None
    """None in stage 1."""
    unifrac: tuple[UnifracTarget, ...] = ()
    """Metrics that the clades learn."""


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What a step predicted, detached, on the device."""

    target: Tensor | None = None
    """float32 [B, O]"""
    unifrac: dict[UnifracMetric, Tensor] = field(default_factory=dict)
    """float32 [B, G] by metric; of Faith's PD, [B]."""
    log_abundance: Tensor | None = None
    """float32 [B, S]"""
    nucleotides_right: Tensor | None = None
    """float32 []: scored masked positions that were filled in rightly."""


def predict_unifrac(metric: UnifracMetric, output: EncoderOutput, batch: Batch) -> Tensor:
    """A metric of this worker's samples: distances to all samples of all workers [B, G], or Faith's PD [B]."""
    if metric == "faith_pd":
        return output.faith_pd
    assert batch.shared is not None
    assert batch.shared_abundance is not None
    if metric == "unweighted":
        weight_BS, shared_weight_GT = batch.slot_mask.float(), torch.ones_like(batch.shared_abundance)
    else:
        weight_BS, shared_weight_GT = batch.log_abundance.exp() * batch.slot_mask, batch.shared_abundance
    common_BG = common_tips(output.tip_lengths, batch.slot, weight_BS, batch.shared, shared_weight_GT)
    own = output.profiles.of(metric)
    everyone = all_gather_rows(own, batch.rank_sizes)
    tips = Tips(own[:, -1], everyone[:, -1], common_BG)
    return DISTANCES[metric](own[:, :-1], everyone[:, :-1], output.lengths, tips)


def autocast_of(precision: str, device: str) -> torch.dtype | None:
    """Arithmetic of the forward pass that a `--precision` means on a kind of device; None for fp32."""
    is_fast = device == "cuda" or (precision == "fastest" and cpu_has_bf16())
    return torch.bfloat16 if precision == "bf16" or (precision != "fp32" and is_fast) else None


def cpu_has_bf16() -> bool:
    """Whether this machine's CPU has instructions for bf16, which then pays."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def step(
    model: nn.Module,
    batch: Batch,
    objective: Objective,
    *,
    autocast: torch.dtype | None = None,
    chunk_size: int | None = None,
    cached_vectors: Tensor | None = None,
    cached_features: Tensor | None = None,
) -> tuple[Losses, Predictions]:
    """Run the model on a batch and score it.

    Parameters
    ----------
    model : nn.Module
        SequenceEncoder, or SequencePredictor where the objective has a target; wrapped or not.
    batch : Batch
        On the device of the model. Losses whose target it lacks are absent.
    objective : Objective
        Weights, target, unit of the UniFrac loss.
    autocast : torch.dtype, optional
        Arithmetic of the forward pass; losses are float32 always.
    chunk_size : int, optional
        Distinct ASVs encoded at a time.
    cached_vectors : Tensor [U, D], optional
        Vectors of the ASVs, computed before by a frozen encoder.
    cached_features : Tensor [B, F], optional
        Features of the samples, computed before; see `SequencePredictor.forward`.
    """
    cached = {"cached_vectors": cached_vectors} if cached_features is None else {"cached_features": cached_features}
    with torch.autocast(batch.tokens.device.type, dtype=autocast, enabled=autocast is not None):
        output = model(batch, chunk_size=chunk_size, **cached)
    encoder = output if objective.target is None else output.base
    base = nuc = count = target = None
    predicted: dict[str, Tensor] = {}
    unifrac: dict[UnifracMetric, Tensor] = {}
    metrics: dict[UnifracMetric, LossTerm] = {}
    for asked in objective.unifrac:
        truth = getattr(batch, asked.metric)
        if truth is not None:
            assert encoder is not None, "features of samples were cached, and UniFrac is to be learned"
            found = predict_unifrac(asked.metric, encoder, batch)
            metrics[asked.metric] = unifrac_loss(found, truth, batch, asked.variance)
            unifrac[asked.metric] = found.detach()
    if metrics:
        base = mean_term([*metrics.values()])
    if batch.masked_position is not None:
        assert encoder is not None
        nuc = nucleotide_loss(encoder.nucleotide_logits, batch)
        truth = batch.tokens.gather(1, batch.masked_position)
        right = (encoder.nucleotide_logits.detach().argmax(dim=-1) == truth) & batch.masked_scored
        predicted["nucleotides_right"] = right.sum().float()
    if objective.target is not None:
        predicted["target"] = output.target.detach()
        if batch.target is not None:
            target = target_loss(output.heads, batch, objective.target)
        if batch.count_masked is not None:
            count = count_loss(output.log_abundance, batch)
            predicted["log_abundance"] = output.log_abundance.detach()
    losses = Losses(target=target, count=count, base=base, nuc=nuc, metrics=metrics if len(metrics) > 1 else {})
    return losses, Predictions(unifrac=unifrac, **predicted)
