"""Ray jobs: where they are submitted to, and what becomes of them."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import ray
from ray._private import worker
from ray.dashboard.modules.job import sdk
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from aam.config import RayConfig
from aam.distributed.cluster import connect

ROOT = Path(__file__).resolve().parent.parent.parent
UPLOADED = ("aam", "jobs")
"""What a job needs of this checkout, in which data and much else may lie."""
API_ADDRESS = "RAY_API_SERVER_ADDRESS"
RETRIES = 30
"""How often a lost connection is tried again, every few seconds, before it counts as the end of the cluster."""
SUBMISSIONS = 6
"""How often a job is submitted, Ray waiting ten seconds each time."""


class JobFailedError(RuntimeError):
    """A job ended without success; the message has its last lines."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where jobs are submitted to."""

    address: str
    """Of the dashboard."""
    uploads: bool
    """Whether it has to be sent this checkout."""
    is_own: bool
    """Whether it ends with this process."""
    gcs_address: str | None = None
    """For ray.init(), from this machine."""


def job_environment(cluster: Cluster, scratch: Path) -> dict[str, Any]:
    """What a job needs to find this code; a copy of it is put into `scratch` where it is to be sent."""
    if cluster.uploads:
        for name in UPLOADED:
            shutil.copytree(ROOT / name, scratch / name, ignore=shutil.ignore_patterns("__pycache__"))
        return {"working_dir": str(scratch)}
    return {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}}


def find_cluster(address: str | None, config: RayConfig) -> Cluster:
    """The cluster that the settings name, or the one of this machine, or a new one.

    Raises
    ------
    ValueError
        Where there is none at an address that was given, or it takes no jobs.
    """
    address = address or os.environ.get(API_ADDRESS)
    if address is not None:
        return Cluster(address=address.rstrip("/"), uploads=True, is_own=False)
    connect(config)
    node = worker._global_node
    assert node is not None
    dashboard, gcs, is_own = node.address_info["webui_url"], node.gcs_address, node.is_head()
    if not is_own:
        ray.shutdown()  # the client of jobs needs no connection of its own, which would end when the cluster does
    if not dashboard:
        raise ValueError("the Ray of this machine has no dashboard, which jobs are submitted to: start it with one")
    return Cluster(address=f"http://{dashboard}", uploads=False, is_own=is_own, gcs_address=gcs)


def connect_client(cluster: Cluster) -> JobSubmissionClient:
    """Client of the jobs of a cluster.

    Raises
    ------
    ValueError
        Where nothing answers, or it does not let us in.
    """
    os.environ[API_ADDRESS] = cluster.address  # Ray prefers it, or RAY_ADDRESS, to the address that it is given
    logging.getLogger(sdk.__name__).setLevel(logging.WARNING)  # else: a line on each log that was read to its end
    try:
        return JobSubmissionClient(cluster.address)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"no Ray dashboard answers at {cluster.address}: start one there (ray start --head), or give its address "
            f"as --address http://HOST:8265 ({_first_line(error)})"
        ) from None
    except AuthenticationError as error:
        raise ValueError(
            f"the Ray at {cluster.address} asks for its token: copy its ~/.ray/auth_token to this machine, or set "
            f"RAY_AUTH_TOKEN_PATH and RAY_AUTH_MODE=token ({_first_line(error)})"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def running_job(client: JobSubmissionClient, labels: dict[str, str], entrypoint: str) -> str | None:
    """Id of the job of a stage that an interrupted pipeline left running; None where there is none.

    Raises
    ------
    ValueError
        Where one runs with other settings.
    """
    for job in client.list_jobs():
        if job.submission_id is None or job.status.is_terminal():
            continue
        if labels.items() <= (job.metadata or {}).items():
            if job.entrypoint != entrypoint:
                raise ValueError(
                    f"{labels['aam_pipeline']}: {labels['aam_stage']} is running with other settings as Ray job "
                    f"{job.submission_id}: repeat its command to follow it, end it by `ray job stop "
                    f"{job.submission_id}`, or choose another --output-dir"
                )
            return job.submission_id
    return None


def submit(client: JobSubmissionClient, labels: dict[str, str], entrypoint: str, environment: dict[str, Any]) -> str:
    """Submit a job; returns its id. The files that it is to be sent are read before this returns."""
    for attempt in range(SUBMISSIONS):
        try:
            return client.submit_job(entrypoint=entrypoint, metadata=labels, runtime_env=environment)
        except RuntimeError as error:
            # A Ray that has just been started takes no jobs for some seconds, more on a busy machine.
            if attempt == SUBMISSIONS - 1 or "No available agent" not in str(error):
                raise
    raise AssertionError


def follow(client: JobSubmissionClient, job: str) -> None:
    """Print what a job logs, from its beginning, until it ends; a connection that is lost is made again.

    Raises
    ------
    JobFailedError
        Where the cluster does not answer any more.
    """
    printed, lost = [0], 0
    while True:
        try:
            asyncio.run(_print_log(client, job, printed))
            if client.get_job_status(job).is_terminal():
                return
            lost = 0
        except (OSError, RuntimeError, aiohttp.ClientError) as error:
            lost += 1
            if lost > RETRIES:
                raise JobFailedError(
                    f"lost the Ray cluster that runs job {job} ({_first_line(error)}); when it is back, the same "
                    "command goes on"
                ) from None
        time.sleep(1 if lost == 0 else 5)


async def _print_log(client: JobSubmissionClient, job: str, printed: list[int]) -> None:
    """Print the log beyond the characters that are printed already, and count on."""
    at = 0
    async for text in client.tail_job_logs(job):
        new = text[max(0, printed[0] - at) :]
        at += len(text)
        if new:
            print(new, end="", flush=True)
            printed[0] = at


def check_succeeded(client: JobSubmissionClient, job: str, name: str) -> None:
    """Raise an error with the last lines of a job unless it succeeded."""
    info = client.get_job_info(job)
    if info.status == JobStatus.SUCCEEDED:
        return
    if info.status == JobStatus.STOPPED:
        raise JobFailedError(f"{name}: its Ray job {job} was stopped; the same command goes on with it")
    said = last_lines(client.get_job_logs(job)) or info.message or ""
    code = "" if info.driver_exit_code is None else f", exit code {info.driver_exit_code}"
    raise JobFailedError(f"{name} failed (Ray job {job}{code}); the last it said:\n\n{said}")


def last_lines(log: str, most: int = 15) -> str:
    """The end of a log: from its last `error: ` on, else its last lines."""
    lines: Sequence[str] = [line for line in log.splitlines() if line.strip()]
    errors = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    return "\n".join(lines[errors[-1] :][:most] if errors else lines[-most:])
