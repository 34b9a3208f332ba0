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

from aam.data.split import Split
from aam.ensemble.fit import Fold, describe, fit_ensemble
from aam.ensemble.members import Part
from aam.plan import RunPlan
from aam.predict.samples import heads_of, predict_samples
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
    everything, network = _predicted(loaded, plan)
    places = _folds(plan, target)
    if places:
        trained = [_left_out(loaded, plan, place, epochs) for place in places]
        folds, networks = [fold for fold, _ in trained], [heads for _, heads in trained]
    else:
        train, val = np.split(np.arange(len(everything.targets)), [len(plan.split.train)])
        folds = [Fold(fitted=everything.take(train), left_out=everything.take(val), network=network[val])]
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
    loaded: Checkpoint, plan: RunPlan, held_out: np.ndarray, epochs: int
) -> tuple[Fold, dict[str, np.ndarray]]:
    """A fold, and the heads of a network that is trained without it.

    It is trained for as many epochs as the run's network was, and its last weights are taken: where the learning rate
    has come down to 0, they are a little better than those of an epoch that a few groups choose (NOTES.md).
    """
    ids = np.asarray(_labelled(plan))
    print(f"ensemble: training without {len(held_out)} of {len(ids)} samples", flush=True)
    rest = np.setdiff1d(np.arange(len(ids)), held_out)
    split = Split(train=ids[rest].tolist(), val=ids[held_out].tolist())
    # They do not choose when to stop.
    without = dataclasses.replace(plan, split=split, loop=dataclasses.replace(plan.loop, patience=plan.loop.epochs))
    task = dataclasses.replace(build_task(without, _device()), verbose=False, bar_file=io.StringIO())
    fit(task, until=max(1, round(epochs / plan.epochs * without.epochs)))
    everything, network = _predicted(dataclasses.replace(loaded, model=task.model.eval()), plan)
    fold = Fold(fitted=everything.take(rest), left_out=everything.take(held_out), network=network[held_out])
    return fold, heads_of(task.model)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _predicted(loaded: Checkpoint, plan: RunPlan) -> tuple[Part, np.ndarray]:
    """All labelled samples with the features that a network reads of them, and its outputs: float32 [n, O]."""
    loop, device, sample_ids = plan.loop, _device(), _labelled(plan)
    target = loaded.spec.target
    assert target is not None
    outputs = predict_samples(
        loaded,
        plan.dataset,
        sample_ids,
        batch_size=loop.batch_size,
        chunk_size=loop.asv_chunk_size or 1024,
        base_cache=loop.base_cache,
        device=device,
        autocast=autocast_of(loop.precision, device.type),
    )
    part = Part(
        features=outputs.features,
        targets=target.encode([plan.targets[s] for s in sample_ids]),
        groups=np.array([plan.groups.get(s, "") for s in sample_ids]),  # not known without folds: one
    )
    return part, outputs.target
