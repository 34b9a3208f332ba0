"""What the README tells people to type works."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys

from conftest import ROOT

from aam.cli import parse, parse_known
from aam.config import PipelineConfig, PretrainConfig, SweepConfig
from aam.distributed.pipeline import plan_stages
from aam.distributed.search import search_space

QUICK = {
    "jobs/pretrain.py": "--embedding-dim 16 --attention-heads 2 --attention-layers 1 --epochs 1 --rarefy-depth 200",
    "jobs/train.py": "--attention-layers 1 --epochs 1",
    "jobs/predict.py": "",
}
PIPELINE = "jobs/pipeline.py"


def test_commands_for_your_own_data(ray_cluster, synthetic_folder, tmp_path):
    readme = (ROOT / "README.md").read_text()
    block = next(b for b in re.findall(r"```bash\n(.*?)```", readme, re.DOTALL) if "jobs/predict.py" in b)
    commands = [line for line in block.splitlines() if line.startswith("python ")]
    assert [shlex.split(c)[1] for c in commands] == list(QUICK)
    for name in ("table.biom", "tree.nwk", "metadata.tsv"):
        shutil.copy(synthetic_folder / name, tmp_path / name)
    shutil.copy(synthetic_folder / "table.biom", tmp_path / "new.biom")
    metadata = tmp_path / "metadata.tsv"
    metadata.write_text(metadata.read_text().replace("gradient", "age", 1))
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    for command in commands:
        _, script, *arguments = shlex.split(command)
        done = subprocess.run(
            [sys.executable, script, *arguments, *QUICK[script].split()],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=os.environ,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    assert (tmp_path / "predictions.tsv").read_text().startswith("SampleID\tprediction\n")
    # What the table of a run folder promises.
    named = re.findall(r"^\| `([^`]+)`(?:, `([^`]+)`)?", readme[readme.index("A run folder holds") :], re.MULTILINE)
    for name in [n for pair in named[:5] for n in pair if n]:
        assert (tmp_path / "runs" / "age" / name).exists(), name
    board = [sys.executable, "-m", "tensorboard.main", "--inspect", "--logdir", str(tmp_path / "runs")]
    shown = subprocess.run(board, capture_output=True, text=True, check=True)
    assert "val/total_loss" in shown.stdout


def test_flags_in_the_readme_exist():
    readme = (ROOT / "README.md").read_text()
    known = set()
    for script in [*QUICK, PIPELINE, "jobs/tune.py"]:
        done = subprocess.run(
            [sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True, check=True
        )
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
