"""Presets: settings below the flags that are given, in each job; and each of them runs."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from aam import presets
from aam.cli import parse, parse_known, to_arguments
from aam.config import LoopConfig, PipelineConfig, PretrainConfig, SweepConfig, TrainConfig
from aam.distributed.pipeline import plan_stages
from aam.distributed.run import complete_ensemble
from aam.distributed.submission import Cluster
from aam.distributed.summary import train_command
from aam.plan import check_resumable, make_plan
from aam.presets import PRESETS
from aam.report import flags_of
from aam.training import checkpoint
from runs import fit_here, history

FAR = Cluster(address="http://head:8265", uploads=True, is_own=False)
DEFAULT_LR = str(LoopConfig().lr)
"""1e-4, where gut-small has 1e-3: what is as by default without a preset is not as by default with it."""
SMALL = PRESETS["gut-small"]


def sources(folder: Path) -> list[str]:
    return [f"--{name}={folder / file}" for name, file in
            (("table", "table.biom"), ("tree", "tree.nwk"), ("metadata", "metadata.tsv"))]  # fmt: skip


def settings_of_stages(*arguments: str) -> tuple[PretrainConfig, TrainConfig]:
    """What the jobs of a pipeline train with, by the command lines that they are submitted with."""
    found = []
    for stage in plan_stages(parse(PipelineConfig, list(arguments)))[:2]:
        _, _, *words = shlex.split(stage.entrypoint(FAR))
        found.append(parse(type(stage.config), words))
        assert found[-1] == stage.config
    first, second = found
    return first, second


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_trains_both_stages(name, synthetic_folder, tmp_path):
    small = ["--embedding-dim", "16", "--epochs", "1", "--token-limit", "32", "--rarefy-depth", "100"]
    flags = [*sources(synthetic_folder), "--target", "gradient", "--output-dir", str(tmp_path)]
    for config in settings_of_stages(*flags, *small, "--preset", name):
        plan, best = fit_here(config), config.output_dir / "best"
        assert [row["epoch"] for row in history(config.output_dir)] == [1]
        if isinstance(config, TrainConfig) and config.loss.ensemble:
            complete_ensemble(plan, str(config.output_dir), best)
            assert checkpoint.load(best).ensemble is not None


def test_a_stage_takes_its_part_of_the_preset_and_flags_win(tmp_path):
    assert SMALL.settings("pretrain")["lr"] != float(DEFAULT_LR), "or the flag below would say nothing"
    config = parse(PretrainConfig, ["--lr", DEFAULT_LR, "--preset=gut-small", "--max-updates", "None"])
    assert config.preset == "gut-small"
    assert (config.loop.batch_size, config.loop.epochs) == (SMALL.pretrain["batch_size"], SMALL.pretrain["epochs"])
    assert SMALL.pretrain["max_updates"] is not None, "nor this one"
    assert (config.loop.lr, config.loop.max_updates) == (1e-4, None), "as without a preset, because it was asked for"
    assert parse(PretrainConfig, to_arguments(config)) == config
    stage_2 = parse(TrainConfig, ["--preset", "gut-small", "--pretrained", str(tmp_path)])
    assert SMALL.train["epochs"] != SMALL.pretrain["epochs"]
    assert (stage_2.freeze_base, stage_2.loop.epochs) == (True, SMALL.train["epochs"])
    assert stage_2.loop.max_updates == SMALL.train.get("max_updates")
    assert parse(TrainConfig, to_arguments(stage_2)) == stage_2
    assert not parse(TrainConfig, ["--preset", "gut-small", "--no-freeze-base"]).freeze_base


def test_the_jobs_of_a_pipeline_get_what_is_given_and_below_it_the_preset(tmp_path):
    first, second = settings_of_stages(
        "--preset", "gut-small", "--output-dir", str(tmp_path), "--lr", DEFAULT_LR, "--no-freeze-base",
        "--pretrain-flags=--epochs 1000", "--train-flags=--batch-size 8",
    )  # fmt: skip
    assert first.preset == second.preset == "gut-small"
    assert first.loop.lr == second.loop.lr == 1e-4
    assert (first.loop.epochs, second.loop.epochs) == (1000, SMALL.train["epochs"])
    assert (first.loop.batch_size, second.loop.batch_size) == (SMALL.pretrain["batch_size"], 8)
    assert (first.loop.max_updates, second.loss.ensemble) == (SMALL.pretrain["max_updates"], SMALL.train["ensemble"])
    assert not second.freeze_base
    first, second = settings_of_stages(
        "--preset=gut-small", "--epochs=3", "--batch_size=4", "--output-dir", str(tmp_path)
    )
    assert first.loop.epochs == second.loop.epochs == 3
    assert first.loop.batch_size == second.loop.batch_size == 4
    assert second.freeze_base


def test_trials_and_the_command_that_follows_stage_1_have_it_too(tmp_path):
    sweep, others = parse_known(SweepConfig, ["--stage", "pretrain", "--lr", "1e-4", "1e-2", "--preset", "gut-small"])
    config = parse(PretrainConfig, [*others, "--output-dir", str(tmp_path)])
    assert sweep.lr == (1e-4, 1e-2)
    assert config.loop.epochs == SMALL.pretrain["epochs"]
    _, script, *arguments = shlex.split(train_command(config))
    assert script == "jobs/train.py"
    assert parse(TrainConfig, arguments).loop.epochs == SMALL.train["epochs"]


def test_a_run_keeps_settings_and_name_and_is_resumed_and_repeated_by_the_settings(
    synthetic_folder, tmp_path, monkeypatch
):
    flags = [*sources(synthetic_folder), "--output-dir", str(tmp_path), "--rarefy-depth", "200"]
    config = parse(PretrainConfig, [*flags, "--preset", "gut-small"])
    record = json.loads(json.dumps(make_plan(config).describe(config)))
    assert record["config"]["preset"] == "gut-small"
    assert record["config"]["loop"]["lr"] == SMALL.settings("pretrain")["lr"]
    repeated = parse(PretrainConfig, flags_of(record))
    assert repeated == replace(config, preset=None)
    check_resumable(record, repeated, tmp_path)
    monkeypatch.setitem(PRESETS, "gut-small", replace(SMALL, pretrain={**SMALL.pretrain, "lr": 7e-3}))
    assert parse(PretrainConfig, flags_of(record)) == repeated, "whatever becomes of the preset"
    with pytest.raises(ValueError, match="was started with other values of --lr;"):
        check_resumable(record, parse(PretrainConfig, [*flags, "--preset", "gut-small"]), tmp_path)


def test_classes_have_settings_of_their_own(tmp_path):
    lr, epochs = SMALL.classifier["lr"], SMALL.classifier["epochs"]
    assert (lr, epochs) != (SMALL.train["lr"], SMALL.train["epochs"])
    flags = ["--preset", "gut-small", "--pretrained", str(tmp_path), "--target", "site"]
    config = parse(TrainConfig, [*flags, "--classifier"])
    assert (config.loop.lr, config.loop.epochs) == (lr, epochs)
    assert config.loop.batch_size == SMALL.train["batch_size"], "where they have none, those of a number"
    assert parse(TrainConfig, to_arguments(config)) == config
    given = parse(TrainConfig, [*flags, "--classifier", "--epochs", "77"])
    assert (given.loop.lr, given.loop.epochs) == (lr, 77)
    assert parse(TrainConfig, to_arguments(given)) == given
    first, second = settings_of_stages(
        "--preset", "gut-small", "--output-dir", str(tmp_path), "--target", "site", "--classifier"
    )
    assert (second.loop.lr, second.loop.epochs) == (lr, epochs)
    assert first.loop.lr == SMALL.pretrain["lr"]


@pytest.mark.parametrize("script", ["pretrain.py", "train.py", "pipeline.py", "evaluate.py", "tune.py"])
def test_a_preset_that_there_is_not(script, run_here):
    stage = ["--stage", "train"] if script == "tune.py" else []
    done = run_here(script, *stage, "--preset", "gut-smal")
    assert done.returncode == 1
    assert done.stderr == f"error: --preset gut-smal: no such preset; there is {', '.join(PRESETS)}\n"


def test_a_preset_is_for_the_whole_pipeline(tmp_path):
    with pytest.raises(ValueError, match="--preset is for the whole pipeline"):
        settings_of_stages("--output-dir", str(tmp_path), "--pretrain-flags=--preset gut-small")


@pytest.mark.parametrize("script", ["pretrain.py", "train.py", "pipeline.py", "evaluate.py"])
def test_help_lists_the_presets(script, run_here):
    shown = run_here(script, "--help").stdout
    assert presets.listed() in shown
    assert "--preset" in shown
