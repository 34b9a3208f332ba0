"""What each Ray Train worker runs: the plain PyTorch loop, with its reports handed to Ray."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
from ray.train.v2._internal.execution import context

from aam.distributed.checkpoints import SCORE
from aam.plan import RunPlan
from aam.task import build_task
from aam.training.loop import fit


def train_worker(config: dict[str, Any]) -> None:
    """Train as one of the workers; resumes from Ray's latest checkpoint of the run where there is one.

    Parameters
    ----------
    config : dict
        `plan`: the RunPlan.
    """
    plan: RunPlan = config["plan"]
    # Ray prints every report in full, by a logger that its own logging settings do not reach.
    logging.getLogger(context.__file__).setLevel(logging.WARNING)
    device = ray.train.torch.get_device()
    task = build_task(plan, device, report=report_to_ray, folder=plan.output_dir)
    latest = ray.train.get_checkpoint()
    if latest is None:
        fit(task)
        return
    with latest.as_directory() as folder:
        fit(task, resume_from=Path(folder))


def report_to_ray(metrics: dict[str, float], write: Callable[[Path], None] | None) -> None:
    """Report an epoch; the first worker's report carries the checkpoint.

    Ray takes plain finite floats only, so a metric that is not finite stays out of the report.
    """
    plain = {k: (int(v) if k == "epoch" else float(v)) for k, v in metrics.items() if math.isfinite(v)}
    plain[SCORE] = plain["val/total_loss"]
    # The name is the epoch's, so that an epoch that is redone after a failure replaces its own checkpoint.
    name = f"epoch_{int(metrics['epoch']):04d}"
    if write is None:
        ray.train.report(plain, checkpoint_dir_name=name)
        return
    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch) / "checkpoint")
        checkpoint = ray.train.Checkpoint.from_directory(str(Path(scratch) / "checkpoint"))
        ray.train.report(plain, checkpoint=checkpoint, checkpoint_dir_name=name)
