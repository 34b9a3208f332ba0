"""Prediction by many workers of a Ray cluster, each with the model on a device of its own.

The driver hands out shares of the work, one at a time to each worker, and gathers what comes back. The vectors of the
ASVs go to each node once, by Ray's object store, where all workers of the node read them without a copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError
from ray.util.actor_pool import ActorPool

from aam.config import RayConfig
from aam.distributed.shared_dataset import dataset_at_hand, share_dataset
from aam.predict.samples import Executor, Map, Worker
from aam.training.memory import KEEP_FREED_MEMORY


class PredictionWorker:
    """A worker in a process of its own: an actor, which Ray starts anew where it was lost, and asks again."""

    def __init__(self) -> None:
        self.worker: Worker | None = None

    def do(self, given: Given, method: Callable[..., Any], number: int, item: Any, *shared: Any) -> tuple[int, Any]:
        """Number and result of an item of the work."""
        if self.worker is None:  # not in __init__, of which Ray neither hands on errors nor keeps what it was given
            worker: Any = ray.get(given.worker)
            self.worker = dataclasses.replace(worker, dataset=dataset_at_hand(worker.dataset, given.storage_path))
        return number, method(self.worker, item, *shared)


@dataclass(frozen=True)
class Given:
    """What each worker starts from."""

    worker: Any
    """Reference to the Worker, as the driver has it."""
    storage_path: str | None
    """Where the dataset was shared."""


def ray_executor(config: RayConfig) -> Executor:
    """Workers of the cluster that the settings name, or of one that is started here.

    Parameters
    ----------
    config : RayConfig
        Settings.

    Raises
    ------
    ValueError
        Where the cluster does not answer, or does not have that much.
    """
    # Here and not above: it imports Ray Train, seconds that each worker would take too.
    from aam.distributed.cluster import cluster_size, connect, scaling_config

    connect(config)
    scaling: Any = scaling_config(config)  # Ray has it that each field may be a range to search
    least, most = config.workers
    cores, (cpus, gpus) = scaling.resources_per_worker["CPU"], cluster_size()
    room = gpus if scaling.use_gpu else cpus // cores
    actor = ray.remote(PredictionWorker).options(
        num_cpus=cores,
        num_gpus=int(scaling.use_gpu),
        max_restarts=config.max_failures,
        max_task_retries=config.max_failures,
        scheduling_strategy="SPREAD" if config.placement == "spread" else "DEFAULT",
        runtime_env=None if scaling.use_gpu else {"env_vars": KEEP_FREED_MEMORY},
    )

    def start(worker: Worker) -> Map:
        if config.storage_path is not None:
            share_dataset(worker.dataset, config.storage_path)
        given = Given(ray.put(worker), config.storage_path)
        actors = [actor.remote() for _ in range(max(least, min(most, room)))]
        return lambda method, items, *shared: _map(actors, given, config.max_failures, method, items, *shared)

    return Executor(device=torch.device("cuda" if scaling.use_gpu else "cpu"), start=start)


def _map(
    actors: list[Any], given: Given, max_failures: int, method: Callable[..., Any], items: Sequence[Any], *shared: Any
) -> Iterator[tuple[int, Any]]:
    """Hand out items to whoever is free; see `aam.predict.samples.Map`."""
    kept = [ray.put(one) for one in shared]

    def submit(actor: Any, numbered: Any) -> Any:
        return actor.do.remote(given, method, *numbered, *kept)

    pool: Any = ActorPool(actors)  # its annotations are not those of what it takes and gives
    try:
        yield from pool.map_unordered(submit, enumerate(items))
    except RayTaskError as error:
        raise error.cause or error from None
    except RayError as error:
        raise RuntimeError(
            f"a worker was lost more than {max_failures} times (--max-failures), for want of memory perhaps: lower "
            f"--batch-size, --asv-chunk-size or --num-workers. Ray said: {str(error).splitlines()[0]}"
        ) from None
