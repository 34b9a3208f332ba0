"""Runs kept on object storage: a real S3 endpoint on this machine."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pyarrow import fs

from aam.distributed.checkpoints import find_best, run_record
from aam.distributed.storage import (
    Uploader,
    check_writable,
    download,
    exists,
    fetch,
    join,
    name_of,
    read_text,
    write_text,
)
from conftest import ROOT
from runs import history


@pytest.fixture(scope="module")
def bucket():
    """URI of an empty bucket."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while True:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        assert time.monotonic() < end, "no S3 endpoint"
        time.sleep(0.2)
    # The workers of a Ray that was started earlier have no environment of ours: the keys stand in the URI.
    query = f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
    filesystem, _ = fs.FileSystem.from_uri(f"s3://key:secret@aam?{query}&allow_bucket_creation=true")
    filesystem.create_dir("aam")
    yield f"s3://key:secret@aam/runs?{query}"
    server.terminate()
    server.wait()


def test_locations_are_joined_before_the_query():
    assert join("s3://b/runs?region=x", "a", "b") == "s3://b/runs/a/b?region=x"
    assert join("s3://b/runs/", "a") == "s3://b/runs/a"
    assert join("/shared/runs", "a") == "/shared/runs/a"
    assert name_of("s3://b/runs/stage1/?region=x") == "stage1"
    assert name_of("/shared/stage1") == "stage1"


def test_a_storage_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--storage-path .*cannot be written to"):
        check_writable(str(tmp_path / "file" / "below"))
    with pytest.raises(ValueError, match=r"nosuch://.*not a location"):
        check_writable("nosuch://bucket/runs")


@pytest.mark.slow
def test_files_on_s3(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("AAM_CACHE", str(tmp_path / "cache"))
    place = join(bucket, "files")
    assert not exists(place)
    write_text(join(place, "a", "one.txt"), "1")
    assert read_text(join(place, "a", "one.txt")) == "1"
    own = tmp_path / "own"
    own.mkdir()
    (own / "log").write_text("x")
    uploader = Uploader(own, place)
    uploader()
    (own / "log").write_text("xy")
    uploader()
    download(place, tmp_path / "back", wanted=lambda path: path != "log")
    assert not (tmp_path / "back" / "log").exists()
    first = fetch(place)
    assert (first / "log").read_text() == "xy"
    assert (first / "a" / "one.txt").read_text() == "1"
    assert fetch(place) == first
    write_text(join(place, "a", "two.txt"), "22")
    assert (fetch(place) / "a" / "two.txt").read_text() == "22"


@pytest.mark.slow
def test_both_stages_from_s3(run_job, run_here, bucket, synthetic_folder, tmp_path):
    """Stage 1 is interrupted and resumed from S3 alone; stage 2 takes its best checkpoint from there."""
    table = ["--table", synthetic_folder / "table.biom", "--metadata", synthetic_folder / "metadata.tsv"]
    tiny = ["--embedding-dim", "16", "--attention-heads", "2", "--clades", "32", "--kmer", "3"]
    quick = ["--batch-size", "8", "--lr", "3e-3", "--rarefy-depth", "200", "--no-report", "--storage-path", bucket]
    stage_1 = ["pretrain.py", *table, "--tree", synthetic_folder / "tree.nwk", *tiny, *quick, "--epochs", "15",
               "--output-dir", tmp_path / "stage1"]  # fmt: skip
    home = join(bucket, "stage1")
    script = [sys.executable, str(ROOT / "jobs" / "pretrain.py"), *map(str, stage_1[1:])]
    driver = subprocess.Popen(script, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while driver.poll() is None and not (exists(join(home, "metrics.jsonl")) and len(lines(home)) >= 3):
        time.sleep(0.1)
    driver.kill()
    driver.wait()
    assert 3 <= len(lines(home)) < 15, "the run was over before it could be stopped"
    shutil.rmtree(tmp_path / "stage1")
    done = run_job(*stage_1, "--resume")
    assert done.returncode == 0, done.stderr
    rows = history(tmp_path / "stage1")
    assert [row["epoch"] for row in rows] == list(range(1, 16))
    assert [json.loads(line) for line in lines(home)] == [json.loads(line) for line in
            (tmp_path / "stage1" / "metrics.jsonl").read_text().splitlines()]  # fmt: skip
    assert list((tmp_path / "stage1" / "tensorboard").glob("events*"))
    best = find_best(home)
    assert json.loads((best / "config.json").read_text())["metrics"]["val/total_loss"] == min(
        row["val/total_loss"] for row in rows
    )
    assert (best / "model.safetensors").read_bytes() == (
        tmp_path / "stage1" / "best" / "model.safetensors"
    ).read_bytes()
    done = run_here("train.py", *table, "--target", "gradient", "--clades", "32", *quick, "--epochs", "2",
                    "--pretrained", home, "--freeze-base", "--output-dir", tmp_path / "stage2")  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = run_record(join(bucket, "stage2"))
    assert record is not None
    assert record["config"]["pretrained"] == home
    done = run_here("predict.py", "--checkpoint", join(bucket, "stage2"), "--table", synthetic_folder / "table.biom",
                    "--output", tmp_path / "predictions.tsv")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "predictions.tsv").exists()


def lines(home: str) -> list[str]:
    return read_text(join(home, "metrics.jsonl")).splitlines()


@pytest.mark.parametrize("root", ["s3", "path"])
def test_the_record_of_a_run_is_found_from_its_checkpoints_and_its_sweep(request, tmp_path, root):
    place = join(request.getfixturevalue("bucket"), "records") if root == "s3" else str(tmp_path / "records")
    write_text(join(place, "sweep", "sweep.json"), json.dumps({"best": "00001_lr=0.1"}))
    write_text(join(place, "sweep", "trials", "00001_lr=0.1", "run.json"), json.dumps({"stage": "of the sweep"}))
    write_text(join(place, "run", "run.json"), json.dumps({"stage": "of the run"}))
    write_text(join(place, "run", "ray", "train", "epoch_0001", "config.json"), "{}")
    assert run_record(join(place, "run")) == {"stage": "of the run"}
    assert run_record(join(place, "run", "ray", "train", "epoch_0001")) == {"stage": "of the run"}
    assert run_record(join(place, "sweep")) == {"stage": "of the sweep"}
    write_text(join(place, "alone", "config.json"), "{}")
    assert run_record(join(place, "alone")) is None
