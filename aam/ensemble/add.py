"""Adding an ensemble to the best checkpoint of a run."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import torch
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

from aam.data.batches import BatchPlan, EpochBatches
from aam.data.draw import FIXED_DRAW
from aam.data.split import Split
from aam.ensemble.fit import Part, describe, fit_ensemble
from aam.plan import RunPlan
from aam.predict.samples import fixed_draws, open_cache, predict_samples
from aam.task import build_task
from aam.training import checkpoint
from aam.training.checkpoint import Checkpoint
from aam.training.logs import VALIDATION, write_validation
from aam.training.loop import fit
from aam.training.metrics import EpochArrays
from aam.training.step import autocast_of
from aam.training.targets import Target


def add_ensemble(best: Path, plan: RunPlan) -> str:
    """Fit an ensemble to a trained network, put it into its checkpoint, and write its validation predictions.

    Parameters
    ----------
    best : Path
        Checkpoint of stage 2.
    plan : RunPlan
        Of the run that it is of.

    Returns
    -------
    str
        How well each member does on the validation samples, and its weight.
    """
    loaded = dataclasses.replace(checkpoint.load(best), ensemble=None)
    assert loaded.spec.target is not None
    train, val = (_part(loaded, plan, ids) for ids in (plan.split.train, plan.split.val))
    folds = [_left_out(loaded, plan, train, held_out) for held_out in _folds(plan, loaded.spec.target)]
    ensemble = fit_ensemble(train, val, loaded.spec.target, seed=plan.loop.seed, folds=folds)
    ensemble.save(best)
    together = ensemble.outputs(val.network, val.draws, val.vectors, loaded.spec.target)
    arrays = EpochArrays(target=together, target_true=val.targets)
    write_validation(plan.output_dir / VALIDATION, plan.split.val, arrays, loaded.spec.target)
    return describe(ensemble, loaded.spec.target)


def _folds(plan: RunPlan, target: Target) -> list[np.ndarray]:
    """Training samples of each fold, as positions: each in one, groups together, classes spread evenly."""
    if not plan.ensemble_folds:
        return []
    groups = [plan.groups[s] for s in plan.split.train]
    labels = target.encode([plan.targets[s] for s in plan.split.train])
    kind = StratifiedGroupKFold if target.classes else GroupKFold
    splitter = kind(min(plan.ensemble_folds, max(2, len(set(groups)))), shuffle=True, random_state=plan.loop.seed)
    try:
        splits = list(splitter.split(labels, labels, groups))
    except ValueError as error:  # one group, or fewer samples of each class than folds
        print(f"ensemble: no folds of the training samples: {error}", flush=True)
        return []
    folds = []
    for number, (rest, held_out) in enumerate(splits, start=1):
        if target.classes and set(labels[rest]) != set(labels):
            print(f"ensemble: fold {number} weighs nothing: it has all training samples of a class", flush=True)
        else:
            folds.append(held_out)
    return folds


def _left_out(loaded: Checkpoint, plan: RunPlan, train: Part, held_out: np.ndarray) -> tuple[Part, Part]:
    """The other training samples and those of a fold, of which a network speaks that was trained without them.

    It is trained as the run's was, up to the same share of its updates.
    """
    print(f"ensemble: training without {len(held_out)} of {len(train.targets)} training samples", flush=True)
    rest = np.setdiff1d(np.arange(len(train.targets)), held_out)
    ids = np.asarray(plan.split.train)
    split = Split(train=ids[rest].tolist(), val=ids[held_out].tolist())
    # They are not asked when to stop.
    without = dataclasses.replace(plan, split=split, loop=dataclasses.replace(plan.loop, patience=plan.loop.epochs))
    task = dataclasses.replace(build_task(without, _device()), verbose=False, bar_file=io.StringIO())
    fit(task, until=max(1, round(loaded.metrics["epoch"] / plan.epochs * without.epochs)))
    network = _part(dataclasses.replace(loaded, model=task.model), without, split.val).network
    return _take(train, rest, train.network[rest]), _take(train, held_out, network)


def _take(part: Part, rows: np.ndarray, network: np.ndarray) -> Part:
    return dataclasses.replace(part, draws=[part.draws[i] for i in rows], targets=part.targets[rows], network=network)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _part(loaded: Checkpoint, plan: RunPlan, sample_ids: list[str]) -> Part:
    """Samples, with what the network says of them."""
    loop, device = plan.loop, _device()
    autocast = autocast_of(loop.precision, device.type)
    batches = BatchPlan(
        dataset=plan.dataset, sample_ids=sample_ids, contract=loaded.spec.contract, batch_size=loop.batch_size
    )
    loaded.model.to(device).eval()
    cache = open_cache(
        loaded, plan.dataset, autocast, chunk_size=loop.asv_chunk_size or 1024, base_cache=loop.base_cache
    )
    cache.fill([EpochBatches(batches, FIXED_DRAW)], verbose=False)
    vectors = cache.vectors.rows
    network = predict_samples(
        loaded, plan.dataset, sample_ids, batch_size=loop.batch_size, device=device, autocast=autocast, vectors=vectors
    )
    assert loaded.spec.target is not None
    targets = loaded.spec.target.encode([plan.targets[s] for s in sample_ids])
    return Part(draws=fixed_draws(batches), vectors=vectors, targets=targets, network=network)
