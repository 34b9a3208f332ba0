"""The one forward step of training, validation, prediction and sweeps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aam.batch import Batch
from aam.model.sequence_encoder import KnownOutputs, unifrac_distances
from aam.training.collectives import all_gather_rows
from aam.training.losses import (
    Losses,
    LossWeights,
    count_loss,
    nucleotide_loss,
    target_loss,
    unifrac_loss,
)
from aam.training.targets import Target


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a run learns. Facts live here: nothing is ever asked of the model, wrapped or not."""

    weights: LossWeights
    target: Target | None = None
    """None in stage 1."""
    distance_mean: float = 0.0
    """Mean UniFrac distance of the training samples."""
    distance_variance: float = 1.0
    """Variance of the same: the unit of the UniFrac loss."""


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What a step predicted, detached, on the device."""

    target: Tensor | None = None
    """float32 [B, O]"""
    unifrac: Tensor | None = None
    """float32 [B, G]"""
    log_abundance: Tensor | None = None
    """float32 [B, S]"""
    nucleotides_right: Tensor | None = None
    """float32 []: scored masked positions that were filled in rightly."""


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
    known: KnownOutputs | None = None,
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
    known : KnownOutputs, optional
        What is known already of what the encoder says of the batch.
    """
    with torch.autocast(batch.tokens.device.type, dtype=autocast, enabled=autocast is not None):
        output = model(batch, chunk_size=chunk_size, known=known)
    encoder = output if objective.target is None else output.base
    base = nuc = count = target = None
    predicted: dict[str, Tensor] = {}
    if batch.unifrac is not None:
        everyone = all_gather_rows(encoder.embedding, batch.rank_sizes)
        distances = unifrac_distances(encoder.embedding, everyone, encoder.offset, encoder.scale)
        base = unifrac_loss(distances, batch, objective.distance_variance)
        predicted["unifrac"] = distances.detach()
    if batch.masked_position is not None:
        nuc = nucleotide_loss(encoder.nucleotide_logits, batch)
        truth = batch.tokens.gather(1, batch.masked_position)
        right = (encoder.nucleotide_logits.detach().argmax(dim=-1) == truth) & batch.masked_scored
        predicted["nucleotides_right"] = right.sum().float()
    if objective.target is not None:
        predicted["target"] = output.target.detach()
        if batch.target is not None:
            target = target_loss(output.target, batch, objective.target)
        if batch.count_masked is not None:
            count = count_loss(output.log_abundance, batch)
            predicted["log_abundance"] = output.log_abundance.detach()
    return Losses(target=target, count=count, base=base, nuc=nuc), Predictions(**predicted)
