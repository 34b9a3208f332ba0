"""From a plan to a task: what each worker builds before the loop starts."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from aam.config import LoopConfig
from aam.data.batches import BatchPlan, build_batch
from aam.data.composition import prevalent_asvs
from aam.model.layers import Transformer
from aam.model.sequence_encoder import SequenceEncoder
from aam.model.sequence_predictor import SequencePredictor
from aam.plan import RunPlan
from aam.training import checkpoint
from aam.training.base_cache import BaseCache, encoder_of
from aam.training.loop import Report, Task
from aam.training.memory import clear_cache
from aam.training.step import Objective, autocast_of


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
        distance_mean=plan.spec.distance_mean,
        distance_variance=plan.spec.distance_variance,
    )
    train, val = (_batch_plan(plan, part) for part in ("train", "val"))
    encoder = encoder_of(model)
    if plan.weights.base > 0 and plan.pretrained is None:
        calibrate_distances(encoder, train, objective, device)
    if isinstance(model, SequencePredictor) and model.target_groups is not None:
        _place_groups(model, train, config)
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
        unifrac=plan.weights.base > 0,
        mask_fraction=plan.mask_fraction,
        count_mask_fraction=plan.count_mask_fraction,
        fixed_rarefaction=plan.fixed_rarefaction,
        targets=None if target is None else target.encode([plan.targets[s] for s in sample_ids]),
    )


@torch.no_grad()
def calibrate_distances(encoder: SequenceEncoder, plan: BatchPlan, objective: Objective, device: torch.device) -> None:
    """Set offset and scale of the distance head so that the first predictions have the true mean and spread.

    New embeddings differ far more in their distances than samples do. Without this, the head's first lesson is
    to lower that spread, and it costs the encoder its first hundreds of updates.
    """
    rows = min(len(plan.sample_ids), max(plan.batch_size, 32))
    batch = build_batch(plan, np.arange(rows), epoch=1, index=0).to(device)
    was_training = encoder.training
    embedding = encoder.eval()(batch).embedding
    encoder.train(was_training)
    apart = torch.pdist(embedding.cpu())
    assert apart.mean() > 0, "samples that differ have the same embedding"
    spread = apart.std().item() if len(apart) > 1 else 0.0
    scale = objective.distance_variance**0.5 / spread if spread > 0 else 1.0
    # With a near-constant distance to start from, the scale that gives the true mean is already the smaller.
    scale = min(scale, objective.distance_mean / apart.mean().item())
    nn.init.constant_(encoder.distance_log_scale, math.log(scale))
    nn.init.constant_(encoder.distance_offset, objective.distance_mean - scale * apart.mean().item())


def _place_groups(model: SequencePredictor, plan: BatchPlan, config: LoopConfig) -> None:
    """Let the groups of ASVs start from those of the training samples; nothing of the target is used."""
    dataset = plan.dataset
    known = prevalent_asvs(dataset.sample(dataset.row[sample_id])[0] for sample_id in plan.sample_ids)
    was_training = model.base.training
    model.base.eval()
    autocast = autocast_of(config.precision, next(model.parameters()).device.type)
    is_kept = model.freeze_base and config.base_cache
    cache = BaseCache(model, dataset, None, autocast, chunk_size=config.asv_chunk_size, on_disk=is_kept)
    cache.encode_together(known)
    model.base.train(was_training)
    assert model.target_groups is not None
    model.target_groups.start_from(torch.from_numpy(cache.vectors.rows[known]), config.seed)


def _freeze_unused(encoder: SequenceEncoder, plan: RunPlan) -> None:
    """Parts that no loss of this run reaches: out of the optimizer, and DDP must not wait for them."""
    if plan.weights.nuc == 0:
        encoder.asv_encoder.nucleotide_head.requires_grad_(False)
    if plan.weights.base == 0:
        encoder.embedding.requires_grad_(False)
        encoder.distance_offset.requires_grad_(False)
        encoder.distance_log_scale.requires_grad_(False)
    if plan.stage == "pretrain" and plan.weights.base == 0:
        for part in (encoder.abundance, encoder.transformer, encoder.summary, encoder.asv_encoder.pool):
            part.requires_grad_(False)
        encoder.asv_encoder.norm.requires_grad_(False)
        if encoder.asv_encoder.kmer:
            encoder.asv_encoder.kmer_head.requires_grad_(False)
            encoder.asv_encoder.kmer_norm.requires_grad_(False)
