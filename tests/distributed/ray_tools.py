"""What tests look at, and do to, on a Ray that runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psutil
import ray
from ray.util.placement_group import placement_group_table
from ray.util.state import list_actors

from aam.distributed.cluster import free_leftovers
from runs import wait_for


def train_workers() -> list[psutil.Process]:
    """Processes that train, of the Ray that the tests started. Ray names its processes by what they run."""
    return [process for process in psutil.Process().children(recursive=True) if _trains(process)]


def _trains(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):  # gone meanwhile
        return "RayTrainWorker" in " ".join(process.cmdline())
    return False


@contextlib.contextmanager
def paused(worker: psutil.Process) -> Iterator[None]:
    """Stop a training worker, and with it those that wait for it, so that a run stays where it is."""
    worker.suspend()
    try:
        yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.resume()


def nodes_of_workers() -> list[str]:
    """Node of each training worker that runs."""
    actors = list_actors(filters=[("class_name", "=", "RayTrainWorker"), ("state", "=", "ALIVE")])
    return [actor.node_id for actor in actors]


def wait_until_freed(*, as_by_next_job: bool = False) -> None:
    """All CPUs are there again, and no placement group holds any; by what the next job would free, where asked for."""

    def freed() -> bool:
        if as_by_next_job:
            free_leftovers()
        states = {group["state"] for group in placement_group_table().values()}
        return states <= {"REMOVED"} and ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]

    wait_for(freed)
