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
    DataContract,
    LoopConfig,
    ModelConfig,
    PretrainConfig,
    RayConfig,
    TargetConfig,
    TrainConfig,
)
from aam.data.draw import draw_sample
from aam.data.unifrac import unweighted_unifrac
from aam.plan import check_resumable, make_plan
from aam.spec import estimate_distances
from aam.task import build_task
from aam.training.checkpoint import ModelSpec
from aam.training.loop import fit
from plans import OUT, change_metadata, pretrain, refusal, site, train
from runs import CPU, TINY, data_config, pretrain_config, train_config

# What is decided


def test_sizes_have_their_defaults(synthetic_folder):
    config = dataclasses.replace(pretrain(synthetic_folder, rarefy_depth=None, token_limit=None), model=ModelConfig())
    spec = make_plan(config).spec
    sizes = spec.encoder
    assert (sizes.embedding_dim, sizes.attention_heads, sizes.attention_layers, sizes.asv_layers) == (
        128,
        4,
        4,
        4,
    )
    assert (sizes.dropout, sizes.kmer, sizes.max_bp) == (0.1, 5, 150)
    assert spec.contract == DataContract(max_bp=150, rarefy_depth=1000, token_limit=1024, seed=0)
    assert spec.predictor is None


def test_groups_of_asvs_start_from_those_of_the_training_samples(synthetic_folder):
    def centers(of) -> np.ndarray:
        return build_task(of, CPU).model.target_groups.centers.detach().numpy()

    plan = make_plan(train(synthetic_folder, target=TargetConfig(target="gradient", asv_groups=8)))
    found, parts = centers(plan), plan.split
    assert found.shape == (8, TINY.embedding_dim)
    fewer_val = dataclasses.replace(parts, val=parts.val[: len(parts.val) // 2])
    np.testing.assert_array_equal(centers(dataclasses.replace(plan, split=fewer_val)), found)
    fewer_train = dataclasses.replace(parts, train=parts.train[:8])
    assert not np.allclose(centers(dataclasses.replace(plan, split=fewer_train)), found)
    other_target = {sample: -value for sample, value in plan.targets.items()}
    np.testing.assert_array_equal(centers(dataclasses.replace(plan, targets=other_target)), found)


def test_without_groups_of_asvs(synthetic_folder):
    plan = make_plan(train(synthetic_folder, target=TargetConfig(target="gradient", asv_groups=0)))
    task = build_task(dataclasses.replace(plan, loop=LoopConfig(epochs=1, batch_size=16)), CPU)
    assert task.model.target_groups is None
    assert fit(task).epoch == 1
    for wrong in (1, -1):
        with pytest.raises(ValueError, match="--asv-groups must be 0 or at least 2"):
            TargetConfig(asv_groups=wrong)


def test_heads_may_have_no_attention_of_their_own(synthetic_folder):
    target = TargetConfig(target="gradient", head_layers=0, asv_groups=4)
    plan = make_plan(train(synthetic_folder, target=target))
    assert (plan.spec.predictor.attention_layers, plan.spec.encoder.attention_layers) == (0, TINY.attention_layers)
    task = build_task(dataclasses.replace(plan, loop=LoopConfig(epochs=1, batch_size=16)), CPU)
    assert not any("target_encoder.blocks" in name for name, _ in task.model.named_parameters())
    before = task.model.target_encoder.norm.weight.detach().clone()
    assert fit(task).epoch == 1
    assert not torch.equal(task.model.target_encoder.norm.weight, before), "its states still reach the target"
    assert make_plan(train(synthetic_folder)).spec.predictor.attention_layers == TINY.attention_layers
    with pytest.raises(ValueError, match="--head-layers must not be negative"):
        TargetConfig(head_layers=-1)


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
    config = pretrain(folder, cache_dir=tmp_path / "cache")
    plan = make_plan(config)
    assert plan.spec.encoder.max_bp == plan.spec.contract.max_bp == longest
    assert f"--max-bp {longest}: the longest sequence of the table" in plan.notes
    fit(build_task(dataclasses.replace(plan, loop=LoopConfig(epochs=1, batch_size=16)), CPU))
    # What was asked for, and what a model was trained for, stay limits.
    assert f"give --max-bp {longest}" in refusal(pretrain(folder, cache_dir=tmp_path / "cache", max_bp=150))
    base = make_plan(pretrain(synthetic_folder)).spec
    assert f"has {longest} nt, more than 150" in refusal(
        train(folder, cache_dir=tmp_path / "cache"), (Path("base"), base)
    )
    assert (
        make_plan(train(folder, cache_dir=tmp_path / "cache"), (Path("base"), plan.spec)).spec.encoder
        == plan.spec.encoder
    )


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
    model = ModelConfig(embedding_dim=16, attention_heads=2, attention_layers=2, asv_layers=1, dropout=0.0, kmer=0)
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
    assert plan.spec.predictor.dropout == 0.0
    given = dataclasses.replace(config, data=data_config(synthetic_folder, token_limit=10, rarefy_depth=50))
    contract = make_plan(given, base).spec.contract
    assert (contract.token_limit, contract.rarefy_depth, contract.token_choice) == (10, 50, "random")


@pytest.mark.parametrize(
    ("flag", "model", "had"),
    [
        ("--embedding-dim 32", ModelConfig(embedding_dim=32), 16),
        ("--attention-heads 4", ModelConfig(attention_heads=4), 2),
        ("--asv-layers 2", ModelConfig(asv_layers=2), 1),
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


# Distances


def all_distances(plan) -> np.ndarray:
    draws = []
    for sample in plan.split.train:
        cells = plan.dataset.sample(plan.dataset.row[sample])
        draws.append(draw_sample(*cells, sample, plan.spec.contract, epoch=1)[0])
    return unweighted_unifrac(draws, plan.dataset.paths)[np.triu_indices(len(draws), 1)]


def test_the_estimate_is_close_to_all_distances(synthetic_folder):
    plan = make_plan(pretrain_config(synthetic_folder, OUT))
    truth = all_distances(plan)
    assert plan.spec.distance_mean == pytest.approx(truth.mean(), rel=0.02)
    assert plan.spec.distance_variance == pytest.approx(truth.var(), rel=0.1)
    blocks = estimate_distances(plan.dataset, plan.split.train, plan.spec.contract, blocks=30, size=8)
    assert blocks[0] == pytest.approx(truth.mean(), rel=0.05)
    assert blocks[1] == pytest.approx(truth.var(), rel=0.3)


def test_samples_all_alike_are_refused(synthetic_folder):
    plan = make_plan(pretrain_config(synthetic_folder, OUT))
    with pytest.raises(ValueError, match="same UniFrac distance"):
        estimate_distances(plan.dataset, plan.split.train[:2], plan.spec.contract)


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
