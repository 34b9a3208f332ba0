"""A single run, from settings to checkpoints."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from aam.config import LoopConfig, RunConfig, TrainConfig
from aam.distributed.checkpoints import (
    RECORD,
    copy_logs,
    find_best,
    has_checkpoints,
    home_of,
    place_checkpoints,
    reported,
    run_record,
)
from aam.distributed.storage import check_writable, exists, join, read_json, read_text, upload, write_text
from aam.html_report import REPORT
from aam.plan import RunPlan, check_resumable, make_plan
from aam.training import checkpoint
from aam.training.schedule import run_length


class RunFailedError(RuntimeError):
    """The training ended with an error; the message is its last lines."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a finished run left."""

    output_dir: Path
    best: Path
    """Best checkpoint."""
    metrics: dict[str, float]
    """Of the best epoch."""
    epochs: int
    """Epochs that were run."""


def run(config: RunConfig) -> RunResult:
    """Plan a run, train it on Ray, and point at its checkpoints.

    Parameters
    ----------
    config : PretrainConfig or TrainConfig
        Settings.

    Raises
    ------
    ValueError
        For files or settings that cannot work, before any worker is started.
    RunFailedError
        Where the training failed.
    """
    home = home_of(config)
    plan = prepare_run(config, home)
    say(plan)
    changed = not is_finished(plan.loop, len(plan.split.train), history(home))
    if changed:
        train(config, plan, home)
    else:
        print(f"{home}: finished already")
    result = collect(plan, home)
    if isinstance(config, TrainConfig) and config.loss.ensemble:
        changed |= complete_ensemble(plan, home, result.best)
    if config.loop.report and (changed or not (plan.output_dir / REPORT).is_file()):
        report(config, home)
    return result


def complete_ensemble(plan: RunPlan, home: str, best: Path) -> bool:
    """Put the ensemble into the best checkpoint, here and where the run is kept, where it is not there yet.

    Returns
    -------
    bool
        Whether it was not.
    """
    if (best / checkpoint.ENSEMBLE).is_file():
        return False
    # Here and not above: it takes seconds, which the processes that train should not.
    from aam.ensemble.add import add_ensemble

    print(add_ensemble(best, plan, len(history(home))), flush=True)
    if home != str(plan.output_dir):
        kept = reported(home)
        assert kept is not None, "its best checkpoint was just copied from there"
        upload(best, kept[0])
    return True


def train(config: RunConfig, plan: RunPlan, home: str) -> None:
    """Train a planned run on Ray, to its end."""
    from aam.distributed.cluster import connect, scaling_config
    from aam.distributed.trials import fit_trials

    connect(config.ray)
    [outcome] = fit_trials(config, plan, home, scaling_config(config.ray))
    copy_logs(home, plan.output_dir)
    if outcome.error is not None:
        raise RunFailedError(outcome.error)
    rows = history(home)
    if not rows:
        raise RunFailedError(f"{home}: stopped before its first epoch was done; start it again")
    if not is_finished(plan.loop, len(plan.split.train), rows):
        # Tune ends an interrupted run without an error; that is not the end of the training all the same.
        done, epochs = int(rows[-1]["epoch"]), plan.epochs
        raise RunFailedError(
            f"{home}: stopped after epoch {done} of {epochs}; go on with the same command and --resume"
        )


def collect(plan: RunPlan, home: str) -> RunResult:
    """Put logs and checkpoints of a run in place, and read what came out."""
    copy_logs(home, plan.output_dir)
    best = place_checkpoints(plan.output_dir, home)
    return RunResult(
        output_dir=plan.output_dir,
        best=best,
        metrics=json.loads((best / checkpoint.CONFIG).read_text())["metrics"],
        epochs=len(history(home)),
    )


def report(config: RunConfig, home: str) -> None:
    """Write the report of a run that has ended; a run is none the worse for want of one."""
    base = config.pretrained if isinstance(config, TrainConfig) else None
    try:
        # Here and not above: it takes seconds, which the processes that train should not.
        from aam.html_report.write import write_report

        path = write_report(config.output_dir, None if base is None else run_record(base))
        if home != str(config.output_dir):
            write_text(join(home, REPORT), path.read_text(encoding="utf-8"))
        print(f"report: {path}", flush=True)
    except Exception as error:
        print(f"note: no {REPORT}, the run is done all the same: {type(error).__name__}: {error}", flush=True)


def history(home: str) -> list[dict[str, float]]:
    """Metrics of each epoch of a run; none where it has not begun."""
    log = join(home, "metrics.jsonl")
    # What ends without a line break was being written when its process was stopped.
    lines = read_text(log).splitlines(keepends=True) if exists(log) else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def is_finished(loop: LoopConfig, samples: int, rows: list[dict[str, float]]) -> bool:
    """Whether a run has come to the end of its epochs or of its patience.

    Parameters
    ----------
    loop : LoopConfig
        Its settings.
    samples : int
        Its training samples.
    rows : list of dict
        Its `history`.
    """
    if not rows:
        return False
    return rows[-1]["epoch"] >= run_length(loop, samples)[0] or rows[-1]["epochs_without_improvement"] >= loop.patience


def prepare_run(config: RunConfig, home: str) -> RunPlan:
    """Make the plan and the run folder.

    Raises
    ------
    ValueError
        Also where the folder holds a run and `--resume` is not given, or the other way round.
    """
    if config.ray.storage_path is not None:
        check_writable(config.ray.storage_path)
    record = read_json(join(home, RECORD))
    if config.resume_or_start:
        config = dataclasses.replace(config, resume=record is not None, resume_or_start=False)
    if record is not None and has_checkpoints(home) and not config.resume:
        raise ValueError(f"{home}: holds a run already; go on with it by --resume, or choose another --output-dir")
    if config.resume:
        if record is None:
            raise ValueError(f"{home}: no run to resume (it has no run.json); leave out --resume to start one")
        check_resumable(record, config, config.output_dir)
    plan = plan_run(config)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    if not config.resume:
        write_text(join(home, RECORD), json.dumps(plan.describe(config), indent=1))
    return plan


def plan_run(config: RunConfig) -> RunPlan:
    """Make the plan of a run."""
    pretrained, base_record = None, None
    if isinstance(config, TrainConfig) and config.pretrained is not None:
        path = find_best(config.pretrained)
        pretrained = (path, checkpoint.load(path).spec)
        base_record = run_record(config.pretrained)
    return make_plan(config, pretrained, base_record)


def say(plan: RunPlan) -> None:
    """Print what a run learns from, and what was dropped."""
    manifest = plan.dataset.manifest
    print(
        f"data: {manifest['samples']} samples, {manifest['asvs']} ASVs, {manifest['reads']} reads; "
        f"{len(plan.split.train)} samples to train on, {len(plan.split.val)} to validate, "
        f"{len(plan.split.test)} kept back"
    )
    for note in plan.notes:
        print(f"note: {note}")
    if plan.pretrained is not None:
        print(f"base: {plan.pretrained}{' (frozen)' if plan.spec.freeze_base else ''}", flush=True)
