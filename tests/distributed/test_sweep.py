"""Sweeps: what they draw from, trials stopped and resumed, and what is left in the end."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from ray import tune
from ray_tools import wait_until_freed

from aam.cli import parse
from aam.config import PretrainConfig, SweepConfig, TargetConfig, TrainConfig
from aam.distributed.checkpoints import find_best
from aam.distributed.search import search_space
from aam.distributed.sweep import run_sweep
from aam.distributed.trials import trial_name, with_settings
from conftest import ROOT
from runs import pretrain_config, train_config


def space_of(config, *search, **flags):
    return search_space(SweepConfig(stage="pretrain", search=search, **flags), config)


@pytest.fixture
def config(synthetic_folder, tmp_path):
    return pretrain_config(synthetic_folder, tmp_path / "sweep")


def test_what_a_sweep_draws_from(config):
    space = space_of(config, lr=(1e-5, 1e-3), token_limit=(64, 128))
    assert isinstance(space["lr"].get_sampler(), type(tune.loguniform(1, 2).get_sampler()))
    assert (space["lr"].lower, space["lr"].upper) == (1e-5, 1e-3)
    assert space["token_limit"].categories == [64, 128]
    assert list(space_of(config)) == ["lr"], "with nothing else asked for"
    more = space_of(config, "dropout=0..0.3", "embedding-dim=64,128", "weight-decay=1e-4..0.1:log", "kmer=3..5",
                    "token-choice=abundance,random")  # fmt: skip
    assert list(more) == ["dropout", "embedding_dim", "weight_decay", "kmer", "token_choice"]
    assert {type(more["kmer"].sample()) for _ in range(9)} == {int}
    assert {int(more["kmer"].sample()) for _ in range(99)} == {3, 4, 5}
    assert all(0 <= more["dropout"].sample() <= 0.3 for _ in range(9))
    assert more["embedding_dim"].categories == [64, 128]


@pytest.mark.parametrize(
    ("search", "words"),
    [
        ("dropout", "expected NAME=A,B,C"),
        ("drop_out=0..1", "did you mean 'dropout'"),
        ("kmer=a,b", "expected values of type int"),
        ("dropout=0.3..0.1", "LO below HI"),
        ("weight_decay=0..1:log", "above 0 for log"),
        ("token_choice=abundance,rarest", "'rarest' is none of"),
        ("seed=1,2", "must be the same for all trials"),
        ("base_weight=0.1,1", "cannot be compared"),
    ],
)
def test_searches_that_cannot_be(config, search, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        space_of(config, search)


def test_a_sweep_says_that_its_trials_have_no_ensemble(synthetic_folder, tmp_path, capsys):
    config = train_config(synthetic_folder, tmp_path, target=TargetConfig(target="gradient", ensemble=True))
    with pytest.raises(ValueError, match="did you mean 'dropout'"):  # before anything is trained
        run_sweep(SweepConfig(stage="train", search=("drop_out=0..1",)), config)
    assert "trials train the network alone" in capsys.readouterr().out


def test_settings_of_a_trial(config, tmp_path):
    settings = {"lr": 0.00123456, "token_limit": 20, "dropout": 0.5}
    trial = with_settings(config, settings, tmp_path / "trial")
    assert (trial.loop.lr, trial.data.token_limit, trial.model.dropout) == (0.00123456, 20, 0.5)
    assert trial.output_dir == tmp_path / "trial"
    assert trial_name("a1b2_00003", settings) == "00003_lr=0.00123_token_limit=20_dropout=0.5"
    with pytest.raises(ValueError, match="--dropout"):
        with_settings(config, {"dropout": 1.5}, tmp_path)


def rows(folder: Path) -> list[dict]:
    log = folder / "metrics.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.mark.slow
def test_a_sweep_that_was_killed_goes_on(run_job, run_here, synthetic_folder, tmp_path):
    """One at a time: a middling trial, one of a better and one of a hopeless learning rate, which ASHA stops."""
    folder = tmp_path / "sweep"
    sweep = [
        "--stage",
        "pretrain",
        "--num-samples",
        "3",
        "--max-concurrent",
        "1",
        "--lr",
        "1e-7",
        "1e-2",
        "--token-limit",
        "20",
        "40",
        "--search-seed",
        "40",
        "--grace-period",
        "4",
        "--reduction-factor",
        "2",
    ]
    run = ["--table", synthetic_folder / "table.biom", "--tree", synthetic_folder / "tree.nwk", "--embedding-dim", "16",
           "--attention-heads", "2", "--clades", "32", "--kmer", "3", "--batch-size", "8", "--epochs", "8",
           "--rarefy-depth", "200", "--num-workers", "2", "--output-dir", folder]  # fmt: skip
    script = [sys.executable, str(ROOT / "jobs" / "tune.py"), *sweep, *map(str, run)]
    driver = subprocess.Popen(script, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def trials() -> list[Path]:
        return sorted((folder / "trials").glob("0*")) if folder.exists() else []

    while driver.poll() is None and not (len(trials()) == 2 and len(rows(trials()[1])) >= 2):
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    assert 2 <= len(rows(trials()[1])) < 8, "the sweep was over before it could be killed"
    first = trials()[0]
    assert len(rows(first)) == 8
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()}

    again = run_here("tune.py", *sweep, *run)
    assert again.returncode == 1
    assert "--resume" in again.stderr
    other = run_here("tune.py", *sweep[:-1], "3", *run, "--resume")
    assert "--reduction-factor" in other.stderr
    done = run_job("tune.py", *sweep, *run, "--resume")
    assert done.returncode == 0, done.stderr
    wait_until_freed()

    assert {path: path.stat().st_mtime_ns for path in before} == before, "a finished trial was touched"
    table = pd.read_csv(folder / "trials.tsv", sep="\t", index_col="trial")
    assert list(table["ended"]) == ["all epochs", "all epochs", "stopped by ASHA"]
    assert list(table["token_limit"]) == [20, 40, 20]
    assert [path.parent.name for path in folder.rglob("report.html")] == [table["val_loss"].idxmin()]
    for trial, row in table.iterrows():
        history = rows(folder / "trials" / str(trial))
        # One that is stopped may have logged an epoch that it did not report any more.
        assert [epoch["epoch"] for epoch in history] in [list(range(1, row["epochs"] + n)) for n in (1, 2)]
        losses = [epoch["val/total_loss"] for epoch in history[: row["epochs"]]]
        assert row["val_loss"] == pytest.approx(min(losses))
        best = json.loads((find_best(folder / "trials" / str(trial)) / "config.json").read_text())
        assert best["metrics"]["val/total_loss"] == min(losses), "the best checkpoint was lost"
        last = json.loads((folder / "trials" / str(trial) / "last" / "config.json").read_text())
        assert last["metrics"]["epoch"] == row["epochs"], "the last checkpoint was lost"
    # What TensorBoard shows of the folder: a curve for each trial, and no second set of Tune's.
    shown = {path.parent.relative_to(folder) for path in folder.rglob("events*")}
    assert shown == {Path("trials") / str(trial) / "tensorboard" for trial in table.index}
    assert 4 <= table["epochs"].iloc[2] < 12
    assert table["val_loss"].idxmin() == table.index[1]
    assert find_best(folder) == find_best(folder / "trials" / str(table.index[1]))
    assert (folder / "sweep.png").stat().st_size > 10_000
    # The commands that it prints.
    commands = dict(re.findall(r"^  (its settings|next) +python jobs/\w+.py (.*)$", done.stdout, re.MULTILINE))
    again = parse(PretrainConfig, shlex.split(commands["its settings"]))
    assert again.loop.lr == pytest.approx(table["lr"].iloc[1])
    assert again.data.token_limit == 40
    assert f"--pretrained {folder}" in commands["next"]
    words = commands["next"].replace("METADATA.tsv", str(synthetic_folder / "metadata.tsv"))
    stage_2 = parse(TrainConfig, shlex.split(words))
    assert stage_2.loop.lr == pytest.approx(table["lr"].iloc[1], rel=0.01)
    assert stage_2.data.table == synthetic_folder / "table.biom"


def test_faults_of_a_sweep_are_named_before_any_trial(run_here, tmp_path):
    base = ["--output-dir", tmp_path / "sweep"]
    cases = [
        (["--stage", "pretrain", "--search", "dropout=0,2"], "--dropout"),
        (["--stage", "pretrain", "--resume"], "no sweep to resume"),
        (["--stage", "train", "--search", "embeding-dim=2,4"], "did you mean 'embedding_dim'"),
    ]  # fmt: skip
    for arguments, words in cases:
        done = run_here("tune.py", *arguments, *base)
        assert done.returncode == 1, done.stderr
        assert words in done.stderr
        assert "Traceback" not in done.stderr
