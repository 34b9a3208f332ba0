"""Learning curves: the mean of the runs at each share of the labels, whatever else is in the folder."""

from __future__ import annotations

import json
import subprocess
import sys

from conftest import ROOT


def test_curves_are_means_over_seeds(tmp_path):
    for share, seed, mae, alone in ((0.1, 0, 80, 90), (0.1, 1, 84, 94), (1.0, 0, 60, 70)):
        scores = {"model": {"mae": mae}, "network": {"mae": alone}, "baselines": {"random_forest": {"mae": mae + 20}}}
        (tmp_path / f"with-{share}-{seed}.json").write_text(json.dumps(scores))
    (tmp_path / "with-none.json").write_text("{}")
    script = [sys.executable, ROOT / "benchmarks" / "learning_curve.py", "--output", "curve.png"]
    done = subprocess.run([*script, "A=with-{}-*.json"], cwd=tmp_path, capture_output=True, text=True, check=True)
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [row[:3] for row in rows] == [
        ["A", "0.1", "82"],
        ["A", "1", "60"],
        ["A, network alone", "0.1", "92"],
        ["A, network alone", "1", "70"],
        ["random forest", "0.1", "102"],
        ["random forest", "1", "80"],
    ]
    assert [row[3:] for row in rows[:2]] == [["2.8", "2 runs"], ["0", "1 runs"]]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    missing = subprocess.run([*script, "A=none-{}.json"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert missing.returncode == 1
    assert "none-{}.json: no such files" in missing.stderr
