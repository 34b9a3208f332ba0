"""Data and the one Ray that the tests share."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import ray
import torch
from runs import Workers

from aam.data import synthetic
from aam.distributed.cluster import RAY_ENVIRONMENT, start_local

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def _environment(tmp_path_factory):
    """Prepared datasets of the tests stay in a folder of the tests; threads as Ray would set them."""
    os.environ["AAM_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def synthetic_folder(tmp_path_factory) -> Path:
    """Built-in dataset: 40 samples of 10 subjects, 200 ASVs."""
    config = synthetic.SyntheticConfig(samples=40, subjects=10, asvs=200, seed=1)
    return synthetic.ensure(tmp_path_factory.mktemp("data") / "synthetic", config)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of public data sets, named by AAM_TEST_DATA."""
    folder = os.environ.get("AAM_TEST_DATA")
    if not folder:
        pytest.skip("AAM_TEST_DATA names no folder of real data sets")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def two_workers():
    """Two processes that all tests of several workers share: `two_workers(function, *arguments)`."""
    workers = Workers(2)
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def ray_cluster():
    """One local Ray for all tests that need one; job scripts find it by RAY_ADDRESS."""
    os.environ.update(RAY_ENVIRONMENT)
    # A lost node is noticed after seconds rather than a minute.
    os.environ.update({"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "3"})
    # The `python` of a submitted job is the one on the path where Ray was started.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    os.environ["RAY_ADDRESS"] = start_local(num_cpus=2, log_to_driver=False)
    yield ray.get_runtime_context()
    os.environ.pop("RAY_ADDRESS")
    ray.shutdown()


@pytest.fixture(scope="session")
def run_job(ray_cluster):
    """Run a script of jobs/ as a user would; returns the finished process."""

    def run(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(ROOT / "jobs" / script), *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=500,
            check=False,
        )

    return run


@pytest.fixture
def run_here(capsys, monkeypatch):
    """Run a script of jobs/ within this process, which has imported what a new one takes seconds for."""

    def run(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command, code = [script, *map(str, arguments)], 0
        monkeypatch.setattr(sys, "argv", command)
        monkeypatch.setattr(sys, "path", list(sys.path))  # the script adds to it
        capsys.readouterr()
        try:
            runpy.run_path(str(ROOT / "jobs" / script), run_name="__main__")
        except SystemExit as end:
            code = int(end.code or 0)
        return subprocess.CompletedProcess(command, code, *capsys.readouterr())

    return run
