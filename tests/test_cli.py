"""Flags to settings and back."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from aam.cli import parse, reporting_faults, to_arguments
from aam.config import PipelineConfig, PredictConfig, PretrainConfig, RayConfig, TargetConfig, TrainConfig, to_dict
from aam.distributed.pipeline import plan_stages
from aam.report import flags_of


def test_settings_become_the_flags_that_give_them(tmp_path):
    given = [
        "--table", str(tmp_path / "a table.biom"), "--metadata", str(tmp_path / "m.tsv"), "--target", "age",
        "--pretrained", "s3://bucket/runs/stage1", "--freeze-base", "--num-workers", "1:4", "--lr", "0.0003",
        "--output-dir", str(tmp_path / "run"), "--no-classifier", "--storage-path", "s3://bucket/runs",
    ]  # fmt: skip
    config = parse(TrainConfig, given)
    assert config.ray.workers == (1, 4)
    assert config.pretrained == "s3://bucket/runs/stage1"
    arguments = to_arguments(config)
    assert "--no-classifier" not in arguments, "as by default"
    assert parse(TrainConfig, arguments) == config


@pytest.mark.parametrize("use_gpu", [True, False, None])
def test_values_that_flags_take_in_a_way_of_their_own(use_gpu, tmp_path):
    """True and False where there is a third, and what looks like a flag."""
    config = TrainConfig(
        output_dir=tmp_path, loss=TargetConfig(target="-log(age)"), ray=RayConfig(use_gpu=use_gpu), freeze_base=False
    )
    assert parse(TrainConfig, to_arguments(config)) == config
    record = json.loads(json.dumps({"stage": "train", "config": to_dict(config)}))
    assert parse(TrainConfig, flags_of(record)) == config
    pipeline = PipelineConfig(output_dir=tmp_path, ray=config.ray, loss=TargetConfig(target="age"))
    assert [stage.config.ray.use_gpu for stage in plan_stages(pipeline)[:2]] == [use_gpu] * 2


def test_paths_are_absolute_and_uris_left_alone(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = parse(PredictConfig, ["--checkpoint", "runs/age", "--table", "t.biom", "--output", "out/p.tsv"])
    assert config.checkpoint == str(tmp_path / "runs" / "age")
    assert config.output == tmp_path / "out" / "p.tsv"
    assert parse(PretrainConfig, ["--storage-path", "s3://b/x"]).ray.storage_path == "s3://b/x"
    assert parse(PretrainConfig, ["--storage-path", "shared"]).ray.storage_path == str(tmp_path / "shared")


def test_a_run_without_a_folder_gets_one_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folder = parse(PretrainConfig, []).output_dir
    assert folder.parent == tmp_path / "runs"
    assert folder.name.startswith("pretrain-")
    assert parse(TrainConfig, []).output_dir.name.startswith("train-")


@pytest.mark.parametrize("metrics", [["weighted"], ["faith_pd", "unweighted"], ["unweighted", "weighted", "faith_pd"]])
def test_several_unifrac_metrics(tmp_path, metrics):
    given = ["--output-dir", str(tmp_path), "--unifrac-metric", *metrics, "--asv-layers", "0", "--kmer", "4"]
    config = parse(PretrainConfig, given)
    assert config.loss.unifrac_metric == tuple(metrics)
    assert (config.model.asv_layers, config.loss.nuc_weight) == (0, None)
    assert parse(PretrainConfig, to_arguments(config)) == config
    record = json.loads(json.dumps({"stage": "pretrain", "config": to_dict(config)}))
    assert parse(PretrainConfig, flags_of(record)) == config


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--unifrac-metric", "weighted", "weighted"], "--unifrac-metric must be one or more different ones"),
        (["--unifrac-metric", "bray_curtis"], "unweighted"),
        (["--kmer", "0", "--asv-layers", "0"], "--kmer 0 and --asv-layers 0 leave nothing to read"),
    ],
)
def test_settings_of_stage_1_that_cannot_be(flags, message, capsys):
    with pytest.raises(SystemExit):
        parse(PretrainConfig, flags)
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize("workers", ["0", "3:2", "1:2:3", "two", "-1"])
def test_numbers_of_workers_that_cannot_be(workers, capsys):
    with pytest.raises(SystemExit):
        parse(PretrainConfig, [f"--num-workers={workers}"])
    assert "--num-workers must be a number from 1, or MIN:MAX" in " ".join(
        capsys.readouterr().err.replace("│", " ").split()
    )


def test_a_fault_is_one_line_and_what_follows_a_blank_line_stays(capsys):
    def fail() -> None:
        raise RuntimeError(f"{Path('job')}:\n it failed\n\nlast line 1\nlast line 2")

    with pytest.raises(SystemExit, match="1"):
        reporting_faults(fail)
    assert capsys.readouterr().err == "error: job: it failed\nlast line 1\nlast line 2\n"


def test_a_reader_that_has_gone_is_no_fault(capsys):
    read, write = os.pipe()
    os.close(read)

    def fail() -> None:
        os.write(write, b"a table")

    with pytest.raises(SystemExit, match="141"):
        reporting_faults(fail)
    assert capsys.readouterr().err == ""
    os.close(write)
