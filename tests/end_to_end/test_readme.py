"""What the README tells people to type works."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys

from aam.cli import parse, parse_known
from aam.config import EvaluateConfig, PipelineConfig, PretrainConfig, SweepConfig
from aam.distributed.pipeline import plan_stages
from aam.distributed.search import search_space
from conftest import ROOT

PIPELINE = "jobs/pipeline.py"


def test_commands_for_your_own_data(readme_jobs):
    folder, ended = readme_jobs
    assert list(ended) == ["jobs/pretrain.py", "jobs/train.py", "jobs/predict.py"]
    for done in ended.values():
        assert done.returncode == 0, f"{done.args}\n{done.stderr}"
    assert (folder / "predictions.tsv").read_text().startswith("SampleID\tprediction\n")
    notes = json.loads((folder / "runs" / "age" / "run.json").read_text())["notes"]
    assert notes, "some samples have no value there"
    for note in notes:
        assert f"note: {note}" in ended["jobs/train.py"].stdout
    assert "stage 2: best epoch" in ended["jobs/train.py"].stdout
    [page] = re.findall(r"^report: (.*)$", ended["jobs/train.py"].stdout, re.MULTILINE)
    assert (folder / page).read_text().startswith("<!DOCTYPE html>")
    assert not (folder / "runs" / "stage1" / "report.html").exists(), "--no-report"
    # What the table of a run folder promises.
    readme = (ROOT / "README.md").read_text()
    named = re.findall(r"^\| `([^`]+)`(?:, `([^`]+)`)?", readme[readme.index("A run folder holds") :], re.MULTILINE)
    for name in [n for pair in named[:6] for n in pair if n]:
        assert (folder / "runs" / "age" / name).exists(), name
    board = [sys.executable, "-m", "tensorboard.main", "--inspect", "--logdir", str(folder / "runs")]
    shown = subprocess.run(board, capture_output=True, text=True, check=True)
    assert "val/total_loss" in shown.stdout


def test_flags_in_the_readme_exist():
    readme = (ROOT / "README.md").read_text()
    known = set()
    for script in (ROOT / "jobs").glob("*.py"):
        done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True)
        known |= set(re.findall(r"--[a-z][a-z0-9-]+", done.stdout))
    used = set(re.findall(r"--[a-z][a-z0-9-]+", readme)) - {"--logdir", "--head", "--generate", "--working-dir"}
    assert used <= known, used - known


def test_the_command_of_the_pipeline_is_understood():
    """tests/distributed/test_pipeline.py runs one."""
    readme = (ROOT / "README.md").read_text()
    [command] = re.findall(rf"^python {PIPELINE} (.*)$", readme, re.MULTILINE)
    names = [stage.name for stage in plan_stages(parse(PipelineConfig, shlex.split(command)))]
    assert names == ["stage 1", "stage 2", "report"]


def test_the_command_of_the_sweep_is_understood():
    """tests/distributed/test_sweep.py runs one."""
    readme = (ROOT / "README.md").read_text()
    [command] = re.findall(r"^python jobs/tune.py (.*)$", readme, re.MULTILINE)
    sweep, others = parse_known(SweepConfig, shlex.split(command))
    assert list(search_space(sweep, parse(PretrainConfig, others))) == ["lr", "token_limit"]


def test_the_command_of_the_evaluation_is_understood():
    """tests/test_evaluation.py runs one."""
    readme = (ROOT / "README.md").read_text()
    [command] = re.findall(r"^python jobs/evaluate.py (.*)$", readme, re.MULTILINE)
    config = parse(EvaluateConfig, shlex.split(command))
    assert (config.preset, config.seeds) == ("gut-small", 3)


def test_the_demo_is_a_pipeline(monkeypatch):
    """Of which tests/distributed/test_pipeline.py runs a smaller one."""
    shown = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    monkeypatch.chdir(ROOT)
    [command] = re.findall(r"jobs/pipeline.py (--output-dir.*)$", shown, re.MULTILINE)
    with_values_attached = runpy.run_path(str(ROOT / PIPELINE))["with_values_attached"]
    stages = plan_stages(parse(PipelineConfig, with_values_attached(shlex.split(command))))
    assert [stage.config.output_dir for stage in stages[:2]] == [ROOT / "demo" / "stage1", ROOT / "demo" / "stage2"]


def test_targets_of_the_makefile_that_the_readme_names():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
