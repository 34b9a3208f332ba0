"""Samples a second of two workers against one: the first part of scaling.py."""

from __future__ import annotations

import argparse
import socket
import sys
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from aam.plan import RunPlan, make_plan
from aam.task import build_task
from aam.training import loop
from benchmarks.runs import CPU, FLOAT, be_quiet, count_parameters, make_config, receive, start


class Watched(DistributedDataParallel):
    """DDP that can be told to leave out the all-reduce of the gradients, as its `no_sync()` does."""

    synced = True

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        self.require_backward_grad_sync = Watched.synced
        return super().forward(*inputs, **kwargs)


class SetUp:
    """Worker processes that train a plan together; after each epoch they wait on a pipe, at no cost.

    Parameters
    ----------
    plan : RunPlan
        With the batch of all of them together.
    world : int
        How many.
    """

    def __init__(self, plan: RunPlan, world: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.workers = [start(_serve, plan, rank, world, port) for rank in range(world)]
        """They train their first epoch, in which all is new, without being told to."""

    def begin(self, *, synced: bool = True) -> None:
        """Let them train one epoch."""
        for _, pipe in self.workers:
            pipe.send(synced)

    def seconds(self) -> float:
        """Wait until they have; seconds of the training part, of the slowest."""
        return max(receive(pipe) for _, pipe in self.workers)

    def epoch(self, *, synced: bool = True) -> float:
        """Train an epoch; seconds of its training part."""
        self.begin(synced=synced)
        return self.seconds()

    def close(self) -> None:
        """End the processes; those that wait do so by themselves."""
        for _, pipe in self.workers:
            pipe.close()
        for process, _ in self.workers:
            process.join(timeout=20)
            process.kill()
            process.join()


def _serve(pipe: Connection, plan: RunPlan, rank: int, world: int, port: int) -> None:
    """Train, one epoch for each word from the pipe, until it is closed."""
    be_quiet()
    loop.DistributedDataParallel = Watched
    if world > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)

    def report(metrics: dict[str, float], write: Any) -> None:
        pipe.send(len(plan.split.train) / metrics["throughput(samples/s)"])
        try:
            Watched.synced = pipe.recv()
        except EOFError:
            sys.exit(0)

    loop.fit(replace(build_task(plan, CPU, report=report), bar_file=sys.stdout))


def measure_workers(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Epochs of one worker, of two, of two without all-reduce, and of two apart, in turn."""
    # Epochs enough for all rounds; each set-up is ended while it waits.
    config = make_config(options, folder, validation=4, epochs=3 + 2 * options.rounds)
    plan = make_plan(config)
    of_two = replace(plan, loop=replace(plan.loop, batch_size=2 * options.per_worker))
    setups: list[SetUp] = []
    try:
        for world in (1, 1, 2):
            setups.append(SetUp(of_two if world == 2 else plan, world))  # noqa: PERF401 (what was started is closed)
        for setup in setups:
            setup.seconds()  # of the first epoch
        one, other, two = setups
        kinds = {
            "one worker": one.epoch,
            "two workers": two.epoch,
            "two, no all-reduce": partial(two.epoch, synced=False),
            "two apart": partial(_apart, one, other),
        }
        times: dict[str, list[float]] = {name: [] for name in kinds}
        for number in range(options.rounds):
            for name, epoch in kinds.items():
                times[name].append(epoch())
            print(f"round {number}  " + "  ".join(f"{k} {v[-1]:.2f} s" for k, v in times.items()), flush=True)
    finally:
        for setup in setups:
            setup.close()
    result = summarize_workers(times, options.samples)
    parameters = count_parameters(plan)
    result |= {"seconds": times, "parameters": parameters, "gradient_mb": FLOAT * parameters / 1e6}
    print(f"{'':22} {'samples/s':>10}")
    for name, rate in result["samples_per_s"].items():
        print(f"{name:22} {rate:10.2f}")
    print(
        f"two workers to one: {result['speedup']:.2f} x (two apart: {result['ceiling']:.2f} x); "
        f"all-reduce of {result['gradient_mb']:.1f} MB: {result['all_reduce_share']:.1%} of a step"
    )
    return result


def _apart(one: SetUp, other: SetUp) -> float:
    one.begin()
    other.begin()
    return max(one.seconds(), other.seconds())


def summarize_workers(times: dict[str, list[float]], samples: int) -> dict[str, Any]:
    """Rates and ratios, medians over the rounds; a ratio is of two neighbours in time.

    Parameters
    ----------
    times : dict of str to list of float
        Seconds of each round's epoch, by set-up.
    samples : int
        Of an epoch; two apart train twice as many.
    """
    one, two, silent, apart = (
        np.array(times[k]) for k in ("one worker", "two workers", "two, no all-reduce", "two apart")
    )
    rates = {name: (2 if name == "two apart" else 1) * samples / median(t) for name, t in times.items()}
    return {
        "samples_per_s": rates,
        "speedup": float(np.median(one / two)),
        "speedup_rounds": (one / two).tolist(),
        "ceiling": float(np.median(2 * one / apart)),
        "all_reduce_share": float(np.median(1 - silent / two)),
    }
