"""Adding an ensemble to the best checkpoint of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from aam.data.batches import BatchPlan, EpochBatches
from aam.data.draw import FIXED_DRAW
from aam.ensemble.fit import Part, describe, fit_ensemble
from aam.plan import RunPlan
from aam.predict.samples import fixed_draws, open_cache, predict_samples
from aam.training import checkpoint
from aam.training.checkpoint import Checkpoint
from aam.training.logs import VALIDATION, write_validation
from aam.training.metrics import EpochArrays
from aam.training.step import autocast_of


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
    train, val = (_part(loaded, plan, part) for part in ("train", "val"))
    ensemble = fit_ensemble(train, val, loaded.spec.target, seed=plan.loop.seed)
    ensemble.save(best)
    together = ensemble.outputs(val.network, val.draws, val.vectors, loaded.spec.target)
    arrays = EpochArrays(target=together, target_true=val.targets)
    write_validation(plan.output_dir / VALIDATION, plan.split.val, arrays, loaded.spec.target)
    return describe(ensemble, loaded.spec.target)


def _part(loaded: Checkpoint, plan: RunPlan, part: str) -> Part:
    """A part of the split, with what the network says of it."""
    sample_ids, loop = getattr(plan.split, part), plan.loop
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autocast = autocast_of(loop.precision, device.type)
    batches = BatchPlan(
        dataset=plan.dataset, sample_ids=sample_ids, contract=loaded.spec.contract, batch_size=loop.batch_size
    )
    loaded.model.to(device).eval()
    cache = open_cache(
        loaded, plan.dataset, autocast, chunk_size=loop.asv_chunk_size or 1024, base_cache=loop.base_cache
    )
    cache.fill([EpochBatches(batches, FIXED_DRAW)])
    vectors = cache.vectors.rows
    network = predict_samples(
        loaded, plan.dataset, sample_ids, batch_size=loop.batch_size, device=device, autocast=autocast, vectors=vectors
    )
    assert loaded.spec.target is not None
    targets = loaded.spec.target.encode([plan.targets[s] for s in sample_ids])
    return Part(draws=fixed_draws(batches), vectors=vectors, targets=targets, network=network)
