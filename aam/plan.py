"""From settings to a run: what is read, which samples are used, what is learned. Made once, by the driver.

Every worker gets the same plan, so that all agree on split, targets and sizes without talking. All faults of
a user's files surface here, before any process is started.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aam.config import DEFAULT_COUNT_WEIGHT, LoopConfig, PretrainConfig, RunConfig, TrainConfig, UnifracMetric, to_dict
from aam.data import synthetic
from aam.data.dataset import PreparedDataset
from aam.data.prepare import default_cache, prepare
from aam.data.sources import content_hash
from aam.data.split import Split
from aam.model.sizes import EncoderSizes
from aam.samples import choose_samples, groups_of_labelled
from aam.spec import contract_of, encoder_sizes, estimate_unifrac, predictor_spec
from aam.training.checkpoint import ModelSpec
from aam.training.losses import LossWeights
from aam.training.schedule import run_length
from aam.training.trackers import check_trackers

FREE_ON_RESUME = (
    "preset",  # the settings that it gave are compared
    "resume",
    "resume_or_start",
    "output_dir",
    "ray",
    "data.cache_dir",
    "loop.loader_workers",
    "loop.clear_cache",
    "loop.base_cache",
    "loop.gradient_checkpointing",
    "loop.asv_chunk_size",  # what a run that had no memory left is resumed with
    "loop.report",
    "loop.use_expandable_segments",
    "loop.wandb",
    "loop.mlflow",
)
"""What may differ when a run is resumed: it changes where and how fast a run goes, not what comes out."""


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
    made_up_fraction: float = 0.0
    kmer_dropout: float = 0.0
    count_mask_fraction: float = 0.0
    fixed_rarefaction: bool = False
    targets: dict[str, Any] = field(default_factory=dict)
    """Target of each sample, in its own units."""
    ensemble_folds: int = 0
    """Folds of the labelled samples that weigh the members of an ensemble; 0: the validation samples do."""
    groups: dict[str, str] = field(default_factory=dict)
    """Group of each training and validation sample, where there are such folds."""
    pretrained: Path | None = None
    """Checkpoint whose encoder is the base."""
    notes: tuple[str, ...] = ()
    """What was dropped and why, in words."""

    @property
    def epochs(self) -> int:
        """Epochs of the run, if its patience lasts."""
        return run_length(self.loop, len(self.split.train))[0]

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


def make_plan(
    config: RunConfig,
    pretrained: tuple[Path, ModelSpec] | None = None,
    base_record: dict[str, Any] | None = None,
) -> RunPlan:
    """Plan a run.

    Parameters
    ----------
    config : PretrainConfig or TrainConfig
        Settings.
    pretrained : tuple of Path and ModelSpec, optional
        The checkpoint that `--pretrained` names.
    base_record : dict, optional
        `run.json` of the run that it is of.

    Raises
    ------
    ValueError
        For anything in files or settings that cannot work; names the culprit and the way out.
    """
    check_trackers(config.loop)
    asked, config = config, with_builtin_data(config)
    base = None if pretrained is None else pretrained[1]
    sizes, contract = encoder_sizes(config, base), contract_of(config, base)
    weights, use_tree = _weights(config, sizes), config.loss.base_weight > 0
    is_open = config.data.max_bp is None and base is None
    reads_any_length = not sizes.asv_layers and config.data.max_bp is None
    dataset = prepare(config.data, max_bp=None if is_open or reads_any_length else sizes.max_bp, use_tree=use_tree)
    split, targets, notes = choose_samples(config, dataset, contract.rarefy_depth)
    # Of the table: a stage without the tree, or a prediction, keeps sequences that the tree lacks.
    longest = len(dataset.manifest["longest_sequence"])
    if is_open and longest > sizes.max_bp:
        notes.append(f"--max-bp {longest}: the longest sequence of the table")
        sizes = dataclasses.replace(sizes, max_bp=longest)
        contract = dataclasses.replace(contract, max_bp=longest)
    if pretrained is not None:
        notes += _seen_by_base(base_record, split)
    _check_sizes(split, config, use_tree)
    if asked.data.tree is not None and not use_tree:
        notes.append("the tree is not used: --base-weight is 0")
    spec = ModelSpec(encoder=sizes, contract=contract)
    if isinstance(config, TrainConfig):
        spec = predictor_spec(spec, config, dataset, split, targets)
        if config.freeze_base and config.loss.count_weight is None:
            notes.append(
                "no count head: beside a frozen base it trains nothing that the target uses (--count-weight "
                f"{DEFAULT_COUNT_WEIGHT} adds it)"
            )
    epochs, updates = run_length(config.loop, len(split.train))
    if epochs < config.loop.epochs:
        notes.append(f"--max-updates {updates}: ends in epoch {epochs}, not after {config.loop.epochs}")
    if use_tree:
        metrics: tuple[UnifracMetric, ...] = ("unweighted",)
        if isinstance(config, PretrainConfig):
            metrics = config.loss.unifrac_metric
        elif base is not None and base.unifrac:
            metrics = tuple(learned.metric for learned in base.unifrac)
        spec = dataclasses.replace(spec, unifrac=estimate_unifrac(dataset, split.train, contract, metrics))
    elif base is not None and spec.freeze_base:
        spec = dataclasses.replace(spec, unifrac=base.unifrac)
    folds, groups = 0, {}
    if isinstance(config, TrainConfig) and config.loss.ensemble and config.freeze_base:
        folds = config.loss.ensemble_folds
        if folds:
            groups, found_out = groups_of_labelled(config, dataset, split)
            notes += found_out
    return RunPlan(
        stage="pretrain" if isinstance(config, PretrainConfig) else "train",
        output_dir=config.output_dir,
        dataset=dataset,
        split=split,
        spec=spec,
        weights=weights,
        loop=config.loop,
        mask_fraction=config.loss.mask_fraction if isinstance(config, PretrainConfig) and weights.nuc else 0.0,
        kmer_dropout=config.loss.kmer_dropout if isinstance(config, PretrainConfig) and use_tree else 0.0,
        made_up_fraction=config.loss.made_up_fraction if isinstance(config, PretrainConfig) and use_tree else 0.0,
        count_mask_fraction=_count_mask_fraction(config),
        fixed_rarefaction=config.data.fixed_rarefaction,
        targets=targets,
        ensemble_folds=folds,
        groups=groups,
        pretrained=None if pretrained is None else pretrained[0],
        notes=tuple(notes),
    )


def _seen_by_base(record: dict[str, Any] | None, split: Split) -> list[str]:
    """Say which samples that are held back from training the base was trained on."""
    if record is None:
        return []
    trained, chose = set(record["split"]["train"]), set(record["split"]["val"])
    notes = []
    for part, ids, known in (("test", split.test, trained | chose), ("validation", split.val, trained)):
        seen = len(known.intersection(ids))
        if seen:
            notes.append(
                f"{seen} of {len(ids)} {part} samples trained the base or chose its best epoch (UniFrac and "
                "nucleotides, no labels): figures on them are transductive"
            )
    return notes


def with_builtin_data(config: RunConfig) -> RunConfig:
    """The same settings with the built-in synthetic dataset in the place of a table that was not given."""
    if config.data.table is not None:
        return config
    settings = synthetic.SyntheticConfig()
    cache = config.data.cache_dir or default_cache()
    name = f"synthetic-{settings.samples}-{settings.seed}-v{synthetic.GENERATOR_VERSION}"
    folder = synthetic.ensure(cache / name, settings)
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


def _check_sizes(split: Split, config: RunConfig, pairs: bool) -> None:
    """Each worker needs a sample of every batch; UniFrac needs pairs."""
    workers = config.ray.workers[1]
    least = max(workers, 2 if pairs else 1)
    for part, ids in (("training", split.train), ("validation", split.val)):
        if len(ids) < least:
            raise ValueError(
                f"{part} samples left: {len(ids)}, needed: {least} "
                f"({'UniFrac compares pairs' if least > workers else f'one for each of {workers} workers'}): "
                "use more samples, another split, or fewer workers"
            )


def _weights(config: RunConfig, sizes: EncoderSizes) -> LossWeights:
    if isinstance(config, PretrainConfig):
        base, nuc = config.loss.base_weight, config.loss.nuc_weight
        if not sizes.asv_layers and (nuc or not base):
            raise ValueError(
                "masked nucleotides are predicted by the nucleotide stack, and there is none: give --asv-layers 2, "
                "say, or leave --nuc-weight out and keep --base-weight above 0"
            )
        return LossWeights(base=base, nuc=float(sizes.asv_layers > 0) if nuc is None else nuc)
    loss = config.loss
    return LossWeights(target=loss.target_weight, count=config.count_weight, base=loss.base_weight)


def _count_mask_fraction(config: RunConfig) -> float:
    return config.loss.count_mask_fraction if isinstance(config, TrainConfig) and config.count_weight else 0.0


def check_resumable(saved: dict[str, Any], config: RunConfig, folder: Path) -> None:
    """A run goes on with the settings and the data that it was started with; refuse others, by their flags.

    Parameters
    ----------
    saved : dict
        `run.json` of the run.
    config : PretrainConfig or TrainConfig
        Settings to resume it with.
    folder : Path
        Run folder, for the message.
    """
    before, now = _flat(saved["config"]), _flat(json.loads(json.dumps(to_dict(config))))
    changed = [
        f"--{key.split('.')[-1].replace('_', '-')}"
        for key in now
        if key in before  # not a setting that came later
        and before[key] != now[key]
        and not f"{key}.".startswith(tuple(f"{k}." for k in FREE_ON_RESUME))
    ]
    if changed:
        raise ValueError(
            f"{folder}: the run was started with other values of {', '.join(sorted(changed))}; resume it "
            "with the same, or start a new run in another --output-dir"
        )
    for name, digest in saved["dataset"]["sha256"].items():
        path = getattr(config.data, name)  # None: the built-in dataset
        if path is not None and content_hash(path) != digest:
            raise ValueError(
                f"{path}: has changed since the run in {folder} was started; restore it, or start a new run "
                "in another --output-dir"
            )


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
