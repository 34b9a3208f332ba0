"""Data and the one Ray that the tests share."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import ray
import torch
from ray._private.utils import get_ray_address_file, read_ray_address

from aam.data import synthetic
from aam.distributed.cluster import RAY_ENVIRONMENT, free_leftovers, start_local
from runs import Workers

ROOT = Path(__file__).resolve().parent.parent
NO_RAY = "127.0.0.1:9"

# How long an example takes says nothing on a machine that does other things as well.
hypothesis.settings.register_profile(
    "any-machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any-machine")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    """Mark the tests that need the one Ray, which `make test` runs in one process and all others beside it."""
    for item in items:
        if "ray_cluster" in item.fixturenames:
            item.add_marker(pytest.mark.ray)


@pytest.fixture(scope="session", autouse=True)
def _environment(tmp_path_factory):
    """Prepared datasets of the tests stay in a folder of the tests; threads as Ray would set them.

    A test that needs Ray and does not ask for `ray_cluster` fails, and does not use a Ray that is not of the tests.
    """
    os.environ["AAM_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["RAY_ADDRESS"] = NO_RAY
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
    latest = Path(get_ray_address_file(None))  # where a job looks for the Ray of this machine
    before = latest.read_bytes() if latest.exists() else None
    address = os.environ["RAY_ADDRESS"] = start_local(num_cpus=2, log_to_driver=False)
    yield ray.get_runtime_context()
    os.environ["RAY_ADDRESS"] = NO_RAY
    ray.shutdown()
    # What `ray start` wrote for a second node of this Ray would lead the jobs of the next one astray.
    if (read_ray_address() or "").endswith(address[address.rindex(":") :]):
        latest.unlink()
        if before is not None:
            latest.write_bytes(before)


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


README_FLAGS = {
    "jobs/pretrain.py": "--embedding-dim 16 --attention-heads 2 --clades 32 --asv-layers 1 --kmer 3 --batch-size 8 "
    "--epochs 2 --lr 3e-3 --rarefy-depth 200 --no-report --metadata metadata.tsv --group-column subject",
    "jobs/train.py": "--batch-size 8 --epochs 1",
    "jobs/predict.py": "",
}
"""What makes the README's commands quick."""


@pytest.fixture(scope="session")
def readme_jobs(ray_cluster, synthetic_folder, tmp_path_factory):
    """The README's commands for one's own data, typed one after the other: their folder, and each as it ended."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("table.biom", "tree.nwk"):
        shutil.copy(synthetic_folder / name, folder / name)
    shutil.copy(synthetic_folder / "table.biom", folder / "new.biom")
    (folder / "metadata.tsv").write_text((synthetic_folder / "metadata.tsv").read_text().replace("gradient", "age", 1))
    (folder / "jobs").symlink_to(ROOT / "jobs")
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    block = next(block for block in blocks if "jobs/predict.py" in block)
    ended = {}
    for command in re.findall(r"^python (.*)$", block, re.MULTILINE):
        script, *arguments = shlex.split(command)
        ended[script] = subprocess.run(
            [sys.executable, script, *arguments, *README_FLAGS[script].split()],
            cwd=folder, capture_output=True, text=True, timeout=500, check=False,
        )  # fmt: skip
    return folder, ended


@pytest.fixture
def run_here(capsys, monkeypatch):
    """Run a script of jobs/ within this process, which has imported what a new one takes seconds for."""

    def run(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command, code = [script, *map(str, arguments)], 0
        monkeypatch.setattr(sys, "argv", command)
        monkeypatch.setattr(sys, "path", list(sys.path))  # the script adds to it
        capsys.readouterr()
        if ray.is_initialized():
            free_leftovers()  # as a process that connects does
        try:
            runpy.run_path(str(ROOT / "jobs" / script), run_name="__main__")
        except SystemExit as end:
            code = int(end.code or 0)
        return subprocess.CompletedProcess(command, code, *capsys.readouterr())

    return run
