"""A stage 1 step of ours against the naive one: time, memory, and how near to the hardware's limit.

Each side has a process of its own, for its own peak memory and its own settings; they take their steps in turn on
the same batches, one at a time.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import resource
import tempfile
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import tyro

from aam.batch import Batch
from aam.config import DataConfig, LoopConfig, ModelConfig, PretrainConfig
from aam.data import synthetic
from aam.data.batches import EpochBatches
from aam.model.sizes import EncoderSizes
from aam.plan import make_plan
from aam.task import build_task
from aam.training.memory import keep_freed_memory
from aam.training.optimizer import make_optimizer, update
from aam.training.step import step
from benchmarks.naive import NaiveEncoder, naive_step

NAIVE = "naive"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _default_data() -> list[Path]:
    folder = os.environ.get("AAM_TEST_DATA")
    return [Path(folder) / name for name in ("ibd", "ecam")] if folder else []


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to time."""

    data: list[Path] = field(default_factory=_default_data)
    """Folders with table.biom, tree.nwk, train.txt and val.txt. [default: ibd and ecam in $AAM_TEST_DATA, or else the
    built-in dataset]"""
    batch_sizes: list[int] = field(default_factory=lambda: [8, 32])
    """Samples of a step."""
    precisions: list[str] = field(default_factory=list)
    """fp32, bf16: arithmetic of our step. [default: fp32, and bf16 where the hardware has instructions for it]"""
    rounds: int = 5
    """Steps of each side that are timed, after one that is not."""
    threads: int = os.cpu_count() or 1
    """CPU threads."""
    device: str = "cpu"
    """cpu, or cuda: the naive step then runs in bf16 too."""
    embedding_dim: int = 128
    """Width, in heads of 32."""
    layers: int = 4
    """Of each of three stacks: nucleotides, and two over the ASVs of a sample."""
    json: Path | None = None
    """File for the results."""


def main(settings: Settings) -> None:
    """Time all datasets and batch sizes."""
    precisions = settings.precisions or ["fp32", *(["bf16"] if _has_bf16(settings.device) else [])]
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folders = settings.data or [synthetic.ensure(Path(scratch) / "built-in", synthetic.SyntheticConfig())]
        for folder in folders:
            for batch_size in settings.batch_sizes:
                found = _compare(settings, precisions, folder, batch_size)
                results.setdefault(folder.name, {})[str(batch_size)] = found
                _show(folder.name, batch_size, found)
                if settings.json is not None:
                    settings.json.write_text(json.dumps(results, indent=2) + "\n")


def _compare(settings: Settings, precisions: list[str], folder: Path, batch_size: int) -> dict[str, Any]:
    """Steps of the sides in turn; the first of each is not timed."""
    context = mp.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for side in (NAIVE, *precisions):
        pipes[side], far = context.Pipe()
        processes.append(context.Process(target=_side, args=(side, settings, folder, batch_size, far)))
        processes[-1].start()
        far.close()
    losses = {side: _ask(pipe, "losses") for side, pipe in pipes.items()}
    records: dict[str, list[dict[str, float]]] = {side: [] for side in pipes}
    for index in range(settings.rounds + 1):
        for side, pipe in pipes.items():
            records[side].append(_ask(pipe, index))
    for pipe in pipes.values():
        pipe.send(None)
    for process in processes:
        process.join()
    found: dict[str, Any] = {NAIVE: _summary(records[NAIVE][1:])}
    for precision in precisions:
        ours = _summary(records[precision][1:])
        pairs = zip(records[NAIVE][1:], records[precision][1:], strict=True)
        ratios = [naive["seconds"] / own["seconds"] for naive, own in pairs]
        ours |= {
            "ratio": median(ratios),
            "ratio_spread": [min(ratios), max(ratios)],
            "loss_difference": max(abs(losses[precision][k] / losses[NAIVE][k] - 1) for k in losses[NAIVE]),
        }
        found[precision] = ours
    fastest = max(precisions, key=lambda precision: found[precision]["ratio"])
    return {"ratio": found[fastest]["ratio"], "precision": fastest, "mfu": found[fastest]["mfu"]} | found


def _ask(pipe: Connection, request: str | int) -> Any:
    pipe.send(request)
    return pipe.recv()


def _summary(records: list[dict[str, float]]) -> dict[str, float]:
    """Medians of all that was measured; the peak of the memory."""
    summary = {name: median(record[name] for record in records) for name in records[0]}
    return summary | {"peak_memory_gib": max(record["peak_memory_gib"] for record in records)}


def _side(side: str, settings: Settings, folder: Path, batch_size: int, pipe: Connection) -> None:
    """One side's process: answers each number of a batch with what its step took."""
    torch.set_num_threads(settings.threads)
    device = torch.device(settings.device)
    files = {"train_ids": folder / "train.txt", "val_ids": folder / "val.txt"}
    data = DataConfig(
        table=folder / "table.biom",
        tree=folder / "tree.nwk",
        **(files if files["train_ids"].exists() else {}),
    )
    sizes = ModelConfig(
        embedding_dim=settings.embedding_dim,
        attention_heads=max(1, settings.embedding_dim // 32),
        attention_layers=2 * settings.layers,
        asv_layers=settings.layers,
    )
    plan = make_plan(PretrainConfig(data=data, model=sizes, loop=LoopConfig(batch_size=batch_size)))
    task = build_task(plan, device)
    precision = side if side != NAIVE else "bf16" if device.type == "cuda" else "fp32"
    autocast = None if precision == "fp32" else torch.bfloat16
    model = task.model
    if side == NAIVE:
        model = NaiveEncoder(model, task.spec.contract.token_limit).to(device)
    elif device.type == "cpu":
        keep_freed_memory()  # as the loop does
    torch.backends.cuda.enable_cudnn_sdp(False)  # as the loop does

    def losses_of(batch: Batch) -> torch.Tensor:
        if side == NAIVE:
            return torch.stack(list(naive_step(model, batch, task.objective, autocast).values()))
        losses, _ = step(model, batch, task.objective, autocast=autocast)
        return torch.stack([term.share for term in losses.present().values()])

    optimizer, batches = make_optimizer(model, 0.01), EpochBatches(task.train, 1)
    model.train()
    while (request := pipe.recv()) is not None:
        if request == "losses":
            pipe.send(_losses_without_dropout(model, losses_of, batches[0].to(device)))
            continue
        peak = _peak_rate(PRECISIONS[precision], device)
        started = perf_counter()
        host_batch = batches[request % len(batches)]
        waited = perf_counter() - started
        total = losses_of(host_batch.to(device)).sum()
        total.backward()
        update(optimizer, total.detach().isfinite(), lr=1e-4, clip_norm=1.0)
        if device.type == "cuda":
            torch.cuda.synchronize()
        pipe.send(_record(host_batch, perf_counter() - started, waited, peak, task.spec.encoder, device))


def _losses_without_dropout(model: Any, losses_of: Any, batch: Batch) -> dict[str, float]:
    model.eval()
    with torch.no_grad():
        base, nuc = losses_of(batch).tolist()
    model.train()
    return {"base": base, "nuc": nuc}


def _peak_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of a plain large matrix product."""
    n = 8192 if device.type == "cuda" else 4096
    x = torch.ones(n, n, dtype=dtype, device=device)
    for _ in range(2):  # the first one warms up
        started = perf_counter()
        x @ x
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = perf_counter() - started
    return 2 * n**3 / seconds


def _record(
    batch: Batch, seconds: float, waited: float, peak: float, sizes: EncoderSizes, device: torch.device
) -> dict[str, float]:
    lengths_U = (batch.tokens != 0).sum(dim=1).double()
    slots_B = batch.slot_mask.sum(dim=1).double()
    operations = _operations(lengths_U, sizes.asv_layers, sizes) + _operations(slots_B, sizes.attention_layers, sizes)
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**30
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "seconds": seconds,
        "samples_per_second": len(batch.slot) / seconds,
        "distinct_tokens_per_second": float(lengths_U.sum()) / seconds,
        "token_padding": 1 - float(lengths_U.sum()) / batch.tokens.numel(),
        "slot_padding": 1 - float(slots_B.sum()) / batch.slot.numel(),
        "deduplication": float(slots_B.sum()) / len(batch.tokens),
        "waiting_for_data": waited / seconds,
        "tflops": operations / seconds / 1e12,
        "peak_tflops": peak / 1e12,
        "mfu": operations / seconds / peak,
        "peak_memory_gib": memory,
    }


def _operations(lengths: torch.Tensor, layers: int, sizes: EncoderSizes) -> float:
    """Of the blocks' matrix products on items, not on padding; the backward pass takes twice the forward's."""
    dim = sizes.embedding_dim
    return 3 * layers * float((24 * dim**2 * lengths + 4 * dim * lengths**2).sum())


def _show(name: str, batch_size: int, found: dict[str, Any]) -> None:
    naive = found[NAIVE]
    print(f"{name}, batch {batch_size}: naive {naive['seconds']:.2f} s, {naive['peak_memory_gib']:.1f} GiB", flush=True)
    for precision in PRECISIONS.keys() & found.keys():
        ours = found[precision]
        low, high = ours["ratio_spread"]
        print(
            f"  {precision} {ours['seconds']:.2f} s, {ours['peak_memory_gib']:.1f} GiB: {ours['ratio']:.1f} x "
            f"({low:.1f} to {high:.1f}), MFU {ours['mfu']:.2f} of {ours['peak_tflops']:.3f} TFLOP/s, "
            f"{ours['samples_per_second']:.2f} samples/s, {ours['distinct_tokens_per_second']:.0f} tokens/s, "
            f"token padding {ours['token_padding']:.3f}, slot padding {ours['slot_padding']:.2f}, each ASV "
            f"{ours['deduplication']:.2f} times, {100 * ours['waiting_for_data']:.1f} % waiting for data, losses "
            f"within {ours['loss_difference']:.0e}",
            flush=True,
        )


def _has_bf16(device: str) -> bool:
    if device == "cuda":
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
