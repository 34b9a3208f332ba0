"""What 64 GPUs would do, from bytes, links and the time to build a batch: the third part of scaling.py."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from aam.config import DataConfig, ModelConfig, PretrainConfig, PretrainLossConfig
from aam.data import synthetic
from aam.data.batches import BatchPlan, build_batch, exact_unifrac, make_up_samples
from aam.data.draw import generator
from aam.plan import make_plan
from benchmarks.runs import FLOAT, count_parameters, data_of

WORLDS = (1, 2, 8, 64)
BACKWARD_SHARE = 2 / 3
"""Of a step; what the all-reduce of the gradients can hide behind."""
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20
"""Bytes that DDP all-reduces at a time, by default."""
STUDY = synthetic.SyntheticConfig(samples=2600, subjects=400, asvs=5000)
"""For batches of 64 workers, of which the built-in dataset has not the samples."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """GPUs and what joins them."""

    link_gbit: float
    """Gbit/s of a node's network, one way."""
    nvlink_gbit: float
    """Gbit/s of a GPU within its node, one way."""
    gpus_per_node: int
    latency_us: float
    """Of a collective, whatever its size."""

    def milliseconds(self, sent: float, collectives: int, world: int) -> float:
        """Time for `sent` bytes of each worker, in so many collectives.

        One ring through all workers enters and leaves each node once: its slowest link carries what a worker sends.
        """
        if world == 1:
            return 0.0
        gbit = self.nvlink_gbit if world <= self.gpus_per_node else self.link_gbit
        return 8e-6 * sent / gbit + collectives * self.latency_us / 1000


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A step of many workers."""

    width: int
    world: int
    gradient_mb: float
    """That a worker sends at an update, for the gradients."""
    profile_mb: float
    """That a worker sends in a step, for the profiles of all samples and their gradients."""
    gradient_ms: float
    profile_ms: float
    """Nothing hides these: the loss waits for the one, the encoder's backward pass for the other."""
    host_ms: float
    """To build a worker's share of a batch."""
    serial: float
    """Efficiency, the GPU's share of a step, where communication waits for the backward pass to end."""
    overlapped: float
    """Where the gradients are sent while the backward pass goes on, as DDP does."""
    with_host: float
    """The same, and batches are built in the loop, which is the default."""
    with_loaders: float
    """The same, and so many processes build batches ahead."""


def gradient_bytes(parameters: int, world: int) -> float:
    """Bytes that each worker of a ring sends to all-reduce the gradients of an update."""
    return 2 * (world - 1) / world * FLOAT * parameters


def profile_bytes(samples: int, clades: int, metrics: int, world: int) -> float:
    """Bytes that each worker of a ring sends for the profiles of a step.

    Forward, `collectives.all_gather_rows` gathers the rows of all; backward, it all-reduces the gradients of all rows.

    Parameters
    ----------
    samples : int
        Of each worker, made-up ones among them.
    clades : int
        Numbers of a sample for each metric: its presence in each clade, or its share.
    metrics : int
        Metrics of pairs: unweighted, weighted. Faith's PD is of each sample alone, and nothing is sent.
    world : int
        Workers.
    """
    own = metrics * samples * clades * FLOAT
    return (world - 1) * own + 2 * (world - 1) / world * world * own


def estimate(
    cluster: Cluster,
    *,
    width: int,
    parameters: int,
    samples: int,
    clades: int,
    metrics: int,
    step_ms: float,
    host_ms: float,
    loaders: int,
    world: int,
) -> Estimate:
    """Efficiency of `world` GPUs: the GPU's own step over the whole of it.

    Parameters
    ----------
    cluster : Cluster
        Links.
    width, parameters : int
        Of the model.
    samples, clades, metrics : int
        See `profile_bytes`.
    step_ms, host_ms : float
        A GPU's step alone, and the time to build its batch.
    loaders : int
        Processes that build batches ahead, each on a core of its own.
    world : int
        Workers.
    """
    size = FLOAT * parameters
    buckets = 1 + math.ceil(max(0, size - FIRST_BUCKET) / BUCKET)
    gradients = gradient_bytes(parameters, world)
    profiles = profile_bytes(samples, clades, metrics, world)
    gradient_ms = cluster.milliseconds(gradients, buckets, world)
    profile_ms = cluster.milliseconds(profiles, 2 * metrics, world)
    others = profile_ms + cluster.milliseconds(0, 1, world)  # whether to skip the update: one number
    # The last bucket is ready only when the backward pass is over.
    exposed = max(gradient_ms / buckets, gradient_ms - BACKWARD_SHARE * step_ms)
    overlapped = step_ms + others + exposed
    return Estimate(
        width=width,
        world=world,
        gradient_mb=gradients / 1e6,
        profile_mb=profiles / 1e6,
        gradient_ms=gradient_ms,
        profile_ms=profile_ms,
        host_ms=host_ms,
        serial=step_ms / (step_ms + others + gradient_ms),
        overlapped=step_ms / overlapped,
        with_host=step_ms / (overlapped + host_ms),
        with_loaders=step_ms / max(overlapped, host_ms / max(1, loaders)),
    )


def extrapolate(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure `build_batch` as the workers grow in number, and work out the rest."""
    host = measure_host(options, folder)
    print(
        f"build_batch, {options.gpu_batch} samples a worker and made-up ones beside them: ms of the slower of first "
        "and last worker"
    )
    print(f"{'workers':>8} {'batch':>6} {'all':>8} {'draws':>8} {'UniFrac':>8}")
    for world, times in host.items():
        shown = " ".join(f"{times[k]:8.1f}" for k in ("all", "draws", "unifrac"))
        print(f"{world:8} {world * options.gpu_batch:6} {shown}", flush=True)
    cluster = Cluster(
        link_gbit=options.link_gbit,
        nvlink_gbit=options.nvlink_gbit,
        gpus_per_node=options.gpus_per_node,
        latency_us=options.latency_us,
    )
    rows = []
    for width, step_ms in options.gpu_step_ms:
        plan = make_plan(_config(options, data_of(options.data), width))
        parameters = count_parameters(plan)
        rows += [
            estimate(
                cluster,
                width=width,
                parameters=parameters,
                samples=options.gpu_batch + round(plan.made_up_fraction * options.gpu_batch),
                clades=options.clades,
                metrics=sum(metric != "faith_pd" for metric in options.unifrac_metric),
                step_ms=step_ms,
                host_ms=host[world]["all"],
                loaders=options.loader_workers,
                world=world,
            )
            for world in WORLDS
        ]
    if rows:
        print_estimates(rows, options)
    else:
        print("no efficiency without a GPU's step: run gpu_step.py on one, and give --gpu-step-ms WIDTH=MS")
    return {"host_ms": host, "estimates": [asdict(row) for row in rows]}


def _config(options: argparse.Namespace, data: DataConfig, width: int) -> PretrainConfig:
    model = ModelConfig(
        embedding_dim=width,
        attention_heads=max(1, width // 32),
        clades=options.clades,
        asv_layers=options.asv_layers,
    )
    loss = PretrainLossConfig(unifrac_metric=tuple(options.unifrac_metric))
    return PretrainConfig(data=data, model=model, loss=loss)


def print_estimates(rows: list[Estimate], options: argparse.Namespace) -> None:
    """Table of the estimates."""
    print(
        f"\non paper: {options.link_gbit:g} Gbit/s between nodes, {options.nvlink_gbit:g} within; a GPU's step "
        + ", ".join(f"{ms:g} ms at D {width}" for width, ms in options.gpu_step_ms)
        + f"; efficiency of a step: communication in series, overlapped, + build_batch in the loop, + "
        f"{options.loader_workers} loader workers"
    )
    print(
        f"{'D':>4} {'workers':>8} {'grad MB':>8} {'ms':>6} {'prof MB':>8} {'ms':>6} {'host ms':>8}"
        f" {'series':>7} {'overlap':>8} {'+ host':>7} {'+ load':>7}"
    )
    for row in rows:
        print(
            f"{row.width:4} {row.world:8} {row.gradient_mb:8.1f} {row.gradient_ms:6.2f} {row.profile_mb:8.2f} "
            f"{row.profile_ms:6.2f} {row.host_ms:8.1f} {row.serial:7.0%} {row.overlapped:8.0%} "
            f"{row.with_host:7.0%} {row.with_loaders:7.0%}"
        )


def measure_host(options: argparse.Namespace, folder: Path) -> dict[int, dict[str, float]]:
    """Milliseconds to build a worker's share of a batch, by the number of workers; each worker draws all samples."""
    data = data_of(options.data)
    if options.data is None:
        study = synthetic.ensure(folder / "study", STUDY)
        data = DataConfig(table=study / "table.biom", tree=study / "tree.nwk", cache_dir=folder / "cache")
    plan = make_plan(_config(options, data, options.embedding_dim))
    batches = BatchPlan(
        dataset=plan.dataset,
        sample_ids=plan.split.train,
        contract=plan.spec.contract,
        batch_size=options.gpu_batch,
        unifrac=tuple(options.unifrac_metric),
        made_up_fraction=plan.made_up_fraction,
        mask_fraction=plan.mask_fraction,
    )
    rounds: dict[int, list[dict[str, float]]] = {world: [] for world in WORLDS}
    for number in range(1 + options.rounds):
        for world in WORLDS:
            measured = _time_batch(batches, world * options.gpu_batch, world, number + 1)
            if number:  # in the first, the dataset is read from the disk
                rounds[world].append(measured)
    return {
        world: {key: 1000 * median(times[key] for times in measured) for key in measured[0]}
        for world, measured in rounds.items()
    }


def _time_batch(plan: BatchPlan, size: int, world: int, epoch: int) -> dict[str, float]:
    """Seconds of a batch, and of its two parts that every worker does for all samples.

    A study with fewer samples than the batch has them again; UniFrac then meets fewer ASVs than it would.
    """
    assert plan.dataset.paths is not None
    positions = np.arange(size) % len(plan.sample_ids)
    seconds = []
    for rank in sorted({0, world - 1}):
        started = perf_counter()
        build_batch(plan, positions, epoch=epoch, index=0, rank=rank, world=world)
        seconds.append(perf_counter() - started)
    started = perf_counter()
    draws = [plan.draw(plan.sample_ids[int(p)], epoch) for p in positions]
    draws += make_up_samples(draws, round(plan.made_up_fraction * size), generator(plan.contract.seed, epoch))
    drawn = perf_counter()
    for metric in plan.unifrac:
        exact_unifrac(metric, draws, plan.dataset.paths, slice(0, len(draws) // world))
    return {"all": max(seconds), "draws": drawn - started, "unifrac": perf_counter() - drawn}
