"""Experiment trackers that a run may log to as well: Weights & Biases, MLflow. Imported only where asked for."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from aam.config import LoopConfig

_PACKAGES = {"wandb": "wandb", "mlflow": "mlflow"}
_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
ENVIRONMENT = ("WANDB_", "MLFLOW_")
"""How the names of environment variables begin that trackers read, in the processes that train."""


class Tracker:
    """Where the metrics of a run go as well.

    Parameters
    ----------
    log : callable
        Takes the metrics of an epoch and its number.
    close : callable
        Ends the run there.
    """

    def __init__(self, log: Callable[[dict[str, float], int], None], close: Callable[[], None]) -> None:
        self.log, self.close = log, close


def check_trackers(config: LoopConfig) -> None:
    """Refuse a tracker whose package is not installed, or an MLflow that does not answer.

    Raises
    ------
    ValueError
        Names the flag and the way out.
    """
    for flag, package in _PACKAGES.items():
        if getattr(config, flag) is not None and find_spec(package) is None:
            raise ValueError(f"--{flag} needs a package that is not installed: pip install 'aam[{flag}]'")
    if config.mlflow is None:
        return
    from mlflow import MlflowClient  # an extra

    before = os.environ.get(_RETRIES)
    os.environ[_RETRIES] = before or "1"
    try:
        MlflowClient(tracking_uri=config.mlflow).get_experiment_by_name("aam")
    except Exception as error:  # MLflow has many, which share no base
        raise ValueError(
            f"--mlflow {config.mlflow}: cannot be used ({(str(error) or type(error).__name__).splitlines()[0]}); give "
            "the http:// address of an MLflow server, or install the whole of mlflow for sqlite://"
        ) from None
    finally:
        if before is None:
            os.environ.pop(_RETRIES)


def open_trackers(config: LoopConfig, folder: Path, settings: dict[str, Any]) -> list[Tracker]:
    """Trackers of a run; a run that is resumed goes on in the same one.

    Parameters
    ----------
    config : LoopConfig
        `wandb` and `mlflow`.
    folder : Path
        Run folder; its name is the name of the run.
    settings : dict
        Shown with the run.
    """
    trackers: list[Tracker] = []
    if config.wandb is not None:
        trackers.append(_wandb(config.wandb, folder, settings))
    if config.mlflow is not None:
        trackers.append(_mlflow(config.mlflow, folder, settings))
    return trackers


def _wandb(project: str, folder: Path, settings: dict[str, Any]) -> Tracker:
    import wandb  # an extra

    identity = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    run = wandb.init(project=project, name=folder.name, id=identity, resume="allow", dir=str(folder), config=settings)
    return Tracker(lambda metrics, epoch: run.log(metrics, step=epoch), run.finish)


def _mlflow(uri: str, folder: Path, settings: dict[str, Any]) -> Tracker:
    from mlflow import MlflowClient  # an extra
    from mlflow.entities import Metric, Param

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("aam")
    experiment_id = experiment.experiment_id if experiment else client.create_experiment("aam")
    kept = folder / "mlflow_run_id"
    if kept.exists():
        run_id = kept.read_text()
    else:
        run_id = client.create_run(experiment_id, run_name=folder.name).info.run_id
        kept.write_text(run_id)
        client.log_batch(run_id, params=[Param(name, str(value)) for name, value in settings.items()])

    def log(metrics: dict[str, float], epoch: int) -> None:
        # MLflow takes no brackets in names.
        named = {re.sub(r"[()]", " ", name).strip(): value for name, value in metrics.items()}
        client.log_batch(run_id, metrics=[Metric(n, v, 0, epoch) for n, v in named.items()])

    return Tracker(log, lambda: client.set_terminated(run_id))
