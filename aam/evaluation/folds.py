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
    order = np.argsort(np.asarray(usable))  # the order of the table must not matter
    ids = np.asarray(usable)[order]
    members = None if groups is None else np.asarray(groups)[order]
    labels = None if classes is None else np.asarray(classes)[order]
    kinds = {"samples": ids, f"groups of {len(ids)} samples": members}
    for what, values in kinds.items():
        if values is not None and len(np.unique(values)) < folds:
            raise ValueError(f"--folds {folds}: there are {len(np.unique(values))} {what} only; give fewer folds")
    splits = []
    for number, held in enumerate(_held_out(ids, folds, seed, members, labels), start=1):
        rest = np.setdiff1d(np.arange(len(ids)), held)
        drawn = _draw_validation(
            ids[rest].tolist(),
            val_fraction,
            seed,
            None if members is None else members[rest].tolist(),
            None if labels is None else labels[rest].tolist(),
        )
        if drawn is None:
            raise ValueError(
                f"--folds {folds}: fold {number}: in {_ATTEMPTS} draws, the validation samples always had a class that "
                "the training samples lack; give another --seed or --val-fraction, or leave rare classes out"
            )
        splits.append(Split(train=drawn.train, val=drawn.val, test=ids[held].tolist()))
    return splits


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
    test = draw_test(usable, test_fraction=test_fraction, seed=seed, groups=groups, classes=classes)
    held = set(test)
    rest = [i for i, sample in enumerate(usable) if sample not in held]
    drawn = _draw_validation(
        [usable[i] for i in rest],
        val_fraction,
        seed,
        None if groups is None else [groups[i] for i in rest],
        None if classes is None else [classes[i] for i in rest],
    )
    if drawn is None:
        raise ValueError(
            f"--test-fraction {test_fraction:g}: in {_ATTEMPTS} draws, the validation samples always had a class that "
            "the training samples lack; give another --seed or --val-fraction, or leave rare classes out"
        )
    return Split(train=drawn.train, val=drawn.val, test=test)


def _held_out(
    ids: np.ndarray, folds: int, seed: int, members: np.ndarray | None, labels: np.ndarray | None
) -> list[np.ndarray]:
    """Rows of the test samples of each fold, ascending."""
    if labels is not None:
        kind = StratifiedKFold if members is None else StratifiedGroupKFold
        splitter = kind(n_splits=folds, shuffle=True, random_state=seed)
        try:
            return [np.sort(held) for _, held in splitter.split(ids, labels, members)]
        except ValueError as error:
            raise ValueError(f"--folds {folds}: {str(error).rstrip('.')}; give fewer folds") from None
    units, unit = np.unique(ids if members is None else members, return_inverse=True)
    splitter = KFold(n_splits=folds, shuffle=True, random_state=seed)
    return [np.flatnonzero(np.isin(unit, held)) for _, held in splitter.split(units)]


def _draw_validation(
    rest: list[str], val_fraction: float, seed: int, groups: list[str] | None, classes: list[str] | None
) -> Split | None:
    """Training and validation samples; none where validation always has a class that training lacks."""
    of = {} if classes is None else dict(zip(rest, classes, strict=True))
    for attempt in range(_ATTEMPTS):
        drawn = draw_split(rest, val_fraction=val_fraction, seed=seed + 1000 * attempt, groups=groups, classes=classes)
        if {of[s] for s in drawn.val if s in of} <= {of[s] for s in drawn.train if s in of}:
            return drawn
    return None
