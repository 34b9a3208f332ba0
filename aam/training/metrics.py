"""Metrics of an epoch, computed by scikit-learn and scipy on the predictions of all workers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn import metrics as sk

from aam.batch import Batch
from aam.training.collectives import all_reduce_sum, gather_array
from aam.training.losses import Losses
from aam.training.step import Objective, Predictions
from aam.training.targets import Target


@dataclass
class EpochRecord:
    """Sums of the losses, and the predictions, of an epoch. Nothing waits for the device before the end."""

    objective: Objective
    device: torch.device
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    counts: dict[str, torch.Tensor] = field(default_factory=dict)
    kept: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    masked_total: int = 0

    def add(
        self, batch: Batch, losses: Losses, predictions: Predictions, finite: torch.Tensor | None = None
    ) -> None:
        """Add a step; one that was skipped for a non-finite loss adds nothing to the sums."""
        for name, term in losses.present().items():
            value = term.sum.detach()
            count = torch.full((), float(term.count), device=self.device)
            if finite is not None:
                value, count = torch.where(finite, value, 0.0), torch.where(finite, count, 0.0)
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts[name] + count if name in self.counts else count
        if predictions.target is not None:
            self._keep(target=predictions.target)
            if batch.target is not None:
                self._keep(target_true=batch.target)
        if predictions.unifrac is not None and batch.unifrac is not None:
            B, G = batch.unifrac.shape
            # Pairs of different samples, each once over all workers.
            i, j = torch.triu_indices(B, G, offset=batch.global_rows.start + 1, device=self.device)
            self._keep(unifrac=predictions.unifrac[i, j], unifrac_true=batch.unifrac[i, j])
        if predictions.log_abundance is not None and batch.count_masked is not None:
            self._keep(
                count=predictions.log_abundance.flatten(),
                count_true=batch.log_abundance.flatten(),
                count_masked=batch.count_masked.flatten(),
            )
        if predictions.nucleotides_right is not None:
            self._keep(right=predictions.nucleotides_right)
            self.masked_total += batch.masked_total

    def _keep(self, **tensors: torch.Tensor) -> None:
        for name, tensor in tensors.items():
            self.kept.setdefault(name, []).append(tensor)

    def losses(self) -> dict[str, float]:
        """Mean of each loss over all workers, and their weighted total."""
        totals = all_reduce_sum(torch.stack(list(self.sums.values())).double()).tolist()
        counts = torch.stack(list(self.counts.values())).tolist()
        means = {name: total / max(n, 1.0) for name, total, n in zip(self.sums, totals, counts, strict=True)}
        total = sum(getattr(self.objective.weights, name) * mean for name, mean in means.items())
        return {"total_loss": total} | {f"{name}_loss": mean for name, mean in means.items()}

    def arrays(self) -> EpochArrays:
        """Predictions and truths of all workers."""
        host = {name: torch.cat([t.reshape(-1) if name != "target" else t for t in parts]).cpu().numpy()
                for name, parts in self.kept.items()}  # fmt: skip
        found = EpochArrays()
        if "count" in host:
            masked = host.pop("count_masked")
            host["count"], host["count_true"] = host["count"][masked], host["count_true"][masked]
        if "right" in host:
            right = all_reduce_sum(torch.tensor(host.pop("right").sum(), device=self.device))
            found.nucleotide_accuracy = right.item() / self.masked_total
        for name, values in host.items():
            gathered = gather_array(values.reshape(-1), self.device)
            setattr(found, name, gathered.reshape(-1, *values.shape[1:]))
        return found


@dataclass
class EpochArrays:
    """Predictions and truths of an epoch, of all workers."""

    target: np.ndarray | None = None
    """[n, O]: as the model says them."""
    target_true: np.ndarray | None = None
    """[n]: transformed, or class codes."""
    unifrac: np.ndarray | None = None
    unifrac_true: np.ndarray | None = None
    count: np.ndarray | None = None
    count_true: np.ndarray | None = None
    nucleotide_accuracy: float | None = None

    def metrics(self, target: Target | None) -> dict[str, float]:
        """All metrics that the predictions allow, by tag; one that is not defined is absent."""
        found: dict[str, float] = {}
        if self.unifrac is not None and self.unifrac_true is not None:
            found |= _named("unifrac_", regression_metrics(self.unifrac_true, self.unifrac), ("mae", "r2"))
            spread = self.unifrac_true.std()
            if spread > 0:
                found["unifrac_std_ratio"] = float(self.unifrac.std() / spread)  # near 0: collapsed
        if self.nucleotide_accuracy is not None:
            found["nuc_accuracy"] = self.nucleotide_accuracy
        if self.count is not None and self.count_true is not None:
            values = regression_metrics(self.count_true, self.count)
            found |= _named("count_", values, ("mae", "r2"))
        if target is not None and self.target is not None and self.target_true is not None:
            if target.classes:
                found |= classification_metrics(self.target_true, class_probabilities(self.target))
            else:
                truth = target.transform.inverse(self.target_true)
                found |= regression_metrics(truth, target.transform.inverse(self.target[:, 0]))
        return found


def _named(prefix: str, values: dict[str, float], names: tuple[str, ...]) -> dict[str, float]:
    return {prefix + name: values[name] for name in names if name in values}


def class_probabilities(scores: np.ndarray) -> np.ndarray:
    """Softmax of the scores [n, classes], in float64."""
    shifted = np.exp(scores.astype(np.float64) - scores.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def regression_metrics(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """MAE, RMSE, R2 and Spearman's correlation; the last two only where they are defined."""
    truth, predicted = np.asarray(truth, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    found = {
        "mae": float(sk.mean_absolute_error(truth, predicted)),
        "rmse": float(sk.root_mean_squared_error(truth, predicted)),
    }
    if len(truth) > 1 and np.ptp(truth) > 0:
        found["r2"] = float(sk.r2_score(truth, predicted))
        if np.ptp(predicted) > 0:
            found["spearman"] = float(spearmanr(truth, predicted).statistic)
    return found


def classification_metrics(truth: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """Accuracy, balanced accuracy, macro-F1, and AUROC where every class occurs.

    Parameters
    ----------
    truth : ndarray of int [n]
        Class codes.
    probabilities : ndarray [n, classes]
    """
    predicted = probabilities.argmax(axis=1)
    present = np.unique(truth)
    found = {
        "accuracy": float(sk.accuracy_score(truth, predicted)),
        # The mean recall over the classes that occur; scikit-learn warns when others were predicted.
        "balanced_accuracy": float(
            sk.recall_score(truth, predicted, labels=present, average="macro", zero_division=0)
        ),
        "macro_f1": float(sk.f1_score(truth, predicted, average="macro", zero_division=0)),
    }
    classes = probabilities.shape[1]
    if len(present) == classes and classes > 1:
        scores = probabilities[:, 1] if classes == 2 else probabilities
        found["auroc"] = float(sk.roc_auc_score(truth, scores, multi_class="ovr"))
    return found
