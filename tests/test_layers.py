"""Imports run one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import aam

PACKAGE = Path(aam.__file__).parent
FORBIDDEN = {
    "data": ("ray", "torch.nn", "aam.model", "aam.training", "aam.distributed", "aam.plan", "aam.task"),
    "model": ("ray", "aam.data", "aam.training", "aam.distributed", "aam.plan", "aam.task", "torch.optim"),
    "training": ("ray", "aam.distributed", "aam.plan", "aam.task", "aam.samples"),
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("layer", FORBIDDEN)
def test_a_layer_knows_nobody_above_it(layer):
    files = list((PACKAGE / layer).rglob("*.py"))
    assert len(files) > 3
    for path in files:
        for name in imported(path):
            for forbidden in FORBIDDEN[layer]:
                assert not f"{name}.".startswith(f"{forbidden}."), f"{path} imports {name}"


def test_only_the_ray_edge_imports_ray():
    users = {p.relative_to(PACKAGE).parts[0] for p in PACKAGE.rglob("*.py") if "ray" in
             {name.split(".")[0] for name in imported(p)}}  # fmt: skip
    assert users == {"distributed"}


def test_processes_that_train_do_not_import_what_only_the_driver_needs():
    """Each process of a run would start a second later for it."""
    code = "import sys, aam.distributed.trials, aam.task, aam.training.loop; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert {"aam.plan", "aam.task", "ray.train.torch"} <= loaded
    assert not loaded & {"matplotlib", "scipy.stats", "skbio", "sklearn"}
