"""Stage 1, stage 2 and the report, as Ray jobs one after the other; jobs that are there already are followed."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import ray
from ray._private import worker
from ray.dashboard.modules.job import sdk
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from aam.cli import parse, to_arguments
from aam.config import Location, PipelineConfig, PredictConfig, PretrainConfig, TrainConfig
from aam.distributed.checkpoints import RECORD, home_of
from aam.distributed.cluster import connect
from aam.distributed.run import history, is_finished
from aam.distributed.storage import join, read_json
from aam.plan import check_resumable
from aam.training.checkpoint import is_checkpoint

ROOT = Path(__file__).resolve().parent.parent.parent
DEFAULT_TEST_FRACTION = 0.2
UPLOADED = ("aam", "jobs")
"""What a job needs of this checkout, in which data and much else may lie."""
API_ADDRESS = "RAY_API_SERVER_ADDRESS"
RETRIES = 30
"""How often a lost connection is tried again, every few seconds, before it counts as the end of the cluster."""
SUBMISSIONS = 6
"""How often a job is submitted, Ray waiting ten seconds each time."""

_SHARED = ("table", "metadata", "sequences", "group_column", "test_ids", "test_fraction")
"""What decides, with the seed, which samples are held back: both stages must agree on it."""

C = TypeVar("C", PretrainConfig, TrainConfig)


class JobFailedError(RuntimeError):
    """A job ended without success; the message has its last lines."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A job of the pipeline."""

    name: str
    script: str
    config: PretrainConfig | TrainConfig | PredictConfig

    def entrypoint(self, cluster: Cluster) -> str:
        """Command line of the job."""
        arguments = to_arguments(self.config)
        if cluster.uploads:
            return shlex.join(["python", f"jobs/{self.script}", *arguments])
        # With several Rays on a machine, the environment that Ray gives to a job may name another.
        address = f"RAY_ADDRESS={cluster.gcs_address}"
        return shlex.join(["env", address, sys.executable, str(ROOT / "jobs" / self.script), *arguments])

    def is_done(self) -> bool:
        """Whether its run folder holds a finished run of these settings and data; only for one that lies here.

        Raises
        ------
        ValueError
            Where it holds a run of others.
        """
        if isinstance(self.config, PredictConfig):
            return False  # takes seconds, and its report may have to tell of a better checkpoint
        home = home_of(self.config)
        record = read_json(join(home, RECORD))
        if record is None or not is_checkpoint(self.config.output_dir / "best"):
            return False
        check_resumable(record, self.config, self.config.output_dir)
        return is_finished(self.config, history(home))


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


def plan_stages(config: PipelineConfig) -> list[Stage]:
    """The jobs of a pipeline, all their settings checked.

    Parameters
    ----------
    config : PipelineConfig
        Settings.

    Raises
    ------
    ValueError
        For settings that cannot work, or that let the stages hold back different samples.
    """
    data, folder = config.data, config.output_dir
    if data.test_ids is None and data.test_fraction == 0:
        data = replace(data, test_fraction=DEFAULT_TEST_FRACTION)
    storage, where = config.ray.storage_path, replace(config.ray, ray_address=None)
    if storage is not None:  # runs are kept there under the names of their folders: stage1 of which pipeline?
        where = replace(where, storage_path=Location(join(storage, folder.name)))
    both = [*to_arguments(config.model), *to_arguments(config.loop), *to_arguments(where), "--resume-or-start"]
    first = _parse(
        PretrainConfig,
        [*to_arguments(data), *both, "--output-dir", str(folder / "stage1")],
        "--pretrain-flags",
        config.pretrain_flags,
    )
    # Stage 2 has no use for the tree without UniFrac, and would say so.
    second_data = data if config.loss.base_weight > 0 else replace(data, tree=None)
    frozen = ["--freeze-base"] if config.freeze_base else []
    second = _parse(
        TrainConfig,
        [*to_arguments(second_data), *both, *to_arguments(config.loss), *frozen, "--pretrained", home_of(first),
         "--output-dir", str(folder / "stage2")],
        "--train-flags",
        config.train_flags,
    )  # fmt: skip
    _check_agreement(config, folder, first, second)
    report = PredictConfig(
        checkpoint=Location(home_of(second)),
        output=folder / "predictions.tsv",
        part="test",
        report=folder / "report.md",
        cache_dir=data.cache_dir,
    )
    return [
        Stage(name="stage 1", script="pretrain.py", config=first),
        Stage(name="stage 2", script="train.py", config=second),
        Stage(name="report", script="predict.py", config=report),
    ]


def _parse(config_type: type[C], arguments: list[str], flag: str, more: str) -> C:
    """Settings of a stage: those of the pipeline, and those of its own flags, which win."""
    try:
        return parse(config_type, [*arguments, *shlex.split(more)])
    except SystemExit as end:
        if end.code == 0:  # --help
            raise
        raise ValueError(f"{flag} {more!r}: not settings that this stage can use, as said above") from None
    except ValueError as error:  # a quote that is left open
        raise ValueError(f"{flag} {more!r}: {error}") from None


def _check_agreement(config: PipelineConfig, folder: Path, first: PretrainConfig, second: TrainConfig) -> None:
    if (first.output_dir, second.output_dir) != (folder / "stage1", folder / "stage2"):
        raise ValueError("--output-dir is for the whole pipeline: leave it out of --pretrain-flags and --train-flags")
    differing = [name for name in _SHARED if getattr(first.data, name) != getattr(second.data, name)]
    if first.loop.seed != second.loop.seed:
        differing.append("seed")
    if differing:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in differing)
        raise ValueError(
            f"{flags}: must be the same in both stages, which else hold back different samples; give it to the "
            "pipeline, not in --pretrain-flags or --train-flags"
        )


def run_pipeline(config: PipelineConfig) -> None:
    """Run what is left of a pipeline, its jobs' logs going to the terminal.

    Raises
    ------
    ValueError
        For settings that cannot work, or a cluster that does not answer.
    JobFailedError
        Where a job failed or was stopped.
    """
    stages = plan_stages(config)
    cluster = find_cluster(config)
    client = connect_client(cluster)
    for stage in stages:
        if not cluster.uploads and stage.is_done():
            print(f"{stage.name}: done already", flush=True)
            continue
        entrypoint = stage.entrypoint(cluster)
        labels = {"aam_pipeline": str(config.output_dir), "aam_stage": stage.name}
        job = running_job(client, labels, entrypoint)
        said = "follows" if job else "submitted as"
        if job is None:
            with tempfile.TemporaryDirectory() as scratch:
                job = submit(client, labels, entrypoint, _environment(cluster, Path(scratch)))
        print(f"{stage.name}: {said} Ray job {job} at {cluster.address}", flush=True)
        try:
            follow(client, job)
        except KeyboardInterrupt:
            print(f"\n{stage.name}: {_what_becomes_of_it(cluster, job)}", file=sys.stderr, flush=True)
            raise
        check_succeeded(client, job, stage.name)
    print(f"pipeline done: {config.output_dir}\n" + _where_things_are(config.output_dir), flush=True)


def _environment(cluster: Cluster, scratch: Path) -> dict[str, Any]:
    """What a job needs to find this code; a copy of it is put into `scratch` where it is to be sent."""
    if cluster.uploads:
        for name in UPLOADED:
            shutil.copytree(ROOT / name, scratch / name, ignore=shutil.ignore_patterns("__pycache__"))
        return {"working_dir": str(scratch)}
    return {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}}


def _what_becomes_of_it(cluster: Cluster, job: str) -> str:
    again = "the same command, with this --output-dir,"
    if cluster.is_own:
        return f"ends with the Ray that was started here; {again} goes on from its last checkpoint"
    return f"its job goes on; {again} follows it again. To end it: ray job stop --address {cluster.address} {job}"


def _where_things_are(folder: Path) -> str:
    return "\n".join(
        [
            f"  report       {folder / 'report.md'}",
            f"  predictions  {folder / 'predictions.tsv'}",
            f"  stage 1      {folder / 'stage1'}",
            f"  stage 2      {folder / 'stage2'}",
        ]
    )


def find_cluster(config: PipelineConfig) -> Cluster:
    """The cluster that the settings name, or the one of this machine, or a new one.

    Raises
    ------
    ValueError
        Where there is none at an address that was given, or it takes no jobs.
    """
    address = config.address or os.environ.get(API_ADDRESS)
    if address is not None:
        return Cluster(address=address.rstrip("/"), uploads=True, is_own=False)
    connect(config.ray)
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
