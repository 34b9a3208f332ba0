"""Training on Ray: a Tune experiment, each trial of which is a TorchTrainer. A single run is one of one trial."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ray import train, tune
from ray.train.torch import TorchTrainer
from ray.tune.experiment import Trial
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.logger import JsonLoggerCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import BasicVariantGenerator

from aam.config import RayConfig, RunConfig
from aam.distributed.checkpoints import SCORE, TRAIN_RUN, TRIALS, copy_logs, ray_storage
from aam.distributed.search import GROUPS
from aam.distributed.storage import join, resolve
from aam.distributed.worker import share, train_worker
from aam.plan import RunPlan
from aam.training.memory import EXPANDABLE_SEGMENTS, KEEP_FREED_MEMORY
from aam.training.trackers import ENVIRONMENT

# Read by Ray Train in the process that calls fit().
TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # how long an epoch's report waits; 2 s by default
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # prints everything twice
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # logs an error of its own in each run
}
# How long workers are waited for, as nodes start up or other runs end: attempts of so many seconds. An elastic run
# counts the nodes anew at each attempt.
_WAIT_FIXED, _WAIT_ELASTIC = (6, 600), (60, 60)
# The driver of a trial takes no CPU from the workers that it waits for; Ray refuses a request for nothing.
DRIVER_RESOURCES = {"CPU": 0, "node:__internal_head__": 0.001}
_EXPERIMENT = "tune"
_COPY_EVERY = 10.0
"""Seconds between copies of the logs to the run folder, where the run is kept elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """What a sweep tries."""

    space: dict[str, Any]
    """Name of a setting to a Tune domain."""
    samples: int
    concurrent: int
    """Trials at a time."""
    grace_period: int
    """Epochs before a trial may be stopped."""
    reduction_factor: float
    """One in so many trials goes on at each rung."""
    seed: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A trial as Tune left it."""

    name: str
    settings: dict[str, Any]
    ended: bool
    """False where it was interrupted and can go on."""
    error: str | None = None


def fit_trials(
    config: RunConfig,
    plan: RunPlan,
    home: str,
    scaling: train.ScalingConfig,
    search: Search | None = None,
    *,
    resume: bool = False,
) -> list[Outcome]:
    """Train one run, or the trials of a sweep.

    Parameters
    ----------
    config : PretrainConfig or TrainConfig
        Settings of the run, or those that the trials share.
    plan : RunPlan
        Of these settings.
    home : str
        Location of the run or the sweep.
    scaling : ScalingConfig
        Workers of a trial.
    search : Search, optional
        What the trials of a sweep differ in.
    resume : bool
        Go on with the sweep that is there. A single run need not: its one trial finds its checkpoints itself.
    """
    filesystem, storage = resolve(ray_storage(home))
    if config.ray.storage_path is not None:
        share(plan, home, config.ray.storage_path)
    trainable = tune.with_resources(
        tune.with_parameters(
            _trial,
            config=config,
            plan=plan,
            home=home,
            scaling=scaling,
            sweep=search is not None,
            environment={k: v for k, v in os.environ.items() if k.startswith(ENVIRONMENT)},
        ),
        DRIVER_RESOURCES,
    )
    _Watch.home, _Watch.output_dir, _Watch.trials, _Watch.status = home, config.output_dir, [], {}
    path = f"{storage}/{_EXPERIMENT}"
    if resume and tune.Tuner.can_restore(path, storage_filesystem=filesystem):
        tuner = tune.Tuner.restore(path, trainable, resume_errored=True, storage_filesystem=filesystem)
    else:
        run_config = tune.RunConfig(
            name=_EXPERIMENT,
            storage_path=storage,
            storage_filesystem=filesystem,
            verbose=0,
            callbacks=[_Watch(), JsonLoggerCallback()],
        )
        space = search.space if search else {}
        tune_config = _tune_config(search, plan.loop.epochs)
        tuner = tune.Tuner(trainable, param_space=space, tune_config=tune_config, run_config=run_config)
    logging.getLogger("ray.tune.tune").setLevel(logging.ERROR)  # on Ctrl-C it advises to call Tuner.restore()
    tuner.fit()
    return [_outcome(trial) for trial in _Watch.trials]


def _tune_config(search: Search | None, epochs: int) -> tune.TuneConfig:
    """ASHA over random settings; over a single trial it does nothing."""
    return tune.TuneConfig(
        metric=SCORE,
        mode="min",
        scheduler=ASHAScheduler(
            time_attr="epoch",
            max_t=epochs + 1,  # at max_t a trial is killed, even one that has just finished
            grace_period=search.grace_period if search else epochs,
            reduction_factor=search.reduction_factor if search else 4,
        ),
        num_samples=search.samples if search else 1,
        search_alg=BasicVariantGenerator(
            max_concurrent=search.concurrent if search else 1, random_state=search.seed if search else 0
        ),
    )


class _Watch(tune.Callback):
    """Keeps Tune's trials at hand, and the logs in the run folder up to date.

    By the class: Tune keeps callbacks with the experiment, and a restored one has copies that nobody else holds.
    """

    home: ClassVar[str]
    output_dir: ClassVar[Path]
    trials: ClassVar[list[Trial]]
    status: ClassVar[dict[str, str]]
    """Of each trial; when Tune is interrupted, it calls all of them terminated in the end."""
    copied: ClassVar[float] = 0.0

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        _Watch.trials, _Watch.status = trials, {trial.trial_id: trial.status for trial in trials}

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        if not _Watch.trials:  # nothing was left to do
            self.on_step_end(0, trials)

    def on_trial_result(self, iteration: int, trials: list[Trial], trial: Trial, result: dict, **info: Any) -> None:
        if time.monotonic() - _Watch.copied < _COPY_EVERY:
            return
        if trial.config:
            name = trial_name(trial.trial_id, trial.config)
            copy_logs(join(_Watch.home, TRIALS, name), _Watch.output_dir / TRIALS / name)
        else:
            copy_logs(_Watch.home, _Watch.output_dir)
        _Watch.copied = time.monotonic()


def _outcome(trial: Trial) -> Outcome:
    status = _Watch.status[trial.trial_id]
    error = trial.get_error() if status == Trial.ERROR else None
    return Outcome(
        name=trial_name(trial.trial_id, trial.config),
        settings=dict(trial.config),
        ended=status in (Trial.TERMINATED, Trial.ERROR),
        error=None if error is None else last_words(error),
    )


def trial_name(trial_id: str, settings: dict[str, Any]) -> str:
    """Name of a trial's run folder: its number, then its settings."""
    shown = [
        f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}" for name, value in settings.items()
    ]
    return "_".join([trial_id.rsplit("_", 1)[-1], *shown])


def with_settings(config: RunConfig, settings: dict[str, Any], output_dir: Path) -> RunConfig:
    """The settings of a trial.

    Raises
    ------
    ValueError
        For a value that no run could use.
    """
    groups = {}
    for name in GROUPS:
        group = getattr(config, name)
        own = {field.name for field in dataclasses.fields(group)} & settings.keys()
        groups[name] = dataclasses.replace(group, **{key: settings[key] for key in own})
    return dataclasses.replace(config, **groups, output_dir=output_dir, resume=False, resume_or_start=True)


def _trial(
    settings: dict[str, Any],
    *,
    config: RunConfig,
    plan: RunPlan,
    home: str,
    scaling: train.ScalingConfig,
    sweep: bool,
    environment: dict[str, str],
) -> None:
    """The trial: one TorchTrainer, which resumes by its name after a failure."""
    os.environ.update(TRAIN_ENVIRONMENT)
    if sweep:
        from aam.distributed.run import prepare_run  # seconds to import, which a single run need not wait for

        name = trial_name(tune.get_context().get_trial_id(), settings)
        config = with_settings(config, settings, config.output_dir / TRIALS / name)
        home = join(home, TRIALS, name)
        plan = prepare_run(config, home)
        if config.ray.storage_path is not None:
            share(plan, home, config.ray.storage_path)
    train_with_ray(plan, home, config.ray, scaling, environment)


def train_with_ray(
    plan: RunPlan, home: str, config: RayConfig, scaling: train.ScalingConfig, environment: dict[str, str]
) -> None:
    """Run the TorchTrainer of a plan, its workers with more variables in their environment."""
    attempts, seconds = _WAIT_FIXED if isinstance(scaling.num_workers, int) else _WAIT_ELASTIC
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(seconds)
    if plan.loop.use_expandable_segments:
        environment = environment | EXPANDABLE_SEGMENTS
    if not scaling.use_gpu:
        environment = environment | KEEP_FREED_MEMORY
    filesystem, storage = resolve(ray_storage(home))
    TorchTrainer(
        train_worker,
        train_loop_config={"plan": plan, "home": home, "storage_path": config.storage_path},
        scaling_config=scaling,
        run_config=train.RunConfig(
            name=TRAIN_RUN,
            storage_path=storage,
            storage_filesystem=filesystem,
            callbacks=[TuneReportCallback()],
            failure_config=train.FailureConfig(max_failures=config.max_failures, controller_failure_limit=attempts),
            checkpoint_config=train.CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute=SCORE, checkpoint_score_order="min"
            ),
            worker_runtime_env={"env_vars": environment} if environment else None,
            logging_config=train.LoggingConfig(log_level="WARNING"),
        ),
    ).fit()


def last_words(error: BaseException) -> str:
    """The line of an error that says what happened, out of the layers that Ray wraps around it."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "Error: " in line and not line.startswith(" ")]
    return (named or lines or [repr(error)])[-1].strip()
