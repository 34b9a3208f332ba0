"""Stage 1 steps on a GPU: fp32 against bf16, with and without cuDNN's attention, in turn on the same batches."""

from __future__ import annotations

import tempfile
from pathlib import Path
from time import perf_counter

import torch

from aam.config import DataConfig, LoopConfig, ModelConfig, PretrainConfig
from aam.data import synthetic
from aam.data.batches import EpochBatches
from aam.plan import make_plan
from aam.task import build_task
from aam.training.optimizer import make_optimizer, update
from aam.training.step import step

GPU = torch.device("cuda", 0)
KINDS = (("fp32", None, False), ("bf16, cuDNN attention", torch.bfloat16, True), ("bf16", torch.bfloat16, False))


def main() -> None:
    """Print milliseconds a step, three times each; in the first round all shapes are new."""
    print(torch.cuda.get_device_name(GPU), torch.__version__)
    with tempfile.TemporaryDirectory() as scratch:
        folder = synthetic.ensure(Path(scratch) / "data", synthetic.SyntheticConfig())
        data = DataConfig(table=folder / "table.biom", tree=folder / "tree.nwk", cache_dir=Path(scratch) / "cache")
        for width in (128, 768):
            model = ModelConfig(embedding_dim=width, attention_heads=width // 32)
            plan = make_plan(PretrainConfig(data=data, model=model, loop=LoopConfig(batch_size=32)))
            task = build_task(plan, GPU)
            optimizer = make_optimizer(task.model, 0.01)
            task.model.train()
            batches = [batch.to(GPU) for epoch in range(1, 5) for batch in EpochBatches(task.train, epoch)]
            for round_number in range(3):
                for name, autocast, cudnn in KINDS:
                    torch.backends.cuda.enable_cudnn_sdp(cudnn)
                    torch.cuda.synchronize()
                    started = perf_counter()
                    for batch in batches:
                        losses, _ = step(task.model, batch, task.objective, autocast=autocast)
                        total = task.objective.weights.total(losses)
                        total.backward()
                        update(optimizer, total.detach().isfinite(), lr=1e-4, clip_norm=1.0)
                    torch.cuda.synchronize()
                    milliseconds = 1000 * (perf_counter() - started) / len(batches)
                    print(f"D {width}  round {round_number}  {name:22} {milliseconds:7.1f} ms/step", flush=True)


if __name__ == "__main__":
    main()
