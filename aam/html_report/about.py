"""What was trained on what, how the training went, and how to repeat it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from typing import Any

from aam.html_report.page import Html, bullets, element, figure, folded, grid, join, paragraph, table, tiles
from aam.html_report.pictures import curves
from aam.html_report.run_files import Run
from aam.predict import source_of
from aam.report import METRIC_NAMES, flags_of
from aam.training.metrics import UNIFRAC_NAMES

_NUMBERS = ("r2", "mae", "spearman", "balanced_accuracy", "auroc", "macro_f1", "unifrac_r2", "weighted_unifrac_r2",
            "faith_pd_r2", "nuc_accuracy")  # fmt: skip
"""Metrics that stand out; of each a curve."""


def title_of(run: Run) -> str:
    """Title of the report."""
    return "Stage 1: encoder of samples" if run.target is None else f"Stage 2: {run.target.column}"


def subtitle_of(run: Run) -> str:
    """What the model does, in a sentence."""
    if run.target is None:
        return f"Learns, without labels, {_what_stage_1_learns(run)}. Run folder {run.folder}"
    what = f"classification, {len(run.target.classes)} classes" if run.target.classes else "regression"
    return f"Predicts the metadata column {run.target.column} ({what}) of a sample. Run folder {run.folder}"


def _what_stage_1_learns(run: Run) -> str:
    spec = run.best.spec
    parts = [UNIFRAC_NAMES[learned.metric] for learned in spec.unifrac]
    nuc_weight = run.record["config"]["loss"]["nuc_weight"]
    if spec.encoder.asv_layers and (nuc_weight is None or nuc_weight > 0):
        parts.append("to fill in masked nucleotides")
    return " and ".join(parts)


def about(run: Run) -> Html:
    """What was trained on what, the best epoch, and what to keep in mind."""
    metrics, data = run.stage.metrics, run.record["dataset"]
    best = [("best epoch", f"{metrics['epoch']:g} of {len(run.history)}")]
    best += [
        (f"{METRIC_NAMES[name]} (validation)", f"{metrics[f'val/{name}']:.4g}")
        for name in _NUMBERS
        if f"val/{name}" in metrics
    ]
    sources = [f"{name}: {source_of(run.record, name)}" for name in data["sources"]]
    return join(
        [
            tiles([(part, str(len(run.split(key)))) for part, key in _PARTS]),
            tiles(best),
            paragraph(
                f"The prepared dataset has {data['samples']:,} samples, {data['asvs']:,} ASVs and {data['reads']:,} "
                f"reads. {_base(run)}"
            ),
            bullets(sources),
            element("h3", "Notes: what was dropped, and why"),
            bullets(run.record["notes"]) or paragraph("Nothing was dropped."),
            element("h3", "To keep in mind"),
            bullets(_caveats(run)),
        ]
    )


_PARTS = (("samples to train on", "train"), ("to validate", "val"), ("held out (test)", "test"))


def _base(run: Run) -> str:
    pretrained = run.record["pretrained"]
    if run.target is None:
        return "No labels were read."
    if pretrained is None:
        return "The encoder was trained from scratch, together with its heads."
    how = "kept as it was (frozen)" if run.best.spec.freeze_base else "trained further (fine-tuned)"
    return f"The encoder comes from {pretrained} and was {how}."


def _caveats(run: Run) -> list[str]:
    lines = [
        "The best epoch is the one with the lowest validation loss: scores on the validation samples are, for "
        "that, a little better than on new samples."
    ]
    if run.best.ensemble is not None:
        weights = run.best.ensemble.weights.by_name.items()
        shares = ", ".join(f"{name.replace('_', ' ')} {weight:.2f}" for name, weight in weights)
        lines.append(
            f"Predictions are those of an ensemble ({shares}), whose weights come from samples that its members were "
            "not fitted to; in the end these learned from the validation samples too, whose predictions here were "
            "made before, without them. The curves, and the metrics of the best epoch, are those "
            "of the network alone."
        )
    test = len(run.split("test"))
    if test:
        lines.append(f"{test} test samples were held out: this run neither trained nor chose its best epoch by them.")
    else:
        lines.append("No test samples were held out (--test-fraction or --test-ids hold some out).")
    return lines


def training(run: Run) -> Html:
    """Curves of all losses and of the main metrics, and all figures of the best epoch."""
    last = run.history[-1]
    losses = [tag.removeprefix("val/") for tag in last if tag.startswith("val/") and tag.endswith("_loss")]
    metrics = [name for name in _NUMBERS if f"val/{name}" in last]
    best = run.stage.metrics["epoch"]
    pictures = []
    for name in [*losses, *metrics]:
        lines = {
            label: [(row["epoch"], row[f"{part}/{name}"]) for row in run.history if f"{part}/{name}" in row]
            for part, label in (("train", "train"), ("val", "validation"))
        }
        shown = METRIC_NAMES.get(name, name.replace("_", " "))
        picture = curves(shown, {label: points for label, points in lines.items() if points}, best)
        value = run.stage.metrics.get(f"val/{name}", math.nan)
        pictures.append(figure(picture, f"{shown}: {value:.4g} on the validation samples at the best epoch."))
    tags = sorted({tag.split("/", 1)[1] for tag in run.stage.metrics if "/" in tag and "(" not in tag})
    rows = [(tag, *(_shown(run.stage.metrics.get(f"{part}/{tag}")) for part in ("train", "val"))) for tag in tags]
    return join(
        [
            paragraph("Training values are means over an epoch, with dropout, while the weights changed."),
            grid(*pictures),
            folded(
                "All figures of the best epoch",
                table(f"epoch {best:g}, as in metrics.jsonl", ("", "train", "validation"), rows),
            ),
        ]
    )


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def settings(run: Run) -> Html:
    """Commands that repeat the run, all its settings, versions, hash of the weights."""
    records = [record for record in (run.base_record, run.record) if record is not None]
    commands = [shlex.join(["python", f"jobs/{record['stage']}.py", *flags_of(record)]) for record in records]
    versions = [f"{name} {version}" for name, version in run.versions.items()]
    return join(
        [
            paragraph(
                "Flags that are not shown are at their defaults. Where these folders are still there, give another "
                "--output-dir."
            ),
            element("pre", "\n\n".join(commands)),
            paragraph(f"Trained with {', '.join(versions)}."),
            paragraph("Weights, sha256: ", element("code", run.stage.weights)),
            folded("All settings", table("run.json", ("setting", "value"), _flat(run.record["config"]))),
            folded("Model", table("config.json of the checkpoint", ("", "value"), _flat(run.record["spec"]))),
        ]
    )


def _flat(nested: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in nested.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", "-" if value is None else str(value)
