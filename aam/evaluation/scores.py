"""Scores with intervals, and a model against a baseline on the same samples.

All intervals are of the percentile bootstrap over test samples; over whole groups where samples come in groups. A
resample is a row of weights: how often each sample was drawn. So a score of all resamples is a matrix product.

R resamples, N test samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import binomtest, wilcoxon

from aam.training.metrics import classification_metrics, regression_metrics

RESAMPLES = 2000
LEAST_UNITS = 6
"""Groups, or samples on their own, below which a model is never told apart: all of five are better in one of 16 draws
where neither is, and the bootstrap would always call that a difference."""
_LEVEL = (2.5, 97.5)


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Test samples that are scored."""

    ids: list[str]
    truth: np.ndarray
    """[N] float64, or int64: codes of the classes."""
    classes: tuple[str, ...] = ()
    groups: np.ndarray | None = None
    """[N] names; None for samples on their own."""
    folds: dict[int, np.ndarray] = field(default_factory=dict)
    """Repeat to the fold of each sample [N]; empty where there is one split."""

    @property
    def main_metric(self) -> str:
        """What a model and a baseline are compared by."""
        return "macro_f1" if self.classes else "mae"

    @property
    def units(self) -> int:
        """What is drawn in a resample: groups, or samples on their own."""
        return len(self.ids) if self.groups is None else len(np.unique(self.groups))

    def weights(self, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
        """How often each sample is in each resample: float64 [R, N]."""
        _, unit = np.unique(np.arange(len(self.ids)) if self.groups is None else self.groups, return_inverse=True)
        units = self.units
        drawn = np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), size=resamples)
        return drawn[:, unit].astype(np.float64)

    def scores(self, said: np.ndarray, among: np.ndarray | None = None) -> dict[str, float]:
        """The metrics of the project, of numbers [N] or probabilities [N, classes]; of all samples, or of `among`."""
        metrics = classification_metrics if self.classes else regression_metrics
        return metrics(self.truth, said) if among is None else metrics(self.truth[among], said[among])

    def resampled(self, said: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Those metrics that sums give, of each resample: [R], NaN where one is not defined."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self._class_scores(said, weights) if self.classes else self._number_scores(said, weights)

    def _number_scores(self, said: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
        error, total = said - self.truth, weights.sum(axis=1)
        squares = weights @ error**2
        about = self.truth - self.truth.mean()  # no digits are lost to a large mean
        variation = weights @ about**2 - (weights @ about) ** 2 / total
        is_constant = variation <= 1e-12 * (weights @ about**2)
        return {
            "mae": weights @ np.abs(error) / total,
            "rmse": np.sqrt(squares / total),
            "r2": np.where(is_constant, np.nan, 1 - squares / variation),
        }

    def _class_scores(self, said: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
        codes = np.arange(len(self.classes))
        is_true = (self.truth[:, None] == codes).astype(np.float64)
        is_said = (said.argmax(axis=1)[:, None] == codes).astype(np.float64)
        right, true, called = weights @ (is_true * is_said), weights @ is_true, weights @ is_said
        return {
            "accuracy": right.sum(axis=1) / weights.sum(axis=1),
            "balanced_accuracy": np.nanmean(right / true, axis=1),
            "macro_f1": np.nanmean(np.where(true > 0, 2 * right / (true + called), np.nan), axis=1),
        }


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of a model, or of a baseline: means over its runs."""

    mean: dict[str, float]
    spread: dict[str, float]
    """Standard deviation over the runs; empty for one."""
    runs: list[dict[str, float]]
    interval: dict[str, tuple[float, float]]
    """95 % over test samples, of the mean over the runs."""
    fold_mean: dict[str, float]
    """Mean over folds, each scored by itself, as cross-validation is often told: of scores that all folds have, one of
    too few samples or classes not. Empty where there is one split."""
    fold_spread: dict[str, float]
    """Standard deviation over the folds of all repeats, of each the mean over the seeds."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A model less a baseline, by the main metric."""

    difference: float
    interval: tuple[float, float]
    better_share: float
    """Share of the resamples in which the model is better; a tie counts half."""
    test: str
    p_value: float


def score(samples: Samples, runs: list[np.ndarray], weights: np.ndarray, repeats: Sequence[int] = ()) -> Scores:
    """Score the runs of a model, each of all samples.

    Parameters
    ----------
    samples : Samples
        What was predicted.
    runs : list of ndarray
        Of each run: numbers [N], or probabilities [N, classes].
    weights : ndarray [R, N]
        Resamples.
    repeats : sequence of int
        Repeat of each run, where samples have folds.
    """
    found = [samples.scores(said) for said in runs]
    mean = mean_scores(found)
    single = []
    for repeat, folds in samples.folds.items():
        of_seeds = [said for said, of in zip(runs, repeats, strict=True) if of == repeat]
        single += [mean_scores([samples.scores(said, folds == fold) for said in of_seeds]) for fold in np.unique(folds)]
    fold_mean = mean_scores(single)
    return Scores(
        mean=mean,
        spread=_spread(found, mean),
        runs=found,
        fold_mean=fold_mean,
        fold_spread=_spread(single, fold_mean),
        interval={
            name: interval
            for name, values in _mean_resampled(samples, runs, weights).items()
            if name in mean and (interval := _interval(values)) is not None
        },
    )


def mean_scores(found: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each score over runs; of those that all runs have."""
    shared = [name for name in (found[0] if found else ()) if all(name in scores for scores in found)]
    return {name: float(np.mean([scores[name] for scores in found])) for name in shared}


def _spread(found: list[dict[str, float]], names: Iterable[str]) -> dict[str, float]:
    return {name: float(np.std([scores[name] for scores in found], ddof=1)) for name in names if len(found) > 1}


def compare(samples: Samples, model: list[np.ndarray], baseline: list[np.ndarray], weights: np.ndarray) -> Comparison:
    """Compare the runs of a model with those of a baseline, sample by sample.

    Parameters
    ----------
    samples, weights
        As for `score`.
    model, baseline : list of ndarray
        Their runs.
    """
    name = samples.main_metric
    both = [_mean_resampled(samples, runs, weights)[name] for runs in (model, baseline)]
    points = [float(np.mean([samples.scores(said)[name] for said in runs])) for runs in (model, baseline)]
    differences = both[0] - both[1]
    gain = differences if samples.classes else -differences
    interval = _interval(differences)
    assert interval is not None, "MAE and macro-F1 are always defined"
    test, p_value = (_mcnemar if samples.classes else _signed_rank)(samples.truth, model, baseline)
    return Comparison(
        difference=points[0] - points[1],
        interval=interval,
        better_share=float(np.mean((gain > 0) + 0.5 * (gain == 0))),
        test=test,
        p_value=p_value,
    )


def _mean_resampled(samples: Samples, runs: list[np.ndarray], weights: np.ndarray) -> dict[str, np.ndarray]:
    """Mean of the scores of the runs, of each resample."""
    found = [samples.resampled(said, weights) for said in runs]
    return {name: np.mean([scores[name] for scores in found], axis=0) for name in found[0]}


def _interval(values: np.ndarray) -> tuple[float, float] | None:
    if np.isnan(values).all():
        return None
    low, high = np.nanpercentile(values, _LEVEL)
    return float(low), float(high)


def _signed_rank(truth: np.ndarray, model: list[np.ndarray], baseline: list[np.ndarray]) -> tuple[str, float]:
    """Wilcoxon's test on the absolute errors, each the mean over the runs."""
    name = "Wilcoxon signed-rank"
    errors = [np.mean([np.abs(said - truth) for said in runs], axis=0) for runs in (model, baseline)]
    if np.array_equal(*errors):
        return name, 1.0
    return name, float(wilcoxon(*errors).pvalue)  # pyright: ignore[reportAttributeAccessIssue]


def _mcnemar(truth: np.ndarray, model: list[np.ndarray], baseline: list[np.ndarray]) -> tuple[str, float]:
    """Exact test on the samples that one has right and the other wrong, in most of its runs."""
    name = "exact McNemar, of accuracy"
    right = [np.sign(np.mean([said.argmax(axis=1) == truth for said in r], axis=0) - 0.5) for r in (model, baseline)]
    won, lost = int((right[0] > right[1]).sum()), int((right[0] < right[1]).sum())
    return name, 1.0 if won + lost == 0 else float(binomtest(won, won + lost, 0.5).pvalue)
