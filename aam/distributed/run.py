"""A run on Ray: a Tune experiment of one trial, whose trial is a TorchTrainer."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.tune
from ray import train, tune
from ray._private.utils import read_ray_address
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler

from aam.config import RayConfig, RunConfig, TrainConfig
from aam.distributed.checkpoints import (
    SCORE,
    TRAIN_RUN,
    find_best,
    has_checkpoints,
    link_checkpoints,
    storage,
)
from aam.distributed.worker import train_worker
from aam.plan import RunPlan, check_resumable, make_plan
from aam.training import checkpoint
from aam.training.memory import EXPANDABLE_SEGMENTS

# Read by Ray Train in the process that calls fit().
TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # how long an epoch's report waits; 2 s by default
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # prints everything twice
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # logs an error of its own in each run
}
# Read where Ray is started and where Tune runs.
RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # workers at Ray's 15 starve beside anything else on the machine
    "RAY_AIR_NEW_OUTPUT": "0",  # a table of Tune's settings, whatever the verbosity
}
# The driver of a trial takes no CPU from the workers that it waits for; Ray refuses a request for nothing.
DRIVER_RESOURCES = {"CPU": 0, "node:__internal_head__": 0.001}


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
    plan = prepare_run(config)
    connect(config.ray)
    scaling = scaling_config(config.ray)
    asha = ASHAScheduler(
        time_attr="epoch",
        max_t=plan.loop.epochs + 1,  # at max_t a trial is killed, even one that has just finished
        grace_period=min(plan.loop.patience, plan.loop.epochs),
    )
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(_trial, plan=plan, config=config.ray, scaling=scaling), DRIVER_RESOURCES
        ),
        tune_config=tune.TuneConfig(metric=SCORE, mode="min", scheduler=asha),
        run_config=tune.RunConfig(name="tune", storage_path=str(storage(config.output_dir)), verbose=0),
    )
    result = tuner.fit()[0]
    if result.error is not None:
        raise RunFailedError(_last_words(result.error))
    rows = _finished_history(plan, config.output_dir)
    best = link_checkpoints(config.output_dir)
    return RunResult(
        output_dir=config.output_dir,
        best=best,
        metrics=json.loads((best / checkpoint.CONFIG).read_text())["metrics"],
        epochs=len(rows),
    )


def _finished_history(plan: RunPlan, folder: Path) -> list[dict[str, float]]:
    """Metrics of each epoch of a run that has come to its end.

    Tune ends an interrupted run without an error; that is not the end of the training all the same.
    """
    log = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if not rows:
        raise RunFailedError(f"{folder}: stopped before its first epoch was done; start it again")
    done, epochs = int(rows[-1]["epoch"]), plan.loop.epochs
    if done < epochs and rows[-1]["epochs_without_improvement"] < plan.loop.patience:
        raise RunFailedError(
            f"{folder}: stopped after epoch {done} of {epochs}; go on with the same command and --resume"
        )
    return rows


def prepare_run(config: RunConfig) -> RunPlan:
    """Make the plan and the run folder; says what was dropped.

    Raises
    ------
    ValueError
        Also where the folder holds a run and `--resume` is not given, or the other way round.
    """
    folder = config.output_dir
    record = folder / "run.json"
    if record.exists() and has_checkpoints(folder) and not config.resume:
        raise ValueError(f"{folder}: holds a run already; go on with it by --resume, or choose another --output-dir")
    if config.resume:
        if not record.exists():
            raise ValueError(f"{folder}: no run to resume (it has no run.json); leave out --resume to start one")
        check_resumable(json.loads(record.read_text()), config, folder)
    pretrained = None
    if isinstance(config, TrainConfig) and config.pretrained is not None:
        path = find_best(config.pretrained)
        pretrained = (path, checkpoint.load(path).spec)
    plan = make_plan(config, pretrained)
    folder.mkdir(parents=True, exist_ok=True)
    if not config.resume:
        record.write_text(json.dumps(plan.describe(config), indent=1))
    manifest = plan.dataset.manifest
    print(
        f"data: {manifest['samples']} samples, {manifest['asvs']} ASVs, {manifest['reads']} reads; "
        f"{len(plan.split.train)} samples to train on, {len(plan.split.val)} to validate, "
        f"{len(plan.split.test)} kept back"
    )
    for note in plan.notes:
        print(f"note: {note}")
    if pretrained is not None:
        print(f"base: {pretrained[0]}{' (frozen)' if plan.spec.freeze_base else ''}")
    return plan


def connect(config: RayConfig) -> None:
    """Connect to the cluster that the settings name, or to a running one, or start one here.

    Raises
    ------
    ValueError
        Where no cluster answers at the address that was given.
    """
    if ray.is_initialized():
        return
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not sys.stdout.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    address = config.ray_address or os.environ.get("RAY_ADDRESS")
    if address is not None and not _answers(address):
        raise ValueError(
            f"no Ray answers at {address}: start one there (ray start --head), or leave out --ray-address "
            "and RAY_ADDRESS"
        )
    if address is None:
        # A head that died without `ray stop` leaves its address behind, to which Ray would try to connect for ever.
        left = read_ray_address()
        address = "local" if left is not None and not _answers(left) else None
    ray.init(address=address, log_to_driver=True, logging_level=logging.WARNING)


def _answers(address: str) -> bool:
    """Whether something listens at `host:port`; other forms of address are left to Ray."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "://" in address:
        return True
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:
        return False
    return True


def scaling_config(config: RayConfig) -> train.ScalingConfig:
    """Workers and what each is given.

    Raises
    ------
    ValueError
        Where the cluster does not have that much.
    """
    total = ray.cluster_resources()
    cpus, gpus = int(total.get("CPU", 0)), int(total.get("GPU", 0))
    workers = config.num_workers
    use_gpu = gpus >= workers if config.use_gpu is None else config.use_gpu
    share = max(1, cpus // workers)
    each = config.cpus_per_worker or (min(4, share) if use_gpu else share)
    if workers * each > cpus or (use_gpu and workers > gpus):
        raise ValueError(
            f"--num-workers {workers} of {each} CPUs{' and a GPU' if use_gpu else ''} each do not fit the cluster "
            f"({cpus} CPUs, {gpus} GPUs): lower --num-workers or --cpus-per-worker"
        )
    resources = {"CPU": each, "GPU": 1} if use_gpu else {"CPU": each}
    return train.ScalingConfig(num_workers=workers, use_gpu=use_gpu, resources_per_worker=resources)


def _trial(settings: dict[str, Any], *, plan: RunPlan, config: RayConfig, scaling: train.ScalingConfig) -> None:
    """The trial: one TorchTrainer, which resumes by its name after a failure."""
    os.environ.update(TRAIN_ENVIRONMENT)
    environment = EXPANDABLE_SEGMENTS if plan.loop.use_expandable_segments else {}
    TorchTrainer(
        train_worker,
        train_loop_config={"plan": plan},
        scaling_config=scaling,
        run_config=train.RunConfig(
            name=TRAIN_RUN,
            storage_path=str(storage(plan.output_dir)),
            callbacks=[TuneReportCallback()],
            failure_config=train.FailureConfig(max_failures=config.max_failures, controller_failure_limit=3),
            checkpoint_config=train.CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute=SCORE, checkpoint_score_order="min"
            ),
            worker_runtime_env={"env_vars": environment} if environment else None,
            logging_config=train.LoggingConfig(log_level="WARNING"),
        ),
    ).fit()


def _last_words(error: BaseException) -> str:
    """The line of an error that says what happened, out of the layers that Ray wraps around it."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "Error: " in line and not line.startswith(" ")]
    return (named or lines or [repr(error)])[-1].strip()
