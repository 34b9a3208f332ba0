"""Predict samples, as a user's settings have it, alone or with a crew of workers.

Each distinct ASV is encoded once in all: the workers encode disjoint chunks, then all read the vectors. Then each
predicts shares of the samples. What is held is of the size of the outcome, and never the states of all samples.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
from tqdm import tqdm

from aam.config import PredictConfig
from aam.data.batches import BatchPlan, EpochBatches
from aam.data.dataset import PreparedDataset
from aam.data.draw import FIXED_DRAW
from aam.data.prepare import prepare
from aam.predict.samples import Crew, Each, SampleOutputs, Worker, open_cache, this_process
from aam.predict.table import choose, sources, what_is_new
from aam.training.base_cache import encoder_of
from aam.training.checkpoint import Checkpoint
from aam.training.metrics import class_probabilities
from aam.training.step import autocast_of
from aam.training.targets import Target

SHARE = 4
"""Batches that are handed to a worker at a time."""


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
    beside: np.ndarray | None = None
    """float64 [n, quantiles - 1]: the other quantiles (`Target.beside`), in own units; None where there are none."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """All that was asked for."""

    dataset: PreparedDataset
    notes: list[str]
    """What was dropped from the table, and what of it is new to the model."""
    sample_ids: list[str]
    skipped: dict[str, str]
    predictions: Predictions | None
    """None in stage 1, and where only the ASVs were asked for."""
    embeddings: np.ndarray | None
    """float32 [n, D]"""
    asvs: np.ndarray | None
    """float32 [ASVs, D]: vectors of all ASVs of the dataset."""
    distances: str
    """What the distances between embeddings say."""


def predict(
    config: PredictConfig,
    loaded: Checkpoint,
    record: dict[str, Any] | None = None,
    crew: Crew | None = None,
) -> Found:
    """Predict the samples that the settings ask for.

    Parameters
    ----------
    config : PredictConfig
        Settings.
    loaded : Checkpoint
        Of stage 2; for embeddings, of either stage.
    record : dict, optional
        `run.json` of the run that the checkpoint is of: its table, and which samples were its test samples.
    crew : Crew, optional
        Who does the work; this process by default.

    Raises
    ------
    ValueError
        For a stage 1 checkpoint, a table that the model cannot read, or samples that cannot be told.
    """
    target, contract = loaded.spec.target, loaded.spec.contract
    if target is None and (config.output or config.report):
        flag = "--output" if config.output else "--report"
        raise ValueError(
            f"{loaded.path}: a stage 1 checkpoint predicts no target; give the folder of a jobs/train.py run, or "
            f"--embeddings without {flag}"
        )
    dataset = prepare(sources(config, record), max_bp=contract.max_bp, use_tree=False)
    notes = [note for note in dataset.manifest["notes"] if not note.startswith("metadata: ")]
    ids, skipped = [], {}
    if config.output or config.report or config.embeddings:
        ids, skipped = choose(config, dataset, record, contract.rarefy_depth)
    notes += what_is_new(dataset, ids or dataset.sample_ids, record)
    crew = crew or this_process(config.ray.use_gpu)
    worker = Worker(
        loaded=loaded,
        dataset=dataset,
        batch_size=config.batch_size,
        device=crew.device,
        autocast=autocast_of(config.precision, crew.device.type),
    )
    each = crew.start(worker)
    started = perf_counter()
    vectors = _encode(config, worker, ids, each)
    encoded = perf_counter()
    outputs = _predict(worker, ids, vectors, each) if ids else None
    if ids:
        seconds = perf_counter() - encoded
        print(
            f"time: {encoded - started:.1f} s for the ASVs, {seconds:.1f} s for {len(ids)} samples "
            f"({len(ids) / seconds:.1f} samples/s)",
            flush=True,
        )
    return Found(
        dataset=dataset,
        notes=notes,
        sample_ids=ids,
        skipped=skipped,
        predictions=None if target is None or outputs is None else _in_own_units(target, dataset, ids, outputs.target, skipped),
        embeddings=None if outputs is None else _embeddings(loaded, outputs),
        asvs=vectors if config.asv_embeddings else None,
        distances=_distances(loaded),
    )


def _encode(config: PredictConfig, worker: Worker, ids: list[str], each: Each) -> np.ndarray:
    """Vectors of the ASVs that the samples show, or of all: float32 [ASVs, D], others never written."""
    dataset, contract = worker.dataset, worker.loaded.spec.contract
    if config.asv_embeddings:
        wanted = np.arange(len(dataset.lengths))
    else:
        plan = BatchPlan(dataset=dataset, sample_ids=ids, contract=contract, batch_size=config.batch_size)
        wanted = EpochBatches(plan, FIXED_DRAW).possible_asvs()
    cache = open_cache(
        worker.loaded, dataset, worker.autocast, chunk_size=config.asv_chunk_size, base_cache=config.base_cache
    )
    missing = wanted[cache.vectors.missing(wanted)]
    chunks = cache.chunks(missing)
    with _bar(len(missing), "ASVs") as bar:
        for number, rows in each(Worker.encode, chunks):
            cache.keep(chunks[number], rows)
            bar.update(len(rows))
    cache.say(len(missing), len(wanted))
    return cache.vectors.rows


def _predict(worker: Worker, ids: list[str], vectors: np.ndarray, each: Each) -> SampleOutputs:
    """Outputs for samples, in their order."""
    size = SHARE * worker.batch_size
    shares = [ids[start : start + size] for start in range(0, len(ids), size)]
    outputs: dict[int, SampleOutputs] = {}
    with _bar(len(ids), "samples") as bar:
        for number, of_share in each(Worker.predict, shares, vectors):
            outputs[number] = of_share
            bar.update(len(shares[number]))
    return SampleOutputs.concatenate([outputs[number] for number in range(len(shares))])


def _embeddings(loaded: Checkpoint, outputs: SampleOutputs) -> np.ndarray:
    """Presence of each clade in each sample, times its length: float32 [n, P]."""
    return outputs.presence * encoder_of(loaded.model).clades.lengths.detach().cpu().numpy()


def _bar(total: int, what: str) -> tqdm:
    # In a log each refresh is a line: a few of them are enough, and none for what is over by then.
    interval = 0.1 if sys.stderr.isatty() else 20.0
    return tqdm(
        total=total,
        desc=what,
        unit=f" {what}",
        disable=total == 0,
        delay=0 if sys.stderr.isatty() else interval,
        mininterval=interval,
        maxinterval=interval,
        dynamic_ncols=True,
    )


def _in_own_units(
    target: Target, dataset: PreparedDataset, ids: list[str], outputs: np.ndarray, skipped: dict[str, str]
) -> Predictions:
    probabilities, beside = None, None
    if target.classes:
        probabilities = class_probabilities(outputs)
        values = [target.classes[code] for code in probabilities.argmax(axis=1)]
    else:
        decoded = target.decode(outputs)
        values = decoded[:, target.point].tolist()
        beside = decoded[:, [*target.beside.values()]] if target.beside else None
    return Predictions(
        target=target,
        dataset=dataset,
        sample_ids=ids,
        values=values,
        probabilities=probabilities,
        skipped=skipped,
        beside=beside,
    )


def _distances(loaded: Checkpoint) -> str:
    """What a model's embeddings say of UniFrac."""
    if "unweighted" not in {learned.metric for learned in loaded.spec.unifrac}:
        return "clades weighted by their lengths; the base was trained without unweighted UniFrac"
    return "clades weighted by their lengths; 1 - sum(min) / sum(max) of two samples is about their unweighted UniFrac"
