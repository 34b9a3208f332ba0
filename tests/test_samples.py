"""Which samples a run uses: what is dropped and said, what is refused."""

import json

import biom
import h5py
import pytest
import skbio

from aam.config import DEFAULT_RAREFY_DEPTH, RayConfig, TargetConfig
from aam.distributed.checkpoints import run_record
from aam.plan import make_plan
from plans import change_metadata, pretrain, refusal, site, train, write_ids

# What is dropped, and said


def test_samples_below_the_depth_are_counted_and_named(synthetic_folder):
    plan = make_plan(pretrain(synthetic_folder, rarefy_depth=DEFAULT_RAREFY_DEPTH))
    depths = dict(zip(plan.dataset.sample_ids, plan.dataset.depths.tolist(), strict=True))
    shallow = [s for s, reads in depths.items() if reads < 1000]
    used = set(plan.split.train) | set(plan.split.val)
    assert shallow
    assert used == {s for s, reads in depths.items() if reads >= 1000}
    [note] = [n for n in plan.notes if "--rarefy-depth" in n]
    assert note.startswith(f"{len(shallow)} sample")
    assert "fewer reads than --rarefy-depth 1000" in note
    assert shallow[0] in note


def test_a_depth_above_all_samples_is_refused_with_the_deepest(synthetic_folder):
    depths = make_plan(pretrain(synthetic_folder)).dataset.depths
    message = refusal(pretrain(synthetic_folder, rarefy_depth=10**8))
    assert "all 40 samples have fewer reads than --rarefy-depth 100000000" in message
    assert str(depths.max()) in message


def test_samples_without_a_target_are_dropped_and_named(synthetic_folder):
    plan = make_plan(train(synthetic_folder, rarefy_depth=0))
    column = plan.dataset.metadata["gradient"]
    without = [s for s in plan.dataset.sample_ids if column[s] is None]
    assert without
    assert not set(without) & {*plan.split.train, *plan.split.val, *plan.targets}
    [note] = [n for n in plan.notes if "no value in column 'gradient'" in n]
    assert without[0] in note


def test_samples_that_the_metadata_lacks_are_an_error_unless_ignored(synthetic_folder, tmp_path):
    path = change_metadata(synthetic_folder, tmp_path, lambda frame: frame.drop(index=["0001.01", "0003.01"]))
    for make in (train, pretrain):
        message = refusal(make(synthetic_folder, metadata=path, rarefy_depth=0))
        assert f"{path}: 2 samples of the table are not in it (0001.01, 0003.01)" in message
        assert "--missing-samples ignore" in message
        plan = make_plan(make(synthetic_folder, metadata=path, rarefy_depth=0, missing_samples="ignore"))
        assert not {"0001.01", "0003.01"} & {*plan.split.train, *plan.split.val}
        assert "2 samples dropped: not in the metadata (0001.01, 0003.01)" in plan.notes
    # Stage 1 without groups does not ask the metadata.
    assert make_plan(pretrain(synthetic_folder, metadata=path, group_column=None)).split.train


# Id files


def test_id_files_are_followed_and_test_samples_kept_back(synthetic_folder, tmp_path):
    ids = make_plan(pretrain(synthetic_folder)).dataset.sample_ids
    depths = make_plan(pretrain(synthetic_folder)).dataset.depths
    ids = [s for s, reads in zip(ids, depths, strict=True) if reads >= 200]
    files = {
        "train_ids": write_ids(tmp_path / "train.txt", ids[:20]),
        "val_ids": write_ids(tmp_path / "val.txt", ids[20:28]),
        "test_ids": write_ids(tmp_path / "test.txt", ids[28:31]),
    }
    split = make_plan(pretrain(synthetic_folder, **files)).split
    assert (split.train, split.val, split.test) == (ids[:20], ids[20:28], ids[28:31])
    plan = make_plan(pretrain(synthetic_folder, test_ids=files["test_ids"]))
    assert plan.split.test == ids[28:31]
    assert sorted([*plan.split.train, *plan.split.val, *plan.split.test]) == sorted(ids)
    assert not any("id file" in note for note in plan.notes)  # the others are drawn, not unused


def test_an_id_file_may_list_samples_that_the_plan_dropped(synthetic_folder, tmp_path):
    first = make_plan(train(synthetic_folder, rarefy_depth=0))
    without = next(s for s in first.dataset.sample_ids if s not in first.targets)
    used = sorted(first.targets)
    files = {
        "train_ids": write_ids(tmp_path / "train.txt", [*used[:20], without]),
        "val_ids": write_ids(tmp_path / "val.txt", used[20:]),
    }
    plan = make_plan(train(synthetic_folder, rarefy_depth=0, **files))
    assert plan.split.train == used[:20]
    assert f"--train-ids: 1 sample dropped: no value in column 'gradient' ({without})" in plan.notes
    assert "the id files split the samples, --group-column subject does not" in plan.notes


def test_an_id_file_may_list_samples_without_reads(synthetic_folder, tmp_path):
    whole = biom.load_table(str(synthetic_folder / "table.biom"))
    ids = list(whole.ids())
    emptied = whole.transform(lambda reads, name, _: reads * (name != ids[0]), inplace=False)
    with h5py.File(tmp_path / "table.biom", "w") as file:
        emptied.to_hdf5(file, "test")
    files = {
        "train_ids": write_ids(tmp_path / "train.txt", ids[:20]),
        "val_ids": write_ids(tmp_path / "val.txt", ids[20:]),
    }
    plan = make_plan(pretrain(synthetic_folder, table=tmp_path / "table.biom", rarefy_depth=0, **files))
    assert plan.split.train == ids[1:20]
    assert f"--train-ids: 1 sample dropped: no reads ({ids[0]})" in plan.notes


# Test samples that are drawn


@pytest.mark.parametrize("group_column", ["subject", None])
def test_both_stages_draw_the_same_test_samples_whatever_they_drop(synthetic_folder, tmp_path, group_column):
    tree = skbio.TreeNode.read(str(synthetic_folder / "tree.nwk"))
    table = biom.load_table(str(synthetic_folder / "table.biom"))
    lonely = table.ids()[0]  # a sample whose ASVs the tree lacks: stage 1 drops it, stage 2 does not
    lost = set(table.ids("observation")[table.data(lonely) > 0])
    tree.shear([tip.name for tip in tree.tips() if tip.name not in lost]).write(str(tmp_path / "tree.nwk"))
    data = {"test_fraction": 0.3, "rarefy_depth": 0, "group_column": group_column}
    first = make_plan(pretrain(synthetic_folder, tree=tmp_path / "tree.nwk", max_missing_from_tree=1, **data))
    second = make_plan(train(synthetic_folder, **data))
    third = make_plan(train(synthetic_folder, target=site(), **data))
    assert lonely in first.dataset.manifest["dropped_samples"]
    assert set(second.targets) < set(third.targets), "no sample is without a target"
    test = set(third.split.test)
    assert len(test) == pytest.approx(12, abs=3)
    assert set(first.split.test) == test - {lonely}
    assert set(second.split.test) == test & set(second.targets)
    for plan in (first, second, third):
        assert not test & {*plan.split.train, *plan.split.val}
        if group_column:
            subject = third.dataset.metadata["subject"]
            assert not set(subject[sorted(test)]) & set(subject[[*plan.split.train, *plan.split.val]])


def test_a_base_that_saw_samples_held_back_is_said(synthetic_folder, tmp_path):
    config = pretrain(synthetic_folder)
    base = make_plan(config)
    checkpoint = tmp_path / "base" / "ray" / "train" / "epoch_0001"
    checkpoint.mkdir(parents=True)
    run_json = tmp_path / "base" / "run.json"
    run_json.write_text(json.dumps(base.describe(config)))
    ids = [s for s in base.split.train if s in make_plan(train(synthetic_folder)).targets]
    test = write_ids(tmp_path / "test.txt", [*ids[:3], *base.split.val[:1]])
    plan = make_plan(train(synthetic_folder, test_ids=test), (checkpoint, base.spec), run_record(checkpoint))
    assert any(note.startswith(f"4 of {len(plan.split.test)} test samples trained the base or chose its best ")
               for note in plan.notes)  # fmt: skip
    drawn = {"test_fraction": 0.2}
    config = pretrain(synthetic_folder, **drawn)
    run_json.write_text(json.dumps(make_plan(config).describe(config)))
    plan = make_plan(train(synthetic_folder, **drawn), (checkpoint, base.spec), run_record(checkpoint))
    assert not any("test samples trained the base" in note for note in plan.notes)


def test_test_samples_of_which_none_can_be_used(synthetic_folder, tmp_path):
    drawn = make_plan(pretrain(synthetic_folder, test_fraction=0.2, rarefy_depth=0)).split.test

    def blank(frame):
        frame.loc[drawn, "gradient"] = "not provided"

    path = change_metadata(synthetic_folder, tmp_path, blank)
    message = refusal(train(synthetic_folder, metadata=path, test_fraction=0.2, rarefy_depth=0))
    assert f"none of the {len(drawn)} samples drawn by --test-fraction 0.2 can be used" in message
    assert "no value in column 'gradient'" in message


# Targets that cannot be learned


def test_a_target_that_is_no_number_shows_its_values(synthetic_folder):
    message = refusal(train(synthetic_folder, target=TargetConfig(target="site")))
    assert "column 'site' is not numeric" in message
    assert "'gut'" in message
    assert "--classifier" in message


def test_an_unknown_column_names_the_others(synthetic_folder):
    message = refusal(train(synthetic_folder, target=TargetConfig(target="Gradiend")))
    assert "did you mean 'gradient'" in message
    message = refusal(train(synthetic_folder, group_column="person"))
    assert "no column 'person'" in message
    assert "'subject'" in message


def test_a_class_of_the_validation_samples_only_is_refused(synthetic_folder, tmp_path):
    ids = make_plan(train(synthetic_folder, target=site(), rarefy_depth=0)).dataset.sample_ids

    def rename(frame):
        frame.loc[ids[-1], "site"] = "moon"

    files = {
        "train_ids": write_ids(tmp_path / "train.txt", ids[:30]),
        "val_ids": write_ids(tmp_path / "val.txt", ids[30:]),
    }
    path = change_metadata(synthetic_folder, tmp_path, rename)
    config = train(
        synthetic_folder,
        target=site(),
        rarefy_depth=0,
        metadata=path,
        **files,
    )
    message = refusal(config)
    assert "column 'site'" in message
    assert "'moon'" in message


def test_one_class_is_refused(synthetic_folder, tmp_path):
    path = change_metadata(synthetic_folder, tmp_path, lambda frame: frame.assign(site="gut"))
    message = refusal(train(synthetic_folder, target=site(), metadata=path))
    assert "column 'site' has one class only" in message
    assert "gut" in message


def test_a_number_taken_for_classes_is_refused(synthetic_folder):
    config = train(synthetic_folder, target=TargetConfig(target="gradient", classifier=True), group_column="plate")
    assert "too few of each to learn (a number? leave --classifier out)" in refusal(config)


@pytest.mark.parametrize("transform", ["zscore", "minmax", "log1p-zscore"])
def test_a_constant_target_is_refused(synthetic_folder, transform, tmp_path):
    path = change_metadata(synthetic_folder, tmp_path, lambda frame: frame.assign(gradient="3.5"))
    target = TargetConfig(target="gradient", target_transform=transform)
    assert "is 3.5 for all training samples" in refusal(train(synthetic_folder, target=target, metadata=path))


def test_a_target_without_any_value_is_refused(synthetic_folder, tmp_path):
    path = change_metadata(synthetic_folder, tmp_path, lambda frame: frame.assign(gradient="not collected"))
    message = refusal(train(synthetic_folder, metadata=path))
    assert f"{path}: column 'gradient' has no value" in message


def test_a_validation_target_beyond_the_transform_is_refused(synthetic_folder, tmp_path):
    ids = make_plan(train(synthetic_folder, rarefy_depth=0)).dataset.sample_ids

    def lower(frame):
        frame["gradient"] = [str(i) for i in range(len(frame))]
        frame.loc[ids[-1], "gradient"] = "-5"

    files = {
        "train_ids": write_ids(tmp_path / "train.txt", ids[:30]),
        "val_ids": write_ids(tmp_path / "val.txt", ids[30:]),
    }
    target = TargetConfig(target="gradient", target_transform="log1p-zscore")
    path = change_metadata(synthetic_folder, tmp_path, lower)
    config = train(
        synthetic_folder,
        target=target,
        rarefy_depth=0,
        metadata=path,
        **files,
    )
    message = refusal(config)
    assert "column 'gradient'" in message
    assert "--target-transform log1p-zscore" in message


# Groups and sizes


def test_groups_without_a_value_are_refused(synthetic_folder, tmp_path):
    def blank(frame):
        frame.loc[["0002.01", "0004.01"], "subject"] = "not provided"

    path = change_metadata(synthetic_folder, tmp_path, blank)
    message = refusal(pretrain(synthetic_folder, metadata=path, rarefy_depth=0))
    assert "column 'subject' has no value for 2 samples (0002.01, 0004.01)" in message
    assert "--train-ids" in message


def test_a_single_group_is_refused(synthetic_folder, tmp_path):
    path = change_metadata(synthetic_folder, tmp_path, lambda frame: frame.assign(subject="me"))
    assert "--group-column has one group only (me)" in refusal(pretrain(synthetic_folder, metadata=path))


def test_groups_need_metadata(synthetic_folder):
    assert refusal(pretrain(synthetic_folder, metadata=None)) == "--group-column needs --metadata"


def test_too_few_samples_for_the_workers_are_refused(synthetic_folder, tmp_path):
    ids = make_plan(pretrain(synthetic_folder, rarefy_depth=0)).dataset.sample_ids
    files = {
        "train_ids": write_ids(tmp_path / "train.txt", ids[:30]),
        "val_ids": write_ids(tmp_path / "val.txt", ids[30:32]),
    }
    assert make_plan(pretrain(synthetic_folder, rarefy_depth=0, **files)).split.val == ids[30:32]
    message = refusal(pretrain(synthetic_folder, rarefy_depth=0, ray=RayConfig(num_workers=3), **files))
    assert "validation samples left: 2, needed: 3 (one for each of 3 workers)" in message
    write_ids(files["val_ids"], ids[30:31])
    message = refusal(pretrain(synthetic_folder, rarefy_depth=0, **files))
    assert "validation samples left: 1, needed: 2 (UniFrac compares pairs)" in message
