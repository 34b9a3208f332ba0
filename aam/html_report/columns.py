"""Columns of the metadata that are worth showing: those that explain most of the distances between samples."""

from __future__ import annotations

import numpy as np
import pandas as pd

from aam.data.metadata import numeric_column

COLOURS = 3
"""Columns of the metadata that figures of stage 1 are coloured by."""
MOST_CLASSES = 12
_ALIKE = 0.9
"""Correlation beyond which a second column would show the same figure."""


def choose_columns(frame: pd.DataFrame, matrix: np.ndarray) -> dict[str, tuple[float, np.ndarray]]:
    """The columns of a metadata frame that explain most of the distances between its samples.

    Parameters
    ----------
    frame : DataFrame
        Text or None, the samples in the order of the distances.
    matrix : ndarray [n, n]
        Distances.

    Returns
    -------
    dict
        By column, the adjusted R² and the values: float64, NaN where missing, or text, None where missing.
    """
    scored = {}
    for name in frame.columns:
        values = _values(frame, name)
        if values is not None and (share := _explained(values, matrix)) > 0:
            scored[str(name)] = (share, values)
    chosen: dict[str, tuple[float, np.ndarray]] = {}
    for name, (share, values) in sorted(scored.items(), key=lambda item: -item[1][0]):
        if len(chosen) < COLOURS and not any(_alike(values, other) for _, other in chosen.values()):
            chosen[name] = (share, values)
    return chosen


def _values(frame: pd.DataFrame, name: str) -> np.ndarray | None:
    """A column as numbers or classes; None where it is neither, or half of it is missing."""
    text = frame[name].to_numpy(dtype=object, copy=True)
    known = pd.notna(text)
    distinct = len(set(text[known]))
    if distinct < 2 or 2 * known.sum() < len(text):
        return None
    if distinct > min(MOST_CLASSES, known.sum() / 2):
        try:
            return numeric_column(frame, name, source="metadata").to_numpy(dtype=np.float64)
        except ValueError:
            return None
    text[~known] = None
    return text


def _explained(values: np.ndarray, matrix: np.ndarray) -> float:
    """Share of the squared distances that a column explains, adjusted for its number of classes (as in PERMANOVA)."""
    design, known = _design(values)
    n, terms = design.shape
    if n <= terms + 1:
        return 0.0
    squared = -0.5 * matrix[np.ix_(known, known)] ** 2
    centred = squared - squared.mean(axis=0) - squared.mean(axis=1, keepdims=True) + squared.mean()
    basis, _ = np.linalg.qr(design - design.mean(axis=0))
    share = np.trace(basis.T @ centred @ basis) / np.trace(centred)
    return float(1 - (1 - share) * (n - 1) / (n - terms - 1))


def _design(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A column as regressors [n, terms] of the samples that have a value, and which these are."""
    known = np.flatnonzero(pd.notna(values))
    if values.dtype.kind == "f":
        return values[known, None], known
    codes, names = pd.factorize(values[known])
    return np.eye(len(names))[codes][:, 1:], known


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two columns say nearly the same."""
    both = np.flatnonzero(pd.notna(one) & pd.notna(other))
    first, second = (_design(values[both])[0] for values in (one, other))
    if len(both) < 3 or min(first.shape[1], second.shape[1]) == 0:
        return False
    # The largest canonical correlations: 1 where one column follows from the other.
    bases = [np.linalg.qr(design - design.mean(axis=0))[0] for design in (first, second)]
    correlations = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)
    return bool(correlations.mean() > _ALIKE)
