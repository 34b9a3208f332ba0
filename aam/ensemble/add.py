"""Adding an ensemble to the best checkpoint of a run."""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

from aam.data.batches import BatchPlan, EpochBatches
from aam.data.draw import FIXED_DRAW
from aam.data.split import Split
from aam.ensemble.fit import Fold, describe, fit_ensemble
from aam.ensemble.members import Part
from aam.plan import RunPlan
from aam.predict.samples import fixed_draws, heads_of, open_cache, predict_samples
from aam.task import build_task
from aam.training import checkpoint
from aam.training.checkpoint import Checkpoint
from aam.training.logs import VALIDATION, write_validation
from aam.training.loop import fit
from aam.training.metrics import EpochArrays
from aam.training.step import autocast_of
from aam.training.targets import Target

_ATTEMPTS = 10
"""Draws of folds, until each leaves samples of every class to learn from."""


def add_ensemble(best: Path, plan: RunPlan, epochs: int) -> str:
    """Fit an ensemble to a trained network, put it into its checkpoint, and write its validation predictions.

    Parameters
    ----------
    best : Path
        Checkpoint of stage 2.
    plan : RunPlan
        Of the run that it is of.
    epochs : int
        How many the run had.

    Returns
    -------
    str
        How well each member does on samples that it was fitted without, and its weight.
    """
    loaded = dataclasses.replace(checkpoint.load(best), ensemble=None)
    target = loaded.spec.target
    assert target is not None
    everything = _part(loaded, plan, _labelled(plan))
    places = _folds(plan, target)
    if places:
        trained = [_left_out(loaded, plan, everything, place, epochs) for place in places]
        folds, networks = [fold for fold, _ in trained], [network for _, network in trained]
    else:
        train, val = np.split(np.arange(len(everything.targets)), [len(plan.split.train)])
        said_of_val = _said_by_network(loaded, plan, plan.split.val, everything.vectors)
        folds = [Fold(fitted=_take(everything, train), left_out=_take(everything, val), network=said_of_val)]
        places, networks = [val], []
    ensemble, said = fit_ensemble(everything, folds, target, seed=plan.loop.seed, networks=networks)
    ensemble.save(best)
    # In the end its members have learned from the validation samples too: what they said before is written.
    before = np.empty((len(everything.targets), target.outputs), np.float32)
    before[np.concatenate(places)] = said
    of_val = slice(len(plan.split.train), None)
    arrays = EpochArrays(target=before[of_val], target_true=everything.targets[of_val])
    write_validation(plan.output_dir / VALIDATION, plan.split.val, arrays, target)
    return describe(ensemble, target)


def _labelled(plan: RunPlan) -> list[str]:
    """What an ensemble learns from."""
    return [*plan.split.train, *plan.split.val]


def _folds(plan: RunPlan, target: Target) -> list[np.ndarray]:
    """Samples of each fold, as positions among those with labels: groups together, classes spread evenly.

    Each is in one, but for classes of which one group has all samples. Empty where the validation samples are the only
    ones to be left out.
    """
    if not plan.ensemble_folds:
        return []
    groups = [plan.groups[s] for s in _labelled(plan)]
    labels = target.encode([plan.targets[s] for s in _labelled(plan)])
    rows = np.arange(len(labels))
    if target.classes:
        # A class of one group is in no fold: whoever is trained without that group would not know of the class.
        alone = _only_in_one_group(labels, groups)
        if not alone[len(plan.split.train) :].any() and len(set(labels[~alone])) > 1:
            rows = rows[~alone]
    labels, groups = labels[rows], np.asarray(groups)[rows]
    kind = StratifiedGroupKFold if target.classes else GroupKFold
    folds = min(plan.ensemble_folds, max(2, len(set(groups))))
    for attempt in range(_ATTEMPTS):
        splitter = kind(folds, shuffle=True, random_state=plan.loop.seed + 1000 * attempt)
        try:
            splits = list(splitter.split(labels, labels, groups))
        except ValueError as error:  # one group, or fewer samples of each class than folds
            print(f"ensemble: no folds: {error}; the validation samples weigh its members", flush=True)
            return []
        # scikit-learn may leave a fold without any group, where there are few.
        found = [(rest, held_out) for rest, held_out in splits if len(held_out)]
        if not target.classes or all(set(labels[rest]) == set(labels) for rest, _ in found):
            return [rows[held_out] for _, held_out in found]
    print(
        f"ensemble: no folds: in {_ATTEMPTS} draws, one always had all samples of a class; the validation samples "
        "weigh its members",
        flush=True,
    )
    return []


def _only_in_one_group(labels: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """Whether the class of a sample is in one group only: bool [n]."""
    pairs = {(label, group) for label, group in zip(labels.tolist(), groups, strict=True)}
    of_class = Counter(label for label, _ in pairs)
    return np.array([of_class[label] == 1 for label in labels.tolist()])


def _left_out(
    loaded: Checkpoint, plan: RunPlan, everything: Part, held_out: np.ndarray, epochs: int
) -> tuple[Fold, dict[str, np.ndarray]]:
    """A fold, and the network that speaks of it, which is trained without it.

    It is trained as long as the run's was, of which the best epoch was kept: a fold is not asked for its own. Where the
    learning rate has come down to 0, the last epoch is a little better than one that a few groups choose (NOTES.md).
    """
    print(f"ensemble: training without {len(held_out)} of {len(everything.targets)} samples", flush=True)
    rest = np.setdiff1d(np.arange(len(everything.targets)), held_out)
    ids = np.asarray(_labelled(plan))
    split = Split(train=ids[rest].tolist(), val=ids[held_out].tolist())
    # They are not asked when to stop.
    without = dataclasses.replace(plan, split=split, loop=dataclasses.replace(plan.loop, patience=plan.loop.epochs))
    task = dataclasses.replace(build_task(without, _device()), verbose=False, bar_file=io.StringIO())
    fit(task, until=max(1, round(epochs / plan.epochs * without.epochs)))
    trained = dataclasses.replace(loaded, model=task.model)
    fold = Fold(
        fitted=_take(everything, rest),
        left_out=_take(everything, held_out),
        network=_said_by_network(trained, plan, split.val, everything.vectors),
    )
    return fold, heads_of(task.model)


def _take(part: Part, rows: np.ndarray) -> Part:
    draws = [part.draws[i] for i in rows]
    return dataclasses.replace(part, draws=draws, targets=part.targets[rows], groups=part.groups[rows])


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _part(loaded: Checkpoint, plan: RunPlan, sample_ids: list[str]) -> Part:
    """Samples, and vectors of their ASVs."""
    loop, device = plan.loop, _device()
    batches = BatchPlan(
        dataset=plan.dataset, sample_ids=sample_ids, contract=loaded.spec.contract, batch_size=loop.batch_size
    )
    loaded.model.to(device).eval()
    cache = open_cache(
        loaded,
        plan.dataset,
        autocast_of(loop.precision, device.type),
        chunk_size=loop.asv_chunk_size or 1024,
        base_cache=loop.base_cache,
    )
    cache.fill([EpochBatches(batches, FIXED_DRAW)], verbose=False)
    assert loaded.spec.target is not None
    return Part(
        draws=fixed_draws(batches),
        vectors=cache.vectors.rows,
        targets=loaded.spec.target.encode([plan.targets[s] for s in sample_ids]),
        groups=np.array([plan.groups.get(s, "") for s in sample_ids]),  # not known without folds: one
    )


def _said_by_network(loaded: Checkpoint, plan: RunPlan, sample_ids: list[str], vectors: np.ndarray) -> np.ndarray:
    """What the network of a checkpoint says of samples: float32 [n, O]."""
    loop, device = plan.loop, _device()
    return predict_samples(
        loaded,
        plan.dataset,
        sample_ids,
        batch_size=loop.batch_size,
        device=device,
        autocast=autocast_of(loop.precision, device.type),
        vectors=vectors,
    )
