"""The jobs as a user runs them: real scripts, a real Ray, files in and files out."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import biom
import pandas as pd
import pytest

from aam.cli import parse
from aam.config import TrainConfig
from conftest import ROOT
from runs import fit_here, history

TINY = ["--embedding-dim", "16", "--attention-heads", "2", "--clades", "32", "--kmer", "3"]
QUICK = ["--batch-size", "8", "--epochs", "2", "--lr", "3e-3", "--rarefy-depth", "200", "--no-report"]


def sources(folder):
    return [
        "--table",
        folder / "table.biom",
        "--metadata",
        folder / "metadata.tsv",
        "--group-column",
        "subject",
    ]


@pytest.fixture(scope="session")
def stage_1(readme_jobs):
    """A stage 1 run folder."""
    folder, ended = readme_jobs
    done = ended["jobs/pretrain.py"]
    assert done.returncode == 0, done.stderr
    assert "best epoch" in done.stdout
    run = folder / "runs" / "stage1"
    [following] = re.findall(r"^  next +python jobs/train.py (.*)$", done.stdout, re.MULTILINE)
    stage_2 = parse(TrainConfig, shlex.split(following))
    assert stage_2.pretrained == str(run)
    assert stage_2.data.table == folder / "table.biom"
    assert stage_2.data.group_column == "subject"
    return run


def test_stage_1_leaves_a_whole_run_folder(stage_1):
    for name in ("best", "last"):
        assert {p.name for p in (stage_1 / name).iterdir()} >= {
            "model.safetensors",
            "config.json",
            "training_state.pt",
        }
    rows = [json.loads(line) for line in (stage_1 / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert {"train/base_loss", "val/nuc_loss", "val/unifrac_r2", "val/nuc_accuracy", "lr"} <= rows[0].keys()
    assert list((stage_1 / "tensorboard").glob("events*"))
    assert (stage_1 / "figures" / "unifrac.png").exists()
    record = json.loads((stage_1 / "run.json").read_text())
    assert record["config"]["loop"]["epochs"] == 2
    train, val = ({i.split(".")[0] for i in record["split"][part]} for part in ("train", "val"))
    assert not train & val, "a subject is on both sides"


REGRESSION, CLASSIFICATION = ["--target", "gradient"], ["--target", "site", "--classifier"]
FROZEN, TUNED = "--freeze-base", "--no-freeze-base"
TWO_WORKERS = ["--num-workers", "2", "--cpus-per-worker", "1", "--max-failures", "1", "--use-expandable-segments"]


def stage_2(folder, stage_1, output_dir, *more):
    settings = ["--head-layers", "1", "--batch-size", "8", "--epochs", "2", "--lr", "3e-3", "--no-report"]
    return [*sources(folder), "--pretrained", stage_1, *settings, "--output-dir", output_dir, *more]


def test_stage_2_and_prediction(ray_cluster, run_here, stage_1, synthetic_folder, tmp_path):
    """By way of Ray, with two workers."""
    flags = [*CLASSIFICATION, TUNED, *TWO_WORKERS]
    done = run_here("train.py", *stage_2(synthetic_folder, stage_1, tmp_path / "run", *flags))
    assert done.returncode == 0, done.stderr
    assert "stage 2: best epoch" in done.stdout
    assert json.loads((tmp_path / "run" / "run.json").read_text())["notes"] == []
    check_predictions(run_here, synthetic_folder, tmp_path)


@pytest.mark.parametrize(
    "flags",
    [[*REGRESSION, TUNED], [*REGRESSION, FROZEN], [*CLASSIFICATION, FROZEN]],
    ids=["regression", "regression-frozen", "classification-frozen"],
)
def test_stage_2_without_ray_and_prediction(run_here, stage_1, synthetic_folder, tmp_path, flags):
    fit_here(parse(TrainConfig, [*map(str, stage_2(synthetic_folder, stage_1, tmp_path / "run", *flags))]))
    check_predictions(run_here, synthetic_folder, tmp_path)


def check_predictions(run_here, synthetic_folder, tmp_path):
    """Predictions of the validation samples are those of the training, through files, and in the target's units."""
    # A table of the validation samples alone, in another order, without the ASVs that they lack.
    validation = pd.read_csv(tmp_path / "run" / "validation_predictions.tsv", sep="\t", dtype={0: str}).set_index(
        "SampleID"
    )
    table = biom.load_table(str(synthetic_folder / "table.biom"))
    new = table.filter(list(validation.index), inplace=False).sort_order(list(validation.index)[::-1])
    new.remove_empty(axis="observation")
    with biom.util.biom_open(str(tmp_path / "new.biom"), "w") as file:
        new.to_hdf5(file, "tests")
    done = run_here(
        "predict.py", "--checkpoint", tmp_path / "run", "--table", tmp_path / "new.biom",
        "--output", tmp_path / "predictions.tsv",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    predictions = pd.read_csv(tmp_path / "predictions.tsv", sep="\t", dtype={0: str}).set_index("SampleID")
    assert list(predictions.columns) == ["prediction"]
    assert set(predictions.index) == set(validation.index)
    expected = validation.loc[predictions.index]
    if "gut" not in validation.columns:
        difference = (predictions["prediction"] - expected["prediction"]).abs().max()
        assert difference < 1e-5 * expected["prediction"].abs().max()
        assert expected["true"].between(-50, 150).all(), "not in the target's own units"
        return
    assert (predictions["prediction"] == expected["prediction"]).all()
    probabilities = pd.read_csv(tmp_path / "class_probabilities.tsv", sep="\t", dtype={0: str}).set_index("SampleID")
    assert list(probabilities.columns) == ["gut", "skin", "soil"]
    assert probabilities.sum(axis=1).sub(1).abs().max() < 1e-9
    assert (probabilities - expected[probabilities.columns]).abs().max().max() < 1e-5
    assert (probabilities.idxmax(axis=1) == predictions["prediction"]).all()


def test_a_run_that_was_interrupted_goes_on(ray_cluster, run_here, synthetic_folder, tmp_path):
    """Ctrl-C; the same command and --resume finish it, as if nothing had happened, and as if there were no Ray."""

    def command(name, *more):
        settings = [*sources(synthetic_folder), "--target", "gradient", *TINY, *QUICK, "--epochs", "20"]
        one_thread = ["--cpus-per-worker", "1"]  # as many as the tests have: sums come out the same to the bit
        return [*settings, *one_thread, "--output-dir", tmp_path / name, *more]

    fit_here(parse(TrainConfig, [*map(str, command("straight"))]))
    log = tmp_path / "stopped" / "metrics.jsonl"

    script = [sys.executable, str(ROOT / "jobs" / "train.py"), *map(str, command("stopped"))]
    driver = subprocess.Popen(script, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while driver.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= 3):
        time.sleep(0.05)
    driver.send_signal(signal.SIGINT)
    _, said = driver.communicate(timeout=120)
    assert len(log.read_text().splitlines()) < 20, "the run was over before it could be stopped"
    assert driver.returncode != 0, "a stopped run passes for a finished one"
    assert "of 20; go on with the same command and --resume" in said

    again = run_here("train.py", *command("stopped"))
    assert again.returncode == 1
    assert "--resume" in again.stderr
    other = run_here("train.py", *command("stopped", "--resume", "--lr", "0.5"))
    assert other.returncode == 1
    assert "--lr" in other.stderr
    finished = run_here("train.py", *command("stopped", "--resume"))
    assert finished.returncode == 0, finished.stderr
    assert history(tmp_path / "stopped") == history(tmp_path / "straight")


def test_predict_lists_what_it_could_not_predict(run_here, synthetic_folder, tmp_path):
    flags = [*sources(synthetic_folder), "--target", "gradient", *TINY, *QUICK, "--rarefy-depth", "3000"]
    plan = fit_here(parse(TrainConfig, [*map(str, flags), "--output-dir", str(tmp_path / "run")]))
    assert any("3000" in note for note in plan.notes)
    done = run_here("predict.py", "--checkpoint", tmp_path / "run" / "best", "--table",
                   synthetic_folder / "table.biom", "--output", tmp_path / "p.tsv")  # fmt: skip
    assert done.returncode == 0, done.stderr
    skipped = pd.read_csv(tmp_path / "p.skipped.tsv", sep="\t", dtype=str)
    predicted = pd.read_csv(tmp_path / "p.tsv", sep="\t", dtype={0: str})
    table = biom.load_table(str(synthetic_folder / "table.biom"))
    depths = pd.Series(table.sum(axis="sample"), index=table.ids())
    assert set(skipped["SampleID"]) == set(depths.index[depths < 3000])
    assert len(predicted) + len(skipped) == table.shape[1]
    assert skipped["reason"].str.contains("fewer than 3000").all()


@pytest.fixture
def broken(synthetic_folder, tmp_path):
    """A copy of the dataset to break."""
    shutil.copytree(synthetic_folder, tmp_path / "data")
    return tmp_path / "data"


def rewrite_ids(path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


def test_user_faults_are_one_line_without_a_traceback(run_job, run_here, broken, tmp_path):
    """Every fault names its culprit and the way out; the exit code is 1. One data set, broken in turn."""
    table = biom.load_table(str(broken / "table.biom"))
    first_asv = str(table.ids(axis="observation")[0])

    def write(name, changed):
        with biom.util.biom_open(str(broken / name), "w") as file:
            changed.to_hdf5(file, "tests")
        return broken / name

    letter = table.update_ids({first_asv: "X" + first_asv[1:]}, axis="observation", strict=False, inplace=False)
    hashed = table.update_ids({first_asv: "asv-1"}, axis="observation", strict=False, inplace=False)
    nothing = biom.Table([], [], [])
    lines = (broken / "metadata.tsv").read_text().splitlines(keepends=True)
    (broken / "short.tsv").write_text("".join(lines[:-1]))
    missing_id = lines[-1].split("\t")[0]
    (broken / "other.nwk").write_text("((ACGT:1,ACGA:1):1,TTTT:1);")
    ids = (broken / "ids.txt", broken / "val.txt")
    ids[0].write_text("no-such-sample\n")
    ids[1].write_text(lines[1].split("\t")[0] + "\n")
    good = {"--table": broken / "table.biom", "--metadata": broken / "metadata.tsv", "--target": "gradient"}
    tree = {"--tree": broken / "tree.nwk"}
    cases = [
        ("train.py", {"--metadata": broken / "short.tsv"}, [missing_id, "short.tsv", "--missing-samples ignore"]),
        ("train.py", {"--target": "site"}, ["'site'", "not numeric", "--classifier"]),
        ("train.py", {"--target": "gradiant"}, ["'gradiant'", "did you mean 'gradient'"]),
        ("train.py", {"--train-ids": ids[0], "--val-ids": ids[1]}, ["no-such-sample", "ids.txt"]),
        ("train.py", {"--pretrained": tmp_path / "none"}, ["none", "no such run folder"]),
        ("pretrain.py", {"--tree": broken / "other.nwk"}, ["other.nwk", "lacks", "--max-missing-from-tree"]),
        ("pretrain.py", {"--tree": broken / "table.biom"}, ["table.biom"]),
        ("pretrain.py", {"--table": broken / "tree.nwk", **tree}, ["tree.nwk"]),
        ("pretrain.py", {"--table": write("letter.biom", letter), **tree}, ["'X'", "position 1"]),
        ("pretrain.py", {"--table": write("hashed.biom", hashed), **tree}, ["asv-1", "--sequences"]),
        ("pretrain.py", {"--table": write("empty.biom", nothing), **tree}, ["empty.biom"]),
        ("predict.py", {"--checkpoint": broken, "--output": tmp_path / "p.tsv"}, ["neither a checkpoint"]),
    ]  # fmt: skip
    for number, (script, changed, words) in enumerate(cases):
        flags = {**good, **changed}
        if script != "train.py":
            flags.pop("--target")
            flags.pop("--metadata")
        if script != "predict.py":
            flags["--output-dir"] = tmp_path / "run"
        run = run_here if number else run_job  # the first as a user starts it
        done = run(script, *[part for pair in flags.items() for part in pair])
        case = f"{script} {changed}: {done.stderr}"
        assert done.returncode == 1, case
        assert "Traceback" not in done.stderr, case
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, case
        for word in words:
            assert word in errors[0], case


def test_flags_that_do_not_go_together_are_explained_by_the_parser(run_here, synthetic_folder, tmp_path):
    table = ["--table", synthetic_folder / "table.biom", "--output-dir", tmp_path / "run"]
    cases = [
        ("pretrain.py", table, "--tree is needed for the UniFrac loss"),
        ("train.py", [*table, "--metadata", synthetic_folder / "metadata.tsv"], "--target is needed"),
        ("train.py", [*table[2:], "--freeze-base"], "--freeze-base needs --pretrained"),
        ("train.py", [*table[2:], "--batch-size", "4", "--num-workers", "4"], "--batch-size 4"),
        ("train.py", [*table[2:], "--embeding-dim", "4"], "--embedding-dim"),
    ]
    for script, arguments, words in cases:
        done = run_here(script, *arguments)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert words in " ".join(done.stderr.replace("│", " ").split())
        assert not (tmp_path / "run").exists()
