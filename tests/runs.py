"""Small runs for the tests: plans, tasks, and processes that talk by gloo."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from aam.config import (
    DataConfig,
    LoopConfig,
    ModelConfig,
    PretrainConfig,
    TargetConfig,
    TrainConfig,
)
from aam.plan import RunPlan, make_plan

CPU = torch.device("cpu")
TINY = ModelConfig(embedding_dim=16, attention_heads=2, attention_layers=1, kmer=3)
STILL = ModelConfig(embedding_dim=16, attention_heads=2, attention_layers=1, kmer=3, dropout=0.0)
"""Without dropout, whose random numbers differ between ways of cutting up a batch."""


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


def pretrain_config(folder: Path, output_dir: Path, *, model: ModelConfig = TINY, **loop: Any) -> PretrainConfig:
    settings = {"batch_size": 8, "epochs": 2, "lr": 1e-3, **loop}
    return PretrainConfig(output_dir=output_dir, data=data_config(folder), model=model, loop=LoopConfig(**settings))


def train_config(
    folder: Path,
    output_dir: Path,
    *,
    model: ModelConfig = TINY,
    target: TargetConfig | None = None,
    pretrained: Path | None = None,
    freeze_base: bool = False,
    **loop: Any,
) -> TrainConfig:
    settings = {"batch_size": 8, "epochs": 2, "lr": 1e-3, **loop}
    return TrainConfig(
        output_dir=output_dir,
        data=data_config(folder),
        model=model,
        loss=target or TargetConfig(target="gradient"),
        loop=LoopConfig(**settings),
        pretrained=pretrained,
        freeze_base=freeze_base,
    )


def pretrain_plan(folder: Path, output_dir: Path, **settings: Any) -> RunPlan:
    return make_plan(pretrain_config(folder, output_dir, **settings))


def spawn(function: Callable[..., None], world: int, *arguments: Any) -> None:
    """Run `function(*arguments)` in each of `world` processes that form a gloo group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_process, args=(function, world, port, arguments), nprocs=world)


def _process(rank: int, function: Callable[..., None], world: int, port: int, arguments: tuple) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        function(*arguments)
    finally:
        dist.destroy_process_group()
