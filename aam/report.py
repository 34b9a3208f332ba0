"""The report on predictions: what the model was trained on, how well it does, and how to repeat it. Markdown."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from aam.cli import flags, to_arguments
from aam.config import PredictConfig, PretrainConfig, TrainConfig, to_dict
from aam.data.files import some
from aam.data.metadata import numeric_column, read_metadata, text_column
from aam.html_report import REPORT
from aam.predict import Predictions, source_of
from aam.predict.table import what_is_new
from aam.training.checkpoint import CONFIG, WEIGHTS
from aam.training.metrics import classification_metrics, regression_metrics
from aam.training.targets import Target

METRIC_NAMES = {
    "mae": "mean absolute error",
    "rmse": "root mean squared error",
    "r2": "R²",
    "spearman": "Spearman's correlation",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro-F1",
    "auroc": "AUROC",
    "unifrac_r2": "UniFrac R²",
    "weighted_unifrac_r2": "weighted UniFrac R²",
    "faith_pd_r2": "Faith's PD R²",
    "nuc_accuracy": "masked nucleotides right",
}

_NOT_SHOWN = ("resume", "resume_or_start", "ray_address", "preset")
"""Settings of one start of a run, not of the run; and the preset, of which all settings are shown: it may change."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A trained stage, as its files tell of it."""

    record: dict[str, Any]
    """run.json"""
    metrics: dict[str, float]
    """Of the best epoch."""
    weights: str
    """Hash of the weights."""

    @classmethod
    def read(cls, checkpoint: Path, record: dict[str, Any]) -> Stage:
        """Read a stage out of its checkpoint and its run.json."""
        metrics = json.loads((checkpoint / CONFIG).read_text())["metrics"]
        weights = hashlib.sha256((checkpoint / WEIGHTS).read_bytes()).hexdigest()
        return cls(record=record, metrics=metrics, weights=weights)

    def part(self, name: str) -> set[str]:
        """Samples of a part of its split."""
        return set(self.record["split"][name])


def make_report(config: PredictConfig, found: Predictions, stage: Stage, base: Stage | None) -> str:
    """Report on predictions.

    Parameters
    ----------
    config : PredictConfig
        Settings of the prediction.
    found : Predictions
        What was predicted.
    stage : Stage
        The stage 2 that predicted.
    base : Stage, optional
        The stage 1 that it started from.

    Returns
    -------
    str
        Markdown.
    """
    truth = known_truth(found, config.metadata or source_of(stage.record, "metadata"))
    which = {"test": "held-out samples", "all": "samples"}.get(config.part, f"{config.part} samples")
    parts = [
        f"# {found.target.column}: {len(found.sample_ids)} {which}",
        score_table(found, truth, training_truth(stage.record, found.target)),
        _bullets([*_caveats(found, truth, stage, base), *what_is_new(found.dataset, found.sample_ids, stage.record)]),
        "## Training",
        _training(stage, base),
        _bullets(_notes(stage, base)),
        "## To repeat it",
        "```bash\n" + "\n".join(_commands(config, stage, base)) + "\n```",
        "Flags that are not shown are at their defaults.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def check_truth(config: PredictConfig, record: dict[str, Any], target: Target) -> None:
    """See that the metadata has the target, before all that a report takes.

    Raises
    ------
    ValueError
        Where it has no such column.
    """
    source = config.metadata or source_of(record, "metadata")
    if source is not None and source.is_file():
        column_values(read_metadata(source)[0].iloc[:0], target, source)


def known_truth(found: Predictions, source: Path | None) -> dict[str, Any]:
    """Target of each sample that has one in the metadata, read as in training."""
    frame = found.dataset.metadata
    if frame is None or source is None:
        return {}
    return column_values(frame.reindex(frame.index.intersection(found.sample_ids)), found.target, source)


def training_truth(record: dict[str, Any], target: Target) -> list[Any]:
    """Targets of the training samples of a run; none where its metadata is gone."""
    source = source_of(record, "metadata")
    if source is None or not source.is_file():
        return []
    frame = read_metadata(source)[0]
    return list(
        column_values(frame.reindex(frame.index.intersection(record["split"]["train"])), target, source).values()
    )


def column_values(frame: pd.DataFrame, target: Target, source: Path) -> dict[str, Any]:
    """Target of each sample of a metadata frame that has one."""
    read = text_column if target.classes else numeric_column
    return {
        str(sample): value for sample, value in read(frame, target.column, source=source).items() if pd.notna(value)
    }


def score_table(found: Predictions, truth: dict[str, Any], training: list[Any]) -> str:
    """Scores beside those of always saying what the training samples say on average, as a table."""
    known = set(found.target.classes or truth.values())
    rows = [i for i, sample in enumerate(found.sample_ids) if sample in truth and truth[sample] in known]
    if not rows:
        return "Not scored: no known values of the target for these samples (--metadata)."
    values = [truth[found.sample_ids[i]] for i in rows]
    if found.probabilities is None:
        constant = float(np.mean(training)) if training else None
        scores = regression_metrics(np.array(values), np.array([found.values[i] for i in rows]))
        simple = {} if constant is None else regression_metrics(np.array(values), np.full(len(values), constant))
        said = "" if constant is None else f"always the mean of the training samples, {constant:.4g}"
    else:
        codes = np.array([found.target.classes.index(value) for value in values])
        scores = classification_metrics(codes, found.probabilities[rows])
        (constant, _), *_ = Counter(training).most_common(1) or [(None, 0)]
        certain = np.array([[float(name == constant) for name in found.target.classes]] * len(rows))
        simple = {} if constant is None else classification_metrics(codes, certain)
        said = "" if constant is None else f"always the most frequent class of the training samples, {constant}"
    said = said.replace("|", r"\|").replace("<", "&lt;")  # a class may have any name
    lines = [f"| {len(rows)} samples | model | {said or '-'} |", "|---|---|---|"]
    for name, score in scores.items():
        beside = f"{simple[name]:.4g}" if name in simple else "-"
        lines.append(f"| {METRIC_NAMES[name]} | {score:.4g} | {beside} |")
    return "\n".join(lines)


def _caveats(found: Predictions, truth: dict[str, Any], stage: Stage, base: Stage | None) -> list[str]:
    """Which samples were not scored, and which were no secret to the model."""
    lines = [f"not predicted: {n} ({reason})" for reason, n in Counter(found.skipped.values()).items()]
    untold = len(set(found.sample_ids) - truth.keys())
    if truth and untold:
        lines.append(f"not scored: {untold} (no value in column {found.target.column!r})")
    if found.target.classes:
        strange = sorted({value for value in truth.values() if value not in found.target.classes})
        if strange:
            count = sum(value in strange for value in truth.values())
            lines.append(f"not scored: {count} of classes that no training sample had ({some(strange)})")
    stages = {"stage 1": base, "stage 2": stage}
    for name, which in stages.items():
        for part, verb in (("train", "trained on"), ("val", _what_validation_was_for(which))):
            seen = 0 if which is None else len(which.part(part).intersection(found.sample_ids))
            if seen:
                lines.append(f"{name} {verb} {seen} of these samples")
    if len(lines) == 0 or not any(line.startswith("stage ") for line in lines):
        lines.append("no stage trained on any of these samples, nor chose its best epoch by them")
    return lines


def _has_ensemble(stage: Stage | None) -> bool:
    return stage is not None and bool(stage.record["config"]["loss"].get("ensemble"))


def _what_validation_was_for(stage: Stage | None) -> str:
    if _has_ensemble(stage):
        return "chose its best epoch and weighed its ensemble by, and then fitted that to,"
    return "chose its best epoch by"


def _training(stage: Stage, base: Stage | None) -> str:
    stages = {"stage 1": base, "stage 2": stage} if base is not None else {"stage 2": stage}
    lines = ["| | train | validate | held back | best epoch | validation |", "|---|---|---|---|---|---|"]
    for name, which in stages.items():
        if which is None:
            continue
        sizes = " | ".join(str(len(which.part(part))) for part in ("train", "val", "test"))
        found = {
            METRIC_NAMES[tag]: which.metrics[f"val/{tag}"] for tag in METRIC_NAMES if f"val/{tag}" in which.metrics
        }
        shown = ", ".join(f"{label} {value:.4g}" for label, value in found.items())
        name = f"{name}, the network alone" if _has_ensemble(which) else name
        lines.append(f"| {name} | {sizes} | {which.metrics['epoch']:g} | {shown} |")
    return "\n".join(lines)


def _notes(stage: Stage, base: Stage | None) -> list[str]:
    """Sources, and what was dropped; what both stages say, once."""
    data = stage.record["dataset"]
    files = ", ".join(f"{name} {source_of(stage.record, name)}" for name in data["sources"])
    lines = [f"{data['samples']} samples, {data['asvs']} ASVs, {data['reads']} reads: {files}"]
    folders = [which.record["config"]["output_dir"] for which in (base, stage) if which is not None]
    lines.append(f"run folders: {', '.join(folders)}; weights sha256 {stage.weights[:16]}")
    if (figures := Path(stage.record["config"]["output_dir"]) / REPORT).exists():
        lines.append(f"figures, and baselines on the same held-out samples: {figures}")
    notes = {"stage 1": base.record["notes"] if base else [], "stage 2": stage.record["notes"]}
    both = [note for note in notes["stage 1"] if note in notes["stage 2"]]
    lines += both
    return lines + [f"{name}: {note}" for name, found in notes.items() for note in found if note not in both]


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _commands(config: PredictConfig, stage: Stage, base: Stage | None) -> list[str]:
    """The commands that made it, by the settings that differ from their defaults."""
    made = [] if base is None else [["jobs/pretrain.py", *flags_of(base.record)]]
    made.append(["jobs/train.py", *flags_of(stage.record)])
    made.append(["jobs/predict.py", *to_arguments(config)])
    return [shlex.join(["python", *command]) for command in made]


def flags_of(record: dict[str, Any]) -> list[str]:
    """The flags that give the settings of a run, without those at their default and those that only resume it."""
    config = PretrainConfig() if record["stage"] == "pretrain" else TrainConfig()
    return flags(_changed(record["config"], json.loads(json.dumps(to_dict(config)))))


def _changed(settings: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        default = defaults.get(name)
        if isinstance(value, dict):
            found |= _changed(value, default or {})
        elif value is not None and value != default and name not in _NOT_SHOWN:
            found[name] = value
    return found
