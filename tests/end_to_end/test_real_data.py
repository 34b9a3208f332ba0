"""The jobs on real studies: those of the user under data/, or those that AAM_TEST_DATA names."""

from __future__ import annotations

import hashlib
import json
import zipfile

import biom
import pytest

from aam.cli import parse
from aam.config import TrainConfig
from conftest import ROOT
from runs import fit_here

TINY = ["--embedding-dim", "16", "--attention-heads", "2", "--clades", "32", "--epochs", "1", "--lr", "1e-3"]
SMALL = [*TINY, "--no-report", "--batch-size", "32", "--token-limit", "32"]
OWN_TABLE = ROOT / "data" / "fall_train_only_all_outdoor.biom"
OWN_TREE = ROOT / "data" / "all-outdoors_sepp_tree.nwk"


def split(folder):
    return [
        "--train-ids",
        folder / "train.txt",
        "--val-ids",
        folder / "val.txt",
        "--test-ids",
        folder / "test.txt",
    ]


def last_metrics(run):
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def test_stage_1_on_a_study(ray_cluster, run_here, tmp_path, request):
    """By way of Ray; on the user's own table and tree where they are, else on ibd."""
    if OWN_TABLE.exists() and OWN_TREE.exists():
        sources = ["--table", OWN_TABLE, "--tree", OWN_TREE]
    else:
        ibd = request.getfixturevalue("real_data") / "ibd"
        sources = ["--table", ibd / "table.biom", "--tree", ibd / "tree.nwk", *split(ibd)]
    preset = ["--preset", "gut-small", "--max-updates", "150", "--no-report"]
    done = run_here("pretrain.py", *sources, *preset, "--output-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert last_metrics(tmp_path / "run")["val/unifrac_r2"] > 0.8


@pytest.mark.parametrize(
    ("study", "target"),
    [
        ("ibd", ["--target", "surgery_and_ibd", "--classifier"]),
        ("ecam", ["--target", "day_of_life"]),
        ("pmi", ["--target", "add_0c", "--target-transform", "log1p-zscore"]),
    ],
)
def test_stage_2_on_studies(real_data, tmp_path, study, target):
    folder = real_data / study
    flags = [
        "--table", folder / "table.biom", "--tree", folder / "tree.nwk", "--metadata", folder / "metadata.tsv",
        *target, *split(folder), *SMALL, "--output-dir", tmp_path / "run",
    ]  # fmt: skip
    fit_here(parse(TrainConfig, [*map(str, flags)]))
    metrics = last_metrics(tmp_path / "run")
    assert ("val/macro_f1" if study == "ibd" else "val/mae") in metrics
    ids = (folder / "val.txt").read_text().split()
    predicted = (tmp_path / "run" / "validation_predictions.tsv").read_text().splitlines()[1:]
    assert {line.split("\t")[0] for line in predicted} == set(ids)


def artifact(path, kind: str, member: str, content: bytes):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("0b8b2d3a-uuid/metadata.yaml", f"uuid: x\ntype: {kind}\nformat: x\n")
        file.writestr(f"0b8b2d3a-uuid/data/{member}", content)
    return path


def test_artifacts_and_hashed_ids(real_data, tmp_path):
    """A table of hashes, its sequences and its tree as QIIME 2 artifacts."""
    folder = real_data / "moving-pictures"
    table = biom.load_table(str(folder / "table.biom"))
    sequences = list(map(str, table.ids(axis="observation")))
    code = {s: hashlib.md5(s.encode()).hexdigest() for s in sequences}
    table.update_ids(code, axis="observation", inplace=True)
    with biom.util.biom_open(str(tmp_path / "t.biom"), "w") as file:
        table.to_hdf5(file, "tests")
    fasta = "".join(f">{code[s]}\n{s}\n" for s in sequences).encode()
    flags = [
        "--table", artifact(tmp_path / "table.qza", "FeatureTable[Frequency]", "feature-table.biom",
                            (tmp_path / "t.biom").read_bytes()),
        "--sequences", artifact(tmp_path / "seqs.qza", "FeatureData[Sequence]", "dna-sequences.fasta", fasta),
        "--tree", artifact(tmp_path / "tree.qza", "Phylogeny[Rooted]", "tree.nwk",
                           (folder / "tree.nwk").read_bytes()),
        "--metadata", folder / "metadata.tsv", "--target", "BodySite", "--classifier", "--base-weight", "0.5",
        *TINY, "--batch-size", "8", "--output-dir", tmp_path / "run",
    ]  # fmt: skip
    plan = fit_here(parse(TrainConfig, [*map(str, flags)]))
    dropped = next(note for note in plan.notes if "--rarefy-depth 1000" in note)
    assert "1 sample" in dropped
    metrics = last_metrics(tmp_path / "run")
    assert {"val/auroc", "val/unifrac_mae"} & metrics.keys()
