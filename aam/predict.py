"""Predictions for samples, in the target's own units, by the same step that trained the model."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aam.config import DataConfig, PredictConfig, TrainConfig
from aam.data.batches import BatchPlan, EpochBatches
from aam.data.dataset import PreparedDataset
from aam.data.draw import FIXED_DRAW
from aam.data.prepare import prepare
from aam.plan import with_builtin_data
from aam.training.base_cache import BaseCache
from aam.training.checkpoint import Checkpoint
from aam.training.losses import LossWeights
from aam.training.metrics import class_probabilities
from aam.training.step import Objective, step
from aam.training.targets import Target


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What a model says of samples."""

    target: Target
    dataset: PreparedDataset
    """Holds the samples."""
    sample_ids: list[str]
    values: list[Any]
    """Of each sample: a number in the target's own units, or the name of a class."""
    probabilities: np.ndarray | None
    """float64 [n, classes]; None for a number."""
    skipped: dict[str, str]
    """Samples that could not be predicted, and why."""


def predict(config: PredictConfig, loaded: Checkpoint, record: dict[str, Any] | None = None) -> Predictions:
    """Predict the samples that the settings ask for.

    Parameters
    ----------
    config : PredictConfig
        Settings.
    loaded : Checkpoint
        Of stage 2.
    record : dict, optional
        `run.json` of the run that the checkpoint is of: its table, and which samples were its test samples.

    Raises
    ------
    ValueError
        For a stage 1 checkpoint, a table that the model cannot read, or samples that cannot be told.
    """
    contract, target = loaded.spec.contract, loaded.spec.target
    if target is None:
        raise ValueError(
            f"{loaded.path}: a stage 1 checkpoint predicts no target; give the folder of a jobs/train.py run"
        )
    dataset = prepare(_sources(config, record), max_bp=contract.max_bp, use_tree=False)
    wanted = _wanted(config, dataset, record)
    depth = contract.rarefy_depth
    enough, skipped = [], {}
    for sample in wanted:
        if sample not in dataset.row:
            skipped[sample] = dataset.manifest["dropped_samples"].get(sample, "not in the table")
        elif (reads := dataset.depths[dataset.row[sample]]) < depth:
            skipped[sample] = f"{reads} reads, fewer than {depth}"
        else:
            enough.append(sample)
    if not enough:
        raise ValueError(
            f"{dataset.manifest['sources']['table']}: none of {len(wanted)} samples can be predicted, the first: "
            f"{wanted[0]} ({skipped[wanted[0]]}); the model was trained on {depth} reads of each"
        )
    predicted = predict_samples(
        loaded,
        dataset,
        enough,
        batch_size=config.batch_size,
        chunk_size=config.asv_chunk_size,
        base_cache=config.base_cache,
    )
    probabilities = class_probabilities(predicted) if target.classes else None
    if probabilities is None:
        values = target.transform.inverse(predicted[:, 0]).tolist()
    else:
        values = [target.classes[row.argmax()] for row in probabilities]
    return Predictions(
        target=target,
        dataset=dataset,
        sample_ids=enough,
        values=values,
        probabilities=probabilities,
        skipped=skipped,
    )


def _sources(config: PredictConfig, record: dict[str, Any] | None) -> DataConfig:
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


@torch.no_grad()
def predict_samples(
    loaded: Checkpoint,
    dataset: PreparedDataset,
    sample_ids: list[str],
    *,
    batch_size: int = 32,
    chunk_size: int = 1024,
    base_cache: bool = True,
    device: torch.device | None = None,
) -> np.ndarray:
    """What the model says of samples, as it says it.

    Parameters
    ----------
    loaded : Checkpoint
        Of stage 2.
    dataset : PreparedDataset
        Holds the samples, each with at least the reads that the model was trained on.
    sample_ids : list of str
        Which samples.
    batch_size, chunk_size : int
        Samples, and distinct ASVs, at a time.
    base_cache : bool
        Read and keep on disk what a frozen base says.
    device : torch.device, optional
        Default: the GPU where there is one.

    Returns
    -------
    ndarray of float32 [n, outputs]
        Transformed targets, or scores of the classes.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = loaded.model.to(device).eval()
    plan = BatchPlan(dataset=dataset, sample_ids=sample_ids, contract=loaded.spec.contract, batch_size=batch_size)
    objective = Objective(weights=LossWeights(), target=loaded.spec.target)
    batches = EpochBatches(plan, FIXED_DRAW)
    # A base that was trained along with its heads is not met again by other runs.
    cache = BaseCache(
        model, dataset, plan.contract, None, chunk_size=chunk_size, on_disk=base_cache and loaded.spec.freeze_base
    )
    cache.fill([batches])
    found = []
    for index in range(len(batches)):
        batch = batches[index]
        known = cache.known(batch, fixed_draws=True)
        _, predictions = step(model, batch.to(device), objective, known=known)
        assert predictions.target is not None
        found.append(predictions.target.cpu().numpy())
    return np.concatenate(found)


def write_predictions(found: Predictions, output: Path) -> str:
    """Write what q2-sample-classifier writes, and what was skipped.

    Parameters
    ----------
    found : Predictions
        What to write.
    output : Path
        Table of the predictions; others are written beside it.

    Returns
    -------
    str
        What was written, in words.
    """
    lines = [f"note: {note}" for note in found.dataset.manifest["notes"] if not note.startswith("metadata: ")]
    output.parent.mkdir(parents=True, exist_ok=True)
    if found.probabilities is not None:
        name = "class_probabilities.tsv"
        # Other predictions in the same folder must not be written over.
        beside = output.with_name(name if output.name == "predictions.tsv" else f"{output.stem}.{name}")
        _write(beside, ["SampleID", *found.target.classes], found.sample_ids, found.probabilities.tolist())
        lines.append(f"class probabilities: {beside}")
    _write(output, ["SampleID", "prediction"], found.sample_ids, [[v] for v in found.values])
    if found.skipped:
        beside = output.with_name(f"{output.stem}.skipped.tsv")
        _write(beside, ["SampleID", "reason"], list(found.skipped), [[reason] for reason in found.skipped.values()])
        total = len(found.skipped) + len(found.values)
        lines.append(f"{len(found.skipped)} of {total} samples could not be predicted, with the reasons: {beside}")
    return "\n".join([*lines, f"{len(found.values)} predictions of {found.target.column}: {output}"])


def _write(path: Path, header: list[str], sample_ids: list[str], rows: list[list]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(header)
        writer.writerows([sample, *row] for sample, row in zip(sample_ids, rows, strict=True))
