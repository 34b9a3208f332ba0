"""Trackers get what metrics.jsonl gets; the real packages, without a server."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from aam.task import build_task
from aam.training import trackers
from aam.training.loop import fit
from runs import CPU, pretrain_plan, wait_for


def test_mlflow_gets_the_metrics_of_each_epoch(synthetic_folder, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    folder, uri = tmp_path / "run", str(tmp_path / "mlruns")
    plan = pretrain_plan(synthetic_folder, folder, mlflow=uri)
    fit(build_task(plan, CPU, folder=folder))
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("aam")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "run"
    assert run.info.status == "FINISHED"
    assert run.data.params["lr"] == "0.001"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = client.get_metric_history(run.info.run_id, "val/total_loss")
    assert [(m.step, m.value) for m in logged] == [(row["epoch"], row["val/total_loss"]) for row in rows]
    assert "throughput samples/s" in run.data.metrics


def test_wandb_gets_the_metrics_of_each_epoch(synthetic_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "run"
    plan = pretrain_plan(synthetic_folder, folder, wandb="microbes")
    fit(build_task(plan, CPU, folder=folder))
    [written] = folder.glob("wandb/offline-run-*/run-*.wandb")
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    # The file is binary; the numbers stand in it as JSON. A process of wandb's own writes it, a moment after the run.
    wait_for(lambda: str(row["val/total_loss"]).encode() in written.read_bytes())


def test_a_tracker_that_is_not_installed_is_named_before_the_run(synthetic_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(trackers._PACKAGES, "wandb", "no_such_package")
    with pytest.raises(ValueError, match=r"--wandb needs .* pip install 'aam\[wandb\]'"):
        pretrain_plan(synthetic_folder, tmp_path, wandb="microbes")


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "nosuch://place"])
def test_an_mlflow_that_cannot_be_used_is_named_before_the_run(synthetic_folder, tmp_path, uri):
    with pytest.raises(ValueError, match=f"--mlflow {uri}: cannot be used"):
        pretrain_plan(synthetic_folder, tmp_path, mlflow=uri)


def test_trackers_are_imported_only_where_asked_for():
    program = "import sys, aam.training.loop; print([m for m in ('wandb', 'mlflow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
