"""The report: what it scores, what it admits, and commands that give the same settings."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, mean_absolute_error, r2_score

from aam.cli import parse
from aam.config import PredictConfig, PretrainConfig, TargetConfig, TrainConfig, to_dict
from aam.plan import make_plan
from aam.predict import Predictions
from aam.report import Stage, flags_of, known_truth, make_report, score_table, training_truth
from aam.training.targets import Target
from runs import pretrain_config, train_config

GRADIENT, CLASSES = Target(column="gradient"), ("gut", "skin", "soil")


@pytest.fixture
def stages(synthetic_folder, tmp_path):
    """Stage 1 and stage 2, as planned: trained on the same samples."""
    first, second = pretrain_config(synthetic_folder, tmp_path / "1"), train_config(synthetic_folder, tmp_path / "2")
    records = [json.loads(json.dumps(make_plan(config).describe(config))) for config in (first, second)]
    return [Stage(record=record, metrics={"epoch": 3, "val/r2": 0.5}, weights="abc" * 10) for record in records]


def predictions(stage: Stage, part: str, values, *, target=GRADIENT, probabilities=None):
    config = parse(TrainConfig, flags_of(stage.record))
    return Predictions(
        target=target,
        dataset=make_plan(config).dataset,
        sample_ids=sorted(stage.part(part)),
        values=list(values),
        probabilities=probabilities,
        skipped={"lost": "12 reads, fewer than 200"},
    )


def report(found, stages, part="val"):
    config = PredictConfig(checkpoint="2", output=Path("p.tsv"), part=part, report=Path("r.md"))
    return make_report(config, found, stages[1], stages[0])


def row(text: str, name: str) -> list[float]:
    [line] = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [float(cell) for cell in line.split("|")[2:-1]]


def test_scores_of_a_number_stand_beside_those_of_the_training_mean(stages):
    ids = sorted(stages[1].part("val"))
    found = predictions(stages[1], "val", np.linspace(0, 50, len(ids)))
    truth = known_truth(found, Path("metadata.tsv"))
    true = [truth[sample] for sample in ids]
    mean = np.mean(training_truth(stages[1].record, found.target))
    text = report(found, stages)
    assert row(text, "mean absolute error") == pytest.approx(
        [mean_absolute_error(true, found.values), mean_absolute_error(true, [mean] * len(true))], rel=1e-3
    )
    assert row(text, "R²") == pytest.approx(
        [r2_score(true, found.values), r2_score(true, [mean] * len(true))], rel=1e-3
    )
    assert f"the mean of the training samples, {mean:.4g}" in text
    assert "not predicted: 1 (12 reads, fewer than 200)" in text
    assert f"stage 2 chose its best epoch by {len(ids)} of these samples" in text
    record = {**stages[1].record, "config": {**stages[1].record["config"], "loss": {"ensemble": True}}}
    text_of_ensemble = report(found, (stages[0], dataclasses.replace(stages[1], record=record)))
    fitted = f"chose its best epoch and weighed its ensemble by, and then fitted that to, {len(ids)} of these samples"
    assert f"stage 2 {fitted}" in text_of_ensemble
    assert "| stage 2, the network alone |" in text_of_ensemble
    assert "network alone" not in text
    seen = len(stages[0].part("train").intersection(ids))
    assert f"stage 1 trained on {seen} of these samples" in text


def test_scores_of_classes_stand_beside_those_of_the_most_frequent(stages):
    target = Target(column="site", classes=CLASSES[:2], loss="cross_entropy")
    ids = sorted(stages[1].part("val"))
    chosen = np.arange(len(ids)) % 2
    found = predictions(stages[1], "val", [CLASSES[i] for i in chosen], target=target, probabilities=np.eye(2)[chosen])
    truth = known_truth(found, Path("metadata.tsv"))
    scored = [i for i, sample in enumerate(ids) if truth[sample] in target.classes]
    assert 0 < len(scored) < len(ids)
    text = report(found, stages)
    true, said = [truth[ids[i]] for i in scored], [found.values[i] for i in scored]
    assert row(text, "balanced accuracy") == pytest.approx([balanced_accuracy_score(true, said), 0.5], rel=1e-3)
    assert f"not scored: {len(ids) - len(scored)} of classes that no training sample had (soil)" in text


def test_samples_without_a_known_value_are_counted_and_none_at_all_is_said(stages):
    found = predictions(stages[1], "train", np.zeros(len(stages[1].part("train"))))
    text = report(found, stages, "train")
    assert f"stage 1 trained on {len(stages[0].part('train') & set(found.sample_ids))} of these samples" in text
    assert f"stage 2 trained on {len(found.sample_ids)} of these samples" in text
    assert score_table(found, {}, []).startswith("Not scored: no known values")


def test_a_class_of_any_name_leaves_the_table_whole(stages):
    target = Target(column="site", classes=("k__A|p__B", "<b>"), loss="cross_entropy")
    ids = sorted(stages[1].part("val"))
    said = predictions(stages[1], "val", ["<b>"] * len(ids), target=target, probabilities=np.eye(2)[[1] * len(ids)])
    for name in target.classes:
        lines = score_table(said, dict.fromkeys(ids, name), [name]).splitlines()
        assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {4}
        assert "<b>" not in lines[0]


def test_asvs_that_no_training_sample_has_are_counted(stages):
    seen = report(predictions(stages[1], "train", np.zeros(len(stages[1].part("train")))), stages, "train")
    assert "- 0 of " in seen
    assert "(0.00% of the reads) are in no training sample" in seen


def test_the_commands_give_the_settings_of_the_runs(synthetic_folder, tmp_path, stages):
    for config_type, stage in ((PretrainConfig, stages[0]), (TrainConfig, stages[1])):
        made = parse(config_type, flags_of(stage.record))
        assert json.loads(json.dumps(to_dict(made))) == stage.record["config"]
    target = TargetConfig(target="site", classifier=True, quantiles=(0.1, 0.9))
    config = train_config(
        synthetic_folder, tmp_path / "a b", target=target, pretrained=str(tmp_path / "1"), freeze_base=True
    )
    record = {"stage": "train", "config": json.loads(json.dumps(to_dict(config)))}
    record["config"]["resume_or_start"] = True
    flags = flags_of(record)
    assert parse(TrainConfig, shlex.split(shlex.join(flags))) == config
