"""What runs and baselines say of the same test samples, put side by side."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import sklearn

from aam.baselines import fit_predict, reads_of
from aam.config import DataContract
from aam.data.dataset import PreparedDataset
from aam.data.files import replacing, some
from aam.data.metadata import numeric_column, text_column
from aam.evaluation.scores import Samples
from aam.predict import Predictions, source_of


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A run, and what it says of its test samples."""

    repeat: int
    fold: int
    seed: int
    found: Predictions
    record: dict[str, Any]
    """run.json"""
    base_record: dict[str, Any] | None
    """run.json of its stage 1."""
    alone: Predictions | None = None
    """What its network says alone, where it is one of an ensemble."""
    member_weights: dict[str, float] = field(default_factory=dict)
    """What each member of the ensemble counts."""
    weighed_by: int = 0
    """Samples that these were weighed by."""
    unknown: list[str] = field(default_factory=list)
    """What of the test samples the model has never seen, in words."""

    @property
    def contract(self) -> DataContract:
        """How the run draws samples."""
        return DataContract(**self.record["spec"]["contract"])

    def truth(self, sample_ids: Sequence[str]) -> dict[str, Any]:
        """Target of those samples that have one."""
        dataset, target = self.found.dataset, self.found.target
        return column_of(dataset, sample_ids, target.column, self._metadata(), is_class=bool(target.classes))

    def groups(self, column: str, sample_ids: Sequence[str]) -> dict[str, str]:
        """Group of each sample.

        Raises
        ------
        ValueError
            Where one has none.
        """
        found = column_of(self.found.dataset, sample_ids, column, self._metadata(), is_class=True)
        check_groups(found, sample_ids, column, self._metadata())
        return found

    def _metadata(self) -> Path:
        source = source_of(self.record, "metadata")
        assert source is not None, "stage 2 had a target"
        return source


def check_groups(groups: dict[str, str], sample_ids: Iterable[str], column: str, source: Path) -> None:
    """Refuse samples without a group.

    Raises
    ------
    ValueError
        Where there are any.
    """
    without = [sample for sample in sample_ids if sample not in groups]
    if without:
        raise ValueError(
            f"{source}: column {column!r} has no value for {len(without)} samples ({some(without)}), "
            "which --group-column needs: fill it in"
        )


def column_of(
    dataset: PreparedDataset, sample_ids: Iterable[str], column: str, source: Path, *, is_class: bool
) -> dict[str, Any]:
    """Value of each sample that has one in a column of the metadata."""
    frame = dataset.metadata
    assert frame is not None
    read = text_column if is_class else numeric_column
    values = read(frame.loc[[s for s in sample_ids if s in frame.index]], column, source=source)
    return {str(sample): value for sample, value in values.items() if pd.notna(value)}


def scored_samples(outcomes: Sequence[Outcome], group_column: str | None) -> tuple[Samples, list[str]]:
    """The test samples that can be scored in each repeat, and notes on those that cannot be.

    Parameters
    ----------
    outcomes : sequence of Outcome
        Of the same target.
    group_column : str, optional
        Column whose values are the groups.

    Raises
    ------
    ValueError
        Where no sample is left.
    """
    classes = tuple(sorted({name for outcome in outcomes for name in outcome.found.target.classes}))
    truth: dict[str, Any] = {}
    lost: dict[str, str] = {}
    for outcome in outcomes:
        ids = outcome.found.sample_ids
        here = outcome.truth(ids)
        truth |= here
        lost |= outcome.found.skipped | {s: "no value of the target" for s in ids if s not in here}
        trained = outcome.found.target.classes
        if trained:
            lost |= {s: f"class {name!r}, which no training sample has" for s, name in here.items()
                     if name not in trained}  # fmt: skip
    ids = sorted(truth.keys() - lost.keys())
    notes = [f"not scored: {len(samples)} ({reason}; {some(samples)})" for reason, samples in _by_value(lost).items()]
    if not ids:
        raise ValueError(f"no test sample can be scored: {'; '.join(notes)}")
    values = [classes.index(truth[s]) if classes else truth[s] for s in ids]
    groups = None
    if group_column is not None:
        found: dict[str, str] = {}
        for outcome in outcomes:
            found |= outcome.groups(group_column, [s for s in outcome.found.sample_ids if s in truth])
        groups = np.array([found[s] for s in ids])
    folds: dict[int, dict[str, int]] = {}
    for outcome in outcomes:
        folds.setdefault(outcome.repeat, {}).update(dict.fromkeys(outcome.found.sample_ids, outcome.fold))
    several = len({outcome.fold for outcome in outcomes}) > 1
    return Samples(
        ids=ids,
        truth=np.array(values),
        classes=classes,
        groups=groups,
        folds={repeat: np.array([of[s] for s in ids]) for repeat, of in folds.items() if several},
    ), notes


def _by_value(of: dict[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for sample, reason in sorted(of.items()):
        found.setdefault(reason, []).append(sample)
    return found


def model_runs(samples: Samples, outcomes: Sequence[Outcome]) -> dict[tuple[int, int], np.ndarray]:
    """What the models of each repeat and seed say, the folds together: numbers [N] or probabilities [N, classes]."""
    return _joined(
        samples,
        outcomes,
        lambda outcome: _said(outcome.found, samples.classes),
        lambda outcome: (outcome.repeat, outcome.seed),
    )


def network_runs(samples: Samples, outcomes: Sequence[Outcome]) -> list[np.ndarray]:
    """What the networks of ensembles say alone, as `model_runs`; none where a run has no ensemble."""
    alone = [replace(outcome, found=outcome.alone) for outcome in outcomes if outcome.alone is not None]
    return [*model_runs(samples, alone).values()] if len(alone) == len(outcomes) else []


def baseline_runs(
    samples: Samples, outcomes: Sequence[Outcome], name: str, *, seed: int, folder: Path, rarefied: bool = False
) -> dict[int, np.ndarray]:
    """What a baseline says in each repeat, trained on the training and validation samples of the models.

    Parameters
    ----------
    samples : Samples
        Which are scored.
    outcomes : sequence of Outcome
        The runs; those that differ in their seeds alone share a baseline.
    name : str
        See `aam.baselines`.
    seed : int
        Of the baseline.
    folder : Path
        Keeps what was computed before.
    rarefied : bool
        Whether it reads what the model sees, in place of all reads.
    """
    splits = {(outcome.repeat, outcome.fold): outcome for outcome in outcomes}
    return _joined(
        samples,
        list(splits.values()),
        lambda outcome: _trained_baseline(name, outcome, samples.classes, seed, folder, rarefied=rarefied),
        lambda outcome: outcome.repeat,
    )


def _joined(
    samples: Samples, outcomes: Sequence[Outcome], said: Callable[[Outcome], np.ndarray], key: Callable[[Outcome], Any]
) -> dict[Any, np.ndarray]:
    found = {}
    for name, folds in groupby(sorted(outcomes, key=key), key):
        rows = {}
        for outcome in folds:
            rows |= dict(zip(outcome.found.sample_ids, said(outcome), strict=True))
        found[name] = np.array([rows[sample] for sample in samples.ids])
    return found


def _said(found: Predictions, classes: tuple[str, ...]) -> np.ndarray:
    if found.probabilities is None:
        return np.array(found.values, dtype=np.float64)
    wide = np.zeros((len(found.sample_ids), len(classes)))  # another fold may have more classes
    wide[:, [classes.index(name) for name in found.target.classes]] = found.probabilities
    return wide


def _trained_baseline(
    name: str, outcome: Outcome, classes: tuple[str, ...], seed: int, folder: Path, *, rarefied: bool
) -> np.ndarray:
    """What a baseline says of the test samples of a run; kept, as boosting may take minutes."""
    # The models have had both: an ensemble learns from the validation samples, a network's epoch is chosen by them.
    train = [sample for part in ("train", "val") for sample in outcome.record["split"][part]]
    dataset, test = outcome.found.dataset, outcome.found.sample_ids
    truth = outcome.truth(train)
    values = [truth[sample] for sample in train]
    balanced = bool(outcome.found.target.class_weights)
    key = [name, seed, balanced, sklearn.__version__, dataset.folder.name, train, values, test, classes]
    contract = outcome.contract if rarefied else None
    key += [] if contract is None else [asdict(contract)]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    place = folder / f"{name}-{digest}.npy"
    if not place.exists():
        print(f"baseline {name}: {len(train)} samples to train on", flush=True)
        said = fit_predict(
            name,
            reads_of(dataset, train, contract),
            np.array(values),
            reads_of(dataset, test, contract),
            classes=classes,
            balanced=balanced,
            seed=seed,
            jobs=-1,
        )
        with replacing(place) as scratch:
            np.save(scratch, said)
    return np.load(place)
