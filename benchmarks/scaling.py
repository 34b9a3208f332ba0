"""What more workers bring, what Ray costs, and what 64 GPUs would do on paper.

    python benchmarks/scaling.py --json scaling.json

1. `workers`: samples/s of stage 1's training epochs (batches, forward, backward with DDP's all-reduce, update) by two
   worker processes of a thread each, against one, at the same samples per worker. A sample counts once, although in a
   batch twice as large it has twice as many UniFrac pairs; made-up samples do not count. Beside them, what the machine
   itself allows: two processes that do not know of each other, and the two workers without the all-reduce of their
   gradients.
2. `ray`: the same run, one worker of one thread, in a plain process and as the jobs have it on Ray. An epoch is from
   its record to the next one's in TensorBoard: training, validation, checkpoint, report.
3. `paper`: bytes that each worker sends at an update (gradients, and profiles of clades), milliseconds of
   `build_batch`, and the efficiency that follows from these, a link's speed and a GPU's step (--gpu-step-ms).

Set-ups take turns in each round, and what is printed are medians; all loops are `aam.training.loop.fit`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from benchmarks.many_workers import measure_workers
from benchmarks.on_paper import extrapolate
from benchmarks.ray_overhead import measure_ray

PARTS = ("workers", "ray", "paper")


def main() -> None:
    """Print tables; write all figures as JSON where that is asked for."""
    options = parse_options()
    # Read by every process started here, before it imports what has threads; Ray sets it for its workers.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    # So that `timeout` and `kill` also end the processes started here.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    load = os.getloadavg()[0]
    if load > 0.3:
        print(
            f"WARNING: other processes run here (load {load:.1f}): figures of a shared machine mean little", flush=True
        )
    result: dict[str, Any] = {
        "load": load,
        "cores": os.cpu_count(),
        "options": {k: str(v) for k, v in vars(options).items()},
        "torch": torch.__version__,
    }
    measures = {"workers": measure_workers, "ray": measure_ray, "paper": extrapolate}
    with tempfile.TemporaryDirectory() as scratch:
        for part in options.parts:
            started = perf_counter()
            folder = Path(scratch) / part
            folder.mkdir()
            result[part] = measures[part](options, folder)
            result[part]["took_s"] = round(perf_counter() - started, 1)
            print(f"-- {part}: {result[part]['took_s']} s\n", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1))


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Flags of the command line, unless arguments are given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--data", type=Path, help="folder of table.biom, tree.nwk, train.txt, val.txt")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--rounds", type=int, default=5, help="of workers, an epoch of each set-up; of build_batch")
    parser.add_argument("--per-worker", type=int, default=8, help="samples of a step on each worker")
    parser.add_argument("--samples", type=int, default=144, help="training samples of an epoch")
    parser.add_argument("--embedding-dim", type=int, default=128)
    parser.add_argument("--asv-layers", type=int, default=0, help="of the nucleotide stack; 0: k-mers alone")
    parser.add_argument("--clades", type=int, default=512)
    parser.add_argument(
        "--unifrac-metric", nargs="+", choices=("unweighted", "weighted", "faith_pd"), default=["unweighted"]
    )
    parser.add_argument("--ray-rounds", type=int, default=2, help="runs of each kind")
    parser.add_argument("--ray-epochs", type=int, default=6, help="of a run; the first two are not counted")
    parser.add_argument("--gpu-batch", type=int, default=32, help="samples of a step on each GPU")
    parser.add_argument(
        "--gpu-step-ms",
        nargs="+",
        type=_width_and_time,
        default=[],
        metavar="WIDTH=MS",
        help="step of such a batch on one GPU, by the width of the model, as gpu_step.py measures it; without it, no "
        "efficiency is worked out",
    )
    parser.add_argument("--link-gbit", type=float, default=100.0, help="Gbit/s of a node's network, one way")
    parser.add_argument("--nvlink-gbit", type=float, default=2400.0, help="Gbit/s of a GPU within its node, one way")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--latency-us", type=float, default=50.0, help="of a collective, whatever its size")
    parser.add_argument("--loader-workers", type=int, default=8, help="processes that build batches for each GPU")
    options = parser.parse_args(arguments)
    if options.samples % (2 * options.per_worker):
        parser.error("--samples must be a multiple of twice --per-worker: all batches are to be full")
    if options.ray_epochs < 4:
        parser.error("--ray-epochs must be at least 4: the first two are not counted")
    return options


def _width_and_time(text: str) -> tuple[int, float]:
    width, milliseconds = text.split("=")
    return int(width), float(milliseconds)


if __name__ == "__main__":
    main()
