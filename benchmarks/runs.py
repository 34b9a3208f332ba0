"""Runs of the benchmarks: their settings, and processes that train."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from aam.config import DataConfig, LoopConfig, ModelConfig, PretrainConfig, PretrainLossConfig, RayConfig
from aam.plan import RunPlan, make_plan

CPU = torch.device("cpu")
FLOAT = 4
"""Bytes of a number that is sent: gradients and profiles are float32, whatever the precision."""


def make_config(options: argparse.Namespace, folder: Path, *, validation: int, epochs: int) -> PretrainConfig:
    """Settings of a run on so many samples, which are listed in `folder`; batches are those of one worker."""
    data = data_of(options.data)
    base = PretrainConfig(
        output_dir=folder / "run",
        data=data,
        model=ModelConfig(embedding_dim=options.embedding_dim, clades=options.clades, asv_layers=options.asv_layers),
        loss=PretrainLossConfig(unifrac_metric=tuple(options.unifrac_metric)),
        loop=LoopConfig(batch_size=options.per_worker, epochs=epochs, patience=epochs),
        ray=RayConfig(num_workers=1, cpus_per_worker=1, use_gpu=False),
    )
    split = make_plan(base).split
    if len(split.train) < options.samples or len(split.val) < validation:
        raise SystemExit(f"--samples {options.samples}: there are {len(split.train)}, and {len(split.val)} to validate")
    ids = {"train_ids": split.train[: options.samples], "val_ids": split.val[:validation]}
    files = {}
    for name, chosen in ids.items():
        files[name] = folder / name
        files[name].write_text("\n".join(chosen))
    return replace(base, data=replace(data, **files))


def data_of(folder: Path | None) -> DataConfig:
    """Where the data are; the built-in dataset where none are named."""
    if folder is None:
        return DataConfig()
    folder = folder.resolve()
    return DataConfig(
        table=folder / "table.biom",
        tree=folder / "tree.nwk",
        train_ids=folder / "train.txt",
        val_ids=folder / "val.txt",
    )


def start(function: Callable[..., None], *arguments: Any) -> tuple[Any, Connection]:
    """Call `function(pipe, *arguments)` in a new process; the process, and our end of the pipe."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=function, args=(theirs, *arguments))
    process.start()
    theirs.close()
    return process, ours


def receive(pipe: Connection) -> Any:
    """What a process sends; its own traceback has said why where it is gone."""
    try:
        return pipe.recv()
    except EOFError:
        raise SystemExit("a process ended before it was done") from None


def be_quiet() -> None:
    """One thread, as Ray gives a worker of one CPU; no words but errors."""
    torch.set_num_threads(1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, sys.stdout.fileno())


def count_parameters(plan: RunPlan) -> int:
    """Parameters whose gradients the workers all-reduce."""
    return sum(p.numel() for p in plan.spec.build().parameters() if p.requires_grad)
