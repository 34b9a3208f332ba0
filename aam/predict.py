"""Predictions for new samples, in the target's own units, by the same step that trained the model."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch

from aam.config import DataConfig, PredictConfig
from aam.data.batches import BatchPlan, EpochBatches
from aam.data.dataset import PreparedDataset
from aam.data.draw import FIXED_DRAW
from aam.data.prepare import prepare
from aam.training import checkpoint
from aam.training.asv_cache import ASVCache
from aam.training.checkpoint import Checkpoint
from aam.training.losses import LossWeights
from aam.training.metrics import class_probabilities
from aam.training.step import Objective, step


def predict(config: PredictConfig, path: Path) -> str:
    """Predict all samples of a table and write what q2-sample-classifier writes.

    Parameters
    ----------
    config : PredictConfig
        Table, output, sizes.
    path : Path
        Checkpoint of stage 2.

    Returns
    -------
    str
        What was written, in words.

    Raises
    ------
    ValueError
        For a stage 1 checkpoint, or a table that the model cannot read.
    """
    loaded = checkpoint.load(path)
    contract, target = loaded.spec.contract, loaded.spec.target
    if target is None:
        raise ValueError(f"{path}: a stage 1 checkpoint predicts no target; give the folder of a jobs/train.py run")
    data = DataConfig(table=config.table, sequences=config.sequences, cache_dir=config.cache_dir)
    dataset = prepare(data, max_bp=contract.max_bp, use_tree=False)
    depth = contract.rarefy_depth
    enough = [s for s, reads in zip(dataset.sample_ids, dataset.depths, strict=True) if reads >= depth]
    skipped: dict[str, str] = dataset.manifest["dropped_samples"] | {
        s: f"{reads} reads, fewer than {depth}"
        for s, reads in zip(dataset.sample_ids, dataset.depths, strict=True)
        if reads < depth
    }
    if not enough:
        raise ValueError(
            f"{config.table}: all {len(skipped)} samples have fewer reads than the {depth} that the model was "
            "trained on"
        )
    predicted = predict_samples(loaded, dataset, enough, batch_size=config.batch_size, chunk_size=config.asv_chunk_size)
    lines = [f"note: {note}" for note in dataset.manifest["notes"]]
    config.output.parent.mkdir(parents=True, exist_ok=True)
    if target.classes:
        probabilities = class_probabilities(predicted)
        values = [target.classes[row.argmax()] for row in probabilities]
        name = "class_probabilities.tsv"
        # Other predictions in the same folder must not be written over.
        beside = config.output.with_name(
            name if config.output.name == "predictions.tsv" else f"{config.output.stem}.{name}"
        )
        _write(beside, ["SampleID", *target.classes], enough, probabilities.tolist())
        lines.append(f"class probabilities: {beside}")
    else:
        values = target.transform.inverse(predicted[:, 0]).tolist()
    _write(config.output, ["SampleID", "prediction"], enough, [[v] for v in values])
    if skipped:
        beside = config.output.with_name(f"{config.output.stem}.skipped.tsv")
        _write(beside, ["SampleID", "reason"], list(skipped), [[reason] for reason in skipped.values()])
        lines.append(f"{len(skipped)} samples could not be predicted, with the reasons: {beside}")
    return "\n".join([*lines, f"{len(enough)} predictions of {target.column}: {config.output}"])


@torch.no_grad()
def predict_samples(
    loaded: Checkpoint,
    dataset: PreparedDataset,
    sample_ids: list[str],
    *,
    batch_size: int = 32,
    chunk_size: int = 1024,
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
    cache = ASVCache(model, dataset, None, chunk_size)
    found = []
    batches = EpochBatches(plan, FIXED_DRAW)
    for index in range(len(batches)):
        host_batch = batches[index]
        batch = host_batch.to(device)
        vectors = cache.vectors(host_batch.asvs, batch)
        _, predictions = step(model, batch, objective, asv_vectors=vectors)
        assert predictions.target is not None
        found.append(predictions.target.cpu().numpy())
    return np.concatenate(found)


def _write(path: Path, header: list[str], sample_ids: list[str], rows: list[list]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(header)
        writer.writerows([sample, *row] for sample, row in zip(sample_ids, rows, strict=True))
