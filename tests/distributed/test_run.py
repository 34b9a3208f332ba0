"""Runs on a real Ray: checkpoints kept, workers lost, runs resumed."""

from __future__ import annotations

import dataclasses
import json
import threading
import time

import pytest
import ray
from ray_tools import train_workers

from aam.config import RayConfig
from aam.distributed.checkpoints import find_best, reported
from aam.distributed.cluster import scaling_config
from aam.distributed.run import run
from aam.training import checkpoint
from runs import STILL, fit_here, history, pretrain_config


def weights(path):
    return checkpoint.load(path).model.state_dict()


def kill_a_worker_after(folder, epochs: int) -> threading.Thread:
    """SIGKILL one training worker once some epochs are logged."""

    def wait_and_kill() -> None:
        log = folder / "metrics.jsonl"
        while not log.exists() or len(log.read_text().splitlines()) < epochs:
            time.sleep(0.05)
        train_workers()[-1].kill()

    thread = threading.Thread(target=wait_and_kill, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
def test_a_killed_worker_costs_nothing_but_time(ray_cluster, two_workers, synthetic_folder, tmp_path):
    """The outcome is that of two plain processes that nobody killed."""

    def config(name):
        made = pretrain_config(synthetic_folder, tmp_path / name, epochs=6, lr=3e-3, report=True)
        return dataclasses.replace(made, ray=RayConfig(num_workers=2))

    two_workers(fit_here, config("straight"))
    killer = kill_a_worker_after(tmp_path / "killed", epochs=3)
    killed = run(config("killed"))
    killer.join(timeout=1)
    assert not killer.is_alive()
    assert history(tmp_path / "killed") == history(tmp_path / "straight")
    one, other = weights(find_best(tmp_path / "straight")), weights(killed.best)
    assert all((one[name] == other[name]).all() for name in one)
    # Best and last are there, and are what the history says they are.
    losses = [row["val/total_loss"] for row in history(tmp_path / "killed")]
    assert killed.metrics["val/total_loss"] == min(losses)
    assert find_best(tmp_path / "killed") == killed.best
    page = (tmp_path / "killed" / "report.html").read_text()
    assert f"best epoch</dt><dd>{losses.index(min(losses)) + 1} of 6" in page
    last = json.loads((tmp_path / "killed" / "last" / "config.json").read_text())
    assert last["metrics"]["epoch"] == 6
    assert reported(str(tmp_path / "killed")) is not None
    # All workers gave back what they held.
    free = ray.available_resources()
    assert free["CPU"] == ray.cluster_resources()["CPU"]


def test_more_workers_than_the_cluster_has_is_an_error_not_a_wait(ray_cluster):
    with pytest.raises(ValueError, match="--num-workers 64"):
        scaling_config(RayConfig(num_workers=64))
    with pytest.raises(ValueError, match="GPU"):
        scaling_config(RayConfig(num_workers=1, use_gpu=True))
    assert scaling_config(RayConfig(num_workers=2)).resources_per_worker == {"CPU": 1}


def test_a_run_folder_is_not_reused_by_accident(synthetic_folder, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "ray" / "train").mkdir(parents=True)
    (tmp_path / "ray" / "train" / "checkpoint_manager_snapshot.json").write_text("{}")
    with pytest.raises(ValueError, match="--resume"):
        run(pretrain_config(synthetic_folder, tmp_path, model=STILL))
    with pytest.raises(ValueError, match="no run to resume"):
        run(dataclasses.replace(pretrain_config(synthetic_folder, tmp_path / "none"), resume=True))


def test_a_folder_without_checkpoints_says_so(tmp_path):
    with pytest.raises(ValueError, match="no such run folder"):
        find_best(tmp_path / "missing")
    with pytest.raises(ValueError, match="neither a checkpoint nor a run folder"):
        find_best(tmp_path)


def test_an_address_where_nothing_listens_is_an_error_not_a_wait(run_job, synthetic_folder, tmp_path):
    done = run_job(
        "pretrain.py", "--table", synthetic_folder / "table.biom", "--tree", synthetic_folder / "tree.nwk",
        "--ray-address", "127.0.0.1:9", "--output-dir", tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: no Ray answers at 127.0.0.1:9")
