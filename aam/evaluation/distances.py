"""Scores of predicted UniFrac and Faith's PD beside exact ones, and their tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from skbio import DistanceMatrix
from skbio.stats.distance import mantel

from aam.config import UnifracMetric
from aam.training.metrics import UNIFRAC_NAMES, regression_metrics

FEWEST = 4
"""Samples of a group that is scored: six pairs."""
SHOWN = {"r2": "R²", "mantel": "Mantel r", "pearson": "Pearson r", "spearman": "Spearman r", "mae": "MAE"}


@dataclass(frozen=True, kw_only=True)
class MetricScores:
    """Scores of one metric on some samples."""

    metric: UnifracMetric
    samples: int
    scores: dict[str, float]
    """Of all pairs of distances, or of one value a sample: r2, pearson, spearman, mae; mantel of distances."""
    group: str = ""
    """Value of the study column; empty for all samples."""
    unseen: bool | None = None
    """Whether no sample of the group trained the model; None where that cannot be known, or for all samples."""


@dataclass(frozen=True, kw_only=True)
class DistanceEvaluation:
    """Predicted UniFrac of unseen samples beside exact UniFrac."""

    samples: str
    """Which samples, in words."""
    rows: list[MetricScores]
    column: str | None = None
    """Metadata column of the groups."""
    caveats: list[str] = field(default_factory=list)
    """What makes the scores too good."""
    notes: list[str] = field(default_factory=list)
    command: str = ""
    """That does it again."""


def score_matrices(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Scores over all pairs of samples, each pair once; only those that are defined.

    Parameters
    ----------
    truth, predicted : ndarray of float64 [n, n]
        Distances.
    """
    pair = np.triu_indices(len(truth), k=1)
    scores = score_values(truth[pair], predicted[pair])
    if "pearson" in scores and len(truth) > 2:
        matrices = (DistanceMatrix(np.ascontiguousarray(of)) for of in (truth, predicted))
        scores["mantel"] = float(mantel(*matrices, method="pearson", permutations=0)[0])
    return scores


def score_values(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Scores of one value a sample, or a pair: those of a regression, and Pearson's correlation where it is defined."""
    scores = regression_metrics(truth, predicted)
    if len(truth) > 1 and np.ptp(truth) > 0 and np.ptp(predicted) > 0:
        scores["pearson"] = float(np.corrcoef(truth, predicted)[0, 1])
    return scores


def score_groups(
    metric: UnifracMetric,
    truth: np.ndarray,
    predicted: np.ndarray,
    groups: Sequence[str | None] | None = None,
    trained: set[str] | None = None,
) -> list[MetricScores]:
    """Scores of all samples and, where they have groups, of each group by itself: all pairs inside it.

    Parameters
    ----------
    metric : str
        Of the values.
    truth, predicted : ndarray of float64
        Distances [n, n], or Faith's PD [n].
    groups : sequence of str or None, optional
        Group of each sample; groups of fewer than `FEWEST` samples are left out.
    trained : set of str, optional
        Groups whose samples trained the model; None where that is not known.
    """
    score = score_values if truth.ndim == 1 else score_matrices
    found = [MetricScores(metric=metric, samples=len(truth), scores=score(truth, predicted))]
    for name in sorted({group for group in groups or () if group is not None}):
        rows = np.flatnonzero([group == name for group in groups or ()])
        if len(rows) >= FEWEST:
            inside = rows if truth.ndim == 1 else np.ix_(rows, rows)
            found.append(
                MetricScores(
                    metric=metric,
                    group=name,
                    samples=len(rows),
                    scores=score(truth[inside], predicted[inside]),
                    unseen=None if trained is None else name not in trained,
                )
            )
    return found


def to_json(found: DistanceEvaluation) -> dict[str, Any]:
    """As JSON types: `["metrics"]["unweighted"]["r2"]`, and by group below `["metrics"]["unweighted"]["groups"]`."""
    metrics: dict[str, Any] = {}
    for row in found.rows:
        scores = {"samples": row.samples, **row.scores}
        if not row.group:
            metrics[row.metric] = {**scores, "groups": {}}
        else:
            metrics[row.metric]["groups"][row.group] = {**scores, "unseen": row.unseen}
    return {
        "samples": found.samples,
        "study_column": found.column,
        "metrics": metrics,
        "caveats": found.caveats,
        "notes": found.notes,
        "command": found.command,
    }


def to_markdown(found: DistanceEvaluation) -> str:
    """The evaluation to read."""
    parts = [
        f"# UniFrac without a tree: {found.samples}",
        "\n\n".join(f"**{caveat}**" for caveat in found.caveats),
        _table([row for row in found.rows if not row.group], None),
        _table([row for row in found.rows if row.group], found.column),
        "\n".join(f"- {note}" for note in found.notes),
        f"```bash\n{found.command}\n```" if found.command else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_TRAINED: Mapping[bool | None, str] = {True: "unseen", False: "in training", None: "?"}


def _table(rows: Sequence[MetricScores], column: str | None) -> str:
    if not rows:
        return ""
    names = [name for name in SHOWN if any(name in row.scores for row in rows)]
    of_groups = [] if column is None else [_cell(column), ""]
    header = ["", *of_groups, "samples", *(SHOWN[name] for name in names)]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for row in rows:
        group = [] if column is None else [_cell(row.group), _TRAINED[row.unseen]]
        scores = [f"{row.scores[name]:.4g}" if name in row.scores else "-" for name in names]
        lines.append("| " + " | ".join([UNIFRAC_NAMES[row.metric], *group, str(row.samples), *scores]) + " |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("<", "&lt;")
