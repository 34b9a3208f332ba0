"""From settings to a plan: what is decided, and what a run may be resumed with."""

import dataclasses
import json
import re
from pathlib import Path

import biom
import h5py
import numpy as np
import pytest
import torch

from aam.config import (
    DEFAULT_HEAD_DROPOUT,
    DataContract,
    LoopConfig,
    ModelConfig,
    PretrainConfig,
    PretrainLossConfig,
    RayConfig,
    TargetConfig,
    TrainConfig,
)
from aam.data.batches import EpochBatches, exact_unifrac
from aam.data.draw import FIXED_DRAW, draw_sample
from aam.model.sample_features import SampleFeatures
from aam.plan import RunPlan, check_resumable, make_plan
from aam.spec import estimate_unifrac
from aam.task import build_task
from aam.training.checkpoint import ModelSpec
from aam.training.loop import fit
from plans import OUT, change_metadata, pretrain, refusal, site, train
from runs import ALL_METRICS, CPU, DEEP, TINY, data_config, pretrain_config, train_config

# What is decided


def test_sizes_have_their_defaults(synthetic_folder):
    config = dataclasses.replace(pretrain(synthetic_folder, rarefy_depth=None, token_limit=None), model=ModelConfig())
    spec = make_plan(config).spec
    sizes = spec.encoder
    assert (sizes.embedding_dim, sizes.clades, sizes.attention_heads, sizes.asv_layers) == (128, 512, 4, 0)
    assert (sizes.dropout, sizes.kmer, sizes.max_bp) == (0.1, 5, 150)
    assert spec.contract == DataContract(max_bp=150, rarefy_depth=1000, token_limit=1024, seed=0)
    assert spec.predictor is None
    predictor = make_plan(train(synthetic_folder)).spec.predictor
    assert (predictor.attention_layers, predictor.heads, predictor.known_asvs, predictor.hidden) == (0, 4, 500, 128)


def buffers(of: RunPlan) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in build_task(of, CPU).model.named_buffers()}


def test_what_is_settled_before_training_is_of_the_training_samples_and_not_of_the_target(synthetic_folder):
    """Mean and scale of the k-mers; known ASVs, and the spread of the features."""
    plan = make_plan(train(synthetic_folder, target=TargetConfig(target="gradient", known_asvs=60)))
    found, parts = buffers(plan), plan.split
    assert found.keys() == {
        "base.asv_encoder.kmers.mean", "base.asv_encoder.kmers.scale",
        "features.tokens", "features.anchors", "features.mean", "features.scale",
    }  # fmt: skip
    same = {
        "val": dataclasses.replace(plan, split=dataclasses.replace(parts, val=parts.val[: len(parts.val) // 2])),
        "targets": dataclasses.replace(plan, targets={sample: -value for sample, value in plan.targets.items()}),
    }
    for name, other in same.items():
        assert all(torch.equal(buffer, found[key]) for key, buffer in buffers(other).items()), name
    fewer = buffers(dataclasses.replace(plan, split=dataclasses.replace(parts, train=parts.train[:8])))
    assert [key for key, buffer in fewer.items() if torch.equal(buffer, found[key])] == []


def test_known_asvs_are_the_most_prevalent(synthetic_folder):
    plan = make_plan(train(synthetic_folder, target=TargetConfig(target="gradient", known_asvs=8)))
    dataset = plan.dataset
    samples = np.zeros(len(dataset.lengths))
    for sample in plan.split.train:
        samples[dataset.sample(dataset.row[sample])[0]] += 1
    known = build_task(plan, CPU).model.features.tokens.numpy()
    rows = [row for row in range(len(samples)) if (dataset.tokens[row, : known.shape[1]] == known).all(axis=1).any()]
    assert len(rows) == 8
    assert samples[rows].min() >= np.delete(samples, rows).max()
    everything = make_plan(train(synthetic_folder))  # 500 known ASVs, of a table of 200
    tokens = build_task(everything, CPU).model.features.tokens
    assert 8 < tokens.any(dim=1).sum() <= 200


def test_features_of_the_training_samples_are_standardised(synthetic_folder):
    plan = make_plan(train(synthetic_folder))
    task = build_task(plan, CPU)
    model, batches, found = task.model.eval(), EpochBatches(task.train, FIXED_DRAW), []
    for index in range(len(batches)):
        with torch.no_grad():
            found.append(model.features(batches[index], model.base(batches[index])))
    features = torch.cat(found)
    assert len(features) == len(plan.split.train)
    same = SampleFeatures(plan.spec.encoder.clades, plan.spec.predictor.known_asvs, 1)
    same.standardise(features)
    assert (features.std(dim=0) > 0.1).sum() > 50
    torch.testing.assert_close(model.features.mean, same.mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(model.features.scale, same.scale, rtol=1e-3, atol=0)


def test_the_units_of_a_pretrained_encoder_stay(synthetic_folder, tmp_path):
    """Also where stage 2 has other samples to train on."""
    first = make_plan(pretrain(synthetic_folder, loop=LoopConfig(epochs=1, batch_size=16)))
    task = build_task(first, CPU, report=lambda metrics, write: write(tmp_path / "base"))
    fit(task)
    config = dataclasses.replace(train(synthetic_folder), pretrained=tmp_path / "base")
    plan = make_plan(config, (tmp_path / "base", first.spec))
    fewer = dataclasses.replace(plan, split=dataclasses.replace(plan.split, train=plan.split.train[:8]))
    found = build_task(fewer, CPU).model.base.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in task.model.state_dict().items())
    assert found["asv_encoder.kmers.mean"].abs().max() > 0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"head_layers": 2}, {"attention_layers": 2}),
        ({"known_asvs": 0}, {"known_asvs": 0}),
        ({"target_heads": 1}, {"heads": 1}),
    ],
)
def test_sizes_of_the_target_heads(synthetic_folder, settings, expected):
    plan = make_plan(train(synthetic_folder, target=TargetConfig(target="gradient", **settings)))
    assert {name: getattr(plan.spec.predictor, name) for name in expected} == expected
    task = build_task(dataclasses.replace(plan, loop=LoopConfig(epochs=1, batch_size=16)), CPU)
    assert len(task.model.target_heads) == plan.spec.predictor.heads
    assert hasattr(task.model, "target_encoder") == (plan.spec.predictor.attention_layers > 0)
    assert task.model.features.width == 2 * (plan.spec.predictor.known_asvs or plan.spec.encoder.clades)
    assert fit(task).epoch == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head_layers": -1}, "--head-layers must not be negative"),
        ({"target_heads": 0}, "--target-heads must be at least 1"),
        ({"known_asvs": -1}, "--known-asvs must not be negative"),
    ],
)
def test_sizes_of_the_target_heads_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        TargetConfig(**settings)


# UniFrac and nucleotides


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unifrac_metric": ("weighted", "weighted")}, "--unifrac-metric must be one or more different ones"),
        ({"unifrac_metric": ()}, "--unifrac-metric must be one or more different ones"),
        ({"made_up_fraction": -0.5}, "--made-up-fraction must be from 0 to 4"),
        ({"made_up_fraction": 5.0}, "--made-up-fraction must be from 0 to 4"),
        ({"base_weight": 0.0, "nuc_weight": 0.0}, "one of --base-weight, --nuc-weight must be above 0"),
    ],
)
def test_losses_of_stage_1_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        PretrainLossConfig(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kmer": 0, "asv_layers": 0}, "--kmer 0 and --asv-layers 0 leave nothing to read"),
        ({"kmer": 7}, "--kmer must be from 0 to 6, not 7"),
        ({"clades": 1}, "--clades must be at least 2, not 1"),
        ({"asv_layers": -1}, "--asv-layers must be at least 0, not -1"),
    ],
)
def test_sizes_of_the_encoder_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**settings)


def test_neither_kmers_nor_nucleotides_is_refused_by_default_too(synthetic_folder):
    """No --asv-layers means 0."""
    config = dataclasses.replace(pretrain(synthetic_folder), model=ModelConfig(kmer=0))
    assert refusal(config).startswith("--kmer 0 without a nucleotide stack leaves nothing to read: give --asv-layers 2")


@pytest.mark.parametrize(
    ("model", "loss", "expected"),
    [
        (TINY, {}, 0.0),
        (TINY, {"nuc_weight": 0.0}, 0.0),
        (DEEP, {}, 1.0),
        (DEEP, {"nuc_weight": 0.0}, 0.0),
        (DEEP, {"nuc_weight": 0.3}, 0.3),
        (DEEP, {"base_weight": 0.0}, 1.0),
        (TINY, {"nuc_weight": 0.5}, None),
        (TINY, {"base_weight": 0.0}, None),
    ],
)
def test_masked_nucleotides_need_a_stack_that_predicts_them(synthetic_folder, model, loss, expected):
    config = dataclasses.replace(pretrain(synthetic_folder), model=model, loss=PretrainLossConfig(**loss))
    if expected is None:
        said = refusal(config)
        assert all(flag in said for flag in ("--asv-layers 2", "--nuc-weight", "--base-weight"))
        return
    plan = make_plan(config)
    assert plan.weights.nuc == expected
    assert (plan.mask_fraction > 0) == (expected > 0)


def test_made_up_samples_are_for_the_distances_of_stage_1(synthetic_folder):
    config = pretrain(synthetic_folder)
    assert make_plan(config).made_up_fraction == 0.5
    given = dataclasses.replace(config, loss=PretrainLossConfig(made_up_fraction=2.0))
    assert make_plan(given).made_up_fraction == 2.0
    alone = dataclasses.replace(config, model=DEEP, loss=PretrainLossConfig(base_weight=0.0))
    assert make_plan(alone).made_up_fraction == 0.0
    second = train(synthetic_folder, target=TargetConfig(target="gradient", base_weight=0.5))
    assert make_plan(second).made_up_fraction == 0.0


def test_what_a_base_has_learned_is_kept_where_it_is_frozen(synthetic_folder):
    config = dataclasses.replace(pretrain(synthetic_folder), loss=ALL_METRICS)
    base = (Path("base"), make_plan(config).spec)
    assert [learned.metric for learned in base[1].unifrac] == ["unweighted", "weighted", "faith_pd"]
    frozen = dataclasses.replace(train(synthetic_folder), pretrained=base[0], freeze_base=True)
    assert make_plan(frozen, base).spec.unifrac == base[1].unifrac
    tuned = dataclasses.replace(frozen, freeze_base=False)
    assert make_plan(tuned, base).spec.unifrac == ()
    # Where stage 2 goes on learning it, it learns what the base has learned, or the unweighted metric.
    target = TargetConfig(target="gradient", base_weight=0.5)
    learns = dataclasses.replace(train(synthetic_folder, target=target), pretrained=base[0])
    assert [learned.metric for learned in make_plan(learns, base).spec.unifrac] == [
        "unweighted",
        "weighted",
        "faith_pd",
    ]
    alone = make_plan(dataclasses.replace(learns, pretrained=None))
    assert [learned.metric for learned in alone.spec.unifrac] == ["unweighted"]
    assert make_plan(train(synthetic_folder)).spec.unifrac == ()


def longer_by(extra: str, folder: Path, to: Path) -> Path:
    """The synthetic files with a tail on each sequence."""
    to.mkdir()
    table = biom.load_table(str(folder / "table.biom"))
    ids = table.ids("observation")
    with h5py.File(to / "table.biom", "w") as file:
        table.update_ids({s: s + extra for s in ids}, axis="observation", inplace=False).to_hdf5(file, "test")
    (to / "tree.nwk").write_text(re.sub("([ACGT]{20,})", rf"\g<1>{extra}", (folder / "tree.nwk").read_text()))
    (to / "metadata.tsv").write_bytes((folder / "metadata.tsv").read_bytes())
    return to


def test_a_model_is_made_for_the_longest_sequence_of_its_table(synthetic_folder, tmp_path):
    lengths = make_plan(pretrain(synthetic_folder)).dataset.lengths
    longest = int(lengths.max()) - 1 + 120
    assert longest > 150
    folder = longer_by("ACGTT" * 24, synthetic_folder, tmp_path / "longer")
    config = dataclasses.replace(pretrain(folder, cache_dir=tmp_path / "cache"), model=DEEP)
    plan = make_plan(config)
    assert plan.spec.encoder.max_bp == plan.spec.contract.max_bp == longest
    assert f"--max-bp {longest}: the longest sequence of the table" in plan.notes
    fit(build_task(dataclasses.replace(plan, loop=LoopConfig(epochs=1, batch_size=16)), CPU))
    # What was asked for, and what a model was trained for, stay limits.
    assert f"give --max-bp {longest}" in refusal(pretrain(folder, cache_dir=tmp_path / "cache", max_bp=150))
    base = make_plan(dataclasses.replace(pretrain(synthetic_folder), model=DEEP)).spec
    second = dataclasses.replace(train(folder, cache_dir=tmp_path / "cache"), model=DEEP)
    assert f"has {longest} nt, more than 150" in refusal(second, (Path("base"), base))
    assert make_plan(second, (Path("base"), plan.spec)).spec.encoder == plan.spec.encoder


def test_kmers_know_no_limit(synthetic_folder, tmp_path):
    folder = longer_by("ACGTT" * 24, synthetic_folder, tmp_path / "longer")
    base = make_plan(pretrain(synthetic_folder)).spec
    plan = make_plan(train(folder, cache_dir=tmp_path / "cache"), (Path("base"), base))
    assert plan.dataset.lengths.max() - 1 > base.encoder.max_bp == plan.spec.encoder.max_bp
    assert plan.spec.predictor.longest_known == plan.dataset.lengths.max()
    fit(build_task(dataclasses.replace(plan, pretrained=None, loop=LoopConfig(epochs=1, batch_size=16)), CPU))
    asked = train(folder, cache_dir=tmp_path / "cache", max_bp=150)
    assert "nt, more than 150" in refusal(asked, (Path("base"), base))


def test_a_sequence_that_the_tree_lacks_counts_too_as_stage_2_reads_it(synthetic_folder, tmp_path):
    folder = tmp_path / "one_longer"
    folder.mkdir()
    table = biom.load_table(str(synthetic_folder / "table.biom"))
    rarest = min(table.ids("observation"), key=lambda s: table.data(s, "observation").sum())
    ids = {s: s + "ACGTT" * 24 * (s == rarest) for s in table.ids("observation")}
    with h5py.File(folder / "table.biom", "w") as file:
        table.update_ids(ids, axis="observation", inplace=False).to_hdf5(file, "test")
    for name in ("tree.nwk", "metadata.tsv"):
        (folder / name).write_bytes((synthetic_folder / name).read_bytes())
    first = make_plan(pretrain(folder, cache_dir=tmp_path / "cache"))
    assert any("the tree lacks 1 of" in note for note in first.notes)
    assert first.spec.encoder.max_bp == len(ids[rarest]) > 150
    second = make_plan(train(folder, tree=None, cache_dir=tmp_path / "cache"), (Path("base"), first.spec))
    assert ids[rarest] in second.dataset.sequences


def pretrained_spec(folder: Path) -> tuple[Path, ModelSpec]:
    model = ModelConfig(embedding_dim=16, attention_heads=2, clades=32, asv_layers=1, dropout=0.0, kmer=0)
    data = data_config(folder, rarefy_depth=0, token_limit=30, max_bp=130, token_choice="random")
    config = PretrainConfig(output_dir=OUT, data=data, model=model, loop=LoopConfig(seed=7))
    return Path("pretrained"), make_plan(config).spec


def test_a_pretrained_model_decides_what_is_not_given(synthetic_folder):
    base = pretrained_spec(synthetic_folder)
    config = dataclasses.replace(
        train(synthetic_folder, rarefy_depth=None, token_limit=None), model=ModelConfig(), pretrained=base[0]
    )
    plan = make_plan(config, base)
    assert plan.pretrained == base[0]
    assert plan.spec.encoder == base[1].encoder
    assert dataclasses.replace(plan.spec.contract, seed=7) == base[1].contract
    assert plan.spec.contract.seed == 0
    assert plan.spec.predictor.dropout == DEFAULT_HEAD_DROPOUT, "the heads are not of the base"
    given = dataclasses.replace(config, data=data_config(synthetic_folder, token_limit=10, rarefy_depth=50))
    contract = make_plan(given, base).spec.contract
    assert (contract.token_limit, contract.rarefy_depth, contract.token_choice) == (10, 50, "random")


@pytest.mark.parametrize(
    ("flag", "model", "had"),
    [
        ("--embedding-dim 32", ModelConfig(embedding_dim=32), 16),
        ("--attention-heads 4", ModelConfig(attention_heads=4), 2),
        ("--asv-layers 2", ModelConfig(asv_layers=2), 1),
        ("--clades 64", ModelConfig(clades=64), 32),
        ("--kmer 3", ModelConfig(kmer=3), 0),
    ],
)
def test_a_size_that_the_pretrained_model_has_not_is_refused(synthetic_folder, flag, model, had):
    config = dataclasses.replace(train(synthetic_folder), model=model)
    assert refusal(config, pretrained_spec(synthetic_folder)).startswith(
        f"{flag} does not fit --pretrained, which has {had}"
    )


def test_the_target_of_stage_2(synthetic_folder):
    plan = make_plan(train_config(synthetic_folder, OUT))
    values = np.array([plan.targets[s] for s in plan.split.train])
    transform = plan.spec.target.transform
    assert transform.kind == "zscore"
    assert transform.shift == pytest.approx(values.mean())
    assert transform.scale == pytest.approx(values.std())
    assert plan.spec.predictor.outputs == 1
    assert plan.weights.base == 0
    assert "the tree is not used: --base-weight is 0" in plan.notes
    assert plan.dataset.paths is None


def test_classes_of_stage_2(synthetic_folder):
    plan = make_plan(train(synthetic_folder, target=site(class_weights="balanced")))
    assert plan.spec.target.classes == ("gut", "skin", "soil")
    held = [plan.targets[s] for s in plan.split.train]
    weights = [len(held) / (3 * held.count(name)) for name in ("gut", "skin", "soil")]
    assert plan.spec.target.class_weights == pytest.approx(weights)


@pytest.mark.parametrize(
    ("freeze_base", "given", "expected"), [(False, None, 0.1), (True, None, 0), (True, 0.3, 0.3), (False, 0, 0)]
)
def test_a_count_head_is_left_out_where_nothing_would_learn_from_it(synthetic_folder, freeze_base, given, expected):
    target = TargetConfig(target="gradient", count_weight=given)
    config = train_config(synthetic_folder, OUT, target=target, freeze_base=freeze_base, pretrained=Path("base"))
    plan = make_plan(config)
    assert plan.weights.count == expected
    assert plan.spec.predictor.count_head == (expected > 0) == (plan.count_mask_fraction > 0)
    said = any("no count head" in note and "--count-weight 0.1 adds it" in note for note in plan.notes)
    assert said == (freeze_base and given is None)


def test_the_parts_keep_subjects_apart(synthetic_folder):
    plan = make_plan(pretrain_config(synthetic_folder, OUT))
    subject = plan.dataset.metadata["subject"]
    assert not set(subject[plan.split.train]) & set(subject[plan.split.val])


def test_the_plan_is_the_same_each_time_and_goes_into_json(synthetic_folder):
    config = train_config(synthetic_folder, OUT)
    first, second = (make_plan(config).describe(config) for _ in range(2))
    assert json.loads(json.dumps(first)) == json.loads(json.dumps(second))
    assert ModelSpec.from_dict(json.loads(json.dumps(first))["spec"]) == make_plan(config).spec


def test_without_a_table_the_built_in_dataset_is_used():
    first = make_plan(PretrainConfig(output_dir=OUT, model=TINY))
    assert len(first.dataset.sample_ids) == 200
    subject = first.dataset.metadata["subject"]
    assert not set(subject[first.split.train]) & set(subject[first.split.val])
    number = make_plan(TrainConfig(output_dir=OUT, model=TINY))
    assert number.spec.target.column == "gradient"
    assert not any("tree" in note for note in number.notes)  # nobody gave one
    classes = make_plan(TrainConfig(output_dir=OUT, model=TINY, loss=TargetConfig(classifier=True)))
    assert classes.spec.target.column == "site"


# Mean and variance of what is learned


def exact(plan: RunPlan, metric: str) -> np.ndarray:
    """Of all pairs of training samples; of Faith's PD, of all training samples."""
    draws = []
    for sample in plan.split.train:
        cells = plan.dataset.sample(plan.dataset.row[sample])
        draws.append(draw_sample(*cells, sample, plan.spec.contract, epoch=1))
    found = exact_unifrac(metric, draws, plan.dataset.paths)
    return found if metric == "faith_pd" else found[np.triu_indices(len(draws), 1)]


@pytest.mark.parametrize("metric", ["unweighted", "weighted", "faith_pd"])
def test_the_estimate_is_close_to_all_distances(synthetic_folder, metric):
    loss = PretrainLossConfig(unifrac_metric=(metric,))
    plan = make_plan(dataclasses.replace(pretrain_config(synthetic_folder, OUT), loss=loss))
    truth, (learned,) = exact(plan, metric), plan.spec.unifrac
    assert learned.metric == metric
    assert learned.mean == pytest.approx(truth.mean(), rel=0.02)
    assert learned.variance == pytest.approx(truth.var(), rel=0.1)
    (blocks,) = estimate_unifrac(plan.dataset, plan.split.train, plan.spec.contract, (metric,), blocks=30, size=8)
    assert blocks.mean == pytest.approx(truth.mean(), rel=0.05)
    assert blocks.variance == pytest.approx(truth.var(), rel=0.3)


def test_a_metric_does_not_depend_on_those_beside_it(synthetic_folder):
    plan = make_plan(dataclasses.replace(pretrain_config(synthetic_folder, OUT), loss=ALL_METRICS))
    for learned in plan.spec.unifrac:
        alone = estimate_unifrac(plan.dataset, plan.split.train, plan.spec.contract, (learned.metric,))
        assert alone == (learned,)


def test_new_encoders_start_at_the_mean_of_faith_pd(synthetic_folder):
    plan = make_plan(dataclasses.replace(pretrain_config(synthetic_folder, OUT), loss=ALL_METRICS))
    task = build_task(plan, CPU)
    mean = next(learned.mean for learned in plan.spec.unifrac if learned.metric == "faith_pd")
    with torch.no_grad():
        found = task.model.eval()(EpochBatches(task.train, FIXED_DRAW)[0]).faith_pd
    assert 0.3 < found.mean().item() / mean < 3


@pytest.mark.parametrize("metric", ["unweighted", "weighted"])
def test_samples_all_alike_are_refused(synthetic_folder, metric):
    plan = make_plan(pretrain_config(synthetic_folder, OUT))
    with pytest.raises(ValueError, match=f"--unifrac-metric {metric}: it is .* nothing to learn"):
        estimate_unifrac(plan.dataset, plan.split.train[:2], plan.spec.contract, (metric,))


def test_one_faith_pd_for_all_is_refused_whatever_rounding_makes_of_its_variance(synthetic_folder):
    plan = make_plan(pretrain_config(synthetic_folder, OUT))
    contract = dataclasses.replace(plan.spec.contract, rarefy_depth=0)
    assert len(plan.split.train) > 20
    for sample in plan.split.train:
        with pytest.raises(ValueError, match=r"--unifrac-metric faith_pd: it is .* nothing to learn"):
            estimate_unifrac(plan.dataset, [sample] * 3, contract, ("faith_pd",))


# Resuming


@pytest.fixture
def saved(synthetic_folder):
    """Settings of a run, and its run.json."""
    config = pretrain_config(synthetic_folder, OUT)
    return config, json.loads(json.dumps(make_plan(config).describe(config)))


def test_the_same_settings_may_go_on(saved):
    config, record = saved
    check_resumable(record, config, OUT)


def test_what_does_not_change_the_result_may_differ(saved):
    config, record = saved
    moved = dataclasses.replace(
        config,
        output_dir=Path("elsewhere"),
        resume=True,
        ray=RayConfig(num_workers=4, max_failures=0),
        data=dataclasses.replace(config.data, cache_dir=Path("cache")),
        loop=dataclasses.replace(config.loop, loader_workers=2, clear_cache="epoch", base_cache=False),
    )
    check_resumable(record, moved, OUT)


def test_changed_settings_are_named_by_their_flags(saved):
    config, record = saved
    changed = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, token_limit=7),
        loop=dataclasses.replace(config.loop, lr=5.0, batch_size=4),
    )
    with pytest.raises(ValueError, match=r"--batch-size, --lr, --token-limit;") as caught:
        check_resumable(record, changed, OUT)
    assert str(caught.value).startswith("out: ")
    assert "--output-dir" in str(caught.value)


def test_changed_data_are_named(synthetic_folder, saved, tmp_path):
    config, record = saved
    path = change_metadata(synthetic_folder, tmp_path, lambda frame: frame.assign(plate="p"))
    changed = dataclasses.replace(config, data=dataclasses.replace(config.data, metadata=path))
    record["config"]["data"]["metadata"] = str(path)  # as if this file had been there all along
    with pytest.raises(ValueError, match="has changed since the run in out was started") as caught:
        check_resumable(record, changed, OUT)
    assert str(caught.value).startswith(str(path))
