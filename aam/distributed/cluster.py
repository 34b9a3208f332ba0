"""The Ray cluster of a job: found or started, and what it can give to workers."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from functools import partial

import ray
from ray import PlacementGroupID, train
from ray._private import parameter, state
from ray._private.services import find_gcs_addresses
from ray._private.utils import read_ray_address
from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # pyright: ignore[reportAttributeAccessIssue]
from ray.util.placement_group import PlacementGroup, remove_placement_group

from aam.config import RayConfig

# Read where Ray is started and where Tune runs.
RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # workers at Ray's 15 starve beside anything else on the machine
    "RAY_AIR_NEW_OUTPUT": "0",  # a table of Tune's settings, whatever the verbosity
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # TensorBoard shows the loop's own logs, not a second set
}
RESIZE_SECONDS = 10.0
"""How often an elastic run looks whether the cluster has grown; it then goes on from its last checkpoint."""


def connect(config: RayConfig) -> None:
    """Connect to the cluster that the settings name, or to a running one, or start one here; says which.

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
    if address is not None and not answers(address):
        raise ValueError(
            f"no Ray answers at {address}: start one there (ray start --head), or leave out --ray-address "
            "and RAY_ADDRESS"
        )
    # A head that died without `ray stop` leaves its address behind, to which Ray would try to connect for ever.
    left = read_ray_address()
    if address is None and left is not None and answers(left):
        address = left
    if address is None:
        start_local()
    else:
        # Ray's clean-up of stopped trials asks the machine's Ray how they are: with several, it must be told which.
        several = len(find_gcs_addresses()) > 1 and "://" not in address and address != "auto"
        environment = {"env_vars": {"RAY_ADDRESS": address}} if several else None
        ray.init(address=address, runtime_env=environment, log_to_driver=True, logging_level=logging.WARNING)
        free_leftovers()
    print(f"ray: {'started here' if address is None else f'cluster at {address}'}, {_size()}", flush=True)


def start_local(num_cpus: int | None = None, *, log_to_driver: bool = True) -> str:
    """Start a Ray of our own on this machine, which ends with this process; returns its address.

    Its processes have the address in their environment. Without it, those of two Rays on one machine do not
    know which is theirs.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    before = {name: os.environ.get(name) for name in ("RAY_ADDRESS", "RAY_GCS_SERVER_PORT")}
    # ray.init() has no argument for this port, which is fixed: the second Ray on a machine could take no jobs.
    params = parameter.RayParams
    parameter.RayParams = partial(params, dashboard_agent_listen_port=None)  # pyright: ignore[reportAttributeAccessIssue]
    os.environ.update({"RAY_ADDRESS": f"127.0.0.1:{port}", "RAY_GCS_SERVER_PORT": str(port)})
    try:
        ray.init(address="local", num_cpus=num_cpus, log_to_driver=log_to_driver, logging_level=logging.WARNING)
    finally:
        parameter.RayParams = params
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
    return f"127.0.0.1:{port}"


def free_leftovers() -> None:
    """Free what drivers that were killed have left behind in the cluster.

    The controller of a training can outlive its driver by a moment, in which it asks for new workers in the place of
    those that were killed with the driver. Nobody frees these resources then.
    """
    # Over the connection that there is: Ray's public lists of both come from its dashboard, which may be slow, or not
    # there, or that of another Ray on this machine.
    ended = {bytes.fromhex(job["JobID"]) for job in state.jobs() if job["IsDead"]}
    for row in state.state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(row)
        is_there = group.state != PlacementGroupTableData.REMOVED and not group.is_detached
        if is_there and group.creator_job_id in ended:
            print(f"ray: freed {group.placement_group_id.hex()[:8]}, left behind by a job that was killed", flush=True)
            remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))


def answers(address: str) -> bool:
    """Whether something listens at `host:port`; other forms of address are left to Ray."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "://" in address:
        return True
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:
        return False
    return True


def cluster_size() -> tuple[int, int]:
    """CPUs and GPUs of the cluster; of one that grows, what `$AAM_CLUSTER_MAX` (JSON) says that it can grow to.

    Ray itself knows only the nodes that are up, none of them perhaps.
    """
    now = ray.cluster_resources()
    try:
        most = dict(json.loads(os.environ.get("AAM_CLUSTER_MAX") or "{}"))
    except (TypeError, ValueError):
        raise ValueError(
            f'$AAM_CLUSTER_MAX is {os.environ["AAM_CLUSTER_MAX"]!r}, not JSON like {{"CPU": 16, "GPU": 4}}'
        ) from None
    cpus, gpus = (int(max(now.get(kind, 0), most.get(kind, 0))) for kind in ("CPU", "GPU"))
    return cpus, gpus


def _size() -> str:
    cpus, gpus = cluster_size()
    nodes = len([node for node in ray.nodes() if node["Alive"]])
    return f"{nodes} node{'s' if nodes > 1 else ''}, up to {cpus} CPUs and {gpus} GPUs"


def scaling_config(config: RayConfig, *, concurrent: int = 1) -> train.ScalingConfig:
    """Workers of a run, and what each is given.

    Parameters
    ----------
    config : RayConfig
        Settings.
    concurrent : int
        Runs at a time, which share the cluster.

    Raises
    ------
    ValueError
        Where the cluster does not have that much.
    """
    cpus, gpus = cluster_size()
    least, most = config.workers
    use_gpu = gpus >= least * concurrent if config.use_gpu is None else config.use_gpu
    share = max(1, cpus // (most * concurrent))
    each = config.cpus_per_worker or (min(4, share) if use_gpu else share)
    if least * each * concurrent > cpus or (use_gpu and least * concurrent > gpus):
        at_a_time = f", {concurrent} times at once," if concurrent > 1 else ""
        lower = ", --max-concurrent" if concurrent > 1 else ""
        raise ValueError(
            f"--num-workers {config.num_workers} of {each} CPUs{' and a GPU' if use_gpu else ''} each{at_a_time} do "
            f"not fit the cluster ({cpus} CPUs, {gpus} GPUs): lower --num-workers{lower} or --cpus-per-worker"
        )
    return train.ScalingConfig(
        num_workers=most if least == most else (least, most),
        use_gpu=use_gpu,
        resources_per_worker={"CPU": each, "GPU": 1} if use_gpu else {"CPU": each},
        placement_strategy=config.placement.upper(),
        elastic_resize_monitor_interval_s=RESIZE_SECONDS,
    )


def most_concurrent(config: RayConfig, wanted: int) -> int:
    """How many runs the cluster has room for at a time, at most `wanted`.

    A trial that waits for room would keep what it waits for if the sweep were killed meanwhile.
    """
    cpus, gpus = cluster_size()
    workers = config.workers[1]
    use_gpu = gpus >= workers if config.use_gpu is None else config.use_gpu
    room = gpus // workers if use_gpu else cpus // (workers * (config.cpus_per_worker or 1))
    return max(1, min(wanted, room))
