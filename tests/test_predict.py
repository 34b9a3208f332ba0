"""Which samples are predicted: those of a table, or those of a part of the run that trained the model."""

from __future__ import annotations

import json

import pytest
from runs import TINY, fit_here, train_config

from aam.config import DataConfig, LoopConfig, TrainConfig


@pytest.fixture(scope="module")
def built_in_run(tmp_path_factory):
    """A run on the built-in dataset with test samples that were drawn; its folder, and its run.json."""
    config = TrainConfig(
        output_dir=tmp_path_factory.mktemp("built-in") / "run",
        data=DataConfig(test_fraction=0.2, rarefy_depth=200),
        model=TINY,
        loop=LoopConfig(epochs=1, batch_size=32),
    )
    config.output_dir.mkdir()
    record = json.loads(json.dumps(fit_here(config).describe(config)))
    (config.output_dir / "run.json").write_text(json.dumps(record))
    return config.output_dir, record


def predicted(path) -> list[str]:
    return [line.split("\t")[0] for line in path.read_text().splitlines()[1:]]


def test_a_part_of_the_run_s_own_samples_without_a_table(run_here, built_in_run, tmp_path):
    folder, record = built_in_run
    out, report = tmp_path / "p.tsv", tmp_path / "report.md"
    done = run_here("predict.py", "--checkpoint", folder, "--part", "test", "--output", out, "--report", report)
    assert done.returncode == 0, done.stderr
    assert predicted(out) == record["split"]["test"]
    text = report.read_text()
    assert text in done.stdout
    assert f"| {len(record['split']['test'])} samples | model |" in text
    assert "no stage trained on any of these samples" in text
    assert "python jobs/train.py --output-dir" in text
    metrics = json.loads((folder / "best" / "config.json").read_text())["metrics"]
    run_here("predict.py", "--checkpoint", folder, "--part", "val", "--output", out, "--report", report)
    assert f"| R² | {metrics['val/r2']:.4g} |" in report.read_text(), "not what the training said"


def test_a_part_that_is_not_there_is_refused(run_here, synthetic_folder, built_in_run, tmp_path):
    config = train_config(synthetic_folder, tmp_path / "run", epochs=1)
    plan = fit_here(config)
    flags = ["--checkpoint", tmp_path / "run", "--output", tmp_path / "p.tsv"]
    for more in (["--part", "test"], ["--report", tmp_path / "r.md"], []):
        done = run_here("predict.py", *flags, *more)
        assert done.returncode == 1
        assert "no run.json there" in done.stderr, "a bare checkpoint"
    (tmp_path / "run" / "run.json").write_text(json.dumps(plan.describe(config)))
    done = run_here("predict.py", *flags, "--part", "test")
    assert done.returncode == 1
    assert "the run has no test samples; it keeps some back by --test-ids or --test-fraction" in done.stderr


def test_a_table_of_others_is_scored_by_their_metadata(run_here, synthetic_folder, built_in_run, tmp_path):
    out, report = tmp_path / "p.tsv", tmp_path / "report.md"
    flags = ["--checkpoint", built_in_run[0], "--table", synthetic_folder / "table.biom", "--output", out]
    done = run_here("predict.py", *flags, "--report", report)
    assert done.returncode == 0, done.stderr
    assert "Not scored: no known values" in report.read_text()
    done = run_here("predict.py", *flags, "--report", report, "--metadata", synthetic_folder / "metadata.tsv")
    assert done.returncode == 0, done.stderr
    assert "| mean absolute error |" in report.read_text()
    assert "(no value in column 'gradient')" in report.read_text()
