"""From a plan to a task: what each worker builds before the loop starts."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch

from aam.config import LoopConfig
from aam.data.batches import BatchPlan, EpochBatches
from aam.data.composition import prevalent_asvs
from aam.data.draw import FIXED_DRAW, generator
from aam.model.layers import Transformer
from aam.model.sequence_encoder import SequenceEncoder
from aam.model.sequence_predictor import SequencePredictor
from aam.plan import RunPlan
from aam.training import checkpoint
from aam.training.base_cache import BaseCache, encoder_of
from aam.training.loop import Report, Task
from aam.training.memory import clear_cache
from aam.training.step import Objective, autocast_of

MOST_STANDARDISED = 10_000
"""ASVs that settle the mean and scale of k-mer frequencies."""


def build_task(
    plan: RunPlan, device: torch.device, *, report: Report | None = None, folder: Path | None = None
) -> Task:
    """Build model and batches; the same on every worker.

    Parameters
    ----------
    plan : RunPlan
        Made by the driver.
    device : torch.device
        Of this worker.
    report : callable, optional
        See `aam.training.loop.Task`.
    folder : Path, optional
        Run folder for the logs.
    """
    config: LoopConfig = plan.loop
    torch.manual_seed(config.seed)
    model = plan.spec.build()
    if plan.pretrained is not None:
        assert plan.spec.predictor is not None
        source = encoder_of(checkpoint.load(plan.pretrained).model)
        checkpoint.load_weights(encoder_of(model), source.state_dict(), source=plan.pretrained)
    model.to(device)
    objective = Objective(
        weights=plan.weights,
        target=plan.spec.target,
        unifrac=plan.spec.unifrac if plan.weights.base > 0 else (),
    )
    train, val = (_batch_plan(plan, part) for part in ("train", "val"))
    encoder = encoder_of(model)
    if plan.pretrained is None:
        _start_encoder(encoder, train, plan)
    if isinstance(model, SequencePredictor):
        _start_features(model, train, config)
    _freeze_unused(encoder, plan)
    encoder.asv_encoder.after_chunk = partial(clear_cache, config, "batch")
    for module in model.modules():
        if isinstance(module, Transformer):
            module.recompute = config.gradient_checkpointing
    return Task(
        spec=plan.spec,
        model=model,
        objective=objective,
        train=train,
        val=val,
        config=config,
        folder=folder,
        report=report,
    )


def _batch_plan(plan: RunPlan, part: str) -> BatchPlan:
    sample_ids = getattr(plan.split, part)
    target = plan.spec.target
    return BatchPlan(
        dataset=plan.dataset,
        sample_ids=sample_ids,
        contract=plan.spec.contract,
        batch_size=plan.loop.batch_size,
        unifrac=tuple(asked.metric for asked in plan.spec.unifrac) if plan.weights.base > 0 else (),
        made_up_fraction=plan.made_up_fraction,
        kmers=4**plan.spec.encoder.kmer if plan.spec.encoder.kmer else 0,
        kmer_dropout=plan.kmer_dropout,
        mask_fraction=plan.mask_fraction,
        count_mask_fraction=plan.count_mask_fraction,
        fixed_rarefaction=plan.fixed_rarefaction,
        targets=None if target is None else target.encode([plan.targets[s] for s in sample_ids]),
    )


def _start_encoder(encoder: SequenceEncoder, plan: BatchPlan, run: RunPlan) -> None:
    """Take the units of a new encoder's inputs and outputs from the training samples."""
    kmers, dataset = encoder.asv_encoder.kmers, plan.dataset
    if kmers is not None:
        shown = np.unique(np.concatenate([dataset.sample(dataset.row[s])[0] for s in plan.sample_ids]))
        drawn = generator(run.loop.seed, "k-mers").permutation(shown)[:MOST_STANDARDISED]
        kmers.standardise(torch.from_numpy(dataset.tokens[np.sort(drawn)]).to(kmers.mean.device))
    for asked in run.spec.unifrac:
        if asked.metric == "faith_pd":
            encoder.clades.start_pd_at(asked.mean)


@torch.no_grad()
def _start_features(model: SequencePredictor, plan: BatchPlan, config: LoopConfig) -> None:
    """Let the target head know the training samples: their most prevalent ASVs, and the spread of its features.

    Nothing of the target is used.
    """
    dataset, features = plan.dataset, model.features
    device = features.mean.device
    was_training = model.base.training
    model.base.eval()
    autocast = autocast_of(config.precision, device.type)
    is_kept = model.freeze_base and config.base_cache
    cache = BaseCache(model, dataset, autocast, chunk_size=config.asv_chunk_size, on_disk=is_kept)
    if features.known:
        known = prevalent_asvs((dataset.sample(dataset.row[s])[0] for s in plan.sample_ids), most=features.known)
        cache.encode_together(known)
        vectors = torch.from_numpy(cache.vectors.rows[known]).to(device)
        features.know(torch.from_numpy(dataset.tokens[known]).to(device), model.base.clades(vectors))
    batches = EpochBatches(plan, FIXED_DRAW)
    cache.fill([batches], verbose=False)
    read = []
    for index in range(len(batches)):
        host_batch = batches[index]
        vectors, batch = cache.vectors_of(host_batch), host_batch.to(device)
        read.append(features(batch, model.base(batch, cached_vectors=vectors)))
    features.standardise(torch.cat(read))
    model.base.train(was_training)


def _freeze_unused(encoder: SequenceEncoder, plan: RunPlan) -> None:
    """Parts that no loss of this run reaches: out of the optimizer, and DDP must not wait for them."""
    nucleotides, clades = encoder.asv_encoder.nucleotides, encoder.clades
    if nucleotides is not None and plan.weights.nuc == 0:
        nucleotides.head.requires_grad_(False)
    learned = {asked.metric for asked in plan.spec.unifrac} if plan.weights.base > 0 else set()
    if "faith_pd" not in learned:
        clades.log_pd_scale.requires_grad_(False)
    if not learned:
        clades.raw_length.requires_grad_(False)
        clades.tip.requires_grad_(False)
    if plan.stage == "pretrain" and not learned:
        clades.requires_grad_(False)
        assert nucleotides is not None
        for part in (nucleotides.pool, nucleotides.norm, encoder.asv_encoder.kmers):
            if part is not None:
                part.requires_grad_(False)
