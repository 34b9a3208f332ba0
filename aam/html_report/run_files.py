"""A finished run, as the files in its folder tell of it; and the outputs of its model for its samples."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aam.data.dataset import MANIFEST, PreparedDataset
from aam.html_report.encoding import Encoded, affordable, encode
from aam.predict import predict_samples, source_of
from aam.report import Stage, column_values
from aam.training import checkpoint
from aam.training.base_cache import encoder_of
from aam.training.checkpoint import CONFIG, Checkpoint
from aam.training.logs import VALIDATION
from aam.training.metrics import class_probabilities, classification_metrics, regression_metrics
from aam.training.targets import Target

MOST_TEST_SAMPLES = 1000
"""Test samples that are predicted: a report must not take longer than a run."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Samples of a part of the split, what is true of them and what was predicted."""

    target: Target
    sample_ids: list[str]
    truth: np.ndarray
    """float64 [n], own units; or class codes."""
    predicted: np.ndarray
    """float64 [n], own units; or probabilities [n, classes]."""
    interval: np.ndarray | None = None
    """float64 [n, 2]: lowest and highest quantile of a number, where the model learned quantiles."""

    def scores(self, predicted: np.ndarray | None = None) -> dict[str, float]:
        """Metrics of these predictions, or of others for the same samples."""
        predicted = self.predicted if predicted is None else predicted
        score = classification_metrics if self.target.classes else regression_metrics
        return score(self.truth, predicted)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run."""

    record: dict[str, Any]
    """run.json"""
    history: list[dict[str, float]]
    """Metrics of each epoch."""
    best: Checkpoint
    """On the GPU where there is one."""
    stage: Stage
    folder: Path
    base_record: dict[str, Any] | None = None
    """run.json of the stage 1 run that it started from."""

    @classmethod
    def read(cls, folder: Path, base_record: dict[str, Any] | None = None) -> Run:
        """Read a run folder that has `best`, and what stage 1 left beside it."""
        record = json.loads((folder / "run.json").read_text())
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        best = checkpoint.load((folder / "best").resolve())
        best.model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(
            folder=folder,
            record=record,
            history=[json.loads(line) for line in lines],
            best=best,
            stage=Stage.read(best.path, record),
            base_record=base_record,
        )

    @cached_property
    def dataset(self) -> PreparedDataset:
        """The dataset that the run was trained on."""
        return prepared(self.record)

    @property
    def target(self) -> Target | None:
        """What the run predicts; None in stage 1."""
        return self.best.spec.target

    @property
    def versions(self) -> dict[str, str]:
        """Of the packages that trained it."""
        return json.loads((self.best.path / CONFIG).read_text())["versions"]

    def split(self, part: str) -> list[str]:
        """Samples of a part."""
        return self.record["split"][part]

    @cached_property
    def encoded(self) -> Encoded:
        """The validation samples, or as many of them as a report can afford."""
        contract = self.best.spec.contract
        ids = affordable(self.dataset, contract, self.split("val"))
        return encode(encoder_of(self.best.model), self.dataset, contract, ids)

    @cached_property
    def truth(self) -> dict[str, Any]:
        """Target of each sample that has one."""
        source, frame = source_of(self.record, "metadata"), self.dataset.metadata
        assert self.target is not None
        assert source is not None
        assert frame is not None
        return column_values(frame, self.target, source)

    @cached_property
    def validation(self) -> Scored:
        """The validation samples, as predicted when the best epoch ended, or by the ensemble."""
        assert self.target is not None
        with (self.folder / VALIDATION).open(newline="") as file:
            rows = list(csv.reader(file, delimiter="\t"))[1:]
        classes, interval = self.target.classes, None
        if classes:  # found by their place: one of them may be named `true`, as the column of the truth is
            truth = np.array([classes.index(row[1]) for row in rows])
            predicted = np.array([row[3 : 3 + len(classes)] for row in rows], dtype=np.float64)
        else:
            numbers = np.array([row[1:] for row in rows], dtype=np.float64)
            truth, predicted = numbers[:, :2].T
            interval = _ends(numbers[:, 1:])
        return Scored(
            target=self.target,
            sample_ids=[row[0] for row in rows],
            truth=truth,
            predicted=predicted,
            interval=interval,
        )

    @cached_property
    def test(self) -> Scored | None:
        """The held-out samples, those of them that can be scored; None where there are none."""
        target = self.target
        assert target is not None
        known = set(target.classes) if target.classes else None
        ids = [s for s in self.split("test") if s in self.truth and (known is None or self.truth[s] in known)]
        ids = draw(ids, MOST_TEST_SAMPLES)
        if len(ids) < 2:
            return None
        on_disk = self.record["config"]["loop"]["base_cache"]
        outputs = predict_samples(self.best, self.dataset, ids, base_cache=on_disk).target
        values = [self.truth[s] for s in ids]
        if target.classes:
            truth, predicted = target.encode(values), class_probabilities(outputs)
            return Scored(target=target, sample_ids=ids, truth=truth, predicted=predicted)
        numbers = target.decode(outputs)
        return Scored(
            target=target,
            sample_ids=ids,
            truth=np.array(values, dtype=np.float64),
            predicted=numbers[:, target.point],
            interval=_ends(numbers),
        )


def prepared(record: dict[str, Any]) -> PreparedDataset:
    """The dataset of a run.

    Raises
    ------
    ValueError
        Where it is not there any more.
    """
    folder = Path(record["dataset"]["folder"])
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder}: the prepared dataset is not there any more")
    return PreparedDataset(folder)


def draw(ids: list[str], most: int) -> list[str]:
    """At most so many of the ids, in their order; the same ones always."""
    if len(ids) <= most:
        return list(ids)
    chosen = np.random.default_rng(0).choice(len(ids), most, replace=False)
    return [ids[i] for i in sorted(chosen)]


def _ends(quantiles: np.ndarray) -> np.ndarray | None:
    """Lowest and highest of each row [n, O]; None where there is but one."""
    if quantiles.shape[1] == 1:
        return None
    return np.stack([quantiles.min(axis=1), quantiles.max(axis=1)], axis=1)
