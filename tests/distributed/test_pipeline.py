"""The pipeline: its jobs and their settings; a whole one that is interrupted and goes on; one that fails."""

from __future__ import annotations

import json
import runpy
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray_tools import paused, train_workers

from aam.cli import parse
from aam.config import DataConfig, PipelineConfig, PredictConfig, PretrainConfig, TrainConfig
from aam.distributed.pipeline import plan_stages
from aam.distributed.run import is_finished
from aam.distributed.submission import Cluster, last_lines
from conftest import ROOT

TINY = ["--embedding-dim", "16", "--attention-heads", "2", "--clades", "32", "--kmer", "3"]
QUICK = ["--batch-size", "8", "--epochs", "2", "--lr", "3e-3", "--rarefy-depth", "200", "--no-report"]
HERE = Cluster(address="http://127.0.0.1:8265", uploads=False, is_own=False, gcs_address="127.0.0.1:6379")
FAR = Cluster(address="http://head:8265", uploads=True, is_own=False)


def sources(folder: Path) -> list[str]:
    files = [f"--{name}={folder / file}" for name, file in
             (("table", "table.biom"), ("tree", "tree.nwk"), ("metadata", "metadata.tsv"))]  # fmt: skip
    return [*files, "--group-column", "subject", "--target", "gradient"]


def stages_of(*arguments: str):
    return plan_stages(parse(PipelineConfig, list(arguments)))


def refusal(*arguments: str) -> str:
    with pytest.raises(ValueError) as caught:
        stages_of(*arguments)
    return str(caught.value)


# Settings


def test_each_stage_gets_its_settings_and_the_command_line_that_gives_them(synthetic_folder, tmp_path):
    first, second, report = stages_of(
        *sources(synthetic_folder), "--output-dir", str(tmp_path / "a b"), "--freeze-base", "--embedding-dim", "16",
        "--epochs", "9", "--pretrain-flags=--epochs 3 --nuc-weight 0", "--train-flags=--dropout 0",
    )  # fmt: skip
    assert isinstance(first.config, PretrainConfig)
    assert isinstance(second.config, TrainConfig)
    assert isinstance(report.config, PredictConfig)
    assert (first.config.loop.epochs, second.config.loop.epochs) == (3, 9)
    assert (first.config.loss.nuc_weight, second.config.model.dropout) == (0, 0)
    assert second.config.pretrained == str(tmp_path / "a b" / "stage1")
    assert second.config.freeze_base
    assert second.config.data.tree is None, "stage 2 would say that it does not use it"
    assert first.config.data.test_fraction == second.config.data.test_fraction == 0.2
    assert first.config.resume_or_start
    assert second.config.resume_or_start
    assert report.config.checkpoint == str(tmp_path / "a b" / "stage2")
    for stage in (first, second, report):
        python, script, *arguments = shlex.split(stage.entrypoint(FAR))
        assert (python, script) == ("python", f"jobs/{stage.script}")
        assert parse(type(stage.config), arguments) == stage.config
    *command, script = shlex.split(second.entrypoint(HERE))[:4]
    assert command == ["env", "RAY_ADDRESS=127.0.0.1:6379", sys.executable]
    assert script == str(ROOT / "jobs" / "train.py")


def test_without_a_table_all_stages_take_the_built_in_dataset(tmp_path):
    first, second, _ = stages_of("--output-dir", str(tmp_path))
    assert first.config.data == second.config.data == DataConfig(test_fraction=0.2)


def test_storage_tells_the_runs_of_several_pipelines_apart(tmp_path):
    first, second, report = stages_of("--output-dir", str(tmp_path / "p1"), "--storage-path", "s3://bucket/runs")
    assert first.config.ray.storage_path == "s3://bucket/runs/p1"
    assert second.config.pretrained == "s3://bucket/runs/p1/stage1"
    assert report.config.checkpoint == "s3://bucket/runs/p1/stage2"


def test_faults_in_the_flags_of_a_stage_show_before_anything_runs(synthetic_folder, tmp_path, capsys):
    flags = [*sources(synthetic_folder), "--output-dir", str(tmp_path)]
    assert "--train-flags '--epoch 3'" in refusal(*flags, "--train-flags=--epoch 3")
    assert "--epochs" in capsys.readouterr().err, "the parser's suggestion"
    assert "--pretrain-flags" in refusal(*flags, "--pretrain-flags='--lr")
    capsys.readouterr()
    assert "--pretrain-flags ''" in refusal(*[flag for flag in flags if not flag.startswith("--tree=")])
    assert "--tree is needed" in capsys.readouterr().err
    assert "--output-dir is for the whole pipeline" in refusal(*flags, "--train-flags=--output-dir x")
    for more in ("--seed 3", "--test-fraction 0.5", "--table other.biom"):
        message = refusal(*flags, f"--train-flags={more}")
        assert message.startswith(f"{more.split()[0]}: must be the same in both stages")


def test_values_that_look_like_flags_may_follow_after_a_space():
    attach = runpy.run_path(str(ROOT / "jobs" / "pipeline.py"))["with_values_attached"]
    assert attach(["--lr", "1", "--train-flags", "--lr 2", "--pretrain-flags=--lr 3"]) == [
        "--lr", "1", "--train-flags=--lr 2", "--pretrain-flags=--lr 3",
    ]  # fmt: skip


def test_the_last_lines_of_a_job_are_its_error_or_its_end():
    assert last_lines("a\n\nerror: b\nerror: c: d\ntry e\n") == "error: c: d\ntry e"
    assert last_lines("\n".join(map(str, range(40))), most=3) == "37\n38\n39"
    assert last_lines("") == ""


# Jobs


def start(*arguments: str) -> subprocess.Popen[str]:
    script = [sys.executable, str(ROOT / "jobs" / "pipeline.py"), *arguments]
    return subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def rows(folder: Path) -> list[dict]:
    log = folder / "metrics.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def test_a_pipeline_that_is_interrupted_goes_on_and_repeats_nothing(ray_cluster, synthetic_folder, tmp_path):
    """Both stages hold back the same subjects, on whom the report is."""
    out = tmp_path / "pipeline"
    command = [*sources(synthetic_folder), *TINY, *QUICK, "--freeze-base", "--output-dir", str(out),
               "--train-flags", "--epochs 12"]  # fmt: skip
    first = start(*command)
    while first.poll() is None and not rows(out / "stage2"):
        time.sleep(0.05)
    assert first.poll() is None, first.communicate()
    [worker] = train_workers()
    with paused(worker):  # stage 2 does not end before it is followed again
        first.send_signal(signal.SIGINT)
        said, errors = first.communicate(timeout=60)
        assert first.returncode == 130, errors
        assert "stage 1: best epoch" in said, "the log of the job"
        assert "its job goes on; the same command, with this --output-dir, follows it again" in errors
        assert "Traceback" not in errors
        pretrained = (out / "stage1" / "metrics.jsonl").read_bytes()
        written = (out / "stage1" / "metrics.jsonl").stat().st_mtime_ns

        again = start(*command)
        assert again.stdout is not None
        said = ""
        while "stage 2: " not in said and (line := again.stdout.readline()):
            said += line
    more, errors = again.communicate(timeout=300)
    said += more
    assert again.returncode == 0, errors
    assert "stage 1: done already" in said
    assert "stage 2: follows Ray job raysubmit_" in said, said
    assert (out / "stage1" / "metrics.jsonl").read_bytes() == pretrained
    assert (out / "stage1" / "metrics.jsonl").stat().st_mtime_ns == written
    stage_2 = parse(TrainConfig, ["--epochs", "12"])
    samples = json.loads((out / "stage2" / "run.json").read_text())["split"]["train"]
    assert is_finished(stage_2.loop, len(samples), rows(out / "stage2"))

    records = [json.loads((out / name / "run.json").read_text()) for name in ("stage1", "stage2")]
    test = set(records[1]["split"]["test"])
    assert test
    assert test <= set(records[0]["split"]["test"])
    for record in records:
        subjects = {s.split(".")[0] for part in ("train", "val") for s in record["split"][part]}
        assert not subjects & {s.split(".")[0] for s in test}
    predicted = (out / "predictions.tsv").read_text().splitlines()[1:]
    assert {line.split("\t")[0] for line in predicted} == test
    report = (out / "report.md").read_text()
    assert report in said
    assert f"# gradient: {len(test)} held-out samples" in report
    assert "no stage trained on any of these samples" in report
    assert f"report       {out / 'report.md'}" in said


def test_a_stage_that_fails_ends_the_pipeline_with_its_last_lines(ray_cluster, synthetic_folder, tmp_path):
    flags = [*sources(synthetic_folder), *TINY, *QUICK]
    early = start(*flags, "--output-dir", str(tmp_path / "early"), "--train-flags", "--target nosuch")
    failing = start(*flags, "--output-dir", str(tmp_path / "out"), "--cpus-per-worker", "64")
    assert "no column 'nosuch'" in early.communicate(timeout=200)[1]
    assert not (tmp_path / "early" / "stage1").exists(), "stage 1 is trained for nothing"
    _, errors = failing.communicate(timeout=200)
    assert failing.returncode == 1, errors
    assert "Traceback" not in errors
    first, *last = errors.strip().splitlines()[-2:]
    assert first.startswith("error: stage 1 failed (Ray job raysubmit_")
    assert "--num-workers 1 of 64 CPUs each do not fit the cluster" in last[0]
