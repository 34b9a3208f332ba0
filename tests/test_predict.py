"""Which samples are predicted, of a table or of a part of the run that trained the model; and what is written."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import biom
import numpy as np
import pandas as pd
import pytest
import torch

from aam.config import DataConfig, LoopConfig, PredictConfig, TargetConfig, TrainConfig
from aam.data.batches import BatchPlan, EpochBatches
from aam.data.draw import FIXED_DRAW
from aam.plan import make_plan
from aam.predict import check_outputs, predict, write_result
from aam.predict.samples import predict_samples
from aam.predict.table import what_is_new
from aam.training import checkpoint
from aam.training.targets import Target
from runs import TINY, data_config, fit_here, pretrain_config, train_config
from tensors import random_sequences


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
    before = out.read_text()
    out.unlink()
    other = tmp_path / "other.tsv"
    other.write_text("SampleID\tage\na\t1\n")
    done = run_here("predict.py", *flags, "--report", report, "--metadata", other)
    assert done.returncode == 1
    assert f"{other}: no column 'gradient'" in done.stderr
    assert not out.exists(), "all was predicted before the metadata was read"

    read, write = os.pipe()
    done = run_here("predict.py", *flags[:4], "--output", f"/dev/fd/{write}")
    os.close(write)
    with open(read) as file:
        assert file.read() == before
    assert done.stdout == "", "words among the predictions"
    assert "predictions of gradient: /dev/fd/" in done.stderr


@pytest.fixture(scope="module")
def stages(synthetic_folder, tmp_path_factory):
    """Run folders of a stage 1, and of a stage 2 for quantiles on it, frozen; and the plan of the first."""
    first, second = tmp_path_factory.mktemp("first") / "run", tmp_path_factory.mktemp("second") / "run"
    target = TargetConfig(target="gradient", target_loss="quantile")
    plans = []
    for config in (
        pretrain_config(synthetic_folder, first, epochs=1),
        train_config(synthetic_folder, second, target=target, pretrained=first, freeze_base=True, epochs=1),
    ):
        plans.append(fit_here(config))
        (config.output_dir / "run.json").write_text(json.dumps(plans[-1].describe(config)))
    return first, second, plans[0]


def vectors(path) -> tuple[list[str], np.ndarray]:
    frame = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, sep="\t", dtype={0: str})
    assert list(frame.columns[1:]) == [f"e{d}" for d in range(len(frame.columns) - 1)]
    return list(frame.iloc[:, 0]), frame.iloc[:, 1:].to_numpy(np.float32)


def test_embeddings_are_those_of_the_encoder(run_here, stages, tmp_path):
    first, second, plan = stages
    samples, asvs = tmp_path / "new" / "samples.parquet", tmp_path / "asvs.tsv"
    done = run_here("predict.py", "--checkpoint", first, "--embeddings", samples, "--asv-embeddings", asvs)
    assert done.returncode == 0, done.stderr
    found_ids, found = vectors(samples)
    encoder, dataset = checkpoint.load(first / "best").model, plan.dataset
    of_samples = BatchPlan(
        dataset=dataset, sample_ids=found_ids, contract=plan.spec.contract, batch_size=len(found_ids)
    )
    with torch.no_grad():
        output = encoder(EpochBatches(of_samples, FIXED_DRAW)[0])
        of_asvs, _ = encoder.asv_encoder(torch.tensor(dataset.tokens))
        embeddings = output.profiles.presence * output.lengths
    np.testing.assert_allclose(found, embeddings, rtol=0, atol=1e-5)
    sequences, found = vectors(asvs)
    assert sequences == dataset.sequences
    np.testing.assert_allclose(found, of_asvs, rtol=0, atol=1e-5)
    assert found_ids == dataset.sample_ids
    # A frozen base is that of stage 1.
    run_here("predict.py", "--checkpoint", second, "--embeddings", tmp_path / "of_second.tsv")
    np.testing.assert_allclose(vectors(tmp_path / "of_second.tsv")[1], embeddings, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "p.tsv"], "a stage 1 checkpoint predicts no target"),
        (["--report", "r.md"], "a stage 1 checkpoint predicts no target"),
        (["--embeddings", "e.tsv", "--use-gpu", "True"], "there is no GPU here"),
    ],
)
def test_what_cannot_be_had_is_refused(run_here, stages, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = run_here("predict.py", "--checkpoint", stages[0], *flags)
    assert done.returncode == 1
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_write_and_strange_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing to write: give --output"):
        PredictConfig(checkpoint="x")
    out = Path("p.tsv")
    with pytest.raises(ValueError, match=r"^p.tsv: is given twice"):
        PredictConfig(checkpoint="x", output=out, embeddings=out)
    with pytest.raises(ValueError, match=r"s3:/.*: is a URI; give a path"):
        PredictConfig(checkpoint="x", output=Path("s3://bucket/p.tsv"))
    with pytest.raises(ValueError, match=r": is a folder; give the name of a file in it"):
        PredictConfig(checkpoint="x", output=tmp_path)
    (tmp_path / "file").write_text("")
    table = tmp_path / "table.biom"
    with pytest.raises(ValueError, match=r"p.tsv: cannot be written: .*/file'"):
        check_outputs(PredictConfig(checkpoint="x", table=table, output=tmp_path / "file" / "p.tsv"), None)
    table.symlink_to(tmp_path / "file")
    with pytest.raises(ValueError, match=r"file: is read from, and would be written over"):
        check_outputs(PredictConfig(checkpoint="x", table=table, output=tmp_path / "file"), None)
    probabilities = tmp_path / "class_probabilities.tsv"
    with pytest.raises(ValueError, match=r"class_probabilities.tsv: what belongs to .*/predictions.tsv goes there"):
        check_outputs(
            PredictConfig(checkpoint="x", table=table, output=tmp_path / "predictions.tsv", embeddings=probabilities),
            None,
        )
    os.mkfifo(tmp_path / "pipe")
    check_outputs(PredictConfig(checkpoint="x", table=table, output=tmp_path / "pipe"), None)
    with pytest.raises(ValueError, match=r"--asv-embeddings e.csv: the name must end with .tsv or .parquet"):
        PredictConfig(checkpoint="x", asv_embeddings=Path("e.csv"))


def test_nothing_of_earlier_predictions_stays_and_no_half_file_takes_their_place(
    synthetic_folder, built_in_run, tmp_path
):
    loaded = checkpoint.load(built_in_run[0] / "best")
    asked = PredictConfig(checkpoint="x", table=synthetic_folder / "table.biom", output=tmp_path / "predictions.tsv")
    found = predict(asked, loaded)
    assert found.predictions is not None
    of_classes = replace(
        found.predictions, target=Target(column="site", classes=("a", "b"), loss="cross_entropy"),
        probabilities=np.full((len(found.sample_ids), 2), 0.5), skipped={"s": "no reads"},
    )  # fmt: skip
    write_result(asked, replace(found, predictions=of_classes))
    beside = {tmp_path / "class_probabilities.tsv", tmp_path / "predictions.skipped.tsv"}
    assert {*tmp_path.iterdir()} == {asked.output, *beside}
    text = write_result(asked, replace(found, predictions=replace(found.predictions, skipped={})))
    assert {*tmp_path.iterdir()} == {asked.output}
    assert all(f"removed, of earlier predictions: {path}" in text for path in beside)

    with open(os.devnull, "w") as null:
        nowhere = Path(f"/dev/fd/{null.fileno()}")
        text = write_result(replace(asked, output=nowhere), replace(found, predictions=of_classes))
    assert "class probabilities: not written" in text
    assert f"1 of {len(found.sample_ids) + 1} samples could not be predicted:\n  s: no reads" in text
    assert {*tmp_path.iterdir()} == {asked.output}

    before = asked.output.read_text()

    class DiskFull:
        def __str__(self) -> str:
            raise OSError

    broken = replace(found.predictions, values=[*found.predictions.values[:-1], DiskFull()])
    with pytest.raises(OSError):
        write_result(asked, replace(found, predictions=broken))
    assert asked.output.read_text() == before
    assert {*tmp_path.iterdir()} == {asked.output}


def test_quantiles_stand_beside_the_prediction(run_here, stages, tmp_path):
    folder, out, of_bf16 = stages[1], tmp_path / "predictions.tsv", tmp_path / "bf16.tsv"
    done = run_here("predict.py", "--checkpoint", folder, "--part", "val", "--output", out)
    assert done.returncode == 0, done.stderr
    frame = pd.read_csv(out, sep="\t", dtype={0: str}).set_index("SampleID")
    trained = pd.read_csv(folder / "validation_predictions.tsv", sep="\t", dtype={0: str}).set_index("SampleID")
    assert list(frame.columns) == ["prediction", "q0.05", "q0.95"]
    np.testing.assert_allclose(frame, trained.loc[frame.index, frame.columns], rtol=1e-5, atol=1e-4)
    assert (frame["q0.05"] <= frame["prediction"]).all()
    assert "0 ASVs encoded" in done.stdout, "those of the training were not found"
    done = run_here("predict.py", "--checkpoint", folder, "--part", "val", "--output", of_bf16, "--precision", "bf16")
    assert "0 were there already" in done.stdout, "vectors of another arithmetic"
    other = pd.read_csv(of_bf16, sep="\t", dtype={0: str}).set_index("SampleID")
    assert 0 < (other - frame).abs().max().max() < 0.1 * frame.abs().max().max()


def artifact(path, kind: str, member: str, content: bytes):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("5f3e6c1a-uuid/metadata.yaml", f"uuid: x\ntype: {kind}\nformat: x\n")
        file.writestr(f"5f3e6c1a-uuid/data/{member}", content)
    return path


def test_artifacts_with_hashed_ids_and_a_table_of_another_region(run_here, synthetic_folder, stages, tmp_path):
    """A table from elsewhere: other ASVs, hashes for ids, in a QIIME 2 artifact."""
    table = biom.load_table(str(synthetic_folder / "table.biom"))
    flags = ["--checkpoint", stages[1], "--output", tmp_path / "p.tsv"]
    own, expected = list(map(str, table.ids(axis="observation"))), None
    for sequences in (own, random_sequences(len(own), shortest=130, longest=130)):
        code = {s: hashlib.md5(s.encode()).hexdigest() for s in sequences}
        hashes = dict(zip(own, map(code.__getitem__, sequences), strict=True))
        hashed = table.update_ids(hashes, axis="observation", inplace=False)
        with biom.util.biom_open(str(tmp_path / "t.biom"), "w") as file:
            hashed.to_hdf5(file, "tests")
        content = (tmp_path / "t.biom").read_bytes()
        qza = artifact(tmp_path / "table.qza", "FeatureTable[Frequency]", "feature-table.biom", content)
        fasta = "".join(f">{name}\n{s}\n" for s, name in code.items()).encode()
        seqs = artifact(tmp_path / "seqs.qza", "FeatureData[Sequence]", "dna-sequences.fasta", fasta)
        done = run_here("predict.py", *flags, "--table", qza)
        assert done.returncode == 1
        assert "pass --sequences rep-seqs.fasta (or .qza)" in done.stderr
        done = run_here("predict.py", *flags, "--table", qza, "--sequences", seqs)
        assert done.returncode == 0, done.stderr
        frame = pd.read_csv(tmp_path / "p.tsv", sep="\t", dtype={0: str}).set_index("SampleID")
        if sequences == own:
            expected = frame
            assert "ASVs (" in done.stdout
            assert "another primer region" not in done.stdout
        else:
            assert (frame.index == expected.index).all()
            assert not np.allclose(frame, expected)
            assert "(100.00% of the reads) are in no training sample, nor is any ASV of the table" in done.stdout
            length = int(np.median([len(sequence) for sequence in own]))
            assert f"are 130 nt long (median), the training's {length}: another primer region" in done.stdout
    run_here("predict.py", *flags[2:], "--checkpoint", stages[1], "--table", synthetic_folder / "table.biom")
    direct = pd.read_csv(tmp_path / "p.tsv", sep="\t", dtype={0: str}).set_index("SampleID")
    pd.testing.assert_frame_equal(direct, expected)


@pytest.mark.parametrize("depth", [0, 200])
def test_samples_shallower_than_all_in_training_are_counted_where_all_reads_count(synthetic_folder, tmp_path, depth):
    config = train_config(synthetic_folder, tmp_path, data=data_config(synthetic_folder, rarefy_depth=depth))
    plan = make_plan(config)
    depths = dict(zip(plan.dataset.sample_ids, plan.dataset.depths.tolist(), strict=True))
    order = sorted(depths, key=depths.__getitem__)
    record = plan.describe(config)
    record["split"]["train"] = order[5:]
    least = depths[order[5]]
    shallow = sum(reads < least for reads in depths.values())
    assert shallow > 0
    said = f"{shallow} of {len(order)} samples have fewer reads than any training sample ({least})"
    found = what_is_new(plan.dataset, order, record)
    assert any(note.startswith(said) for note in found) == (depth == 0)
    assert len(what_is_new(plan.dataset, order[5:], record)) == 1
    # An ensemble learns from the validation samples too.
    record["split"] |= {"train": order[6:], "val": order[5:6]}
    assert what_is_new(plan.dataset, order[5:6], record)[0].endswith("are in no training sample")
    record["config"]["loss"]["ensemble"] = True
    assert what_is_new(plan.dataset, order[5:], record)[0].startswith("0 of ")
    assert any("than any training or validation sample" in n for n in what_is_new(plan.dataset, order, record)) == (
        depth == 0
    )


def test_several_draws_are_averaged_and_their_deviation_is_written(synthetic_folder, built_in_run, tmp_path):
    folder, _ = built_in_run
    loaded, table = checkpoint.load(folder / "best"), synthetic_folder / "table.biom"

    def predictions(draws: int, name: str) -> pd.DataFrame:
        asked = PredictConfig(checkpoint=str(folder), table=table, output=tmp_path / name, prediction_draws=draws)
        write_result(asked, predict(asked, loaded))
        return pd.read_csv(tmp_path / name, sep="\t", dtype={"SampleID": str}).set_index("SampleID")

    one, several = predictions(1, "one.tsv"), predictions(5, "several.tsv")
    assert list(one.columns) == ["prediction"]
    assert list(several.columns) == ["prediction", "prediction_sd"]
    assert (several["prediction_sd"] > 0).all()
    ids = [*one.index]
    data = make_plan(train_config(synthetic_folder, tmp_path / "plan")).dataset
    of_draws = [predict_samples(loaded, data, ids, draw=draw, base_cache=False).target for draw in range(5)]
    values = np.stack([loaded.spec.target.decode(outputs)[:, 0] for outputs in of_draws])
    np.testing.assert_allclose(one["prediction"], values[0], rtol=1e-4)
    np.testing.assert_allclose(several["prediction"], values.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(several["prediction_sd"], values.std(axis=0, ddof=1), rtol=1e-2, atol=1e-4)
    every_read = replace(loaded, spec=replace(loaded.spec, contract=replace(loaded.spec.contract, rarefy_depth=0)))
    asked = PredictConfig(checkpoint=str(folder), table=table, output=tmp_path / "p.tsv", prediction_draws=2)
    with pytest.raises(ValueError, match="--prediction-draws 2: this model reads all reads"):
        predict(asked, every_read)
