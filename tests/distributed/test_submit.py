"""`ray job submit`, as the README has it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from ray._private import worker
from ray_tools import train_workers, wait_until_freed

from conftest import ROOT
from runs import wait_for

pytestmark = pytest.mark.slow
QUICK = (
    " --embedding-dim 16 --attention-heads 2 --clades 32 --asv-layers 1 --kmer 3 --batch-size 8 --epochs 2 --no-report"
)


@pytest.fixture(scope="module")
def environment(ray_cluster):
    """That of a user's shell after the README's set-up."""
    node = worker._global_node
    assert node is not None
    address = f"http://{node.address_info['webui_url']}"
    return {**os.environ, "RAY_AUTH_MODE": "token", "RAY_API_SERVER_ADDRESS": address}


@pytest.fixture(scope="module")
def commands():
    """The submissions that the README gives."""
    found = re.findall(r"^ray job submit .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(found) == 2
    return found


@pytest.fixture
def checkout(synthetic_folder, tmp_path):
    """A checkout with more data in it than Ray would take."""
    folder = tmp_path / "checkout"
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        if name.split("/")[0] in ("aam", "jobs", ".gitignore", "pyproject.toml"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / "data").mkdir()
    for name in ("table.biom", "tree.nwk"):
        shutil.copy(synthetic_folder / name, folder / "data" / name)
    with (folder / "data" / "study.biom").open("wb") as file:
        file.truncate(300 * 2**20)
    return folder


def test_a_job_runs_in_a_copy_of_the_checkout_without_its_data(commands, environment, checkout):
    def submit(command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command + QUICK, shell=True, cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True
        )

    [command] = (command for command in commands if "--working-dir" in command)
    job = submit(command)
    said, _ = job.communicate()
    assert job.returncode == 0, said
    run = checkout / "runs" / "stage1"
    assert "epoch 2/2" in said, "no logs of the worker"
    assert "stage 1: best epoch" in said
    assert f"checkpoints  {run}/best" in said
    assert f"--pretrained {run}" in said
    assert (run / "best" / "model.safetensors").exists()
    fault = submit(command.replace("table.biom", "none.biom").replace("stage1", "other"))
    relative = submit(command.replace('"$PWD"/runs', "runs"))
    # A fault: one line, and the exit code of the job.
    said, _ = fault.communicate()
    assert fault.returncode == 1
    [error] = set(re.findall(r"^error: .*$", said, re.MULTILINE))  # Ray shows the last lines once more
    assert "none.biom" in error
    assert "Traceback" not in said
    # A path that is not there in the copy: nothing would be left of what is written to it.
    said, _ = relative.communicate()
    assert relative.returncode == 1
    assert "give an absolute path" in said


@pytest.fixture
def new_runs():
    """Run folders that a test has left in the folder of this process; they go."""

    def found() -> set[Path]:
        return set((Path.cwd() / "runs").glob("pretrain-*"))

    before = found()
    yield lambda: found() - before
    for folder in found() - before:
        shutil.rmtree(folder)


def test_the_shortest_form(commands, environment, new_runs):
    """No option at all: the built-in dataset, default settings. It is stopped once it trains."""
    [command] = (command for command in commands if "--working-dir" not in command)
    job = subprocess.Popen(command.split(), env=environment, stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None
    said: list[str] = []
    for line in job.stdout:
        said.append(line)
        if " steps an epoch" in line:
            break
    text = "".join(said)
    [name] = re.findall(r"Job '(\w+)' submitted", text)
    wait_for(lambda: len(train_workers()) == 1)
    stop = subprocess.run(["ray", "job", "stop", name], env=environment, capture_output=True, text=True)
    assert stop.returncode == 0, stop.stderr
    job.stdout.read()
    job.wait()
    assert "200 samples" in text
    # The controller of a run can outlive its driver by a moment, in which it asks for new workers.
    wait_until_freed(as_by_next_job=True)
    assert new_runs(), "Ray was started in the folder of this process"
