"""Several nodes: a second raylet on this machine, which comes and goes."""

from __future__ import annotations

import contextlib
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
from ray_tools import nodes_of_workers, paused, train_workers

from aam.config import RayConfig, RunConfig
from aam.distributed import cluster
from aam.distributed.run import run
from runs import STILL, fit_here, history, pretrain_config, train_config, wait_for

pytestmark = pytest.mark.slow


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


def of_workers(config: RunConfig, number: int | str) -> RunConfig:
    """The same run with workers of two CPUs, of which a node has room for one."""
    return dataclasses.replace(config, ray=RayConfig(num_workers=number, cpus_per_worker=2))


def check_history(config: RunConfig, reference: Path) -> None:
    """All epochs, with the losses of the same training in one process without Ray."""
    fit_here(dataclasses.replace(config, output_dir=reference))
    rows = history(config.output_dir)
    assert [row["epoch"] for row in rows] == list(range(1, config.loop.epochs + 1))
    assert losses(rows) == pytest.approx(losses(history(reference)), rel=1e-4)


def test_an_elastic_run_grows_when_a_node_comes(node, synthetic_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "RESIZE_SECONDS", 1.0)
    config = pretrain_config(synthetic_folder, tmp_path / "run", model=STILL, epochs=16)
    seen = []

    def grow() -> None:
        wait_for(lambda: epochs_logged(tmp_path / "run") >= 3)
        seen.append(nodes_of_workers())
        [worker] = train_workers()
        with paused(worker):  # a node takes its time to come up
            node.start()
        with contextlib.suppress(psutil.NoSuchProcess):  # until two others are there in its place
            while len(nodes_of_workers()) < 2:
                with paused(worker):  # the run cannot end before Ray has seen the node
                    time.sleep(0.5)
        wait_for(lambda: len(nodes_of_workers()) == 2)
        seen.append(nodes_of_workers())

    growing = in_background(grow)
    run(of_workers(config, "1:2"))
    growing.join(timeout=10)
    assert [len(workers) for workers in seen] == [1, 2]
    assert len(set(seen[1])) == 2, "both workers on one node"
    check_history(config, tmp_path / "reference")


def test_a_run_waits_for_a_lost_node_and_goes_on(node, synthetic_folder, tmp_path):
    """Stage 2, on a frozen base."""
    if node.process is None:
        node.start()
    fit_here(pretrain_config(synthetic_folder, tmp_path / "stage1", model=STILL))
    config = train_config(
        synthetic_folder, tmp_path / "run", model=STILL, pretrained=tmp_path / "stage1", freeze_base=True, epochs=10
    )
    seen, logged = [], []

    def lose() -> None:
        wait_for(lambda: epochs_logged(tmp_path / "run") >= 3)
        with paused(train_workers()[0]):  # the run cannot end before the node is lost
            seen.extend(nodes_of_workers())
            node.kill()
        logged.append(epochs_logged(tmp_path / "run"))
        time.sleep(3)
        logged.append(epochs_logged(tmp_path / "run"))
        node.start()

    losing = in_background(lose)
    run(of_workers(config, 2))
    losing.join(timeout=10)
    assert len(set(seen)) == 2, "both workers on one node"
    before, after = logged
    assert before < 10
    assert after <= before + 1, "the run went on with half of its workers"
    check_history(config, tmp_path / "reference")
