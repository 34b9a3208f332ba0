"""Stage 1 steps on a GPU: k-mers alone and with a nucleotide stack, in fp32 and bf16.

With a stack, also with cuDNN's attention. All in turn on the same batches, of 32 samples and 16 made-up ones.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from time import perf_counter

import torch

from aam.batch import Batch
from aam.config import DataConfig, LoopConfig, ModelConfig, PretrainConfig
from aam.data import synthetic
from aam.data.batches import EpochBatches
from aam.plan import make_plan
from aam.task import build_task
from aam.training.loop import Task
from aam.training.optimizer import make_optimizer, update
from aam.training.step import step

GPU = torch.device("cuda", 0)
KINDS = (("fp32", None, False), ("bf16, cuDNN attention", torch.bfloat16, True), ("bf16", torch.bfloat16, False))


def main() -> None:
    """Print milliseconds a step, in three rounds; in the first, all shapes are new."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--asv-layers", nargs="+", type=int, default=[0, 4], help="of the nucleotide stack")
    parser.add_argument("--embedding-dim", nargs="+", type=int, default=[128, 768])
    options = parser.parse_args()
    print(torch.cuda.get_device_name(GPU), torch.__version__)
    with tempfile.TemporaryDirectory() as scratch:
        folder = synthetic.ensure(Path(scratch) / "data", synthetic.SyntheticConfig())
        data = DataConfig(table=folder / "table.biom", tree=folder / "tree.nwk", cache_dir=Path(scratch) / "cache")
        for asv_layers in options.asv_layers:
            for width in options.embedding_dim:
                model = ModelConfig(embedding_dim=width, attention_heads=width // 32, asv_layers=asv_layers)
                plan = make_plan(PretrainConfig(data=data, model=model, loop=LoopConfig(batch_size=32)))
                time_steps(build_task(plan, GPU), f"D {width}  asv layers {asv_layers}")


def time_steps(task: Task, label: str) -> None:
    """Print milliseconds a step of a task, in each round and kind; cuDNN's attention only where there is any."""
    has_attention = task.spec.encoder.asv_layers > 0
    optimizer = make_optimizer(task.model, 0.01)
    task.model.train()
    batches = [batch.to(GPU) for epoch in range(1, 5) for batch in EpochBatches(task.train, epoch)]
    for number in range(3):
        for name, autocast, cudnn in KINDS:
            if has_attention or not cudnn:
                milliseconds = _epoch_ms(task, optimizer, batches, autocast, cudnn)
                print(f"{label}  round {number}  {name:22} {milliseconds:7.2f} ms/step", flush=True)


def _epoch_ms(
    task: Task, optimizer: torch.optim.Optimizer, batches: list[Batch], autocast: torch.dtype | None, cudnn: bool
) -> float:
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    torch.cuda.synchronize()
    started = perf_counter()
    for batch in batches:
        losses, _ = step(task.model, batch, task.objective, autocast=autocast)
        total = task.objective.weights.total(losses)
        total.backward()
        update(optimizer, total.detach().isfinite(), lr=1e-4, clip_norm=1.0)
    torch.cuda.synchronize()
    return 1000 * (perf_counter() - started) / len(batches)


if __name__ == "__main__":
    main()
