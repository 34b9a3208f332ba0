"""UniFrac and Faith's PD without a tree: the files that predict writes, as scikit-bio and QIIME 2 read them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import biom
import numpy as np
import pytest
import torch
from skbio import DistanceMatrix
from skbio.metadata import SampleMetadata
from skbio.stats.ordination import pcoa

from aam.config import TargetConfig
from aam.data.batches import BatchPlan, EpochBatches
from aam.data.dataset import PreparedDataset
from aam.data.draw import FIXED_DRAW
from aam.predict.distances import check_ids, distance_blocks, distance_matrix, write_distances
from aam.predict.samples import SampleOutputs
from aam.training import checkpoint
from aam.training.step import predict_unifrac
from runs import DEEP, data_config, fit_here, pretrain_config, train_config
from tensors import random_sequences

METRICS = ("unweighted", "weighted", "faith_pd")


@pytest.fixture(scope="module")
def runs(synthetic_folder, tmp_path_factory):
    """Run folders: stage 1 that learned all metrics, stage 2 on it with a frozen base and with a fine-tuned one."""
    folder = tmp_path_factory.mktemp("distances")
    first = pretrain_config(synthetic_folder, folder / "first", epochs=2)
    configs = {"first": replace(first, loss=replace(first.loss, unifrac_metric=METRICS))}
    for name in ("frozen", "tuned"):
        configs[name] = train_config(
            synthetic_folder,
            folder / name,
            pretrained=folder / "first",
            freeze_base=name == "frozen",
            data=data_config(synthetic_folder, tree=None),
            target=TargetConfig(target="gradient"),
            epochs=1,
        )
    for config in configs.values():
        config.output_dir.mkdir()
        record = json.loads(json.dumps(fit_here(config).describe(config)))
        (config.output_dir / "run.json").write_text(json.dumps(record))
    return {name: config.output_dir for name, config in configs.items()}


def outputs(presence: np.ndarray) -> SampleOutputs:
    nothing, rng = np.zeros((len(presence), 0), np.float32), np.random.default_rng(1)
    asvs = [rng.permutation(50)[: rng.integers(1, 30)] for _ in presence]
    abundance = [rng.dirichlet(np.ones(len(own))) for own in asvs]
    return SampleOutputs(
        target=nothing,
        features=nothing,
        presence=presence,
        share=presence[:, ::-1].copy(),
        faith_pd=presence.sum(1),
        richness=np.array([len(own) for own in asvs]),
        asvs=np.concatenate(asvs),
        abundance=np.concatenate(abundance).astype(np.float32),
        # Of an ASV in several batches: the same but for rounding.
        tip_lengths=(rng.random(50)[of := np.concatenate(asvs)] + 1e-6 * rng.random(len(of))).astype(np.float32),
    )


@pytest.mark.parametrize("clades", [2, 33, 512])
def test_blocks_are_the_whole_matrix_to_the_last_bit(clades):
    rng = np.random.default_rng(0)
    of, lengths = outputs(rng.random((23, clades), np.float32) ** 4), rng.random(clades, np.float32)
    for metric in ("unweighted", "weighted"):
        whole = distance_matrix(of, lengths, metric)
        assert (whole == whole.T).all()
        assert (np.diag(whole) == 0).all()
        for rows in (1, 2, 7, 23):
            blocks = list(distance_blocks(of, lengths, metric, rows=rows))
            assert max(map(len, blocks)) == rows
            assert (np.concatenate(blocks) == whole).all()


def test_a_distance_of_one_and_any_id_are_written_and_read(tmp_path):
    ids, matrix = ["10317.000001", "007", "a sample", "Ä"], np.array([[0, 1, 0.5, 1e-7], [1, 0, 0.25, 0.999999]])
    whole = np.vstack([matrix, [[0.5, 0.25, 0, 0.123456], [1e-7, 0.999999, 0.123456, 0]]])
    write_distances(tmp_path / "d.tsv", ids, iter([whole[:1], whole[1:]]))
    found = DistanceMatrix.read(str(tmp_path / "d.tsv"))
    assert list(found.ids) == ids
    np.testing.assert_allclose(found.data, whole, atol=5e-7)
    assert (tmp_path / "d.tsv").read_text().startswith("\t10317.000001\t007\ta sample\tÄ\n")


@pytest.mark.parametrize("sample", ["#1", " a", "a\t1"])
def test_ids_that_the_text_cannot_hold_are_refused(sample):
    with pytest.raises(ValueError, match=re.escape(f"sample {sample!r} cannot stand in a distance matrix")):
        check_ids(["1", sample])


@pytest.mark.parametrize("metric", ["unweighted", "weighted"])
@pytest.mark.parametrize("stage", ["first", "frozen"])
def test_the_file_has_what_the_profiles_tell_and_scikit_bio_takes_it(run_here, runs, tmp_path, stage, metric):
    path = tmp_path / "d.tsv"
    done = run_here(
        "predict.py", "--checkpoint", runs[stage], "--distances", path, "--distance-metric", metric, "--batch-size", "7"
    )
    assert done.returncode == 0, done.stderr
    name = f"{metric} UniFrac of all pairs of 40 samples, without a tree: {path}"
    assert name in done.stdout
    found = DistanceMatrix.read(str(path))
    loaded = checkpoint.load(runs["first"] / "best")
    record = json.loads((runs["first"] / "run.json").read_text())
    dataset = fit_dataset(record)
    plan = BatchPlan(dataset=dataset, sample_ids=found.ids, contract=loaded.spec.contract, batch_size=40)
    with torch.no_grad():
        batch = EpochBatches(replace(plan, unifrac=(metric,)), FIXED_DRAW)[0]
        expected = predict_unifrac(metric, loaded.model(batch), batch)
    np.testing.assert_allclose(found.data, expected, atol=2e-6)
    axes = pcoa(found, dimensions=5, warn_neg_eigval=False)
    assert np.asarray(axes.samples).shape == (40, 5)
    assert not list(tmp_path.glob("*.skipped.tsv")), "none was skipped"


def fit_dataset(record) -> PreparedDataset:
    return PreparedDataset(Path(record["dataset"]["folder"]))


def test_faith_pd_is_metadata_that_qiime_2_reads(run_here, runs, synthetic_folder, tmp_path):
    path = tmp_path / "pd.tsv"
    done = run_here("predict.py", "--checkpoint", runs["frozen"], "--faith-pd", path, "--part", "val")
    assert done.returncode == 0, done.stderr
    assert path.read_text().startswith("sample-id\tfaith_pd\n")
    metadata = SampleMetadata.load(str(path))
    column = metadata.get_column("faith_pd").to_series()
    ids = json.loads((runs["frozen"] / "run.json").read_text())["split"]["val"]
    assert list(column.index) == ids
    assert column.dtype == np.float64
    loaded = checkpoint.load(runs["first"] / "best")
    dataset = fit_dataset(json.loads((runs["first"] / "run.json").read_text()))
    plan = BatchPlan(dataset=dataset, sample_ids=ids, contract=loaded.spec.contract, batch_size=len(ids))
    with torch.no_grad():
        expected = loaded.model(EpochBatches(plan, FIXED_DRAW)[0]).faith_pd
    np.testing.assert_allclose(column, expected, rtol=1e-4)


def test_samples_that_are_too_shallow_are_named_beside_the_matrix(run_here, runs, synthetic_folder, tmp_path):
    table = biom.load_table(str(synthetic_folder / "table.biom"))
    shallow = table.ids()[0]
    table.transform(lambda values, name, _: values.clip(max=1) if name == shallow else values, axis="sample")
    with biom.util.biom_open(str(tmp_path / "t.biom"), "w") as file:
        table.to_hdf5(file, "tests")
    flags = ["--checkpoint", runs["first"], "--table", tmp_path / "t.biom"]
    done = run_here("predict.py", *flags, "--distances", tmp_path / "d.tsv", "--faith-pd", tmp_path / "pd.tsv")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "d.skipped.tsv").read_text() == f"SampleID\treason\n{shallow}\tfewer than 200 reads\n"
    assert "1 of 40 samples could not be predicted" in done.stdout
    assert shallow not in DistanceMatrix.read(str(tmp_path / "d.tsv")).ids
    assert {path.name for path in tmp_path.iterdir()} == {"t.biom", "d.tsv", "pd.tsv", "d.skipped.tsv"}


@pytest.mark.parametrize(
    ("stage", "flags", "message"),
    [
        ("tuned", ["--distances"], "the encoder learned the target alone, and its clades do not give UniFrac"),
        ("tuned", ["--faith-pd"], "give a stage 1 run, or train stage 2 on one with --freeze-base"),
        ("one", ["--distance-metric", "weighted", "--distances"], "--unifrac-metric unweighted weighted"),
        ("one", ["--faith-pd"], "as stage 1 learned unweighted alone; pretrain with --unifrac-metric unweighted faith"),
        ("none", ["--distances"], "as stage 1 was trained without UniFrac (--base-weight 0)"),
    ],
)
def test_what_the_clades_do_not_tell_is_refused_in_a_line(
    run_here, runs, synthetic_folder, tmp_path, stage, flags, message
):
    run = runs.get(stage, tmp_path / "run")
    if stage not in runs:
        config = pretrain_config(synthetic_folder, run, epochs=1, model=DEEP)
        fit_here(replace(config, loss=replace(config.loss, base_weight=float(stage == "one"))))
    table = ["--table", synthetic_folder / "table.biom"]
    done = run_here("predict.py", "--checkpoint", run, *table, *flags, tmp_path / "out")
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", ["k-mers", "nucleotides"])
def test_sequences_longer_than_those_of_training_are_read_by_k_mers_alone(
    run_here, runs, synthetic_folder, tmp_path, model
):
    run = runs["first"]
    if model == "nucleotides":
        run = tmp_path / "run"
        fit_here(pretrain_config(synthetic_folder, run, epochs=1, model=DEEP))
    table = biom.load_table(str(synthetic_folder / "table.biom"))
    own = list(map(str, table.ids(axis="observation")))
    longer = dict(zip(own, random_sequences(len(own), shortest=240, longest=250), strict=True))
    with biom.util.biom_open(str(tmp_path / "t.biom"), "w") as file:
        table.update_ids(longer, axis="observation", inplace=False).to_hdf5(file, "tests")
    flags = ["--table", tmp_path / "t.biom", "--distances", tmp_path / "d.tsv"]
    done = run_here("predict.py", "--checkpoint", run, *flags)
    if model == "nucleotides":
        assert done.returncode == 1
        assert "250 nt, more than 150" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert DistanceMatrix.read(str(tmp_path / "d.tsv")).shape == (40, 40)
