"""Splits of an evaluation, grouped and stratified: K folds, each sample once a test sample, or one that is drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.model_selection import KFold, StratifiedGroupKFold, StratifiedKFold

from aam.data.split import Split, draw_split, draw_test

_ATTEMPTS = 20
"""Draws of validation samples until training samples have all the classes."""


def draw_folds(
    usable: Sequence[str],
    *,
    folds: int,
    val_fraction: float,
    seed: int,
    groups: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
) -> list[Split]:
    """Draw the split of each fold: grouped where `groups` are given, stratified where `classes` are.

    Parameters
    ----------
    usable : sequence of str
        Sample ids.
    folds : int
        How many.
    val_fraction : float
        Share of the samples outside a fold that goes to its validation.
    seed : int
        The same seed draws the same folds.
    groups, classes : sequence of str, optional
        Group and class of each sample.

    Raises
    ------
    ValueError
        Where there are too few samples, groups or members of a class.
    """
    ids, members, labels = _by_id(usable, groups, classes)
    kinds = {"samples": ids, f"groups of {len(ids)} samples": members}
    for what, values in kinds.items():
        if values is not None and len(np.unique(values)) < folds:
            raise ValueError(f"--folds {folds}: there are {len(np.unique(values))} {what} only; give fewer folds")
    fractions = {"val_fraction": val_fraction, "seed": seed}
    return [
        _with_validation(ids, held, members, labels, where=f"--folds {folds}: fold {number}", **fractions)
        for number, held in enumerate(_held_out(ids, folds, seed, members, labels), start=1)
    ]


def draw_once(
    usable: Sequence[str],
    *,
    test_fraction: float,
    val_fraction: float,
    seed: int,
    groups: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
) -> Split:
    """Draw test samples, and validation samples from the rest, as `draw_folds` does.

    Parameters
    ----------
    usable : sequence of str
        Sample ids.
    test_fraction, val_fraction : float
        Share of all samples, and of those left.
    seed : int
        The same seed draws the same samples.
    groups, classes : sequence of str, optional
        Group and class of each sample.

    Raises
    ------
    ValueError
        Where there are too few samples, groups or members of a class.
    """
    ids, members, labels = _by_id(usable, groups, classes)
    test = draw_test(usable, test_fraction=test_fraction, seed=seed, groups=groups, classes=classes)
    held, where = np.flatnonzero(np.isin(ids, test)), f"--test-fraction {test_fraction:g}"
    return _with_validation(ids, held, members, labels, where=where, val_fraction=val_fraction, seed=seed)


def _by_id(
    usable: Sequence[str], groups: Sequence[str] | None, classes: Sequence[str] | None
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Ids in their order, for that of the table must not matter, with their groups and classes."""
    order = np.argsort(np.asarray(usable))
    members, labels = (None if values is None else np.asarray(values)[order] for values in (groups, classes))
    return np.asarray(usable)[order], members, labels


def _held_out(
    ids: np.ndarray, folds: int, seed: int, members: np.ndarray | None, labels: np.ndarray | None
) -> list[np.ndarray]:
    """Rows of the test samples of each fold, ascending."""
    if labels is not None:
        kind = StratifiedKFold if members is None else StratifiedGroupKFold
        splitter = kind(n_splits=folds, shuffle=True, random_state=seed)
        try:
            found = [np.sort(held) for _, held in splitter.split(ids, labels, members)]
        except ValueError as error:
            raise ValueError(f"--folds {folds}: {str(error).rstrip('.')}; give fewer folds") from None
        if all(map(len, found)):
            return found
        # Where there are hardly more groups than folds, scikit-learn may leave a fold without any: groups alone then.
    units, unit = np.unique(ids if members is None else members, return_inverse=True)
    splitter = KFold(n_splits=folds, shuffle=True, random_state=seed)
    return [np.flatnonzero(np.isin(unit, held)) for _, held in splitter.split(units)]


def _with_validation(
    ids: np.ndarray,
    held: np.ndarray,
    members: np.ndarray | None,
    labels: np.ndarray | None,
    *,
    val_fraction: float,
    seed: int,
    where: str,
) -> Split:
    """Test samples, the rows held out; and training and validation samples, drawn from the others."""
    rows = np.setdiff1d(np.arange(len(ids)), held)
    rest = ids[rows].tolist()
    groups, classes = (None if values is None else values[rows].tolist() for values in (members, labels))
    of = {} if classes is None else dict(zip(rest, classes, strict=True))
    for attempt in range(_ATTEMPTS):
        drawn = draw_split(rest, val_fraction=val_fraction, seed=seed + 1000 * attempt, groups=groups, classes=classes)
        if {of[s] for s in drawn.val if s in of} <= {of[s] for s in drawn.train if s in of}:
            return Split(train=drawn.train, val=drawn.val, test=ids[held].tolist())
    raise ValueError(
        f"{where}: in {_ATTEMPTS} draws, the validation samples always had a class that the training samples lack; "
        "give another --seed or --val-fraction, or leave rare classes out"
    )
