"""Training, validation and test samples: read from id files, or drawn once, grouped and stratified."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from aam.data.files import Kind, decode, file_kind, some
from aam.data.metadata import is_id_header

_EXPECTED = "a text file of sample ids, one a line"
_GROUPED_DRAWS = 10
"""Splits by group that are drawn, to keep the one whose sizes come out best. With many more, all seeds would
end at the same split of a few groups."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Sample ids of each part; no id is in two parts."""

    train: list[str]
    val: list[str]
    test: list[str] = field(default_factory=list)
    notes: tuple[str, ...] = ()


def describe_dropped(dropped: dict[str, str]) -> list[str]:
    """Say how many samples were dropped, one text for each reason; `dropped` is sample id to reason."""
    by_reason: dict[str, list[str]] = {}
    for sample, reason in dropped.items():
        by_reason.setdefault(reason, []).append(sample)
    return [
        f"{len(ids)} sample{'s' if len(ids) > 1 else ''} dropped: {reason} ({some(ids)})"
        for reason, ids in by_reason.items()
    ]


def read_ids(path: Path) -> list[str]:
    """Sample ids of a file, one a line; of a table with tabs, such as QIIME 2 metadata, its first column.

    Raises
    ------
    ValueError
        For a missing or empty file, or an id that stands in it twice.
    """
    kind = file_kind(path, _EXPECTED)
    if kind not in (Kind.TABBED, Kind.TEXT):
        raise ValueError(f"{path}: expected {_EXPECTED}, found {kind}")
    lines = decode(path.read_bytes(), path).splitlines()
    ids = [cell for line in lines if (cell := line.split("\t")[0].strip())]
    if ids and is_id_header(ids[0]):
        ids = ids[1:]
    if not ids:
        raise ValueError(f"{path}: expected {_EXPECTED}, found none")
    repeated = [name for name, times in Counter(ids).items() if times > 1]
    if repeated:
        raise ValueError(f"{path}: ids stand in it twice: {some(repeated)}; a sample counts once")
    return ids


def split_from_files(
    files: dict[str, Path | None], usable: Sequence[str], dropped: dict[str, str], *, only_kept_out: bool = False
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
    only_kept_out : bool
        Of the test samples nothing is asked but to be in no other part: all of them may be such that cannot be used.

    Raises
    ------
    ValueError
        For an id that the table does not have, that is in two files, or a part with nothing left.
    """
    known = set(usable)
    owner: dict[str, str] = {}
    parts: dict[str, list[str]] = {}
    notes = []
    for part, path in files.items():
        ids = [] if path is None else read_ids(path)
        unknown = [i for i in ids if i not in known and i not in dropped]
        if unknown:
            raise ValueError(
                f"{path}: {len(unknown)} of {len(ids)} ids are not in the table: {some(unknown)}; "
                f"the table's ids look like {', '.join(usable[:3])}"
            )
        twice = [i for i in ids if i in owner]
        if twice:
            raise ValueError(
                f"{path}: ids that --{owner[twice[0]]}-ids lists too: {some(twice)}; a sample has one part"
            )
        owner.update(dict.fromkeys(ids, part))
        parts[part] = [i for i in ids if i in known]
        lost = [i for i in ids if i not in known]
        if lost:
            notes += [f"--{part}-ids: {text}" for text in describe_dropped({i: dropped[i] for i in lost})]
        if ids and not parts[part] and not (only_kept_out and part == "test"):
            raise ValueError(
                f"{path}: none of its {len(ids)} samples can be used, the first: {lost[0]} ({dropped[lost[0]]})"
            )
    unlisted = len(known - owner.keys())
    if unlisted and files["train"] is not None:
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
        Share of the samples, and of each class, that goes to validation; by groups, as near as those allow.
    seed : int
        The same seed draws the same split.
    groups, classes : sequence of str, optional
        Group and class of each sample.

    Raises
    ------
    ValueError
        Where there are too few samples, groups or members of a class.
    """
    try:
        train, val = _draw(usable, val_fraction, seed, groups, classes)
    except ValueError as error:
        raise ValueError(
            f"cannot draw a validation split (--val-fraction {val_fraction:g}) of {len(usable)} samples: "
            f"{error}; change the fraction, or list the samples by --train-ids and --val-ids"
        ) from None
    return Split(train=train, val=val)


def draw_test(
    sample_ids: Sequence[str],
    *,
    test_fraction: float,
    seed: int,
    groups: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
) -> list[str]:
    """Draw test samples, whole groups where those are given, stratified where classes are.

    What is drawn does not depend on their order. Who draws from all samples of a table, without classes, gets the same
    in each stage, whatever that stage drops afterwards.

    Parameters
    ----------
    sample_ids : sequence of str
        Samples to draw from.
    test_fraction : float
        Share of them; by groups, as near as those allow.
    seed : int
        The same seed draws the same samples.
    groups, classes : sequence of str, optional
        Group and class of each sample.

    Raises
    ------
    ValueError
        Where there are too few samples or groups.
    """
    try:
        return _draw(sample_ids, test_fraction, seed, groups, classes)[1]
    except ValueError as error:
        raise ValueError(
            f"cannot draw test samples (--test-fraction {test_fraction:g}) of {len(sample_ids)} samples: {error}; "
            "change the fraction, or list the samples by --test-ids"
        ) from None


def _draw(
    sample_ids: Sequence[str],
    share: float,
    seed: int,
    groups: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
) -> tuple[list[str], list[str]]:
    """Samples that stay and those drawn, sorted."""
    # Here and not above: it takes a second, which the processes that only train should not.
    from sklearn.model_selection import GroupShuffleSplit, ShuffleSplit, StratifiedShuffleSplit

    order = np.argsort(np.asarray(sample_ids))  # the order of the table must not matter
    ids = np.asarray(sample_ids)[order]
    labels = None if classes is None else np.asarray(classes)[order]
    members = None if groups is None else np.asarray(groups)[order]
    if labels is not None and members is None:
        # A class of one sample stays: it cannot be on both sides, and what is drawn could not be known from the rest.
        names, codes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
        alone = sizes[codes] == 1
        if len(names) > 1 and 0 < alone.sum() < len(ids):
            stay, drawn = _draw(ids[~alone].tolist(), share, seed, classes=labels[~alone].tolist())
            return sorted([*stay, *ids[alone].tolist()]), drawn
    if members is not None and len(set(members)) < 2:
        raise ValueError(f"--group-column has one group only ({members[0]}): nothing to hold out")
    if members is not None:
        splitter = GroupShuffleSplit(n_splits=_GROUPED_DRAWS, test_size=share, random_state=seed)
    elif labels is not None:
        splitter = StratifiedShuffleSplit(n_splits=1, test_size=share, random_state=seed)
    else:
        splitter = ShuffleSplit(n_splits=1, test_size=share, random_state=seed)
    _, codes = np.unique(np.zeros(len(ids)) if labels is None else labels, return_inverse=True)
    wanted = share * np.bincount(codes)

    def unevenness(parts: tuple[np.ndarray, np.ndarray]) -> tuple[int, float]:
        stay, drawn = (np.bincount(codes[part], minlength=len(wanted)) for part in parts)
        return int((stay == 0).sum()), float(np.abs(drawn - wanted).sum())

    try:
        # Groups differ in size and in what they hold: a single draw may be far from the share asked for, or take all
        # that there is of a class, which nobody could learn then.
        stay, drawn = min(splitter.split(ids, labels, members), key=unevenness)
    except ValueError as error:
        raise ValueError(str(error).rstrip(".")) from None
    return ids[np.sort(stay)].tolist(), ids[np.sort(drawn)].tolist()
