"""From settings to a run: what is read, which samples are used, what is learned. Made once, by the driver.

Every worker gets the same plan, so that all agree on split, targets and sizes without talking. All faults of
a user's files surface here, before any process is started.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from aam.config import (
    DEFAULT_MAX_BP,
    DEFAULT_RAREFY_DEPTH,
    DEFAULT_TOKEN_LIMIT,
    DataConfig,
    DataContract,
    LoopConfig,
    PretrainConfig,
    RunConfig,
    TargetConfig,
    TrainConfig,
    to_dict,
)
from aam.data import synthetic
from aam.data.dataset import PreparedDataset, default_cache, prepare
from aam.data.draw import draw_sample, generator
from aam.data.metadata import numeric_column, text_column
from aam.data.split import Split, draw_split, name_some, split_from_files
from aam.data.unifrac import unweighted_unifrac
from aam.model.sizes import EncoderSizes, PredictorSizes
from aam.training.checkpoint import ModelSpec
from aam.training.losses import LossWeights
from aam.training.targets import Target, TargetTransform

T = TypeVar("T")
# What may differ when a run is resumed: it changes where and how fast a run goes, not what comes out.
FREE_ON_RESUME = ("resume", "ray", "loop.loader_workers", "loop.clear_cache", "loop.use_expandable_segments")


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """All that a worker needs to know."""

    stage: str
    """pretrain or train"""
    output_dir: Path
    dataset: PreparedDataset
    split: Split
    spec: ModelSpec
    weights: LossWeights
    loop: LoopConfig
    mask_fraction: float = 0.0
    count_mask_fraction: float = 0.0
    targets: dict[str, Any] = field(default_factory=dict)
    """Target of each sample, in its own units."""
    pretrained: Path | None = None
    """Checkpoint whose encoder is the base."""
    notes: tuple[str, ...] = ()
    """What was dropped and why, in words."""

    def describe(self, config: RunConfig) -> dict[str, Any]:
        """The plan and its settings as JSON types: `run.json` of the run folder."""
        return {
            "stage": self.stage,
            "config": to_dict(config),
            "dataset": {"folder": str(self.dataset.folder), **self.dataset.manifest},
            "split": {"train": self.split.train, "val": self.split.val, "test": self.split.test},
            "pretrained": None if self.pretrained is None else str(self.pretrained),
            "spec": self.spec.to_dict(),
            "notes": list(self.notes),
        }


def make_plan(config: RunConfig, pretrained: tuple[Path, ModelSpec] | None = None) -> RunPlan:
    """Plan a run.

    Parameters
    ----------
    config : PretrainConfig or TrainConfig
        Settings.
    pretrained : tuple of Path and ModelSpec, optional
        The checkpoint that `--pretrained` names.

    Raises
    ------
    ValueError
        For anything in files or settings that cannot work; names the culprit and the way out.
    """
    config = with_builtin_data(config)
    base = None if pretrained is None else pretrained[1]
    sizes, contract = _encoder_sizes(config, base), _contract(config, base)
    use_tree = config.loss.base_weight > 0
    dataset = prepare(config.data, max_bp=sizes.max_bp, use_tree=use_tree)
    notes = list(dataset.manifest["notes"])
    if config.data.tree is not None and not use_tree:
        notes.append("the tree is not used: --base-weight is 0")
    dropped = _too_shallow(dataset, contract.rarefy_depth)
    targets = _targets(config, dataset, dropped) if isinstance(config, TrainConfig) else {}
    notes += _dropped_notes(dropped)
    usable = [s for s in dataset.sample_ids if s not in dropped]
    split = _split(config, dataset, usable, dropped, targets)
    notes += split.notes
    _check_sizes(split, config, use_tree)
    spec = ModelSpec(encoder=sizes, contract=contract)
    if isinstance(config, TrainConfig):
        spec = _predictor_spec(spec, config, split, targets)
    if use_tree:
        mean, variance = estimate_distances(dataset, split.train, contract)
        spec = dataclasses.replace(spec, distance_mean=mean, distance_variance=variance)
    return RunPlan(
        stage="pretrain" if isinstance(config, PretrainConfig) else "train",
        output_dir=config.output_dir,
        dataset=dataset,
        split=split,
        spec=spec,
        weights=_weights(config),
        loop=config.loop,
        mask_fraction=_mask_fraction(config),
        count_mask_fraction=_count_mask_fraction(config),
        targets=targets,
        pretrained=None if pretrained is None else pretrained[0],
        notes=tuple(notes),
    )


def with_builtin_data(config: RunConfig) -> RunConfig:
    """The same settings with the built-in synthetic dataset in the place of a table that was not given."""
    if config.data.table is not None:
        return config
    settings = synthetic.SyntheticConfig()
    cache = config.data.cache_dir or default_cache()
    folder = synthetic.ensure(cache / f"synthetic-{settings.samples}-{settings.seed}", settings)
    data = dataclasses.replace(
        config.data,
        table=folder / "table.biom",
        tree=folder / "tree.nwk",
        metadata=folder / "metadata.tsv",
        group_column=config.data.group_column or "subject",
    )
    if isinstance(config, TrainConfig) and config.loss.target is None:
        target = "site" if config.loss.classifier else "gradient"
        config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, target=target))
    return dataclasses.replace(config, data=data)


def _decide(given: T | None, pretrained: T | None, default: T, flag: str | None = None) -> T:
    """What was given, else what the pretrained model has, else the default.

    With a flag, a size that the pretrained model does not have is an error.
    """
    if flag is not None and given is not None and pretrained is not None and given != pretrained:
        raise ValueError(f"--{flag} {given} does not fit --pretrained, which has {pretrained}: leave it out")
    if given is not None:
        return given
    return default if pretrained is None else pretrained


def _encoder_sizes(config: RunConfig, base: ModelSpec | None) -> EncoderSizes:
    model, had = config.model, None if base is None else base.encoder
    layers = _decide(model.attention_layers, None, 4) if had is None else had.attention_layers
    sizes = EncoderSizes(
        embedding_dim=_decide(model.embedding_dim, had and had.embedding_dim, 128, "embedding-dim"),
        attention_heads=_decide(model.attention_heads, had and had.attention_heads, 4, "attention-heads"),
        attention_layers=layers,
        asv_layers=_decide(model.asv_layers, had and had.asv_layers, layers, "asv-layers"),
        dropout=_decide(model.dropout, had and had.dropout, 0.1),
        kmer=_decide(model.kmer, None if had is None else had.kmer, 5, "kmer"),
        max_bp=_decide(config.data.max_bp, had and had.max_bp, DEFAULT_MAX_BP, "max-bp"),
    )
    if sizes.embedding_dim % sizes.attention_heads:
        raise ValueError(
            f"--embedding-dim {sizes.embedding_dim} must be a multiple of --attention-heads {sizes.attention_heads}"
        )
    return sizes


def _contract(config: RunConfig, base: ModelSpec | None) -> DataContract:
    data, had = config.data, None if base is None else base.contract
    return DataContract(
        max_bp=_decide(data.max_bp, had and had.max_bp, DEFAULT_MAX_BP),
        rarefy_depth=_decide(data.rarefy_depth, None if had is None else had.rarefy_depth, DEFAULT_RAREFY_DEPTH),
        token_limit=_decide(data.token_limit, had and had.token_limit, DEFAULT_TOKEN_LIMIT),
        token_choice=_decide(data.token_choice, had and had.token_choice, "abundance"),
        seed=config.loop.seed,
    )


def _too_shallow(dataset: PreparedDataset, depth: int) -> dict[str, str]:
    """Samples with fewer reads than the depth, and the reason to drop them.

    Raises
    ------
    ValueError
        Where none is left.
    """
    dropped = {
        sample: f"{reads} reads, fewer than --rarefy-depth {depth}"
        for sample, reads in zip(dataset.sample_ids, dataset.depths.tolist(), strict=True)
        if reads < depth
    }
    if len(dropped) == len(dataset.sample_ids):
        raise ValueError(
            f"all {len(dropped)} samples have fewer reads than --rarefy-depth {depth} (the deepest has "
            f"{dataset.depths.max()}): lower --rarefy-depth"
        )
    return dropped


def _dropped_notes(dropped: dict[str, str]) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for sample, reason in dropped.items():
        by_reason.setdefault(reason.split(",", 1)[-1].strip(), []).append(sample)
    return [f"{len(ids)} samples dropped: {reason} ({name_some(ids)})" for reason, ids in by_reason.items()]


def _metadata(config: RunConfig, dataset: PreparedDataset, why: str):
    if config.data.metadata is None or dataset.metadata is None:
        raise ValueError(f"{why} needs --metadata")
    return dataset.metadata


def _targets(config: TrainConfig, dataset: PreparedDataset, dropped: dict[str, str]) -> dict[str, Any]:
    """Target of each sample that has one; those without are added to `dropped`."""
    frame, column = _metadata(config, dataset, "--target"), config.loss.target
    assert column is not None
    absent = [s for s in dataset.sample_ids if s not in frame.index and s not in dropped]
    if absent and config.data.missing_samples == "error" and config.data.train_ids is None:
        raise ValueError(
            f"{config.data.metadata}: {len(absent)} samples of the table are not in it ({name_some(absent)}); "
            "add them, or drop them with --missing-samples ignore"
        )
    dropped |= dict.fromkeys(absent, "not in the metadata")
    used = frame.loc[[s for s in frame.index if s not in dropped]]
    source = config.data.metadata
    if config.loss.classifier:
        values = text_column(used, column, source=source)
        present = values.notna()
    else:
        values = numeric_column(used, column, source=source)
        present = values.notna()
    without = [s for s, has in present.items() if not has]
    dropped |= dict.fromkeys(map(str, without), f"no value in column {column!r}")
    found = {str(s): v for s, v in values[present].items()}
    if not found:
        raise ValueError(f"{source}: column {column!r} has no value for any sample that can be used")
    return found


def _split(
    config: RunConfig,
    dataset: PreparedDataset,
    usable: Sequence[str],
    dropped: dict[str, str],
    targets: dict[str, Any],
) -> Split:
    data = config.data
    files = {"train": data.train_ids, "val": data.val_ids, "test": data.test_ids}
    if data.train_ids is not None:
        return split_from_files(files, usable, dropped)
    notes: list[str] = []
    kept_back = []
    if data.test_ids is not None:
        part = split_from_files({"train": None, "val": None, "test": data.test_ids}, usable, dropped)
        kept_back, usable = part.test, [s for s in usable if s not in set(part.test)]
        notes += [n for n in part.notes if "in no id file" not in n]
    groups = None
    if data.group_column is not None:
        frame = _metadata(config, dataset, "--group-column")
        column = text_column(frame, data.group_column, source=data.metadata)
        without = [s for s in usable if s not in column.index or column[s] is None or column[s] != column[s]]
        if without:
            raise ValueError(
                f"{data.metadata}: column {data.group_column!r} has no value for {len(without)} samples "
                f"({name_some(without)}): fill it in, or list the samples by --train-ids and --val-ids"
            )
        groups = [str(column[s]) for s in usable]
    classes = [targets[s] for s in usable] if isinstance(config, TrainConfig) and config.loss.classifier else None
    drawn = draw_split(
        usable, val_fraction=data.val_fraction, seed=config.loop.seed, groups=groups, classes=classes
    )
    return dataclasses.replace(drawn, test=kept_back, notes=tuple(notes))


def _check_sizes(split: Split, config: RunConfig, pairs: bool) -> None:
    """Each worker needs a sample of every batch; UniFrac needs pairs."""
    workers = config.ray.num_workers
    for part, ids in (("training", split.train), ("validation", split.val)):
        least = max(workers, 2 if pairs else 1)
        if len(ids) < least:
            raise ValueError(
                f"{len(ids)} {part} samples are left, {least} are needed for {workers} workers: "
                "use more samples, another split, or fewer workers"
            )
        smallest = len(ids) // max(1, min(-(-len(ids) // config.loop.batch_size), len(ids) // 2))
        assert smallest >= min(least, len(ids))


def _predictor_spec(
    spec: ModelSpec, config: TrainConfig, split: Split, targets: dict[str, Any]
) -> ModelSpec:
    loss = config.loss
    assert loss.target is not None
    target = make_target(loss, [targets[s] for s in split.train])
    target.encode([targets[s] for s in split.val])  # refuses a class that only the validation samples have
    predictor = PredictorSizes(
        attention_layers=_decide(config.model.attention_layers, None, 4),
        dropout=_decide(config.model.dropout, None, 0.1),
        outputs=target.outputs,
        count_head=loss.count_weight > 0,
    )
    return dataclasses.replace(spec, predictor=predictor, target=target, freeze_base=config.freeze_base)


def make_target(loss: TargetConfig, training_values: Sequence[Any]) -> Target:
    """Fit what there is to fit about the target on the training samples."""
    assert loss.target is not None
    if not loss.classifier:
        transform = TargetTransform.fit(loss.target_transform, np.asarray(training_values, dtype=np.float64))
        return Target(column=loss.target, transform=transform, loss=loss.target_loss, quantile=loss.quantile)
    classes, numbers = np.unique(np.asarray(training_values, dtype=str), return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"column {loss.target!r} has one class only in the training samples: {classes[0]!r}")
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


def estimate_distances(
    dataset: PreparedDataset, sample_ids: Sequence[str], contract: DataContract, *, blocks: int = 16, size: int = 32
) -> tuple[float, float]:
    """Mean and variance of the UniFrac distances of random pairs of samples."""
    assert dataset.paths is not None
    values = []
    for block in range(blocks):
        rng = generator(contract.seed, "distances", block)
        chosen = rng.choice(len(sample_ids), min(size, len(sample_ids)), replace=False)
        draws = []
        for i in chosen:
            asvs, counts = dataset.sample(dataset.row[sample_ids[i]])
            draws.append(draw_sample(asvs, counts, sample_ids[i], contract, epoch=1)[0])
        distances = unweighted_unifrac(draws, dataset.paths)
        values.append(distances[np.triu_indices(len(chosen), k=1)])
    everything = np.concatenate(values)
    variance = float(everything.var())
    if variance == 0:
        raise ValueError(
            f"all training samples are at the same UniFrac distance ({everything[0]:g}): nothing to learn"
        )
    return float(everything.mean()), variance


def _weights(config: RunConfig) -> LossWeights:
    if isinstance(config, PretrainConfig):
        return LossWeights(base=config.loss.base_weight, nuc=config.loss.nuc_weight)
    loss = config.loss
    return LossWeights(target=loss.target_weight, count=loss.count_weight, base=loss.base_weight)


def _mask_fraction(config: RunConfig) -> float:
    return config.loss.mask_fraction if isinstance(config, PretrainConfig) and config.loss.nuc_weight else 0.0


def _count_mask_fraction(config: RunConfig) -> float:
    return config.loss.count_mask_fraction if isinstance(config, TrainConfig) and config.loss.count_weight else 0.0


def check_resumable(saved: dict[str, Any], config: RunConfig, folder: Path) -> None:
    """A run goes on with the settings that it was started with; refuse others, by their flags."""
    now = json.loads(json.dumps(to_dict(config)))
    changed = [
        f"--{key.split('.')[-1].replace('_', '-')}"
        for key, value in _flat(now).items()
        if _flat(saved["config"]).get(key) != value and not key.startswith(FREE_ON_RESUME)
    ]
    if changed:
        raise ValueError(
            f"{folder}: the run was started with other values of {', '.join(sorted(changed))}; resume it with "
            "the same, or start a new run in another --output-dir"
        )


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
