"""Epochs on a frozen base: each way of caching runs, and all have the same losses."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from conftest import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("extra", [[], ["--all-reads"], ["--head-layers", "1"]])
def test_the_benchmark_runs(tmp_path, extra):
    small = ["--samples", "12", "--embedding-dim", "16", "--clades", "16", "--rounds", "1", "--threads", "1"]
    command = [sys.executable, "benchmarks/frozen_base.py", *small, *extra, "--json", tmp_path / "r.json"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    result = json.loads((tmp_path / "r.json").read_text())
    assert ("have no sample features cached" in done.stdout) == ("--head-layers" in extra)
    for name in ("ASV vectors cached", "sample features cached"):
        assert result[name]["loss_difference"] < 1e-5
        assert result[name]["train"]["ratio"] > 0
