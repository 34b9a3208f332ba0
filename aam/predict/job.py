"""Predict samples, as a user's settings have it, alone or with several processes.

Each distinct ASV is encoded once in all: the workers encode disjoint chunks, then all read the vectors. Then each
predicts shares of the samples. What is held is of the size of what is asked for, and never a matrix of distances.
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
from aam.predict.distances import check_ids, check_learned
from aam.predict.samples import Executor, Map, SampleOutputs, Worker, open_cache, this_process
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
    """Predicted target of samples."""

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
    deviation: np.ndarray | None = None
    """float64 [n]: standard deviation over rarefactions, of the number or of the predicted class's probability; None
    for a single one."""


@dataclass(frozen=True, kw_only=True)
class PredictionResult:
    """All that was asked for."""

    dataset: PreparedDataset
    notes: list[str]
    """What was dropped from the table, and what of it is new to the model."""
    sample_ids: list[str]
    skipped: dict[str, str]
    predictions: Predictions | None
    """None in stage 1, and where only the ASVs were asked for."""
    outputs: SampleOutputs | None
    """Of the samples, as far as they are needed; None where only the ASVs were asked for."""
    lengths: np.ndarray
    """float32 [P]: of the clades."""
    asvs: np.ndarray | None
    """float32 [ASVs, D]: vectors of all ASVs of the dataset."""


def predict(
    config: PredictConfig,
    loaded: Checkpoint,
    record: dict[str, Any] | None = None,
    executor: Executor | None = None,
) -> PredictionResult:
    """Predict the samples that the settings ask for.

    Parameters
    ----------
    config : PredictConfig
        Settings.
    loaded : Checkpoint
        Of stage 2; for all but the target, of either stage.
    record : dict, optional
        `run.json` of the run that the checkpoint is of: its table, and which samples were its test samples.
    executor : Executor, optional
        Who does the work; this process by default.

    Raises
    ------
    ValueError
        For a target or a UniFrac metric that the model does not predict, a table that it cannot read, or samples that
        cannot be told.
    """
    target, contract = loaded.spec.target, loaded.spec.contract
    if target is None and (config.output or config.report):
        flag = "--output" if config.output else "--report"
        raise ValueError(
            f"{loaded.path}: a stage 1 checkpoint predicts no target; give the folder of a jobs/train.py run, or "
            f"--embeddings, --distances or --faith-pd without {flag}"
        )
    if config.distances is not None:
        check_learned(loaded, config.distance_metric)
    if config.faith_pd is not None:
        check_learned(loaded, "faith_pd")
    if config.prediction_draws > 1 and not (config.output or config.report):
        raise ValueError(
            f"--prediction-draws {config.prediction_draws} averages the predicted target, and none is asked for: give "
            "--output or --report, or leave it out"
        )
    if config.prediction_draws > 1 and not contract.is_random:
        raise ValueError(
            f"--prediction-draws {config.prediction_draws}: this model reads all reads of a sample (--rarefy-depth 0), "
            "so each draw would be the same; leave it out"
        )
    dataset = prepare(sources(config, record), max_bp=longest_read(loaded), use_tree=False)
    notes = [note for note in dataset.manifest["notes"] if not note.startswith("metadata: ")]
    ids, skipped = [], {}
    if config.of_samples or config.report:
        ids, skipped = choose(config, dataset, record, contract.rarefy_depth)
    if config.distances is not None:
        check_ids(ids)
    notes += what_is_new(dataset, ids or dataset.sample_ids, record)
    executor = executor or this_process(config.ray.use_gpu)
    worker = Worker(
        loaded=loaded,
        dataset=dataset,
        batch_size=config.batch_size,
        device=executor.device,
        autocast=autocast_of(config.precision, executor.device.type),
        kept=_kept(config),
    )
    map_items = executor.start(worker)
    started = perf_counter()
    vectors = _encode(config, worker, ids, map_items)
    encoded = perf_counter()
    draws = range(config.prediction_draws if target is not None and ids else min(1, len(ids)))
    of_draws = [_predict(worker, ids, vectors, map_items, draw) for draw in draws]
    if ids:
        seconds = perf_counter() - encoded
        print(
            f"time: {encoded - started:.1f} s for the ASVs, {seconds:.1f} s for {len(ids)} samples "
            f"({len(ids) / seconds:.1f} samples/s)",
            flush=True,
        )
    predictions = None
    if target is not None and of_draws:
        predictions = _in_own_units(target, dataset, ids, [outputs.target for outputs in of_draws], skipped)
    return PredictionResult(
        dataset=dataset,
        notes=notes,
        sample_ids=ids,
        skipped=skipped,
        predictions=predictions,
        outputs=of_draws[0] if of_draws else None,
        lengths=encoder_of(loaded.model).clades.lengths.detach().cpu().numpy(),
        asvs=vectors if config.asv_embeddings else None,
    )


def longest_read(loaded: Checkpoint) -> int | None:
    """Longest sequence that a model can read; None without a nucleotide stack, whose positions are counted."""
    return loaded.spec.contract.max_bp if loaded.spec.encoder.asv_layers else None


def _kept(config: PredictConfig) -> frozenset[str]:
    """Outputs of samples that something is written of."""
    needs_share = config.distances is not None and config.distance_metric == "weighted"
    needs_presence = config.embeddings is not None or (config.distances is not None and not needs_share)
    of_asvs = ["asvs", "abundance", "tip_lengths"] if config.distances is not None else []
    return frozenset(["presence"] * needs_presence + ["share"] * needs_share + of_asvs)


def _encode(config: PredictConfig, worker: Worker, ids: list[str], map_items: Map) -> np.ndarray:
    """Vectors of the ASVs that the samples show, or of all: float32 [ASVs, D], others never written."""
    dataset, contract = worker.dataset, worker.loaded.spec.contract
    if config.asv_embeddings:
        wanted = np.arange(len(dataset.lengths))
    else:
        plan = BatchPlan(dataset=dataset, sample_ids=ids, contract=contract, batch_size=config.batch_size)
        epoch = FIXED_DRAW if config.prediction_draws == 1 else FIXED_DRAW + 1  # an epoch that draws anew: all ASVs
        wanted = EpochBatches(plan, epoch).possible_asvs()
    cache = open_cache(
        worker.loaded, dataset, worker.autocast, chunk_size=config.asv_chunk_size, base_cache=config.base_cache
    )
    missing = wanted[cache.vectors.missing(wanted)]
    chunks = cache.chunks(missing)
    with _bar(len(missing), "ASVs") as bar:
        for number, rows in map_items(Worker.encode, chunks):
            cache.keep(chunks[number], rows)
            bar.update(len(rows))
    cache.say(len(missing), len(wanted))
    return cache.vectors.rows


def _predict(worker: Worker, ids: list[str], vectors: np.ndarray, map_items: Map, draw: int) -> SampleOutputs:
    """Outputs for samples, in their order, by one of their rarefactions."""
    size = SHARE * worker.batch_size
    shares = [ids[start : start + size] for start in range(0, len(ids), size)]
    outputs: dict[int, SampleOutputs] = {}
    with _bar(len(ids), "samples") as bar:
        for number, of_share in map_items(Worker.predict, shares, vectors, draw):
            outputs[number] = of_share
            bar.update(len(shares[number]))
    return SampleOutputs.concatenate([outputs[number] for number in range(len(shares))])


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
    target: Target, dataset: PreparedDataset, ids: list[str], of_draws: list[np.ndarray], skipped: dict[str, str]
) -> Predictions:
    """Means over the draws of the outputs [n, O] of each, and their standard deviation where there are several."""
    decode = class_probabilities if target.classes else target.decode
    in_units = np.stack([decode(outputs) for outputs in of_draws])
    mean_nO = in_units.mean(axis=0)
    probabilities, beside = None, None
    if target.classes:
        probabilities, shown = mean_nO, mean_nO.argmax(axis=1)
        values = [target.classes[code] for code in shown]
    else:
        shown = np.full(len(ids), target.point)
        values = mean_nO[:, target.point].tolist()
        beside = mean_nO[:, [*target.beside.values()]] if target.beside else None
    deviation = None
    if len(of_draws) > 1:
        deviation = in_units.std(axis=0, ddof=1)[np.arange(len(ids)), shown]
    return Predictions(
        target=target,
        dataset=dataset,
        sample_ids=ids,
        values=values,
        probabilities=probabilities,
        skipped=skipped,
        beside=beside,
        deviation=deviation,
    )
