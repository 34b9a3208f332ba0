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
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import tyro

from aam.batch import Batch
from aam.config import DataConfig, LoopConfig, ModelConfig, PretrainConfig, PretrainLossConfig, UnifracMetric
from aam.data import synthetic
from aam.data.batches import EpochBatches
from aam.model.sizes import EncoderSizes
from aam.plan import make_plan
from aam.task import build_task
from aam.training.loop import Task
from aam.training.memory import keep_freed_memory
from aam.training.optimizer import make_optimizer, update
from aam.training.step import cpu_has_bf16, step
from benchmarks.naive import NaiveEncoder, naive_step

NAIVE, OURS = "naive", "ours"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16}


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
    """Samples of a step, without the made-up ones: half as many, as by default in training."""
    precisions: list[str] = field(default_factory=list)
    """fp32, bf16: precision of our step. [default: fp32, and bf16 where the hardware has instructions for it]"""
    rounds: int = 5
    """Steps of each side that are timed, after one that is not."""
    threads: int = os.cpu_count() or 1
    """CPU threads."""
    device: str = "cpu"
    """cpu, where the naive step runs in fp32, or cuda, where it runs in bf16."""
    embedding_dim: int = 128
    """Width, in heads of 32."""
    asv_layers: int = 0
    """Layers of the nucleotide stack; 0: k-mers alone."""
    clades: int = 512
    """Soft clades."""
    unifrac_metric: tuple[UnifracMetric, ...] = ("unweighted",)
    """What the step learns: unweighted, weighted, faith_pd."""
    product: int | None = None
    """Rows of the square matrices whose product gives the peak. [default: 4096, on a GPU 8192]"""
    json: Path | None = None
    """File for the results."""


def main(settings: Settings) -> None:
    """Time all datasets and batch sizes."""
    precisions = settings.precisions or ["fp32", *(["bf16"] if settings.device == "cuda" or cpu_has_bf16() else [])]
    results: dict[str, dict[str, Any]] = {}
    print("MFU counts: k-mer MLP, clade MLP, distances of pairs, blocks of the nucleotide stack", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folders = settings.data or [synthetic.ensure(Path(scratch) / "built-in", synthetic.SyntheticConfig())]
        for folder in folders:
            for batch_size in settings.batch_sizes:
                result = _compare(settings, precisions, folder, batch_size)
                results.setdefault(folder.name, {})[str(batch_size)] = result
                _show(folder.name, batch_size, result)
                if settings.json is not None:
                    settings.json.write_text(json.dumps(results, indent=2) + "\n")


def _compare(settings: Settings, precisions: list[str], folder: Path, batch_size: int) -> dict[str, Any]:
    """Steps of the sides in turn; the first of each is not timed, but has its peak of memory taken."""
    context = mp.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for side in (NAIVE, OURS):
        pipes[side], far = context.Pipe()
        arguments = (side, settings, folder, batch_size, far)
        context.Process(target=_side, args=arguments, daemon=True).start()
        far.close()
    naive_precision = "bf16" if settings.device == "cuda" else "fp32"
    # bf16 before fp32, which takes more memory: a process never shrinks.
    turns = [(NAIVE, naive_precision), *((OURS, precision) for precision in sorted(precisions))]
    losses = {turn: _ask(pipes[turn[0]], ("losses", turn[1], 0)) for turn in turns}
    records: dict[tuple[str, str], list[dict[str, float]]] = {turn: [] for turn in turns}
    for index in range(settings.rounds + 1):
        for side, precision in turns:
            records[side, precision].append(_ask(pipes[side], ("step", precision, index)))
    for pipe in pipes.values():
        pipe.close()
    naive, *ours = turns
    result: dict[str, Any] = {NAIVE: _summary(records[naive]) | {"precision": naive_precision}}
    for turn in ours:
        pairs = zip(records[naive][1:], records[turn][1:], strict=True)
        ratios = [theirs["seconds"] / own["seconds"] for theirs, own in pairs]
        result[turn[1]] = _summary(records[turn]) | {
            "ratio": median(ratios),
            "ratio_spread": [min(ratios), max(ratios)],
            "loss_difference": max(abs(losses[turn][k] / losses[naive][k] - 1) for k in losses[naive]),
        }
    fastest = max(precisions, key=lambda precision: result[precision]["ratio"])
    return {"ratio": result[fastest]["ratio"], "precision": fastest, "mfu": result[fastest]["mfu"]} | result


def _ask(pipe: Connection, request: tuple[str, str, int]) -> Any:
    pipe.send(request)
    return pipe.recv()


def _summary(records: list[dict[str, float]]) -> dict[str, float]:
    """Medians of all steps but the first; the peak of the memory at that one."""
    summary = {name: median(record[name] for record in records[1:]) for name in records[0]}
    return summary | {"peak_memory_gib": records[0]["peak_memory_gib"]}


def _side(side: str, settings: Settings, folder: Path, batch_size: int, pipe: Connection) -> None:
    """One side's process: takes steps as it is asked to, until the pipe is closed."""
    torch.set_num_threads(settings.threads)
    device = torch.device(settings.device)
    task = _task(settings, folder, batch_size, device)
    model: Any = task.model
    if side == NAIVE:
        model = NaiveEncoder(model, task.spec.contract.token_limit).to(device)
    elif device.type == "cpu":
        keep_freed_memory()  # as the loop does
    torch.backends.cuda.enable_cudnn_sdp(False)  # as the loop does
    optimizer, batches = make_optimizer(model, 0.01), EpochBatches(task.train, 1)

    def losses_of(batch: Batch, autocast: torch.dtype | None) -> dict[str, torch.Tensor]:
        if side == NAIVE:
            return naive_step(model, batch, task.objective, autocast)
        losses, _ = step(model, batch, task.objective, autocast=autocast)
        return {name: term.share for name, term in losses.present().items()}

    def take_step(index: int, precision: str) -> dict[str, float]:
        peak = _peak_rate(PRECISIONS[precision], device, settings.product)
        started = perf_counter()
        host_batch = batches[index % len(batches)]
        waited = perf_counter() - started
        total = torch.stack([*losses_of(host_batch.to(device), AUTOCAST[precision]).values()]).sum()
        total.backward()
        update(optimizer, total.detach().isfinite(), lr=1e-4, clip_norm=1.0)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = perf_counter() - started
        operations = count_operations(host_batch, task.spec.encoder, settings.unifrac_metric)
        return _record(host_batch, seconds, waited, peak, operations, device)

    def losses_without_dropout(index: int, precision: str) -> dict[str, float]:
        model.eval()
        with torch.no_grad():
            losses = losses_of(batches[index].to(device), AUTOCAST[precision])
        model.train()
        return {name: loss.item() for name, loss in losses.items()}

    model.train()
    with suppress(EOFError):  # the pipe is closed
        while True:
            request, precision, index = pipe.recv()
            pipe.send({"step": take_step, "losses": losses_without_dropout}[request](index, precision))


def _task(settings: Settings, folder: Path, batch_size: int, device: torch.device) -> Task:
    files = {"train_ids": folder / "train.txt", "val_ids": folder / "val.txt"}
    data = DataConfig(
        table=folder / "table.biom",
        tree=folder / "tree.nwk",
        **(files if files["train_ids"].exists() else {}),
    )
    sizes = ModelConfig(
        embedding_dim=settings.embedding_dim,
        attention_heads=max(1, settings.embedding_dim // 32),
        asv_layers=settings.asv_layers,
        clades=settings.clades,
    )
    loss = PretrainLossConfig(unifrac_metric=settings.unifrac_metric)
    plan = make_plan(PretrainConfig(data=data, model=sizes, loss=loss, loop=LoopConfig(batch_size=batch_size)))
    return build_task(plan, device)


def _peak_rate(dtype: torch.dtype, device: torch.device, rows: int | None) -> float:
    """Operations a second of a plain large matrix product."""
    n = rows or (8192 if device.type == "cuda" else 4096)
    x = torch.rand(n, n, device=device).to(dtype)
    seconds = []
    for _ in range(3):
        started = perf_counter()
        x @ x
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(perf_counter() - started)
    return 2 * n**3 / min(seconds)


def _record(
    batch: Batch, seconds: float, waited: float, peak: float, operations: dict[str, float], device: torch.device
) -> dict[str, float]:
    lengths_U, slots_B, total = _lengths(batch), batch.slot_mask.sum(dim=1).double(), sum(operations.values())
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
        "tflops": total / seconds / 1e12,
        "peak_tflops": peak / 1e12,
        "mfu": total / seconds / peak,
        "peak_memory_gib": memory,
    } | {f"gflop_{part}": number / 1e9 for part, number in operations.items()}


def _lengths(batch: Batch) -> torch.Tensor:
    """Tokens of each distinct ASV, without PAD."""
    return (batch.tokens != 0).sum(dim=1).double()


def count_operations(batch: Batch, sizes: EncoderSizes, metrics: Sequence[UnifracMetric]) -> dict[str, float]:
    """Additions and multiplications of a step, forward and backward, by part: those that the function asks for.

    Of distinct ASVs and of their tokens, not of padding; the backward pass takes twice the forward's, but only once
    where no gradient is wanted of the input. Not counted: frequencies of k-mers, norms, GELU, profiles, the pool and
    the heads of the nucleotide stack, dropout, the update.
    """
    U, G, D, P = len(batch.tokens), batch.global_size, sizes.embedding_dim, sizes.clades
    parts = {
        "kmer_mlp": 2 * 2 * U * 4**sizes.kmer * D if sizes.kmer else 0,
        "clade_mlp": 3 * 2 * U * (D * 2 * D + 2 * D * P),
        # A difference, its absolute value and a sum, for each pair and clade.
        "pairs": 3 * 3 * len(batch.slot) * G * P * sum(metric != "faith_pd" for metric in metrics),
        "nucleotides": 0.0,
    }
    if sizes.asv_layers:
        lengths_U = _lengths(batch)
        parts["nucleotides"] = 3 * sizes.asv_layers * float((24 * D**2 * lengths_U + 4 * D * lengths_U**2).sum())
    return {part: float(number) for part, number in parts.items()}


def _show(name: str, batch_size: int, result: dict[str, Any]) -> None:
    naive = result[NAIVE]
    print(f"{name}, batch {batch_size}: naive {naive['seconds']:.2f} s, {naive['peak_memory_gib']:.1f} GiB", flush=True)
    for precision in PRECISIONS.keys() & result.keys():
        ours = result[precision]
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


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
