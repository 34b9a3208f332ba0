"""Which samples a run uses, and for what; which it drops, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pandas as pd

from aam.config import PretrainConfig, RunConfig, TrainConfig
from aam.data.dataset import PreparedDataset
from aam.data.files import some
from aam.data.metadata import numeric_column, read_metadata, text_column
from aam.data.split import Split, describe_dropped, draw_split, draw_test, split_from_files


def choose_samples(config: RunConfig, dataset: PreparedDataset, depth: int) -> tuple[Split, dict[str, Any], list[str]]:
    """Drop the samples that the run cannot use, and split the others.

    Parameters
    ----------
    config : PretrainConfig or TrainConfig
        Settings.
    dataset : PreparedDataset
        Holds the samples.
    depth : int
        Reads that a sample must have.

    Returns
    -------
    split : Split
        Samples to train on, to validate, and kept back.
    targets : dict
        Target of each sample that has one, in its own units; empty in stage 1.
    notes : list of str
        What was dropped and why, from reading the table onwards.

    Raises
    ------
    ValueError
        Where nothing is left, or the metadata or the id files do not fit.
    """
    dropped = _too_shallow(dataset, depth)
    dropped |= _not_in_metadata(config, dataset, dropped)
    targets: dict[str, Any] = {}
    if isinstance(config, TrainConfig):
        targets, without = _targets(config, dataset, dropped)
        dropped |= without
    split = _split(config, dataset, dropped, targets)
    used = {config.data.group_column, config.loss.target if isinstance(config, TrainConfig) else None}
    read = [note for note in dataset.manifest["notes"] if not _about_other_column(note, used)]
    return split, targets, [*read, *describe_dropped(dropped), *split.notes]


def groups_of_labelled(
    config: TrainConfig, dataset: PreparedDataset, split: Split
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Which training and validation samples belong together, for folds of them.

    By `--group-column`; without it, a group of its own each, unless the samples are listed in files that keep the
    values of a column of the metadata apart.

    Parameters
    ----------
    config : TrainConfig
        Settings.
    dataset : PreparedDataset
        Holds the samples.
    split : Split
        What was chosen of them.

    Returns
    -------
    groups : dict of str
        Group of each of them.
    notes : tuple of str
        What was found out, in words, where nobody says.

    Raises
    ------
    ValueError
        Where the column lacks one of them.
    """
    labelled = [*split.train, *split.val]
    if config.data.group_column is not None:
        return dict(zip(labelled, _groups(config, dataset, labelled), strict=True)), ()
    if config.data.train_ids is None:
        return {s: s for s in labelled}, ()
    columns = _kept_apart(_metadata(dataset, "--target").drop(columns=str(config.loss.target)), split)
    way_out = "--group-column names another, --ensemble-folds 0 does without folds"
    if not columns:
        return {s: s for s in labelled}, (
            "folds of the ensemble take each sample for itself: the id files keep no column of the metadata apart; "
            + way_out,
        )
    # The coarsest: who splits by family splits by person too.
    name, groups = min(columns.items(), key=lambda column: len(set(column[1].values())))
    return groups, (
        f"folds of the ensemble keep the {len(set(groups.values()))} values of {name!r} together, as the id files do; "
        + way_out,
    )


def _kept_apart(metadata: pd.DataFrame, split: Split) -> dict[str, dict[str, str]]:
    """Columns in which no value is in two parts of the split, by sample, of the labelled samples.

    There are two samples or more a value on average. A column of which the training samples have one value says nothing
    of what belongs together.
    """
    found = {}
    for name in metadata.columns:
        values: dict[str, str] = metadata[name].dropna().astype(str).to_dict()
        parts = [{values[s] for s in ids if s in values} for ids in (split.train, split.val, split.test)]
        of = {s: values[s] for s in (*split.train, *split.val) if s in values}
        complete = len(of) == len(split.train) + len(split.val)
        apart = sum(map(len, parts)) == len(set.union(*parts))
        if complete and apart and len(parts[0]) > 1 and len(of) >= 2 * len(set(of.values())):
            found[str(name)] = of
    return found


def _about_other_column(note: str, used: set[str | None]) -> bool:
    """Whether a note is about missing cells of a column that the run does not read; `run.json` has them all."""
    return note.startswith("metadata: column ") and not any(
        note.startswith(f"metadata: column {column!r}") for column in used
    )


def _too_shallow(dataset: PreparedDataset, depth: int) -> dict[str, str]:
    """Samples with fewer reads than the depth, and the reason to drop them.

    Raises
    ------
    ValueError
        Where none is left.
    """
    enough = dataset.depths >= depth
    if not enough.any():
        raise ValueError(
            f"all {len(enough)} samples have fewer reads than --rarefy-depth {depth} (the deepest has "
            f"{dataset.depths.max()}): lower --rarefy-depth"
        )
    shallow = (s for s, is_enough in zip(dataset.sample_ids, enough, strict=True) if not is_enough)
    return dict.fromkeys(shallow, f"fewer reads than --rarefy-depth {depth}")


def _usable(dataset: PreparedDataset, dropped: dict[str, str]) -> list[str]:
    return [s for s in dataset.sample_ids if s not in dropped]


def _metadata(dataset: PreparedDataset, why: str) -> pd.DataFrame:
    if dataset.metadata is None:
        raise ValueError(f"{why} needs --metadata")
    return dataset.metadata


def _not_in_metadata(config: RunConfig, dataset: PreparedDataset, dropped: dict[str, str]) -> dict[str, str]:
    """Samples that the metadata lacks, where the run needs the metadata, and the reason to drop them.

    Raises
    ------
    ValueError
        Unless they may be dropped. Who lists samples in id files has chosen already.
    """
    by_files = config.data.train_ids is not None
    if isinstance(config, PretrainConfig) and (config.data.group_column is None or by_files):
        return {}
    frame = _metadata(dataset, "--target" if isinstance(config, TrainConfig) else "--group-column")
    absent = [s for s in _usable(dataset, dropped) if s not in frame.index]
    if absent and config.data.missing_samples == "error" and not by_files:
        raise ValueError(
            f"{config.data.metadata}: {len(absent)} samples of the table are not in it ({some(absent)}); "
            "add them, or drop them with --missing-samples ignore"
        )
    return dict.fromkeys(absent, "not in the metadata")


def _targets(
    config: TrainConfig, dataset: PreparedDataset, dropped: dict[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Target of each sample that has one, and the samples that have none with the reason to drop them."""
    column, source = config.loss.target, config.data.metadata
    assert column is not None
    assert source is not None
    frame = _metadata(dataset, "--target").loc[_usable(dataset, dropped)]
    read = text_column if config.loss.classifier else numeric_column
    values = read(frame, column, source=source)
    targets = {str(sample): value for sample, value in values.items() if pd.notna(value)}
    if not targets:
        raise ValueError(f"{source}: column {column!r} has no value for any sample that can be used")
    without = (sample for sample in frame.index if sample not in targets)
    return targets, dict.fromkeys(without, f"no value in column {column!r}")


def _split(config: RunConfig, dataset: PreparedDataset, dropped: dict[str, str], targets: dict[str, Any]) -> Split:
    data, usable = config.data, _usable(dataset, dropped)
    listed = _listed(config, dataset, usable, dropped)
    if data.train_ids is not None:
        unused = (f"the id files split the samples, --group-column {data.group_column} does not",)
        unused = () if data.group_column is None else unused
        return dataclasses.replace(listed, notes=(*listed.notes, *unused))
    kept_back = set(listed.test)
    usable = [s for s in usable if s not in kept_back]
    is_class = isinstance(config, TrainConfig) and config.loss.classifier
    drawn = draw_split(
        usable,
        val_fraction=data.val_fraction,
        seed=config.loop.seed,
        groups=None if data.group_column is None else _groups(config, dataset, usable),
        classes=[targets[s] for s in usable] if is_class else None,
    )
    return dataclasses.replace(drawn, test=listed.test, notes=listed.notes)


def _listed(config: RunConfig, dataset: PreparedDataset, usable: list[str], dropped: dict[str, str]) -> Split:
    """Samples whose part is known before any are drawn for validation: by id files, or drawn as test samples."""
    data = config.data
    # An id file may list samples that the table had and the prepared dataset has not.
    unusable = dataset.manifest["dropped_samples"] | dropped
    if data.train_ids is not None or data.test_ids is not None:
        files = {"train": data.train_ids, "val": data.val_ids, "test": data.test_ids}
        return split_from_files(files, usable, unusable, only_kept_out=isinstance(config, PretrainConfig))
    if data.test_fraction == 0:
        return Split(train=[], val=[])
    drawn = _drawn_test(config, dataset)
    left = set(usable)
    test = [s for s in drawn if s in left]
    if not test:
        raise ValueError(
            f"none of the {len(drawn)} samples drawn by --test-fraction {data.test_fraction:g} can be used, the first: "
            f"{drawn[0]} ({unusable[drawn[0]]}); raise it, change --seed, or list samples by --test-ids"
        )
    return Split(train=[], val=[], test=test)


def _drawn_test(config: RunConfig, dataset: PreparedDataset) -> list[str]:
    """Test samples, drawn from all samples of the table: also from those that this stage drops and the other keeps."""
    data = config.data
    ids = [*dataset.sample_ids, *dataset.manifest["dropped_samples"]]
    groups = None
    if data.group_column is not None:
        if data.metadata is None:
            raise ValueError("--group-column needs --metadata")
        # The prepared dataset has the metadata of the samples that it kept.
        column = text_column(read_metadata(data.metadata)[0], data.group_column, source=data.metadata).dropna()
        ids = [s for s in ids if s in column.index]
        groups = column.loc[ids].tolist()
    return draw_test(ids, test_fraction=data.test_fraction, seed=config.loop.seed, groups=groups)


def _groups(config: RunConfig, dataset: PreparedDataset, sample_ids: Sequence[str]) -> list[str]:
    """Group of each sample, which all must have."""
    column, source = config.data.group_column, config.data.metadata
    assert column is not None
    assert source is not None
    groups = text_column(_metadata(dataset, "--group-column"), column, source=source)
    groups = groups.loc[list(sample_ids)]
    without = groups.index[groups.isna()].tolist()
    if without:
        raise ValueError(
            f"{source}: column {column!r} has no value for {len(without)} samples ({some(without)}): "
            "fill it in, or leave --group-column out and list the samples by --train-ids and --val-ids"
        )
    return groups.tolist()
