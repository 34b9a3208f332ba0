"""What each Ray Train worker runs: the plain PyTorch loop, with its reports handed to Ray."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
from ray.train.v2._internal.execution import context

from aam.config import is_uri
from aam.distributed.checkpoints import SCORE
from aam.distributed.shared_dataset import dataset_at_hand, share_dataset
from aam.distributed.storage import Uploader, exists, fetch, join, name_of, upload
from aam.plan import RunPlan
from aam.training.checkpoint import CONFIG


def train_worker(config: dict[str, Any]) -> None:
    """Train as one of the workers; resumes from Ray's latest checkpoint of the run where there is one.

    Parameters
    ----------
    config : dict
        `plan`: the RunPlan; `home`: location of the run; `storage_path`: where `share` put dataset and base, if it
        did.
    """
    # Here and not above: seconds to import, which the processes that start the workers can do without.
    from aam.task import build_task
    from aam.training.loop import fit

    plan, home = at_hand(config["plan"], config["home"], config["storage_path"]), config["home"]
    # Ray prints every report in full, by a logger that its own logging settings do not reach.
    logging.getLogger(context.__file__).setLevel(logging.WARNING)
    device = ray.train.torch.get_device()
    latest = ray.train.get_checkpoint()
    folder = _log_folder(home)
    is_first = ray.train.get_context().get_world_rank() == 0
    if is_first and is_uri(home) and latest is None:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was there before
    upload_logs = Uploader(folder, home) if is_first and is_uri(home) else lambda: None

    def report(metrics: dict[str, float], write: Callable[[Path], None] | None) -> None:
        upload_logs()  # first: what hears of the report may stop the run
        report_to_ray(metrics, write)

    task = build_task(plan, device, report=report, folder=folder)
    try:
        if latest is None:
            fit(task)
            return
        with latest.as_directory() as checkpoint:
            fit(task, resume_from=Path(checkpoint))
    finally:
        upload_logs()


def _log_folder(home: str) -> Path:
    """Where the first worker writes the logs: the home itself, or a folder of this machine."""
    if not is_uri(home):
        return Path(home)
    # Trackers show the name of the folder.
    return Path(tempfile.gettempdir()) / "aam-logs" / hashlib.sha256(home.encode()).hexdigest()[:16] / name_of(home)


def share(plan: RunPlan, home: str, storage_path: str) -> None:
    """Copy what the workers read to where all of them can: the prepared dataset, and the base of stage 2."""
    share_dataset(plan.dataset, storage_path)
    if plan.pretrained is not None and not exists(join(home, "base", CONFIG)):
        upload(plan.pretrained, join(home, "base"), last=CONFIG)


def at_hand(plan: RunPlan, home: str, storage_path: str | None) -> RunPlan:
    """The plan with dataset and base as folders that this machine sees.

    Raises
    ------
    ValueError
        Where it sees neither the folders of the driver nor shared ones.
    """
    dataset, pretrained = dataset_at_hand(plan.dataset, storage_path), plan.pretrained
    if pretrained is not None and not pretrained.exists():
        pretrained = fetch(join(home, "base"))
    return dataclasses.replace(plan, dataset=dataset, pretrained=pretrained)


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
