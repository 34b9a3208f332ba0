"""Training, validation and test samples: read from id files, or drawn once, grouped and stratified."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from sklearn.model_selection import GroupShuffleSplit, ShuffleSplit, StratifiedGroupKFold, StratifiedShuffleSplit


@dataclass(frozen=True, kw_only=True)
class Split:
    """Sample ids of each part; no id is in two parts."""

    train: list[str]
    val: list[str]
    test: list[str] = field(default_factory=list)
    notes: tuple[str, ...] = ()


def name_some(ids: Sequence[str], limit: int = 5) -> str:
    """The first few ids, and how many there are beyond."""
    more = f" and {len(ids) - limit} more" if len(ids) > limit else ""
    return ", ".join(ids[:limit]) + more


def read_ids(path: Path) -> list[str]:
    """Sample ids of a file, one a line (only its first column, if there are tabs).

    Raises
    ------
    ValueError
        For a missing or empty file, or an id that stands in it twice.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file of sample ids")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file of sample ids, one a line") from None
    ids = [line.split("\t")[0].strip() for line in lines if line.strip()]
    if not ids:
        raise ValueError(f"{path}: holds no sample id")
    repeated = sorted({i for i in ids if ids.count(i) > 1}) if len(set(ids)) < len(ids) else []
    if repeated:
        raise ValueError(f"{path}: ids stand in it twice: {name_some(repeated)}")
    return ids


def split_from_files(
    files: dict[str, Path | None], usable: Sequence[str], dropped: dict[str, str]
) -> Split:
    """Split by id files.

    Parameters
    ----------
    files : dict
        `train`, `val` and `test` to their files; None for a part that is not there.
    usable : sequence of str
        Samples that can be used.
    dropped : dict
        Samples of the table that cannot, and why; those are left out and said in the notes.

    Raises
    ------
    ValueError
        For an id that the table does not have, that is in two files, or a part with nothing left.
    """
    known, owner, parts, notes = set(usable), {}, {}, []
    for part, path in files.items():
        ids = [] if path is None else read_ids(path)
        unknown = [i for i in ids if i not in known and i not in dropped]
        if unknown:
            raise ValueError(
                f"{path}: {len(unknown)} of {len(ids)} ids are not in the table: {name_some(unknown)}; "
                f"the table's ids look like {name_some(list(usable), 3)}"
            )
        twice = [i for i in ids if i in owner]
        if twice:
            raise ValueError(f"{path}: {name_some(twice)} also in the {owner[twice[0]]} ids; a sample has one part")
        owner.update(dict.fromkeys(ids, part))
        parts[part] = [i for i in ids if i in known]
        lost = [i for i in ids if i not in known]
        if lost:
            notes.append(f"{part}: {len(lost)} of {len(ids)} listed samples dropped: " + name_some(
                [f"{i} ({dropped[i]})" for i in lost]))
        if ids and not parts[part]:
            raise ValueError(f"{path}: none of its samples can be used, the first: {lost[0]} ({dropped[lost[0]]})")
    unlisted = len(known - owner.keys())
    if unlisted:
        notes.append(f"{unlisted} usable samples are in no id file and stay unused")
    return Split(train=parts["train"], val=parts["val"], test=parts.get("test", []), notes=tuple(notes))


def draw_split(
    usable: Sequence[str],
    *,
    val_fraction: float,
    seed: int,
    groups: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
) -> Split:
    """Draw a split: grouped where `groups` are given, stratified where `classes` are.

    Parameters
    ----------
    usable : sequence of str
        Sample ids.
    val_fraction : float
        Share of the samples (of the groups) that go to validation.
    seed : int
        The same seed draws the same split.
    groups, classes : sequence of str, optional
        Group and class of each sample.

    Raises
    ------
    ValueError
        Where there are too few samples, groups or members of a class.
    """
    order = np.argsort(np.asarray(usable))  # the order of the table must not matter
    ids = np.asarray(usable)[order]
    labels = None if classes is None else np.asarray(classes)[order]
    members = None if groups is None else np.asarray(groups)[order]
    if members is not None and len(set(members)) < 2:
        raise ValueError(f"--group-column has one group only ({members[0]}): nothing to hold out")
    if members is not None and labels is not None:
        folds = min(max(2, round(1 / val_fraction)), len(set(members)))
        splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed)
    elif members is not None:
        splitter = GroupShuffleSplit(n_splits=1, test_size=val_fraction, random_state=seed)
    elif labels is not None:
        splitter = StratifiedShuffleSplit(n_splits=1, test_size=val_fraction, random_state=seed)
    else:
        splitter = ShuffleSplit(n_splits=1, test_size=val_fraction, random_state=seed)
    try:
        train, val = next(iter(splitter.split(ids, labels, members)))
    except ValueError as error:
        raise ValueError(f"cannot draw a validation split of {val_fraction:g}: {error}") from None
    return Split(train=ids[np.sort(train)].tolist(), val=ids[np.sort(val)].tolist())
