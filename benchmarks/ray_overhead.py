"""An epoch on Ray against the same in a plain process: the second part of scaling.py."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from aam.config import PretrainConfig
from aam.plan import make_plan
from aam.task import build_task
from aam.training import loop
from benchmarks.runs import CPU, be_quiet, make_config, receive, start


def measure_ray(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Runs in a plain process and on Ray, in turn."""
    config = make_config(options, folder, validation=options.samples // 4, epochs=options.ray_epochs)
    functions = {"bare": _bare_run, "ray": _ray_run}
    epochs: dict[str, list[float]] = {name: [] for name in functions}
    training: dict[str, list[float]] = {name: [] for name in functions}
    jobs: dict[str, list[float]] = {name: [] for name in functions}
    saving: list[float] = []
    losses: list[list[float]] = []
    for number in range(options.ray_rounds):
        for name, function in functions.items():
            run = replace(config, output_dir=folder / f"{name}-{number}")
            started = perf_counter()
            process, pipe = start(function, run)
            try:
                saving += receive(pipe)
                process.join()
            finally:
                if process.is_alive():
                    process.terminate()  # Ray's processes end with the one that started them
                    process.join()
            jobs[name].append(perf_counter() - started)
            epochs[name] += epoch_seconds(run.output_dir)
            rows = [json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()]
            training[name] += [options.samples / row["throughput(samples/s)"] for row in rows[2:]]
            losses.append([row["val/total_loss"] for row in rows])
            print(
                f"{name} {number}  epochs {' '.join(f'{s:.2f}' for s in epochs[name][2 - len(rows) :])} s", flush=True
            )
    result = summarize_ray(epochs, training, saving)
    result |= {"epoch_s": epochs, "training_s": training, "job_s": jobs, "losses": losses}
    result["same_losses"] = all(run == losses[0] for run in losses)
    print(
        f"epoch: {result['bare_s']:.2f} s bare ({result['bare_unsaved_s']:.2f} s without its checkpoint), "
        f"{result['ray_s']:.2f} s on Ray: {result['overhead']:+.1%}, {result['training_overhead_s']:+.2f} s in the "
        f"training part and {result['other_overhead_s']:+.2f} s outside; losses "
        f"{'the same' if result['same_losses'] else 'DIFFER'}\n"
        f"run, from start to end: {median(jobs['bare']):.1f} s bare, {median(jobs['ray']):.1f} s with Ray's own start"
    )
    return result


def _bare_run(pipe: Connection, config: PretrainConfig) -> None:
    """All that a worker of Ray does, a checkpoint after each epoch included; sends the seconds of each of these."""
    be_quiet()
    plan = make_plan(config)
    seconds: list[float] = []

    def report(metrics: dict[str, float], write: Callable[[Path], None] | None) -> None:
        assert write is not None
        started = perf_counter()
        write(plan.output_dir / "checkpoint")
        seconds.append(perf_counter() - started)

    loop.fit(replace(build_task(plan, CPU, report=report, folder=plan.output_dir), bar_file=sys.stdout))
    pipe.send(seconds[1:])


def _ray_run(pipe: Connection, config: PretrainConfig) -> None:
    """The run of a job, on a Ray of its own that ends with it."""
    # Here and not above: seconds to import, which the other processes can do without.
    import ray

    from aam.distributed.cluster import RAY_ENVIRONMENT, start_local
    from aam.distributed.run import run

    be_quiet()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.environ.update(RAY_ENVIRONMENT)
    try:
        start_local(num_cpus=1, log_to_driver=False)
        run(config)
    finally:
        ray.shutdown()
    pipe.send([])


def epoch_seconds(folder: Path) -> list[float]:
    """Seconds from each epoch's record to the next one's, from the second epoch's on.

    The first pair is left out: the first epoch's checkpoint and pictures are the first of their process.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return np.diff([event.wall_time for event in events.Scalars("lr")]).tolist()[1:]


def summarize_ray(
    epochs: dict[str, list[float]], training: dict[str, list[float]], saving: list[float]
) -> dict[str, Any]:
    """Seconds of an epoch, medians over all runs, and what Ray adds to a bare run that saves as well.

    Parameters
    ----------
    epochs, training : dict of str to list of float
        Seconds of each epoch, and of its training part, of `bare` and `ray`.
    saving : list of float
        Seconds of the bare run's checkpoints.
    """
    bare, on_ray = median(epochs["bare"]), median(epochs["ray"])
    in_training = median(training["ray"]) - median(training["bare"])
    return {
        "bare_s": bare,
        "bare_unsaved_s": bare - median(saving),
        "ray_s": on_ray,
        "overhead": on_ray / bare - 1,
        "overhead_s": on_ray - bare,
        "training_overhead_s": in_training,
        "other_overhead_s": on_ray - bare - in_training,
    }
