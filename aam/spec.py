"""What a run's model is: sizes, data contract, target, and the scale of the distances it is to learn."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from aam.config import (
    DEFAULT_HEAD_DROPOUT,
    DEFAULT_MAX_BP,
    DEFAULT_RAREFY_DEPTH,
    DEFAULT_TOKEN_LIMIT,
    DataContract,
    RunConfig,
    TargetConfig,
    TrainConfig,
    UnifracMetric,
)
from aam.data.batches import exact_unifrac
from aam.data.dataset import PreparedDataset
from aam.data.draw import draw_sample, generator
from aam.data.split import Split
from aam.model.sizes import EncoderSizes, PredictorSizes
from aam.training.checkpoint import ModelSpec
from aam.training.targets import Target, TargetTransform, UnifracTarget

T = TypeVar("T")


def _decide(given: T | None, pretrained: T | None, default: T, flag: str | None = None) -> T:
    """What was given, else what the pretrained model has, else the default.

    With a flag, a size that the pretrained model does not have is an error.
    """
    if flag is not None and given is not None and pretrained is not None and given != pretrained:
        raise ValueError(f"--{flag} {given} does not fit --pretrained, which has {pretrained}: leave it out")
    if given is not None:
        return given
    return default if pretrained is None else pretrained


def encoder_sizes(config: RunConfig, base: ModelSpec | None) -> EncoderSizes:
    """Sizes of the encoder: as asked for, or as the pretrained model has them."""
    model, had = config.model, None if base is None else base.encoder
    sizes = EncoderSizes(
        embedding_dim=_decide(model.embedding_dim, had and had.embedding_dim, 128, "embedding-dim"),
        clades=_decide(model.clades, had and had.clades, 512, "clades"),
        attention_heads=_decide(model.attention_heads, had and had.attention_heads, 4, "attention-heads"),
        asv_layers=_decide(model.asv_layers, None if had is None else had.asv_layers, 0, "asv-layers"),
        dropout=_decide(model.dropout, had and had.dropout, 0.1),
        kmer=_decide(model.kmer, None if had is None else had.kmer, 5, "kmer"),
        max_bp=_decide(config.data.max_bp, had and had.max_bp, DEFAULT_MAX_BP, "max-bp"),
    )
    if not sizes.kmer and not sizes.asv_layers:
        raise ValueError("--kmer 0 without a nucleotide stack leaves nothing to read: give --asv-layers 2, say")
    if sizes.embedding_dim % sizes.attention_heads:
        raise ValueError(
            f"--embedding-dim {sizes.embedding_dim} must be a multiple of --attention-heads {sizes.attention_heads}"
        )
    return sizes


def contract_of(config: RunConfig, base: ModelSpec | None) -> DataContract:
    """How samples are drawn: as asked for, or as for the pretrained model."""
    data, had = config.data, None if base is None else base.contract
    return DataContract(
        max_bp=_decide(data.max_bp, had and had.max_bp, DEFAULT_MAX_BP),
        rarefy_depth=_decide(data.rarefy_depth, None if had is None else had.rarefy_depth, DEFAULT_RAREFY_DEPTH),
        token_limit=_decide(data.token_limit, had and had.token_limit, DEFAULT_TOKEN_LIMIT),
        token_choice=_decide(data.token_choice, had and had.token_choice, "abundance"),
        seed=config.loop.seed,
    )


def predictor_spec(
    spec: ModelSpec, config: TrainConfig, dataset: PreparedDataset, split: Split, targets: dict[str, Any]
) -> ModelSpec:
    """Add what stage 2 has on top of the encoder, and the target as fitted on the training samples."""
    loss = config.loss
    assert loss.target is not None
    target = make_target(loss, [targets[s] for s in split.train])
    with np.errstate(divide="ignore", invalid="ignore"):
        encoded = target.encode([targets[s] for s in split.val])  # refuses a class that only these have
    if not np.isfinite(encoded).all():
        raise ValueError(
            f"column {loss.target!r}: --target-transform {loss.target_transform} is not defined for all "
            "validation samples; choose another"
        )
    predictor = PredictorSizes(
        attention_layers=loss.head_layers,
        dropout=_decide(config.model.dropout, None, DEFAULT_HEAD_DROPOUT),
        outputs=target.outputs,
        count_head=config.count_weight > 0,
        known_asvs=loss.known_asvs,
        heads=loss.target_heads,
        longest_known=int(dataset.lengths.max()),
    )
    return dataclasses.replace(spec, predictor=predictor, target=target, freeze_base=config.freeze_base)


def make_target(loss: TargetConfig, training_values: Sequence[Any]) -> Target:
    """Fit what there is to fit about the target on the training samples."""
    assert loss.target is not None
    if not loss.classifier:
        transform = TargetTransform.fit(loss.target_transform, np.asarray(training_values, dtype=np.float64))
        quantiles = tuple(sorted(loss.quantiles)) if loss.target_loss == "quantile" else ()
        return Target(column=loss.target, transform=transform, loss=loss.target_loss, quantiles=quantiles)
    classes, numbers = np.unique(np.asarray(training_values, dtype=str), return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"column {loss.target!r} has one class only in the training samples: {str(classes[0])!r}")
    if len(classes) > len(training_values) / 2:
        raise ValueError(
            f"column {loss.target!r} has {len(classes)} classes in {len(training_values)} training samples: "
            "too few of each to learn (a number? leave --classifier out)"
        )
    balanced = len(training_values) / (len(classes) * numbers)
    return Target(
        column=loss.target,
        classes=tuple(classes.tolist()),
        loss="cross_entropy",
        class_weights=tuple(balanced.tolist()) if loss.class_weights == "balanced" else (),
    )


def estimate_unifrac(
    dataset: PreparedDataset,
    sample_ids: Sequence[str],
    contract: DataContract,
    metrics: Sequence[UnifracMetric],
    *,
    blocks: int = 16,
    size: int = 32,
) -> tuple[UnifracTarget, ...]:
    """Mean and variance of each metric among random pairs of samples; of Faith's PD, among random samples.

    Raises
    ------
    ValueError
        Where a metric is the same for all.
    """
    values: dict[UnifracMetric, list[np.ndarray]] = {metric: [] for metric in metrics}
    for block in range(blocks):
        rng = generator(contract.seed, "distances", block)
        chosen = rng.choice(len(sample_ids), min(size, len(sample_ids)), replace=False)
        draws = []
        for sample_id in (sample_ids[int(i)] for i in chosen):
            asvs, counts = dataset.sample(dataset.row[sample_id])
            draws.append(draw_sample(asvs, counts, sample_id, contract, epoch=1))
        for metric in metrics:
            found = exact_unifrac(metric, draws, dataset.paths)
            values[metric].append(found if found.ndim == 1 else found[np.triu_indices(len(found), k=1)])
    learned = []
    for metric in metrics:
        everything = np.concatenate(values[metric])
        if np.ptp(everything) == 0:
            raise ValueError(
                f"--unifrac-metric {metric}: it is {everything[0]:g} throughout the training samples: nothing to learn"
            )
        learned.append(UnifracTarget(metric=metric, mean=float(everything.mean()), variance=float(everything.var())))
    return tuple(learned)
