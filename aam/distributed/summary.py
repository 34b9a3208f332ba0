"""What a job says when it is done."""

from __future__ import annotations

import dataclasses
import shlex

from aam.cli import to_arguments
from aam.config import PretrainConfig
from aam.distributed.run import RunResult

_SHOWN = ("total_loss", "base_loss", "nuc_loss", "target_loss", "count_loss", "unifrac_r2", "nuc_accuracy", "mae",
          "r2", "spearman", "interval_coverage", "accuracy", "balanced_accuracy", "macro_f1", "auroc")  # fmt: skip


def summarise(stage: str, result: RunResult, next_command: str) -> str:
    """Metrics of the best epoch, where things are, and what to type next."""
    best_epoch = int(result.metrics["epoch"])
    return "\n".join(
        [
            f"{stage}: best epoch {best_epoch} of {result.epochs}",
            f"  validation   {shown_metrics(result.metrics)}",
            f"  checkpoints  {result.output_dir / 'best'} and {result.output_dir / 'last'}",
            f"  logs         {result.output_dir / 'metrics.jsonl'}, {result.output_dir / 'tensorboard'}",
            f"  pictures     {result.output_dir / 'figures'}",
            f"  next         {next_command}",
        ]
    )


def shown_metrics(metrics: dict[str, float]) -> str:
    """The validation metrics that people look at, in one line."""
    found = {name: metrics[f"val/{name}"] for name in _SHOWN if f"val/{name}" in metrics}
    return "  ".join(f"{name} {value:.4g}" for name, value in found.items())


def train_command(config: PretrainConfig, *, lr: float | None = None) -> str:
    """The stage 2 command on the best encoder of a stage 1 run or sweep; what cannot be known is in capitals."""
    # How samples are drawn comes with the encoder.
    unset = {"tree": None, "token_limit": None, "rarefy_depth": None, "token_choice": None, "max_bp": None}
    arguments = to_arguments(dataclasses.replace(config.data, **unset))
    if lr is not None:
        arguments += ["--lr", f"{lr:.3g}"]
    if config.data.table is not None:
        if config.data.metadata is None:
            arguments += ["--metadata", "METADATA.tsv"]
        arguments += ["--target", "COLUMN"]
    if config.preset is not None:
        arguments = ["--preset", config.preset, *arguments]
    base = ["--pretrained", str(config.output_dir)]
    return shlex.join(["python", "jobs/train.py", *arguments, *base, "--output-dir", "RUN"])
