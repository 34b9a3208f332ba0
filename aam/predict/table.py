"""The samples that are to be predicted: where they come from, which can be, and what of them the model has not met."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from aam.config import DataConfig, PredictConfig, TrainConfig
from aam.data.dataset import MANIFEST, PreparedDataset
from aam.plan import with_builtin_data


def sources(config: PredictConfig, record: dict[str, Any] | None) -> DataConfig:
    """Table, sequences and metadata: those that were given, or those of the run."""
    if config.table is not None:
        return DataConfig(
            table=config.table, sequences=config.sequences, metadata=config.metadata, cache_dir=config.cache_dir
        )
    if record is None:
        raise ValueError(f"{config.checkpoint}: no run.json there that names the run's table; give --table")
    return DataConfig(
        table=source_of(record, "table"),
        sequences=source_of(record, "sequences"),
        metadata=config.metadata or source_of(record, "metadata"),
        cache_dir=config.cache_dir,
    )


def source_of(record: dict[str, Any], name: str) -> Path | None:
    """Path of a source of a run, one of the built-in dataset's where no table was given; None without that source."""
    given = record["config"]["data"]
    if given["table"] is None:
        cache = None if given["cache_dir"] is None else Path(given["cache_dir"])
        return getattr(with_builtin_data(TrainConfig(data=DataConfig(cache_dir=cache))).data, name)
    return None if given[name] is None else Path(given[name])


def choose(
    config: PredictConfig, dataset: PreparedDataset, record: dict[str, Any] | None, depth: int
) -> tuple[list[str], dict[str, str]]:
    """Samples that are asked for and can be predicted, and those that cannot be, with the reason.

    Raises
    ------
    ValueError
        Where there are none.
    """
    wanted = _wanted(config, dataset, record)
    enough, skipped = [], {}
    for sample in wanted:
        if sample not in dataset.row:
            skipped[sample] = dataset.manifest["dropped_samples"].get(sample, "not in the table")
        elif dataset.depths[dataset.row[sample]] < depth:
            skipped[sample] = f"fewer than {depth} reads"
        else:
            enough.append(sample)
    if not enough:
        raise ValueError(
            f"{dataset.manifest['sources']['table']}: none of {len(wanted)} samples can be predicted, the first: "
            f"{wanted[0]} ({skipped[wanted[0]]}); the model was trained on {depth} reads of each"
        )
    return enough, skipped


def _wanted(config: PredictConfig, dataset: PreparedDataset, record: dict[str, Any] | None) -> list[str]:
    """Samples that `--part` names."""
    if config.part == "all":
        return [*dataset.sample_ids, *dataset.manifest["dropped_samples"]]
    if record is None:
        raise ValueError(f"{config.checkpoint}: no run.json there that names the samples of --part {config.part}")
    ids = record["split"][config.part]
    if not ids:
        raise ValueError(
            f"{config.checkpoint}: the run has no {config.part} samples; it keeps some back by --test-ids "
            "or --test-fraction"
        )
    return ids


def what_is_new(dataset: PreparedDataset, sample_ids: Iterable[str], record: dict[str, Any] | None) -> list[str]:
    """Say how much of the samples the model has not learned from, and what that may be due to.

    Parameters
    ----------
    dataset : PreparedDataset
        Holds the samples.
    sample_ids : iterable of str
        Which samples.
    record : dict or None
        `run.json` of the run that trained the model.
    """
    folder = None if record is None else Path(record["dataset"]["folder"])
    if record is None or folder is None or not (folder / MANIFEST).is_file():
        missing = "no run.json beside the checkpoint" if folder is None else f"the run's dataset {folder} is gone"
        return [f"how many of these ASVs the model was trained on cannot be told: {missing}"]
    training = PreparedDataset(folder)
    learned, of_them = _learned_from(record)
    seen = _total_reads(training, learned) > 0
    trained = {training.sequences[i] for i in np.flatnonzero(seen)}
    reads = _total_reads(dataset, sample_ids)
    here = np.flatnonzero(reads)
    new = [i for i in here if dataset.sequences[i] not in trained]
    share = reads[new].sum() / reads.sum()
    found = f"{len(new)} of {len(here)} ASVs ({share:.2%} of the reads) are in no {of_them}"
    if {*training.sequences}.isdisjoint(dataset.sequences):
        lengths = [int(np.median(of.lengths)) - 1 for of in (dataset, training)]
        cause = "another primer region or trim length" if lengths[0] != lengths[1] else "another region, or strand"
        found += (
            f", nor is any ASV of the table in the training's; its ASVs are {lengths[0]} nt long (median), the "
            f"training's {lengths[1]}: {cause}? The model was not trained for these"
        )
    return [found, *_depths(dataset, sample_ids, training, record)]


def _learned_from(record: dict[str, Any]) -> tuple[list[str], str]:
    """Samples that a model learned from, and what they are: an ensemble learns from those of validation too."""
    split = record["split"]
    if record["config"]["loss"].get("ensemble"):
        return [*split["train"], *split["val"]], "training or validation sample"
    return split["train"], "training sample"


def _depths(
    dataset: PreparedDataset, sample_ids: Iterable[str], training: PreparedDataset, record: dict[str, Any]
) -> list[str]:
    """Say what samples are shallower than all that the model was trained on, where it reads all reads of each."""
    if record["spec"]["contract"]["rarefy_depth"]:
        return []
    learned, of_them = _learned_from(record)
    least = training.depths[[training.row[s] for s in learned]].min()
    depths = dataset.depths[[dataset.row[s] for s in sample_ids]]
    shallow = int((depths < least).sum())
    if not shallow:
        return []
    return [f"{shallow} of {len(depths)} samples have fewer reads than any {of_them} ({least}): predicted with care"]


def _total_reads(dataset: PreparedDataset, sample_ids: Iterable[str]) -> np.ndarray:
    """Reads of each ASV that samples have, int64 [ASVs]."""
    total = np.zeros(len(dataset.lengths), dtype=np.int64)
    for sample in sample_ids:
        asvs, reads = dataset.sample(dataset.row[sample])
        total[asvs] += reads
    return total
