"""Metrics of an epoch, computed by scikit-learn and scipy on the predictions of all workers.

Those two take a second to import, which processes that compute no metrics should not: the functions do it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch

from aam.batch import Batch
from aam.config import UnifracMetric
from aam.training.collectives import all_reduce_sum, gather_array, world_size
from aam.training.losses import Losses
from aam.training.step import Objective, Predictions
from aam.training.targets import Target

UNIFRAC_TAGS: dict[UnifracMetric, str] = {
    "unweighted": "unifrac",
    "weighted": "weighted_unifrac",
    "faith_pd": "faith_pd",
}
"""How the tags of a metric's losses and scores begin."""
UNIFRAC_NAMES: dict[UnifracMetric, str] = {
    "unweighted": "unweighted UniFrac",
    "weighted": "weighted UniFrac",
    "faith_pd": "Faith's PD",
}


@dataclass
class EpochRecord:
    """Sums of the losses, and the predictions, of an epoch. Nothing waits for the device before the end.

    Parameters
    ----------
    objective : Objective
        Weights of the total.
    device : torch.device
        Of this worker.
    """

    objective: Objective
    device: torch.device
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    counts: dict[str, torch.Tensor] = field(default_factory=dict)
    kept: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    masked_total: int = 0

    def add(self, batch: Batch, losses: Losses, predictions: Predictions, finite: torch.Tensor | None = None) -> None:
        """Add a step.

        Parameters
        ----------
        batch : Batch
            On the device.
        losses, predictions : Losses, Predictions
            Of the step.
        finite : Tensor of bool [], optional
            False where the loss was not finite on this worker, which then adds nothing to the sums.
        """
        beside = {UNIFRAC_TAGS[metric]: term for metric, term in losses.metrics.items()}
        for name, term in (losses.present() | beside).items():
            value = term.sum.detach().double()  # float32 does not count beyond 2 ** 24 nucleotides
            count = torch.full((), term.count, dtype=torch.float64, device=self.device)
            if finite is not None:
                value, count = torch.where(finite, value, 0.0), torch.where(finite, count, 0.0)
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts[name] + count if name in self.counts else count
        if predictions.target is not None:
            self._keep(target=predictions.target)
            if batch.target is not None:
                self._keep(target_true=batch.target)
        for metric, predicted in predictions.unifrac.items():
            truth, tag = getattr(batch, metric), UNIFRAC_TAGS[metric]
            if truth.ndim == 2:
                # Pairs of different samples, each once over all workers.
                i, j = torch.triu_indices(*truth.shape, offset=batch.global_rows.start + 1, device=self.device)
                predicted, truth = predicted[i, j], truth[i, j]
            self._keep(**{tag: predicted, f"{tag}_true": truth})
        if predictions.log_abundance is not None and batch.count_masked is not None:
            self._keep(
                count=predictions.log_abundance.flatten(),
                count_true=batch.log_abundance.flatten(),
                count_masked=batch.count_masked.flatten(),
            )
        if predictions.nucleotides_right is not None:
            self._keep(right=predictions.nucleotides_right[None])
            self.masked_total += batch.masked_total

    def _keep(self, **tensors: torch.Tensor) -> None:
        for name, tensor in tensors.items():
            self.kept.setdefault(name, []).append(tensor)

    def losses(self) -> dict[str, float]:
        """Mean of each loss over all workers, and their weighted total; absent where no step was finite."""
        totals = all_reduce_sum(torch.stack(list(self.sums.values()))).tolist()
        # A step's count is that of all workers, and each has added it, save those whose share was not finite.
        counts = (all_reduce_sum(torch.stack(list(self.counts.values()))) / world_size()).tolist()
        if min(counts) == 0:
            return {}
        means = {name: total / n for name, total, n in zip(self.sums, totals, counts, strict=True)}
        weights = {f.name: getattr(self.objective.weights, f.name) for f in fields(self.objective.weights)}
        total = sum((weights[name] * mean for name, mean in means.items() if name in weights), 0.0)
        return {"total_loss": total} | {f"{name}_loss": mean for name, mean in means.items()}

    def arrays(self) -> EpochArrays:
        """Predictions and truths of all workers."""
        host = {name: torch.cat(parts).cpu().numpy() for name, parts in self.kept.items()}
        found = EpochArrays()
        if "count" in host:
            masked = host.pop("count_masked")
            host["count"], host["count_true"] = host["count"][masked], host["count_true"][masked]
        if "right" in host:
            own = torch.tensor(host.pop("right").sum(dtype=np.float64), device=self.device)
            found.nucleotide_accuracy = all_reduce_sum(own).item() / self.masked_total
        for name, values in host.items():
            gathered = gather_array(values.reshape(-1), self.device)
            host[name] = gathered.reshape(-1, *values.shape[1:])
        for metric, tag in UNIFRAC_TAGS.items():
            if tag in host:
                found.unifrac[metric] = Scored(predicted=host.pop(tag), truth=host.pop(f"{tag}_true"))
        return replace(found, **host)


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Predictions and truth [n] of one quantity."""

    predicted: np.ndarray
    truth: np.ndarray


@dataclass
class EpochArrays:
    """Predictions and truths of an epoch, of all workers."""

    target: np.ndarray | None = None
    """[n, O]: as the model says them."""
    target_true: np.ndarray | None = None
    """[n]: transformed, or class codes."""
    unifrac: dict[UnifracMetric, Scored] = field(default_factory=dict)
    """Of pairs of samples that were in a batch together; of Faith's PD, of samples."""
    count: np.ndarray | None = None
    count_true: np.ndarray | None = None
    nucleotide_accuracy: float | None = None

    def metrics(self, target: Target | None) -> dict[str, float]:
        """All metrics that the predictions allow, by tag; one that is not defined is absent."""
        found: dict[str, float] = {}
        for metric, scored in self.unifrac.items():
            truth, predicted = _finite_rows(scored.truth, scored.predicted)
            found |= _named(f"{UNIFRAC_TAGS[metric]}_", regression_metrics(truth, predicted), ("mae", "r2"))
            if len(truth) > 1 and np.ptp(truth) > 0:
                ratio = float(predicted.std() / truth.std())  # near 0: collapsed
                found[f"{UNIFRAC_TAGS[metric]}_std_ratio"] = ratio
        if self.nucleotide_accuracy is not None:
            found["nuc_accuracy"] = self.nucleotide_accuracy
        if self.count is not None and self.count_true is not None:
            values = regression_metrics(*_finite_rows(self.count_true, self.count))
            found |= _named("count_", values, ("mae", "r2"))
        if target is not None and self.target is not None and self.target_true is not None:
            truth, predicted = _finite_rows(self.target_true, self.target)
            if target.classes:
                found |= classification_metrics(truth, class_probabilities(predicted))
            else:
                truth, values = target.transform.inverse(truth), target.decode(predicted)
                found |= regression_metrics(truth, values[:, target.point])
                if target.beside and len(truth):
                    inside = (values[:, 0] <= truth) & (truth <= values[:, -1])
                    found["interval_coverage"] = float(inside.mean())
        return found


def _finite_rows(truth: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Those that can be scored: a step that was skipped for a non-finite loss has left others."""
    finite = np.isfinite(predicted.reshape(len(predicted), -1)).all(axis=1)
    return truth[finite], predicted[finite]


def _named(prefix: str, values: dict[str, float], names: tuple[str, ...]) -> dict[str, float]:
    return {prefix + name: values[name] for name in names if name in values}


def class_probabilities(scores: np.ndarray) -> np.ndarray:
    """Softmax of the scores [n, classes], in float64."""
    shifted = np.exp(scores.astype(np.float64) - scores.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def regression_metrics(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """MAE, RMSE, R2 and Spearman's correlation; each only where it is defined.

    Parameters
    ----------
    truth, predicted : ndarray [n]
        In the same units.
    """
    from scipy.stats import spearmanr
    from sklearn import metrics as sk

    truth, predicted = np.asarray(truth, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    if len(truth) == 0:
        return {}
    found = {
        "mae": float(sk.mean_absolute_error(truth, predicted)),
        "rmse": float(sk.root_mean_squared_error(truth, predicted)),
    }
    if len(truth) > 1 and np.ptp(truth) > 0:
        found["r2"] = float(sk.r2_score(truth, predicted))
        if np.ptp(predicted) > 0:
            found["spearman"] = float(spearmanr(truth, predicted)[0])  # pyright: ignore[reportArgumentType]
    return found


def classification_metrics(truth: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """Accuracy, balanced accuracy, macro-F1, and AUROC where every class occurs.

    Balanced accuracy and macro-F1 are means over the classes that occur among these samples: one that is said once, and
    is none of theirs, takes its share of precision from no class, and would be an F1 of 0 among few.

    Parameters
    ----------
    truth : ndarray of int [n]
        Class codes.
    probabilities : ndarray [n, classes]
    """
    from sklearn import metrics as sk

    if len(truth) == 0:
        return {}
    predicted = probabilities.argmax(axis=1)
    present = np.unique(truth)
    recall = sk.recall_score(truth, predicted, labels=present, average="macro")
    macro_f1 = sk.f1_score(truth, predicted, labels=present, average="macro")
    found = {
        "accuracy": float(sk.accuracy_score(truth, predicted)),
        "balanced_accuracy": float(recall),
        "macro_f1": float(macro_f1),
    }
    classes = probabilities.shape[1]
    if len(present) == classes and classes > 1:
        scores = probabilities[:, 1] if classes == 2 else probabilities
        found["auroc"] = float(sk.roc_auc_score(truth, scores, multi_class="ovr"))
    return found
