"""Several nodes: a second raylet on this machine, which comes and goes."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import ray
from ray_tools import nodes_of_workers, train_workers, wait_for
from runs import CPU, STILL, history, pretrain_config, train_config

from aam.config import RayConfig
from aam.distributed import cluster
from aam.distributed.run import run
from aam.plan import make_plan
from aam.task import build_task
from aam.training.loop import fit

pytestmark = pytest.mark.slow
EPOCHS = 50


class Node:
    """A node of two CPUs beside the head."""

    process: subprocess.Popen | None = None

    def start(self) -> None:
        before = alive()
        command = [str(Path(sys.executable).with_name("ray")), "start", "--address", os.environ["RAY_ADDRESS"],
                   "--num-cpus", "2", "--disable-usage-stats", "--block"]  # fmt: skip
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "RAY_AUTH_MODE": "token"}
        )
        wait_for(lambda: alive() == before + 1)

    def kill(self) -> None:
        """As a machine is lost: nothing is told, nothing is cleaned up."""
        if self.process is None:
            return
        before = alive()
        lost = psutil.Process(self.process.pid)
        for process in [*lost.children(recursive=True), lost]:
            process.kill()
        self.process.wait()
        self.process = None
        wait_for(lambda: alive() == before - 1)


def alive() -> int:
    return sum(node["Alive"] for node in ray.nodes())


def epochs_logged(folder: Path) -> int:
    log = folder / "metrics.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def in_background(function: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def losses(rows: list[dict]) -> list[float]:
    return [row[f"{part}/total_loss"] for row in rows for part in ("train", "val")]


@pytest.fixture(scope="module")
def node(ray_cluster):
    made = Node()
    yield made
    made.kill()


@pytest.fixture(scope="module")
def reference(synthetic_folder, tmp_path_factory):
    """Losses of the same training in one process, without Ray."""
    plan = make_plan(
        pretrain_config(synthetic_folder, tmp_path_factory.mktemp("reference"), model=STILL, epochs=EPOCHS)
    )
    return losses(fit(build_task(plan, CPU)).history)


def config(folder, output_dir, workers):
    made = pretrain_config(folder, output_dir, model=STILL, epochs=EPOCHS)
    return dataclasses.replace(made, ray=RayConfig(num_workers=workers, cpus_per_worker=2))


def test_an_elastic_run_grows_when_a_node_comes(node, synthetic_folder, tmp_path, reference, monkeypatch):
    monkeypatch.setattr(cluster, "RESIZE_SECONDS", 1.0)
    seen = []

    def grow() -> None:
        wait_for(lambda: epochs_logged(tmp_path / "run") >= 3)
        seen.append(nodes_of_workers())
        [worker] = train_workers()
        worker.suspend()  # a node takes its time to come up
        node.start()
        worker.resume()
        wait_for(lambda: len(nodes_of_workers()) == 2)
        seen.append(nodes_of_workers())

    growing = in_background(grow)
    run(config(synthetic_folder, tmp_path / "run", "1:2"))
    growing.join(timeout=10)
    assert [len(workers) for workers in seen] == [1, 2]
    assert len(set(seen[1])) == 2, "both workers on one node"
    rows = history(tmp_path / "run")
    assert [row["epoch"] for row in rows] == list(range(1, EPOCHS + 1))
    assert losses(rows) == pytest.approx(reference, rel=1e-4)


def test_a_run_waits_for_a_lost_node_and_goes_on(node, synthetic_folder, tmp_path, reference):
    if node.process is None:
        node.start()
    seen = []

    def lose() -> None:
        wait_for(lambda: epochs_logged(tmp_path / "stage1") >= 3)
        seen.extend(nodes_of_workers())
        node.kill()
        before = epochs_logged(tmp_path / "stage1")
        assert before < EPOCHS
        time.sleep(3)
        assert epochs_logged(tmp_path / "stage1") <= before + 1, "the run went on with half of its workers"
        node.start()

    losing = in_background(lose)
    stage_1 = run(config(synthetic_folder, tmp_path / "stage1", 2))
    losing.join(timeout=10)
    assert len(set(seen)) == 2, "both workers on one node"
    rows = history(tmp_path / "stage1")
    assert [row["epoch"] for row in rows] == list(range(1, EPOCHS + 1))
    assert losses(rows) == pytest.approx(reference, rel=1e-4)
    # Stage 2 from the best checkpoint, again on both nodes.
    stage_2 = train_config(synthetic_folder, tmp_path / "stage2", pretrained=stage_1.best, freeze_base=True)
    result = run(dataclasses.replace(stage_2, ray=RayConfig(num_workers=2, cpus_per_worker=2)))
    assert result.epochs == 2
    assert result.best.exists()
