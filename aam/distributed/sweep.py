"""A sweep: trials that differ in their settings, stopped early by ASHA where they fall behind."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pandas as pd

from aam.cli import to_arguments
from aam.config import PretrainConfig, RunConfig, SweepConfig, TrainConfig, to_dict
from aam.distributed.checkpoints import (
    RECORD,
    SWEEP,
    TRIALS,
    copy_logs,
    home_of,
    link,
    place_checkpoints,
    reported,
)
from aam.distributed.cluster import connect, most_concurrent, scaling_config
from aam.distributed.run import RunFailedError, history, plan_run, report, say
from aam.distributed.search import search_space
from aam.distributed.storage import join, read_json, write_text
from aam.distributed.summary import train_command
from aam.distributed.trials import Outcome, Search, fit_trials, with_settings
from aam.html_report import REPORT
from aam.plan import RunPlan, check_resumable
from aam.training.checkpoint import CONFIG
from aam.training.figures import sweep_figure
from aam.training.schedule import run_length

TABLE, FIGURE = "trials.tsv", "sweep.png"


def run_sweep(sweep: SweepConfig, config: RunConfig) -> str:
    """Run the trials and say which was best.

    Parameters
    ----------
    sweep : SweepConfig
        What to search, and how.
    config : PretrainConfig or TrainConfig
        Settings that the trials share; `output_dir` is the folder of the sweep.

    Returns
    -------
    str
        The table of the trials, the best checkpoint, and the commands that follow.

    Raises
    ------
    ValueError
        For files or settings that cannot work, before any trial is started.
    RunFailedError
        Where no trial came to its end, or the sweep was interrupted.
    """
    home = home_of(config)
    record = read_json(join(home, SWEEP))
    resume = _resumes(sweep, config, record, home)
    if isinstance(config, TrainConfig) and config.loss.ensemble:
        print(
            "note: trials train the network alone; for --ensemble, train once more with the best trial's settings",
            flush=True,
        )
    space = search_space(sweep, config)
    for name, domain in space.items():
        for value in getattr(domain, "categories", ()):
            with_settings(config, {name: value}, config.output_dir)
    plan = plan_run(config)
    if (sweep.grace_period or 0) > plan.epochs:
        raise ValueError(f"--grace-period {sweep.grace_period} is more than the {plan.epochs} epochs of a trial")
    say(plan)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    if record is None:
        record = {"sweep": to_dict(sweep), **plan.describe(config)}
        write_text(join(home, SWEEP), json.dumps(record, indent=1))
    outcomes = _fit(sweep, config, plan, home, space, resume=resume)
    table = collect_trials(outcomes, plan, config, home)
    unfinished = sweep.num_samples - sum(outcome.ended for outcome in outcomes)
    if unfinished:
        raise RunFailedError(
            f"{home}: stopped with {unfinished} of {sweep.num_samples} trials unfinished; go on with the same "
            f"command and --resume\n\n{_shown(table)}"
        )
    losses: dict[str, float] = table["val_loss"].dropna().to_dict()
    if not losses:
        raise RunFailedError(f"{home}: no trial got through an epoch; the first: {table['ended'].iloc[0]}")
    best = min(losses, key=lambda name: losses[name])
    write_text(join(home, SWEEP), json.dumps({**record, "best": best}, indent=1))
    link(config.output_dir / "best", config.output_dir / TRIALS / best / "best")
    settings = next(outcome.settings for outcome in outcomes if outcome.name == best)
    trial = with_settings(config, settings, config.output_dir / TRIALS / best)
    if config.loop.report and not (trial.output_dir / REPORT).is_file():
        report(trial, join(home, TRIALS, best))
    return _summary(table, best, settings, config)


def _resumes(sweep: SweepConfig, config: RunConfig, record: dict[str, Any] | None, home: str) -> bool:
    """Whether to go on with the sweep in the folder."""
    if config.resume and record is None:
        raise ValueError(f"{home}: no sweep to resume (it has no {SWEEP}); leave out --resume to start one")
    if record is None:
        if read_json(join(home, RECORD)) is not None:
            raise ValueError(f"{home}: holds a single run; choose another --output-dir for the sweep")
        return False
    if not (config.resume or config.resume_or_start):
        raise ValueError(f"{home}: holds a sweep already; go on with it by --resume, or choose another --output-dir")
    before, now = record["sweep"], json.loads(json.dumps(to_dict(sweep)))
    changed = [f"--{key.replace('_', '-')}" for key in now if before.get(key) != now[key]]
    if changed:
        raise ValueError(
            f"{home}: the sweep was started with other values of {', '.join(changed)}; resume it with the same, or "
            "start a new one in another --output-dir"
        )
    check_resumable(record, config, config.output_dir)
    return True


def _fit(
    sweep: SweepConfig, config: RunConfig, plan: RunPlan, home: str, space: dict[str, Any], *, resume: bool
) -> list[Outcome]:
    connect(config.ray)
    concurrent = sweep.max_concurrent or most_concurrent(config.ray, sweep.num_samples)
    scaling = scaling_config(config.ray, concurrent=concurrent)
    grace = sweep.grace_period or max(1, min(config.loop.patience, plan.epochs // 8))
    print(
        f"sweep: {sweep.num_samples} trials over {', '.join(space)}, {concurrent} at a time, each with "
        f"{config.ray.num_workers} worker(s) of {scaling.resources_per_worker}; at most {plan.epochs} epochs, "
        f"stopped early from epoch {grace} on",
        flush=True,
    )
    search = Search(
        space=space,
        samples=sweep.num_samples,
        concurrent=concurrent,
        grace_period=grace,
        reduction_factor=sweep.reduction_factor,
        seed=sweep.search_seed,
    )
    return fit_trials(config, plan, home, scaling, search, resume=resume)


def collect_trials(outcomes: list[Outcome], plan: RunPlan, config: RunConfig, home: str) -> pd.DataFrame:
    """Put logs and checkpoints of the trials in place, and make the table and the picture of the sweep.

    Returns
    -------
    DataFrame
        A row for each trial: its settings, best validation loss, epochs, and how it ended. Also in `trials.tsv`.
    """
    rows, curves = [], {}
    for outcome in sorted(outcomes, key=lambda outcome: outcome.name):
        trial_home, folder = join(home, TRIALS, outcome.name), config.output_dir / TRIALS / outcome.name
        copy_logs(trial_home, folder)
        best, last = _placed(folder, trial_home)
        curves[outcome.name] = [row["val/total_loss"] for row in history(trial_home)]
        rows.append(
            {
                "trial": outcome.name,
                **outcome.settings,
                "val_loss": best.get("val/total_loss", float("nan")),
                "best_epoch": int(best.get("epoch", 0)),
                "epochs": int(last.get("epoch", 0)),
                "ended": _ending(outcome, last, plan, config),
            }
        )
    table = pd.DataFrame(rows).set_index("trial") if rows else pd.DataFrame(columns=["val_loss", "ended"])
    table.to_csv(config.output_dir / TABLE, sep="\t")
    if rows:
        figure = sweep_figure(curves, table["lr"].to_dict() if "lr" in table else {})
        figure.savefig(config.output_dir / FIGURE, dpi=120)
    return table


def _placed(folder: Path, trial_home: str) -> tuple[dict[str, float], dict[str, float]]:
    """Put best and last checkpoint of a trial into its folder; returns the metrics of both, none where it has none.

    A trial that is stopped may have logged an epoch more than it reported: its checkpoints say how far it came.
    """
    if reported(trial_home) is None:
        return {}, {}
    place_checkpoints(folder, trial_home)
    best, last = (json.loads((folder / name / CONFIG).read_text())["metrics"] for name in ("best", "last"))
    return best, last


def _ending(outcome: Outcome, last: dict[str, float], plan: RunPlan, config: RunConfig) -> str:
    if outcome.error is not None:
        return f"failed: {outcome.error}"
    loop = with_settings(config, outcome.settings, config.output_dir).loop
    if last and last["epoch"] >= run_length(loop, len(plan.split.train))[0]:
        return "all epochs"
    if last and last["epochs_without_improvement"] >= plan.loop.patience:
        return "patience"
    return "stopped by ASHA" if outcome.ended else "interrupted"


def _shown(table: pd.DataFrame) -> str:
    return table.to_string(float_format=lambda value: f"{value:.4g}")


def _summary(table: pd.DataFrame, best: str, settings: dict[str, Any], config: RunConfig) -> str:
    folder = config.output_dir / TRIALS / best
    again = with_settings(config, settings, Path("RUN"))
    again = dataclasses.replace(again, resume_or_start=False)
    script = "pretrain" if isinstance(config, PretrainConfig) else "train"
    lines = [
        _shown(table.sort_values("val_loss")),
        "",
        f"best trial: {best}, validation loss {table.loc[best, 'val_loss']:.4g}",
        f"  checkpoint   {folder / 'best'}",
        f"  table        {config.output_dir / TABLE}",
        f"  picture      {config.output_dir / FIGURE}",
        f"  its settings python jobs/{script}.py {shlex.join(to_arguments(again))}",
    ]
    if isinstance(config, PretrainConfig):
        lines.append(f"  next         {train_command(config, lr=settings.get('lr', config.loop.lr))}")
    else:
        lines.append(
            f"  next         python jobs/predict.py --checkpoint {shlex.quote(str(config.output_dir))} --table T.biom "
            "--output predictions.tsv"
        )
    return "\n".join(lines)
