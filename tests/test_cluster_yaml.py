"""cluster.yaml, and what docs/cluster.md tells people to type."""

from __future__ import annotations

import functools
import json
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config

from conftest import ROOT

SHIPPED = (ROOT / "cluster.yaml").read_text()
GUIDE = (ROOT / "docs" / "cluster.md").read_text()
OF_BOTH_STAGES = ("jobs/pretrain.py", "jobs/train.py")
TAKES_OTHERS = {"jobs/tune.py": OF_BOTH_STAGES}  # its own --help, and flags of the stage for what the trials share


def _for_gcp() -> str:
    """The file as the command in it makes it for GCP."""
    command = next(line for line in SHIPPED.splitlines() if "> cluster-gcp.yaml" in line).strip("# ")
    assert command in GUIDE
    edit = shlex.split(command.partition(">")[0])
    return subprocess.run(edit, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.fixture(params=["aws", "gcp"])
def cluster(request) -> dict:
    text = SHIPPED if request.param == "aws" else _for_gcp()
    config = prepare_config(yaml.safe_load(text))
    assert config["provider"]["type"] == request.param
    return config


def test_ray_accepts_it(cluster):
    validate_config(cluster)


def test_a_head_for_no_training_and_gpu_nodes_that_go(cluster):
    types = cluster["available_node_types"]
    head, worker = types[cluster["head_node_type"]], types["worker"]
    assert head["resources"] == {"CPU": 0}
    assert worker["resources"]["GPU"] >= 1
    assert worker["min_workers"] == 0 < worker["max_workers"] == cluster["max_workers"]
    assert cluster["idle_timeout_minutes"] > 0


def test_jobs_are_told_what_the_cluster_can_grow_to(cluster):
    worker = cluster["available_node_types"]["worker"]
    start = cluster["head_start_ray_commands"][-1]
    told = json.loads(re.search(r"AAM_CLUSTER_MAX='([^']+)'", start)[1])
    assert told == {name: amount * worker["max_workers"] for name, amount in worker["resources"].items()}


def test_every_node_asks_for_the_token_and_none_is_in_the_file(cluster):
    for role in ("head", "worker"):
        start = cluster[f"{role}_start_ray_commands"][-1]
        for setting in ("RAY_AUTH_MODE=token", "RAY_USAGE_STATS_ENABLED=0", "RAY_worker_niceness=0"):
            assert setting in start
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "ssh_private_key" not in cluster["auth"]
    assert "gcp_credentials" not in cluster["provider"]
    for text in (SHIPPED, GUIDE):
        # access keys, private keys, tokens and account numbers
        assert not re.search(r"\bAKIA\w{16}|PRIVATE KEY|AUTH_TOKEN=[^$\s]|\b[0-9a-f]{32,}\b|\b\d{12}\b", text)


def test_what_is_copied_to_the_nodes_is_there_and_can_be_installed(cluster):
    mounts = cluster["file_mounts"]
    for local in mounts.values():
        assert local.startswith("~") or (ROOT / local).exists()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for needed in ("pyproject.toml", project["readme"], *project["license-files"], "aam", "jobs"):
        assert mounts[f"~/aam/{needed}"] == needed


def test_ray_is_the_one_that_the_project_pins(cluster):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pin = next(r for r in map(Requirement, project["dependencies"]) if r.name == "ray")
    installed = next(Requirement(r) for r in re.findall(r'"(ray\[[^"]+)"', "\n".join(cluster["setup_commands"])))
    assert installed.extras == pin.extras
    (exact,) = installed.specifier
    assert exact.operator == "=="
    assert exact.version in pin.specifier
    named = set(re.findall(r"(?:==|ray:|aam:|rayVersion: )(\d+\.\d+\.\d+)", GUIDE))
    assert named == {exact.version}


def test_the_kubernetes_variant_is_the_same_cluster(cluster):
    (manifest,) = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL))
    spec, (group,) = manifest["spec"], manifest["spec"]["workerGroupSpecs"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert (group["minReplicas"], group["maxReplicas"]) == (0, cluster["max_workers"])
    (head,) = spec["headGroupSpec"]["template"]["spec"]["containers"]
    start = cluster["head_start_ray_commands"][-1]
    for variable in head["env"]:
        assert f"{variable['name']}={shlex.quote(variable['value'])}" in start


@functools.cache
def _flags(script: str) -> set[str]:
    done = subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True, check=True)
    return set(re.findall(r"--[a-z][a-z0-9-]+", done.stdout))


def _job_commands() -> list[list[str]]:
    """Words of each command of the guide that runs a job, from `jobs/X.py` on."""
    blocks = "".join(re.findall(r"```bash\n(.*?)```", GUIDE, re.DOTALL)).replace("\\\n", " ")
    words = [shlex.split(line, comments=True) for line in blocks.splitlines() if "python jobs/" in line]
    return [line[line.index("python") + 1 :] for line in words]


@pytest.mark.parametrize("words", _job_commands(), ids=lambda words: words[0])
def test_flags_of_the_guide_exist(words):
    script, *rest = words
    known = set.union(*(_flags(s) for s in (script, *TAKES_OTHERS.get(script, ()))))
    used = {word for word in rest if word.startswith("--")}
    assert used <= known, used - known


def test_the_guide_shows_every_job():
    shown = {words[0] for words in _job_commands()}
    assert shown == {f"jobs/{name}.py" for name in ("pretrain", "train", "predict", "tune", "pipeline")}
