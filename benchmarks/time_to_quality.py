"""Seconds of stage 1 training until its clades tell UniFrac well: validation R2 of unweighted UniFrac.

    python benchmarks/time_to_quality.py --data ibd --json kmers.json
    python benchmarks/time_to_quality.py --data ibd --kmer 0 --asv-layers 4 --json nucleotides.json
    python benchmarks/time_to_quality.py --data ibd --asv-layers 4 --json both.json

One run in this process, without Ray, by the settings of a preset. The clock is that of the loop, and starts when model
and data are ready; validation is part of it, and reported apart too. R2 is known at the end of each epoch.
"""

from __future__ import annotations

import json
import os
import shlex
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import tyro

from aam.cli import flags, parse
from aam.config import PretrainConfig
from aam.plan import make_plan
from aam.task import build_task
from aam.training import loop
from aam.training.schedule import run_length

CPU = torch.device("cpu")
R2 = "val/unifrac_r2"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to train, and when it is good."""

    data: Path
    """Folder with table.biom, tree.nwk, train.txt and val.txt."""
    r2: float = 0.90
    """Validation R2 of unweighted UniFrac to reach."""
    preset: str = "gut-small"
    """Preset whose stage 1 settings are used."""
    asv_layers: int | None = None
    """Layers of the nucleotide stack. [default: as in the preset]"""
    kmer: int | None = None
    """Length of the k-mers; 0: the nucleotide stack alone. [default: as in the preset]"""
    max_updates: int | None = None
    """Updates of the run. [default: as in the preset]"""
    seed: int | None = None
    """Seed of the run. [default: as in the preset]"""
    flags: str = ""
    """More flags of jobs/pretrain.py, in quotes, with an equals sign: --flags="--lr 1e-3"."""
    threads: int = 2
    """CPU threads."""
    json: Path | None = None
    """File for the results."""


def main(settings: Settings) -> None:
    """Train once; print each epoch and what came out."""
    torch.set_num_threads(settings.threads)
    load = os.getloadavg()[0]
    config = make_config(settings)
    started = perf_counter()
    plan = make_plan(config)
    task = build_task(plan, CPU)
    result: dict[str, Any] = {
        "settings": {
            name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()
        },
        "load_before": load,
        "torch": torch.__version__,
        "precision": str(loop.autocast_of(config.loop.precision, "cpu") or torch.float32),
        "architecture": asdict(plan.spec.encoder),
        "parameters": sum(p.numel() for p in task.model.parameters() if p.requires_grad),
        "samples": {"train": len(plan.split.train), "val": len(plan.split.val)},
        "prepare_s": perf_counter() - started,
    }
    epochs = train(task)
    result |= summarize(epochs, settings.r2) | {"epochs": epochs}
    print(describe(result))
    if settings.json is not None:
        settings.json.write_text(json.dumps(result, indent=1) + "\n")


def make_config(settings: Settings) -> PretrainConfig:
    """Settings of stage 1: those of the preset, below the ones that are given."""
    folder = settings.data.resolve()
    given = {"preset": settings.preset}
    given |= {"table": folder / "table.biom", "tree": folder / "tree.nwk"}
    given |= {"train_ids": folder / "train.txt", "val_ids": folder / "val.txt"}
    chosen = {name: getattr(settings, name) for name in ("asv_layers", "kmer", "max_updates", "seed")}
    given |= {name: value for name, value in chosen.items() if value is not None}
    return parse(PretrainConfig, [*flags(given), *shlex.split(settings.flags)])


def train(task: loop.Task) -> list[dict[str, float]]:
    """Train; updates, seconds since the start, seconds of validation among them, and R2, after each epoch."""
    epochs: list[dict[str, float]] = []
    validation = 0.0
    validate = loop.validate

    def timed_validate(*arguments: Any) -> Any:
        nonlocal validation
        began = perf_counter()
        try:
            return validate(*arguments)
        finally:
            validation += perf_counter() - began

    samples = len(task.train.sample_ids)
    an_epoch = run_length(replace(task.config, epochs=1, max_updates=None), samples)[1]
    total = run_length(task.config, samples)[1]

    def report(metrics: dict[str, float], write: Any) -> None:
        row = {
            "epoch": metrics["epoch"],
            "updates": min(total, int(metrics["epoch"]) * an_epoch),
            "seconds": perf_counter() - started,
            "validation_s": validation,
            "r2": metrics[R2],
            "mae": metrics[R2.replace("r2", "mae")],
        }
        epochs.append(row)
        print(
            f"epoch {row['epoch']:4}  {row['updates']:6} updates  {row['seconds']:8.2f} s  R2 {row['r2']:.4f}",
            flush=True,
        )

    loop.validate = timed_validate
    try:
        with tempfile.TemporaryFile("w") as bar:
            started = perf_counter()
            loop.fit(replace(task, report=report, verbose=False, bar_file=bar))
    finally:
        loop.validate = validate
    return epochs


def summarize(epochs: list[dict[str, float]], r2: float) -> dict[str, Any]:
    """When R2 was first reached, None where it never was; the best epoch; and how long the run took."""
    reached = next((row for row in epochs if row["r2"] >= r2), None)
    last = epochs[-1]
    return {
        "seconds_to_r2": reached and reached["seconds"],
        "validation_s_to_r2": reached and reached["validation_s"],
        "updates_to_r2": reached and reached["updates"],
        "best": max(epochs, key=lambda row: row["r2"]),
        "seconds": last["seconds"],
        "validation_s": last["validation_s"],
        "updates": last["updates"],
        "updates_per_s": last["updates"] / (last["seconds"] - last["validation_s"]),
    }


def describe(result: dict[str, Any]) -> str:
    """The result in a few lines."""
    wanted, best = result["settings"]["r2"], result["best"]
    if result["seconds_to_r2"] is None:
        reached = f"R2 {wanted:g}: not reached"
    else:
        reached = (
            f"R2 {wanted:g}: {result['seconds_to_r2']:.2f} s, {result['validation_s_to_r2']:.2f} s of it validation, "
            f"{result['updates_to_r2']} updates"
        )
    return (
        f"{reached}\nbest R2 {best['r2']:.4f}, MAE {best['mae']:.4f}, after {best['seconds']:.2f} s, "
        f"{best['updates']} updates\nall: {result['seconds']:.2f} s, {result['validation_s']:.2f} s of it validation, "
        f"{result['updates']} updates, {result['updates_per_s']:.2f} updates/s in the training part; "
        f"{result['prepare_s']:.2f} s before to prepare"
    )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=(__doc__ or "").splitlines()[0]))
