"""Small runs for the tests: plans, tasks, and processes that talk by gloo."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from aam.config import (
    DataConfig,
    LoopConfig,
    ModelConfig,
    PretrainConfig,
    PretrainLossConfig,
    TargetConfig,
    TrainConfig,
)
from aam.distributed.checkpoints import find_best
from aam.plan import RunPlan, make_plan
from aam.task import build_task
from aam.training import checkpoint
from aam.training.loop import fit

CPU = torch.device("cpu")
QUICK: dict[str, Any] = {"batch_size": 8, "epochs": 2, "lr": 1e-3, "report": False}
TINY = ModelConfig(embedding_dim=16, attention_heads=2, clades=32, kmer=3)
"""Reads k-mers alone."""
DEEP = ModelConfig(embedding_dim=16, attention_heads=2, clades=32, kmer=3, asv_layers=1)
"""Has a nucleotide stack too, and so masked nucleotides to predict."""
STILL = ModelConfig(embedding_dim=16, attention_heads=2, clades=32, kmer=3, asv_layers=1, dropout=0.0)
"""The same without dropout, whose random numbers differ between ways of cutting up a batch (see `without_dropout`)."""

ALL_METRICS = PretrainLossConfig(unifrac_metric=("unweighted", "weighted", "faith_pd"))


def data_config(folder: Path, **changed: Any) -> DataConfig:
    fields = {
        "table": folder / "table.biom",
        "tree": folder / "tree.nwk",
        "metadata": folder / "metadata.tsv",
        "rarefy_depth": 200,
        "token_limit": 40,
        "group_column": "subject",
    }
    return DataConfig(**{**fields, **changed})


def pretrain_config(
    folder: Path, output_dir: Path, *, model: ModelConfig = TINY, loss: PretrainLossConfig | None = None, **loop: Any
) -> PretrainConfig:
    return PretrainConfig(
        output_dir=output_dir,
        data=data_config(folder),
        model=model,
        loss=loss or PretrainLossConfig(),
        loop=LoopConfig(**{**QUICK, **loop}),
    )


def train_config(
    folder: Path,
    output_dir: Path,
    *,
    model: ModelConfig = TINY,
    target: TargetConfig | None = None,
    pretrained: Path | None = None,
    freeze_base: bool = False,
    data: DataConfig | None = None,
    **loop: Any,
) -> TrainConfig:
    settings = {**QUICK, **loop}
    return TrainConfig(
        output_dir=output_dir,
        data=data or data_config(folder),
        model=model,
        loss=target or TargetConfig(target="gradient"),
        loop=LoopConfig(**settings),
        pretrained=pretrained,
        freeze_base=freeze_base,
    )


def pretrain_plan(folder: Path, output_dir: Path, **settings: Any) -> RunPlan:
    return make_plan(pretrain_config(folder, output_dir, **settings))


def fit_here(config: PretrainConfig | TrainConfig) -> RunPlan:
    """Train within this process, without Ray; the run folder has what a job leaves, but for `last`."""
    pretrained = None
    if isinstance(config, TrainConfig) and config.pretrained is not None:
        path = find_best(config.pretrained)
        pretrained = (path, checkpoint.load(path).spec)
    plan = make_plan(config, pretrained)

    def keep_best(metrics: dict[str, float], write: Callable[[Path], None] | None) -> None:
        if write is not None and metrics["best_epoch"] == metrics["epoch"]:
            write(plan.output_dir / "best")

    fit(build_task(plan, CPU, report=keep_best, folder=plan.output_dir))
    return plan


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def history(folder: Path) -> list[dict[str, float]]:
    """Metrics of each epoch of a run, but for its speed."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("throughput")} for row in rows]


class Workers:
    """Processes that form a gloo group and stay, for the next call: each takes seconds to start.

    Parameters
    ----------
    world : int
        How many.
    """

    def __init__(self, world: int) -> None:
        self.world, self.running = world, []

    def __call__(self, function: Callable[..., None], *arguments: Any) -> None:
        """Run `function(*arguments)` in each of them; the first error of any ends all and is raised here."""
        if not self.running:
            self._start()
        for _, pipe in self.running:
            pipe.send((function, arguments))
        waiting = [pipe for _, pipe in self.running]
        while waiting:
            for pipe in connection.wait(waiting):
                try:
                    error = pipe.recv()
                except EOFError:
                    error = "a process is gone"
                if error is not None:
                    self.close()
                    raise RuntimeError(error)
                waiting.remove(pipe)

    def _start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, self.world, port), daemon=True)
            process.start()
            theirs.close()
            self.running.append((process, ours))

    def close(self) -> None:
        """End the processes; the next call starts new ones."""
        for process, pipe in self.running:
            pipe.close()
            process.kill()
            process.join()
        self.running = []


def _serve(pipe: connection.Connection, rank: int, world: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    while True:
        function, arguments = pipe.recv()
        try:
            function(*arguments)
        except Exception:
            pipe.send(f"worker {rank} of {world}: {traceback.format_exc()}")
        else:
            pipe.send(None)
