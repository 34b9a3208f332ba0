"""The losses, each as a sum over this worker's part and a count over all workers'.

Shape letters: B samples, G samples over all workers, S ASV slots, U distinct ASVs, K masked positions,
V vocabulary, H heads of the target, O outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from aam.batch import Batch
from aam.config import UnifracMetric
from aam.training.targets import Target


@dataclass(frozen=True)
class LossTerm:
    """Mean of a loss over all workers = sum of `sum` over the workers / `count`."""

    sum: Tensor
    """float32 []: over this worker's items."""
    count: int
    """Items of all workers."""

    @property
    def share(self) -> Tensor:
        """Share of this worker in the mean."""
        return self.sum / self.count


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Losses of a step; None for one that the run does not have."""

    target: LossTerm | None = None
    count: LossTerm | None = None
    base: LossTerm | None = None
    nuc: LossTerm | None = None
    metrics: dict[UnifracMetric, LossTerm] = dataclasses.field(default_factory=dict)
    """Of each UniFrac metric, where there are several; `base` is their mean."""

    def present(self) -> dict[str, LossTerm]:
        """The losses that exist and count in the total, by name."""
        pairs = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "metrics")
        return {name: term for name, term in pairs if term is not None}


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weight of each loss in the total; 0 for one that the run does not have."""

    target: float = 0.0
    count: float = 0.0
    base: float = 0.0
    nuc: float = 0.0

    def total(self, losses: Losses) -> Tensor:
        """Share of this worker in the weighted total."""
        shares = [getattr(self, name) * term.share for name, term in losses.present().items()]
        return torch.stack(shares).sum()

    def check(self, losses: Losses) -> None:
        """A weight without its loss, or a loss without a weight, is a fault of ours."""
        weighted = {f.name for f in dataclasses.fields(self) if getattr(self, f.name) > 0}
        assert weighted == losses.present().keys(), f"weights {weighted}, losses {losses.present().keys()}"


def unifrac_loss(predicted: Tensor, truth: Tensor, batch: Batch, variance: float) -> LossTerm:
    """Squared error over the variance of the metric: of all pairs of different samples, or of each sample.

    Parameters
    ----------
    predicted, truth : Tensor of float32
        Distances [B, G] of this worker's samples to all of the batch; of Faith's PD, [B].
    batch : Batch
        Tells which samples these are.
    variance : float
        Of the metric among the training samples.
    """
    squared = (predicted - truth).square()
    if predicted.ndim == 1:
        return LossTerm(squared.sum() / variance, batch.global_size)
    own = torch.arange(len(predicted), device=predicted.device)
    squared = squared.index_put((own, own + batch.global_rows.start), squared.new_zeros(()))
    return LossTerm(squared.sum() / variance, batch.pair_total)


def mean_term(terms: Sequence[LossTerm]) -> LossTerm:
    """The mean of several losses, counted as the first is."""
    count = terms[0].count
    return LossTerm(torch.stack([term.share for term in terms]).mean() * count, count)


def nucleotide_loss(logits_UKV: Tensor, batch: Batch) -> LossTerm:
    """Cross entropy over the masked positions that this worker scores."""
    assert batch.masked_position is not None
    assert batch.masked_scored is not None
    truth_UK = batch.tokens.long().gather(1, batch.masked_position)
    entropy_UK = F.cross_entropy(logits_UKV.float().flatten(0, 1), truth_UK.flatten(), reduction="none")
    return LossTerm((entropy_UK * batch.masked_scored.flatten()).sum(), batch.masked_total)


def count_loss(predicted_BS: Tensor, batch: Batch) -> LossTerm:
    """Huber loss of the log relative abundances that were masked."""
    assert batch.count_masked is not None
    error_BS = F.huber_loss(predicted_BS, batch.log_abundance, reduction="none")
    return LossTerm((error_BS * batch.count_masked).sum(), batch.count_total)


def target_loss(heads_BHO: Tensor, batch: Batch, target: Target) -> LossTerm:
    """Loss of the target, the mean over the heads: each learns by itself, so that their errors differ."""
    terms = [_head_loss(head_BO, batch, target) for head_BO in heads_BHO.unbind(dim=1)]
    return LossTerm(torch.stack([term.sum for term in terms]).mean(), terms[0].count)


@lru_cache
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers on a device, sent there once: to send them for each step, the host would have to wait."""
    return torch.tensor(values, device=device)


def _head_loss(predicted_BO: Tensor, batch: Batch, target: Target) -> LossTerm:
    """Cross entropy, or huber, mse, mae or mean pinball loss of the transformed number."""
    assert batch.target is not None
    if target.classes:
        weights = _constant(target.class_weights, predicted_BO.device) if target.class_weights else None
        loss_B = F.cross_entropy(predicted_BO, batch.target, weight=weights, reduction="none")
        return LossTerm(loss_B.sum(), batch.global_size)
    if target.loss == "quantile":
        quantile_O = _constant(target.quantiles, predicted_BO.device)
        error_BO = batch.target[:, None] - predicted_BO
        loss_B = torch.maximum(quantile_O * error_BO, (quantile_O - 1) * error_BO).mean(dim=1)
    else:
        function = {"huber": F.huber_loss, "mse": F.mse_loss, "mae": F.l1_loss}[target.loss]
        loss_B = function(predicted_BO.squeeze(-1), batch.target, reduction="none")
    return LossTerm(loss_B.sum(), batch.global_size)
