"""An evaluation: train both stages for each split and seed, or take a finished run, and score it beside baselines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aam.baselines import baseline_names
from aam.config import DataConfig, EvaluateConfig, Location, PipelineConfig, PredictConfig, PretrainConfig, TrainConfig
from aam.data.draw import generator
from aam.data.files import some
from aam.data.sources import content_hash
from aam.data.split import Split, read_ids
from aam.distributed.checkpoints import find_best, home_of, run_record
from aam.distributed.pipeline import plan_stages
from aam.distributed.run import run
from aam.distributed.storage import join
from aam.evaluation.caveats import caveats, what_is_unknown, what_was_done
from aam.evaluation.distances import DistanceEvaluation
from aam.evaluation.folds import draw_folds, draw_once
from aam.evaluation.outcome import (
    Outcome,
    baseline_runs,
    check_groups,
    column_of,
    model_runs,
    network_runs,
    scored_samples,
)
from aam.evaluation.results import Evaluation, assess
from aam.evaluation.stage_1 import evaluate_stage_1
from aam.plan import RunPlan, make_plan, with_builtin_data
from aam.predict import predict, source_of
from aam.training import checkpoint

ID_FILES = {"pretrain": "pretrain.txt", "train": "train.txt", "val": "val.txt", "test": "test.txt"}
ALL_VAL = "pretrain-val.txt"
"""Validation samples of stage 1, where stage 2 may not use the labels of all."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A split to train on: the only one, or that of a fold."""

    repeat: int
    fold: int
    name: str
    """Folder of its runs, below that of the evaluation; empty for the only one."""
    split: Split
    pretrain: list[str]
    """What stage 1 trains on."""
    pretrain_val: list[str]
    """What chooses the best epoch of stage 1."""


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Train what is left to train, and score it.

    Parameters
    ----------
    config : EvaluateConfig
        Settings.

    Raises
    ------
    ValueError
        For files or settings that cannot work, before anything is trained.
    RunFailedError
        Where a training failed.
    """
    outcomes, read = _train_all(config) if config.checkpoint is None else _finished(config)
    target, group_column = outcomes[0].found.target, _group_column(config, outcomes[0])
    samples, notes = scored_samples(outcomes, group_column)
    names = [n for n in baseline_names(classifier=bool(target.classes)) if n not in config.skip_baselines]
    seed, rarefied = config.loop.seed, config.rarefied_baselines
    of_baselines = {"seed": seed, "folder": config.output_dir / "baselines", "rarefied": rarefied}
    depth = outcomes[0].contract.rarefy_depth if rarefied else 0
    return assess(
        target.column,
        samples,
        model_runs(samples, outcomes),
        {name: baseline_runs(samples, outcomes, name, **of_baselines) for name in names},
        network=network_runs(samples, outcomes),
        seed=seed,
        reads=f"the {depth} reads of each sample that the model sees" if depth else "all reads",
        caveats=caveats(outcomes, group_column),
        notes=[
            what_was_done(outcomes, config.folds, config.repeats),
            *_how_trained(config),
            *notes,
            *what_is_unknown(outcomes),
            *read,
        ],
    )


def finished_stage_1(config: EvaluateConfig) -> DistanceEvaluation | None:
    """Scores of the UniFrac of a finished stage 1 run; None where that is not what is asked for."""
    record = None if config.checkpoint is None else run_record(config.checkpoint)
    if config.checkpoint is None or record is None or record["stage"] != "pretrain" or config.loss.target is not None:
        return None
    return evaluate_stage_1(config, checkpoint.load(find_best(config.checkpoint)), record)


def _how_trained(config: EvaluateConfig) -> list[str]:
    """What is not the usual way."""
    if config.checkpoint is not None:
        return [
            f"a finished run, {config.checkpoint}: nothing was trained here, and --preset and --seeds change nothing"
        ]
    notes = []
    if config.from_scratch:
        notes.append("without stage 1: the encoder learned from the labels alone (--from-scratch)")
    if config.label_fraction < 1:
        notes.append(
            f"--label-fraction {config.label_fraction:g} of the training samples and of the validation samples"
        )
    return notes


def _finished(config: EvaluateConfig) -> tuple[list[Outcome], list[str]]:
    """The run, and what it says of the samples that it read."""
    assert config.checkpoint is not None
    record = run_record(config.checkpoint)
    if record is None:
        raise ValueError(f"{config.checkpoint}: no run.json there, which names its samples; give the run folder")
    if record["stage"] != "train":
        raise ValueError(
            f"{config.checkpoint}: is a run of stage 1, which predicts no target; leave --target out to score its "
            "UniFrac, or give a run of stage 2"
        )
    if config.study_column is not None:
        raise ValueError(f"--study-column scores the UniFrac of a stage 1 run, and {config.checkpoint} is of stage 2")
    check_asked(config, record)
    had = record["config"]["data"]
    for name in record["dataset"]["sha256"]:
        path = getattr(config.data, name)
        if path is not None and had["table"] is not None:
            had[name] = str(path)  # the same file; the run's may have been moved since
    if config.data.test_ids is not None:
        record["split"]["test"] = read_ids(config.data.test_ids)
    seed = record["config"]["loop"]["seed"]
    return [_outcome(config, config.checkpoint, record, repeat=1, fold=1, seed=seed)], record["notes"]


def check_asked(config: EvaluateConfig, record: dict[str, Any]) -> None:
    """Refuse sources, samples and a target that are not those of a finished run.

    Parameters
    ----------
    config : EvaluateConfig
        What is asked for, with `checkpoint`.
    record : dict
        `run.json` of the run.

    Raises
    ------
    ValueError
        Where something differs.
    """
    run, loss = config.checkpoint, record["config"]["loss"]
    for name, digest in record["dataset"]["sha256"].items():
        path = getattr(config.data, name)
        if path is not None and content_hash(path) != digest:
            raise ValueError(f"--{name} {path}: {run} was trained on another; leave it out, or give that one")
    if config.loss.target is not None:
        asked, had = (config.loss.target, config.loss.classifier), (loss["target"], loss["classifier"])
        if asked != had:
            kinds = [f"{name!r}{' as classes' if is_class else ''}" for name, is_class in (asked, had)]
            raise ValueError(f"--target: {run} predicts {kinds[1]}, not {kinds[0]}")
    split = record["split"]
    for part, path in (("train", config.data.train_ids), ("val", config.data.val_ids)):
        strange = [] if path is None else sorted(set(split[part]) - {*read_ids(path)})
        if strange:
            raise ValueError(f"{path}: {run} was trained on another split: {some(strange)} are not in it")
    if config.data.test_ids is not None:
        known = [s for s in read_ids(config.data.test_ids) if s in {*split["train"], *split["val"]}]
        if known:
            raise ValueError(
                f"{config.data.test_ids}: {run} was trained with {len(known)} of its samples: {some(known)}"
            )


def _outcome(
    config: EvaluateConfig, location: str, record: dict[str, Any], *, repeat: int, fold: int, seed: int
) -> Outcome:
    """What a finished run says of the test samples in its record."""
    asked = PredictConfig(
        checkpoint=Location(location),
        output=config.output_dir / "predictions.tsv",
        part="test",
        precision=record["config"]["loop"]["precision"],
        base_cache=config.loop.base_cache,
        cache_dir=config.data.cache_dir,
    )
    loaded = checkpoint.load(find_best(location))
    everything = predict(asked, loaded, record)
    found, alone, weights, weighed_by = everything.predictions, None, {}, 0
    assert found is not None, "stage 2 has a target"
    if loaded.ensemble is not None:
        alone = predict(asked, replace(loaded, ensemble=None), record).predictions
        weights = loaded.ensemble.weights.by_name
        weighed_by = int(loaded.ensemble.scores["samples"])
    for name in ("table", "metadata"):
        path = source_of(record, name)
        if path is not None and content_hash(path) != record["dataset"]["sha256"][name]:
            raise ValueError(f"{path}: has changed since the run {location} was trained on it; restore it")
    base = record["config"]["pretrained"]
    return Outcome(
        repeat=repeat,
        fold=fold,
        seed=seed,
        found=found,
        record=record,
        base_record=None if base is None else run_record(base),
        alone=alone,
        member_weights=weights,
        weighed_by=weighed_by,
        unknown=[note for note in everything.notes if note not in record["notes"]],
    )


def _group_column(config: EvaluateConfig, outcome: Outcome) -> str | None:
    """Column of the groups: as given, or as the run had it."""
    given = outcome.record["config"]["data"]
    if config.data.group_column is None and given["table"] is None:
        return with_builtin_data(TrainConfig(data=DataConfig(cache_dir=config.data.cache_dir))).data.group_column
    return config.data.group_column or given["group_column"]


def _train_all(config: EvaluateConfig) -> tuple[list[Outcome], list[str]]:
    """All runs, and what was read and what dropped before they were split."""
    resolved = with_builtin_data(TrainConfig(data=config.data, loss=config.loss))
    config = replace(config, data=resolved.data, loss=resolved.loss)
    parts, notes = plan_parts(config)
    seeds = range(config.loop.seed, config.loop.seed + config.seeds)
    planned = [(part, seed, *stages_of(config, part, seed)) for part in parts for seed in seeds]
    one_stage = config.from_scratch or config.pretrained is not None
    for _, seed, first, second in planned:
        if seed == seeds[0]:  # a fault in the last fold is told before the first is trained
            _plan_without_base(first, second)
            if not one_stage:
                make_plan(first)
    stages = "stage 2 alone" if one_stage else "each of two stages"
    print(f"evaluation: {len(planned)} models to train, {stages}, in {config.output_dir}", flush=True)
    for part, seed, first, second in planned:
        for stage, of_stage in (("stage 1", first), ("stage 2", second))[int(one_stage) :]:
            print(f"\n{' '.join([part.name, f'seed {seed}', stage]).strip()}", flush=True)
            run(of_stage)
    # After all are trained: a GPU that this process has used has less memory for workers.
    outcomes = []
    for part, seed, _, second in planned:
        home, record = home_of(second), run_record(home_of(second))
        assert record is not None, "it has just been trained"
        outcomes.append(_outcome(config, home, record, repeat=part.repeat, fold=part.fold, seed=seed))
    return outcomes, notes


def plan_parts(config: EvaluateConfig) -> tuple[list[Part], list[str]]:
    """The splits, and for each the samples of stage 1; their id files are written, or found as they would be written.

    With them, what was read and what dropped, in words.

    Stage 1 trains on the training samples of stage 2 and on samples without a target, but none of a group that is held
    back.

    Raises
    ------
    ValueError
        For settings that cannot work, or a folder that holds an evaluation on another split.
    """
    stages = _two_stages(config, config.data, config.output_dir / f"seed-{config.loop.seed}", config.loop.seed)
    first, second = stages
    # What is drawn is drawn below, by class too; runs without an evaluation draw before they know of a target.
    plan = _plan_without_base(first, replace(second, data=replace(second.data, test_fraction=0.0)))
    column, source = config.data.group_column, config.data.metadata
    assert source is not None
    ids = plan.dataset.sample_ids
    groups = None if column is None else column_of(plan.dataset, ids, column, source, is_class=True)
    if groups is not None:  # known after training, it would be known too late
        assert column is not None
        check_groups(groups, [*plan.split.train, *plan.split.val, *plan.split.test], column, source)
    parts = []
    for repeat in range(1, config.repeats + 1):
        splits = _splits(config, plan, second.data.test_fraction, groups, config.loop.seed + repeat - 1)
        for fold, split in enumerate(splits, start=1):
            more = [] if config.data.train_ids is not None else _unlabelled(plan, split, groups, config.data.test_ids)
            held = split.test if config.transductive else []
            parts.append(
                Part(
                    repeat=repeat,
                    fold=fold,
                    name=_name(config, repeat, fold),
                    split=replace(
                        split,
                        train=_labelled(config, split.train, plan.targets),
                        val=_labelled(config, split.val, plan.targets),
                    ),
                    pretrain=[*split.train, *more, *held],
                    pretrain_val=split.val,
                )
            )
    for part in parts:
        _write_ids(config.output_dir / part.name, part)
    return parts, [note for note in plan.notes if not note.startswith("--max-updates")]  # of another number of samples


def _name(config: EvaluateConfig, repeat: int, fold: int) -> str:
    if config.folds is None:
        return ""
    return f"repeat-{repeat}/fold-{fold}" if config.repeats > 1 else f"fold-{fold}"


def _splits(
    config: EvaluateConfig, plan: RunPlan, test_fraction: float, groups: dict[str, str] | None, seed: int
) -> list[Split]:
    """Those of id files, of folds, or one that is drawn."""
    data = config.data
    if data.train_ids is not None or data.test_ids is not None:
        return [plan.split]
    usable = [*plan.split.train, *plan.split.val]
    of_groups = None if groups is None else [groups[s] for s in usable]
    classes = [plan.targets[s] for s in usable] if config.loss.classifier else None
    if config.folds is None:
        fractions = {"test_fraction": test_fraction, "val_fraction": data.val_fraction}
        return [draw_once(usable, **fractions, seed=seed, groups=of_groups, classes=classes)]
    return draw_folds(
        usable, folds=config.folds, val_fraction=data.val_fraction, seed=seed, groups=of_groups, classes=classes
    )


def _labelled(config: EvaluateConfig, sample_ids: list[str], targets: Mapping[str, Any]) -> list[str]:
    """Samples whose target may be used; of two shares, the smaller is part of the larger.

    Of each class alike, and one at least: what no training sample has cannot be scored.
    """
    order = generator(config.loop.seed, "labels").permutation(len(sample_ids))
    drawn = [sample_ids[int(i)] for i in order]
    of_class: dict[Any, list[str]] = {}
    for sample in drawn:
        of_class.setdefault(targets[sample] if config.loss.classifier else None, []).append(sample)
    least = 1 if config.loss.classifier else 2
    kept = {s for of in of_class.values() for s in of[: max(least, round(config.label_fraction * len(of)))]}
    return [sample for sample in sample_ids if sample in kept]


def _unlabelled(plan: RunPlan, split: Split, groups: dict[str, str] | None, test_ids: Path | None) -> list[str]:
    """Samples without a target, which stage 1 can learn from all the same."""
    held = set() if groups is None else {groups[s] for s in (*split.val, *split.test) if s in groups}
    listed = set() if test_ids is None else set(read_ids(test_ids))
    return [
        sample
        for sample, reads in zip(plan.dataset.sample_ids, plan.dataset.depths, strict=True)
        if sample not in plan.targets
        and sample not in listed
        and reads >= plan.spec.contract.rarefy_depth
        and (groups is None or (sample in groups and groups[sample] not in held))
    ]


def _write_ids(folder: Path, part: Part) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    split = part.split
    lists = {"pretrain": part.pretrain, "train": split.train, "val": split.val, "test": split.test}
    files = {ID_FILES[name]: ids for name, ids in lists.items()}
    if part.pretrain_val != split.val:
        files[ALL_VAL] = part.pretrain_val
    for name, ids in files.items():
        path, text = folder / name, "".join(f"{sample}\n" for sample in ids)
        if not path.exists():
            path.write_text(text)
        elif path.read_text() != text:
            raise ValueError(
                f"{path}: this evaluation was started with another split; go on with the same settings and files, or "
                "choose another --output-dir"
            )


def stages_of(config: EvaluateConfig, part: Part, seed: int) -> tuple[PretrainConfig, TrainConfig]:
    """Settings of both stages on a split, as the pipeline would have them.

    Raises
    ------
    ValueError
        For settings that cannot work.
    """
    folder = config.output_dir / part.name
    train, val, test = (folder / ID_FILES[name] for name in ("train", "val", "test"))
    data = replace(config.data, train_ids=train, val_ids=val, test_ids=test, test_fraction=0.0)
    storage = config.ray.storage_path
    if storage is not None:  # the runs of two evaluations, or of two folds, have the same names
        below = [config.output_dir.name, *part.name.split("/")] if part.name else [config.output_dir.name]
        config = replace(config, ray=replace(config.ray, storage_path=Location(join(storage, *below))))
    first, second = _two_stages(config, data, folder / f"seed-{seed}", seed)
    if (second.data.train_ids, second.data.val_ids) != (train, val):
        raise ValueError("--train-ids, --val-ids: give them to the evaluation, not in --train-flags")
    test_ids = None if config.transductive else test
    if config.from_scratch:
        sizes = replace(first.model, dropout=second.model.dropout)  # the encoder that stage 1 would have trained
        second = replace(second, pretrained=None, freeze_base=False, model=sizes)
    elif config.pretrained is not None:
        second = replace(second, pretrained=config.pretrained)
    all_val = val if part.pretrain_val == part.split.val else folder / ALL_VAL
    of_first = replace(first.data, train_ids=folder / ID_FILES["pretrain"], val_ids=all_val, test_ids=test_ids)
    return replace(first, data=of_first), second


def _two_stages(
    config: EvaluateConfig, data: DataConfig, folder: Path, seed: int
) -> tuple[PretrainConfig, TrainConfig]:
    pretrain_flags = config.pretrain_flags
    if (config.from_scratch or config.pretrained is not None) and data.tree is None:
        # There is no stage 1 to train, and who trains none needs no tree.
        pretrain_flags = f"{pretrain_flags} --base-weight 0"
    first, second, _ = plan_stages(
        PipelineConfig(
            preset=config.preset,
            output_dir=folder,
            pretrain_flags=pretrain_flags,
            train_flags=config.train_flags,
            freeze_base=config.freeze_base,
            data=data,
            model=config.model,
            loss=config.loss,
            loop=replace(config.loop, seed=seed),
            ray=config.ray,
        )
    )
    assert isinstance(first.config, PretrainConfig)
    assert isinstance(second.config, TrainConfig)
    return first.config, second.config


def _plan_without_base(first: PretrainConfig, second: TrainConfig) -> RunPlan:
    """Plan of stage 2 before there is a stage 1: samples are drawn as that would have it."""
    depth = first.data.rarefy_depth if second.data.rarefy_depth is None else second.data.rarefy_depth
    longest = first.data.max_bp if second.data.max_bp is None else second.data.max_bp
    data = replace(second.data, rarefy_depth=depth, max_bp=longest)
    return make_plan(replace(second, pretrained=None, freeze_base=False, model=first.model, data=data))
