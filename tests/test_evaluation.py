"""Folds, intervals and tests: by what they must be for any samples; joined runs; one evaluation from end to end."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest, wilcoxon

from aam.baselines import fit_predict, reads_of
from aam.config import DataConfig, EvaluateConfig, Location, LoopConfig, ModelConfig, TargetConfig
from aam.distributed.evaluation import check_asked, evaluate, plan_parts, stages_of
from aam.evaluation.folds import _held_out, draw_folds, draw_once
from aam.evaluation.outcome import Outcome, model_runs, scored_samples
from aam.evaluation.results import assess, to_markdown
from aam.evaluation.scores import Samples, compare, score
from aam.plan import make_plan
from aam.predict import Predictions
from aam.training.metrics import classification_metrics, regression_metrics
from aam.training.targets import Target
from plans import change_metadata, write_ids
from runs import TINY, data_config, fit_here, pretrain_config, train_config

IDS = [f"s{i:02d}" for i in range(60)]
GROUPS = [f"g{i % 12}" for i in range(60)]
LABELS = ["a" if i % 12 < 4 else "b" if i % 12 < 8 else "c" for i in range(60)]

# Folds


@pytest.mark.parametrize("groups", [None, GROUPS])
@pytest.mark.parametrize("classes", [None, LABELS])
def test_each_sample_is_a_test_sample_once_and_its_group_is_on_one_side(groups, classes):
    drawn = {"folds": 4, "val_fraction": 0.25, "seed": 1}
    splits = draw_folds(IDS, **drawn, groups=groups, classes=classes)
    assert sorted(s for split in splits for s in split.test) == IDS
    of, label = dict(zip(IDS, GROUPS, strict=True)), dict(zip(IDS, LABELS, strict=True))
    for split in splits:
        assert sorted([*split.train, *split.val, *split.test]) == IDS
        assert min(len(split.train), len(split.val), len(split.test)) >= 5
        if groups is not None:
            parts = [{of[s] for s in part} for part in (split.train, split.val, split.test)]
            assert sum(map(len, parts)) == len(set.union(*parts))
        if classes is not None:
            assert {label[s] for s in split.train} == {label[s] for s in split.test} == {"a", "b", "c"}
    backwards = {k: None if v is None else v[::-1] for k, v in {"groups": groups, "classes": classes}.items()}
    assert draw_folds(IDS[::-1], **drawn, **backwards) == splits
    assert draw_folds(IDS, **(drawn | {"seed": 2}), groups=groups, classes=classes) != splits


def test_folds_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="--folds 13: there are 12 groups of 60 samples only"):
        draw_folds(IDS, folds=13, val_fraction=0.2, seed=0, groups=GROUPS)
    few = ["a", "b", *["c", "d"] * 2]
    with pytest.raises(ValueError, match=r"--folds 3: n_splits=3 cannot be greater .*; give fewer folds"):
        draw_folds(IDS[:6], folds=3, val_fraction=0.2, seed=0, classes=few)


@pytest.mark.filterwarnings("ignore:The least populated class")
@pytest.mark.parametrize("rare", [1, 2, 3])
def test_a_class_of_few_samples_stops_nothing_and_is_never_all_in_validation(rare):
    labels = [*["a"] * 30, *["b"] * (30 - rare), *["c"] * rare]
    of = dict(zip(IDS, labels, strict=True))
    for seed in range(8):
        fractions = {"val_fraction": 0.2, "seed": seed}
        splits = [*draw_folds(IDS, folds=2, **fractions, classes=labels),
                  draw_once(IDS, test_fraction=0.2, **fractions, classes=labels)]  # fmt: skip
        for split in splits:
            assert sorted([*split.train, *split.val, *split.test]) == IDS
            assert {of[s] for s in split.val} <= {of[s] for s in split.train}
        assert "c" in {of[s] for s in splits[-1].train}


def test_a_class_of_one_group_is_learned_from_wherever_it_can_be():
    groups = [f"g{i // 6}" for i in range(48)]
    labels = ["c" if group == "g0" else "ab"[i // 6 % 2] for i, group in enumerate(groups)]
    of = dict(zip(IDS, labels, strict=False))
    for seed in range(8):
        fractions = {"val_fraction": 0.25, "seed": seed}
        splits = draw_folds(IDS[:48], folds=4, **fractions, groups=groups, classes=labels)
        assert sorted(s for split in splits for s in split.test) == IDS[:48]
        assert sum("c" in {of[s] for s in split.train} for split in splits) == 3, "but in the fold that tests it"
        for split in splits:
            assert {of[s] for s in split.val} <= {of[s] for s in split.train}


@pytest.mark.filterwarnings("ignore:The least populated class")
def test_no_fold_is_empty_where_there_are_as_many_groups_as_folds():
    groups = np.repeat(["g0", "g1", "g2", "g3", "g4"], [8, 1, 10, 2, 1]).tolist()
    labels = np.repeat(["a", "b", "a", "a", "a"], [8, 1, 10, 2, 1]).tolist()
    for seed in range(40):
        held = _held_out(np.array(IDS[:22]), 5, seed, np.array(groups), np.array(labels))
        assert min(map(len, held)) > 0, seed


# Scores


def numbers(groups=None, n=40) -> Samples:
    truth = np.random.default_rng(0).normal(100, 30, n)
    return Samples(ids=IDS[:n], truth=truth, groups=None if groups is None else np.array(groups[:n]))


def classes(n=40) -> Samples:
    return Samples(ids=IDS[:n], truth=np.random.default_rng(1).integers(0, 3, n), classes=("a", "b", "c"))


def noisy(samples: Samples, seed: int, size: float) -> np.ndarray:
    random = np.random.default_rng(seed)
    if not samples.classes:
        return samples.truth + random.normal(0, size, len(samples.truth))
    said = np.eye(3)[samples.truth] + random.random((len(samples.truth), 3)) * size
    return said / said.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("samples", [numbers(), numbers(GROUPS), classes()], ids=["numbers", "groups", "classes"])
def test_a_resample_scores_as_the_samples_drawn_would(samples):
    said, weights = noisy(samples, 2, 3.0), samples.weights(0, 20)
    metrics = classification_metrics if samples.classes else regression_metrics
    resampled = samples.resampled(said, weights)
    for row, drawn in enumerate(weights):
        rows = np.repeat(np.arange(len(said)), drawn.astype(int))
        expected = metrics(samples.truth[rows], said[rows])
        for name, values in resampled.items():
            assert values[row] == pytest.approx(expected[name]), name


def test_groups_are_drawn_as_a_whole():
    samples = numbers(GROUPS)
    weights = samples.weights(0, 50)
    for name in set(samples.groups):
        of_group = weights[:, samples.groups == name]
        assert (of_group == of_group[:, :1]).all()
    assert len(np.unique(weights.sum(axis=1))) > 1, "groups of 3 and of 4"
    assert (numbers().weights(0, 50).sum(axis=1) == 40).all()


@pytest.mark.parametrize("samples", [numbers(), numbers(GROUPS), classes()], ids=["numbers", "groups", "classes"])
def test_intervals_hold_the_score_and_runs_are_averaged(samples):
    runs = [noisy(samples, seed, 2.0) for seed in range(3)]
    found = score(samples, runs, samples.weights(0))
    for name, (low, high) in found.interval.items():
        assert low < found.mean[name] < high, name
        each = [samples.scores(said)[name] for said in runs]
        assert found.mean[name] == pytest.approx(np.mean(each))
        assert found.spread[name] == pytest.approx(np.std(each, ddof=1))
    assert score(samples, runs[:1], samples.weights(0)).spread == {}


@pytest.mark.parametrize("samples", [numbers(), classes()], ids=["numbers", "classes"])
def test_folds_are_scored_each_by_itself_too(samples):
    folds = {1: np.arange(40) % 4, 2: np.arange(40) // 10}
    samples = replace(samples, folds=folds)
    said = {(repeat, seed): noisy(samples, 10 * repeat + seed, 2.0) for repeat in (1, 2) for seed in (0, 1)}
    other = {1: said[1, 0], 2: said[2, 1]}
    found = assess("age", samples, said, {"depth": other}, seed=0, caveats=[], notes=[])
    name = samples.main_metric

    def of_fold(values, repeat, fold):
        return replace(samples, truth=samples.truth[folds[repeat] == fold]).scores(values[folds[repeat] == fold])[name]

    pairs = [(repeat, fold) for repeat in (1, 2) for fold in range(4)]
    by_hand = {
        "model": [np.mean([of_fold(said[r, seed], r, fold) for seed in (0, 1)]) for r, fold in pairs],
        "depth": [of_fold(other[r], r, fold) for r, fold in pairs],
    }
    text = to_markdown(found)
    for label, scores in (("model", found.model), ("depth", found.baselines["depth"])):
        assert scores.fold_mean[name] == pytest.approx(np.mean(by_hand[label]))
        assert scores.fold_spread[name] == pytest.approx(np.std(by_hand[label], ddof=1))
        assert f"{np.mean(by_hand[label]):.4g} ({np.std(by_hand[label], ddof=1):.2g})" in text
    assert found.predictions["fold_repeat2"].tolist() == folds[2].tolist()


def test_a_score_that_a_fold_lacks_is_named_and_one_fold_has_no_spread():
    samples = replace(classes(), truth=np.array([0, 1] * 10 + [0, 1, 2, 2] * 5), folds={1: np.arange(40) // 20})
    said = {(1, 0): noisy(samples, 1, 1.0)}
    found = assess("site", samples, said, {}, seed=0, caveats=[], notes=[])
    assert "auroc" in found.model.mean
    assert "auroc" not in found.model.fold_mean
    assert "too few samples or classes for it: auroc." in to_markdown(found)
    alone = assess("site", replace(samples, folds={1: np.ones(40)}), said, {}, seed=0, caveats=[], notes=[])
    assert alone.model.fold_mean == alone.model.mean
    assert "(0)" in to_markdown(alone)


@pytest.mark.parametrize("samples", [numbers(), classes()], ids=["numbers", "classes"])
def test_a_perfect_model_is_better_and_an_equal_one_is_not(samples):
    weights, poor = samples.weights(0), [noisy(samples, 4, 10.0)]
    perfect = [noisy(samples, 0, 0.0)]
    found, back = compare(samples, perfect, poor, weights), compare(samples, poor, perfect, weights)
    gain = 1 if samples.classes else -1
    assert gain * found.difference > 0
    assert min(gain * end for end in found.interval) > 0
    assert found.p_value == pytest.approx(back.p_value)
    assert found.p_value < 1e-3
    assert (found.better_share, back.better_share) == (1, 0)
    equal = compare(samples, poor, poor, weights)
    assert (equal.difference, equal.interval, equal.p_value, equal.better_share) == (0, (0, 0), 1, 0.5)


@pytest.mark.parametrize("samples", [numbers(), classes()], ids=["numbers", "classes"])
def test_a_target_that_sequencing_depth_tells_is_told(samples):
    good, constant = noisy(samples, 0, 0.1), noisy(samples, 0, 0.0) * 0 + (1 / 3 if samples.classes else 100.0)
    always = "majority" if samples.classes else "mean"
    metric, than = ("balanced_accuracy", "guessing, which has 0.3333") if samples.classes else ("mae", "mean by ")
    cases = [(good, always), (constant, always), *([] if samples.classes else [(good, "other")])]
    for depth, baseline in cases:
        baselines = {"depth": {1: depth}, baseline: {1: constant}}
        found = assess("y", samples, {(1, 0): good}, baselines, seed=0, caveats=["first"], notes=[])
        if depth is constant or baseline == "other":
            assert found.caveats == ["first"]
            continue
        assert found.caveats[0] == "first"
        assert found.caveats[1].startswith("SEQUENCING DEPTH alone, the number of reads of a sample, has ")
        assert f"{metric} {samples.scores(depth)[metric]:.4g}, better than {than}" in found.caveats[1]


def test_guesses_are_not_taken_for_what_sequencing_depth_tells():
    samples = classes(60)
    told = 0
    for seed in range(40):
        guessed = np.random.default_rng(seed).dirichlet(np.ones(3), 60)
        baselines = {"depth": {1: guessed}, "majority": {1: np.full((60, 3), 1 / 3)}}
        told += len(assess("y", samples, {(1, 0): guessed}, baselines, seed=0, caveats=[], notes=[]).caveats)
    assert told <= 3, "one in forty, by a 95 % interval"


@pytest.mark.parametrize("units", [1, 5, 6])
@pytest.mark.parametrize("grouped", [False, True])
def test_of_few_samples_or_groups_nothing_is_told_apart(units, grouped):
    n = 4 * units if grouped else units
    samples = Samples(ids=IDS[:n], truth=np.arange(n, dtype=float),
                      groups=np.array(IDS)[np.arange(n) % units] if grouped else None)  # fmt: skip
    poor = {"mean": {1: samples.truth + 10}, "depth": {1: samples.truth}}
    found = assess("y", samples, {(1, 0): samples.truth + 1}, poor, seed=0, caveats=[], notes=[])
    [row] = [line for line in to_markdown(found).splitlines() if line.startswith("| mean | -9")]
    assert row.split("|")[3].strip() == ("better" if units == 6 else "not told apart (too few)")
    assert len(found.caveats) == (units == 6)
    what = "groups" if grouped else "samples"
    assert any(note.startswith(f"{units} {what} only: ") for note in found.notes)


def test_a_class_that_no_sample_has_is_no_f1_of_nought_among_few():
    truth = np.array([*[0] * 50, *[1] * 50])
    samples = Samples(ids=[f"s{i}" for i in range(100)], truth=truth, classes=("a", "b", "c"))
    said = np.eye(3)[np.where(np.arange(100) == 7, 2, truth)]
    found = score(samples, [said], samples.weights(0))
    assert found.mean["macro_f1"] == pytest.approx((2 * 49 / 99 + 1) / 2)
    assert min(found.interval["macro_f1"]) > 0.9


def test_p_values_are_scipys():
    samples = numbers()
    model, baseline = noisy(samples, 1, 5.0), noisy(samples, 2, 7.0)
    errors = [np.abs(said - samples.truth) for said in (model, baseline)]
    found = compare(samples, [model], [baseline], samples.weights(0, 10))
    assert found.p_value == wilcoxon(*errors).pvalue
    codes = np.zeros(20, dtype=np.int64)
    yes_no = Samples(ids=IDS[:20], truth=codes, classes=("a", "b"))
    says = [np.eye(2)[[*([0] * right), *([1] * (20 - right))]] for right in (12, 3)]
    found = compare(yes_no, says[:1], says[1:], yes_no.weights(0, 10))
    assert found.p_value == binomtest(9, 9, 0.5).pvalue, "9 samples that one has right and the other wrong"


# Runs


def outcome(dataset, ids, *, repeat=1, fold=1, seed=0, names=("gut", "skin"), train=(), metadata=None) -> Outcome:
    target = Target(column="site", classes=names, loss="cross_entropy")
    probabilities = np.full((len(ids), len(names)), 0.1 * seed)
    probabilities[:, 0] += fold
    said = Predictions(target=target, dataset=dataset, sample_ids=ids, values=[names[0]] * len(ids),
                       probabilities=probabilities, skipped={})  # fmt: skip
    record = {"config": {"data": {"table": "t", "metadata": str(metadata)}}, "split": {"train": list(train)}}
    return Outcome(repeat=repeat, fold=fold, seed=seed, found=said, record=record, base_record=None)


def test_folds_are_put_together_by_sample_and_class(synthetic_folder, tmp_path):
    target = TargetConfig(target="site", classifier=True)
    dataset = make_plan(train_config(synthetic_folder, tmp_path, target=target)).dataset
    site = dataset.metadata["site"].dropna()
    ids = [s for s in dataset.sample_ids if s in site.index]
    halves, soil = (ids[::2], ids[1::2]), {s for s in ids if site[s] == "soil"}
    outcomes = [
        outcome(dataset, half, fold=fold, seed=seed, names=names)
        for seed in (0, 1)
        for fold, (half, names) in enumerate(zip(halves, [("gut", "skin"), ("gut", "skin", "soil")], strict=True))
    ]
    samples, notes = scored_samples(outcomes, "subject")
    assert samples.classes == ("gut", "skin", "soil")
    lost = soil & set(halves[0])
    assert 0 < len(lost) < len(soil)
    assert samples.ids == sorted(set(ids) - lost)
    [note] = notes
    assert note.startswith(f"not scored: {len(lost)} (class 'soil', which no training sample has;")
    runs = model_runs(samples, outcomes)
    assert list(runs) == [(1, 0), (1, 1)]
    for (_, seed), said in runs.items():
        for sample, row in zip(samples.ids, said, strict=True):
            fold = int(sample in halves[1])
            assert row.tolist() == pytest.approx([fold + 0.1 * seed, 0.1 * seed, 0.1 * seed * fold])
    assert [samples.classes[code] for code in samples.truth] == site[samples.ids].tolist()
    assert samples.groups.tolist() == dataset.metadata.loc[samples.ids, "subject"].tolist()
    assert samples.folds[1].tolist() == [int(sample in halves[1]) for sample in samples.ids]
    assert scored_samples(outcomes[:1], "subject")[0].folds == {}, "one split"


# Splits of both stages


def settings(folder, tmp_path, *, data: DataConfig | None = None, **changed) -> EvaluateConfig:
    given = {"loss": TargetConfig(target="gradient"), "loop": LoopConfig(epochs=1, batch_size=16), "model": TINY}
    return EvaluateConfig(output_dir=tmp_path / "e", data=data or data_config(folder), **(given | changed))


def test_stage_1_sees_no_test_group_in_any_fold_and_all_seeds_share_a_split(synthetic_folder, tmp_path):
    def forget(frame: pd.DataFrame) -> None:
        frame.loc[frame.index[::5], "gradient"] = "not collected"

    metadata = change_metadata(synthetic_folder, tmp_path, forget)
    data = data_config(synthetic_folder, metadata=metadata)
    config = settings(synthetic_folder, tmp_path, data=data, folds=3, seeds=2, repeats=2)
    parts, _ = plan_parts(config)
    assert [part.name for part in parts] == [f"repeat-{r}/fold-{f}" for r in (1, 2) for f in (1, 2, 3)]
    assert parts[0].split != parts[3].split
    more = 0
    for part in parts:
        folder = config.output_dir / part.name
        plans = [[make_plan(replace(stage, pretrained=None) if i else stage)
                  for i, stage in enumerate(stages_of(config, part, seed))] for seed in (0, 1)]  # fmt: skip
        for first, second in plans:
            assert first.output_dir.parent == second.output_dir.parent
            assert (second.split.train, second.split.test) == (part.split.train, part.split.test)
            of = first.dataset.metadata["subject"]
            held = set(of[[*part.split.test, *part.split.val]])
            assert held.isdisjoint(of[first.split.train])
            assert set(second.split.train) <= set(first.split.train)
            more += len(first.split.train) - len(second.split.train)
        assert [second.loop.seed for _, second in plans] == [0, 1]
        assert (folder / "test.txt").read_text().split() == part.split.test
    assert more > 0, "samples without a target teach stage 1"
    assert plan_parts(config)[0] == parts
    with pytest.raises(ValueError, match="this evaluation was started with another split"):
        plan_parts(replace(config, loop=LoopConfig(seed=5)))


def test_transductive_lets_stage_1_have_the_test_samples_and_nothing_else_does(synthetic_folder, tmp_path):
    config = settings(synthetic_folder, tmp_path, transductive=True)
    [part], _ = plan_parts(config)
    first, second = stages_of(config, part, 0)
    assert set(part.split.test) < set(make_plan(first).split.train)
    assert make_plan(replace(second, pretrained=None)).split.test == part.split.test
    with pytest.raises(ValueError, match="not in --train-flags"):
        stages_of(replace(config, train_flags="--train-ids a --val-ids b"), part, 0)


def test_id_files_are_kept_to_in_both_stages(synthetic_folder, tmp_path):
    drawn = make_plan(train_config(synthetic_folder, tmp_path, data=data_config(synthetic_folder, test_fraction=0.3)))
    lists = {part: getattr(drawn.split, part)[1:] for part in ("train", "val", "test")}
    files = {f"{part}_ids": write_ids(tmp_path / f"{part}.txt", ids) for part, ids in lists.items()}
    config = settings(synthetic_folder, tmp_path, data=data_config(synthetic_folder, **files))
    [part], _ = plan_parts(config)
    assert part.name == ""
    first, second = stages_of(config, part, 0)
    assert first.output_dir == config.output_dir / "seed-0" / "stage1"
    for stage in (first, replace(second, pretrained=None)):
        split = make_plan(stage).split
        assert {"train": split.train, "val": split.val, "test": split.test} == lists


# The job


def test_a_finished_run_is_scored_on_its_own_split(run_here, synthetic_folder, tmp_path):
    base = pretrain_config(synthetic_folder, tmp_path / "1", epochs=1)
    data = data_config(synthetic_folder, test_fraction=0.3)
    config = train_config(synthetic_folder, tmp_path / "2", data=data, pretrained=tmp_path / "1", epochs=1)
    for settings_of in (base, config):
        plan = fit_here(settings_of)
        (settings_of.output_dir / "run.json").write_text(json.dumps(plan.describe(settings_of)))
    flags = ["--checkpoint", tmp_path / "2", "--output-dir", tmp_path / "e", "--json", tmp_path / "s.json",
             "--table", data.table, "--metadata", data.metadata, "--target", "gradient", "--seeds", "3",
             "--skip-baselines", "gradient_boosting", "random_forest"]  # fmt: skip
    done = run_here("evaluate.py", *flags)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "s.json").read_text())
    truth = plan.dataset.metadata.loc[plan.split.test, "gradient"].astype(float)
    table = pd.read_csv(tmp_path / "e" / "predictions.tsv", sep="\t", dtype={"SampleID": str}, index_col=0)
    assert table.index.tolist() == sorted(plan.split.test)
    assert table["truth"].to_dict() == truth.to_dict()
    done = run_here("predict.py", "--checkpoint", tmp_path / "2", "--part", "test", "--output", tmp_path / "p.tsv")
    assert done.returncode == 0, done.stderr
    said = pd.read_csv(tmp_path / "p.tsv", sep="\t", dtype={"SampleID": str}, index_col=0)["prediction"]
    pd.testing.assert_series_equal(table["model_seed0"], said[table.index], check_names=False)
    expected = regression_metrics(truth[table.index], said[table.index])
    assert {name: found["model"][name] for name in expected} == pytest.approx(expected)
    labelled = [*plan.split.train, *plan.split.val]
    numbers_of = plan.dataset.metadata.loc[labelled, "gradient"].to_numpy(float)
    assert set(found["baselines"]) == {
        "mean", "median", "depth", "ridge", "random_forest_third", "random_forest_median"}  # fmt: skip
    for name, scores in found["baselines"].items():
        reads = [reads_of(plan.dataset, ids) for ids in (labelled, table.index)]
        direct = fit_predict(name, reads[0], numbers_of, reads[1])
        assert scores["mae"] == pytest.approx(regression_metrics(truth[table.index], direct)["mae"])
        low, high = scores["interval"]["mae"]
        assert low < scores["mae"] < high
        against = scores["model_minus_baseline"]["difference"]
        assert against == pytest.approx(found["model"]["mae"] - scores["mae"])
    run_here("evaluate.py", *flags, "random_forest_median", "--rarefied-baselines")
    rarefied = json.loads((tmp_path / "s.json").read_text())
    reads = [reads_of(plan.dataset, ids, plan.spec.contract) for ids in (labelled, table.index)]
    direct = fit_predict("ridge", reads[0], numbers_of, reads[1])
    assert rarefied["baselines"]["ridge"]["mae"] == pytest.approx(regression_metrics(truth[table.index], direct)["mae"])
    assert rarefied["baselines"]["ridge"]["mae"] != found["baselines"]["ridge"]["mae"]
    assert any("fixed settings, the 200 reads of each sample that the model sees" in n for n in rarefied["notes"])
    run_here("evaluate.py", *flags)
    of_base = json.loads((tmp_path / "1" / "run.json").read_text())["split"]
    seen = len({*of_base["train"], *of_base["val"]} & set(plan.split.test))
    assert seen > 0
    caveat = found["caveats"][0]
    assert caveat.startswith(f"TRANSDUCTIVE: stage 1 was trained, without labels, on {seen} of the {len(truth)}")
    text = (tmp_path / "e" / "evaluation.md").read_text()
    assert caveat in text
    assert f"a finished run, {tmp_path / '2'}: nothing was trained here" in text
    assert found["command"].startswith(f"python jobs/evaluate.py --checkpoint {tmp_path / '2'} --output-dir ")
    assert found["command"] in text
    assert any(note in text for note in found["notes"] if "ASVs (" in note and "in no training sample" in note)
    record = plan.describe(config)
    for name in ("table", "metadata"):
        record["config"]["data"][name] = str(tmp_path / "gone" / name)
    (tmp_path / "2" / "run.json").write_text(json.dumps(record))
    again = run_here("evaluate.py", *flags).stdout
    assert text in again, "the same again, from baselines that were kept, though the run's own files are gone"
    done = run_here("evaluate.py", "--checkpoint", tmp_path / "1", "--output-dir", tmp_path / "e", "--target", "site")
    assert done.returncode != 0
    assert "is a run of stage 1, which predicts no target; leave --target out to score its UniFrac" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_asked_of_a_finished_run_must_be_what_it_has(synthetic_folder, tmp_path):
    config = train_config(synthetic_folder, tmp_path, data=data_config(synthetic_folder, test_fraction=0.3))
    record = make_plan(config).describe(config)
    split = record["split"]
    files = {part: write_ids(tmp_path / part, [*ids, "9"]) for part, ids in split.items()}

    def ask(*, target="gradient", classifier=False, **data) -> None:
        loss = TargetConfig(target=target, classifier=classifier)
        check_asked(EvaluateConfig(checkpoint=Location("run"), data=DataConfig(**data), loss=loss), record)

    given = {"table": config.data.table, "metadata": config.data.metadata, "tree": config.data.tree}
    ask(**given, train_ids=files["train"], val_ids=files["val"], test_ids=files["test"])
    changed = change_metadata(synthetic_folder, tmp_path, lambda frame: frame.drop(columns="site"))
    for wrong, words in (
        ({**given, "metadata": changed}, "metadata.tsv: run was trained on another"),
        ({"target": "site", "classifier": True}, "run predicts 'gradient', not 'site' as classes"),
        ({"train_ids": files["val"], "val_ids": files["val"], "test_ids": files["test"]}, "trained on another split"),
        ({"test_ids": files["val"]}, f"run was trained with {len(split['val'])} of its samples"),
    ):
        with pytest.raises(ValueError, match=words):
            ask(**wrong)
    with pytest.raises(ValueError, match="trains nothing: leave out --folds, --from-scratch"):
        EvaluateConfig(checkpoint=Location("run"), folds=3, from_scratch=True)


def test_a_group_that_is_not_known_is_told_before_anything_is_trained(synthetic_folder, tmp_path):
    def forget(frame: pd.DataFrame) -> None:
        frame.loc[frame.index[3], "subject"] = ""

    metadata = change_metadata(synthetic_folder, tmp_path, forget)
    drawn = make_plan(train_config(synthetic_folder, tmp_path, data=data_config(synthetic_folder, test_fraction=0.3)))
    files = {f"{part}_ids": write_ids(tmp_path / part, getattr(drawn.split, part)) for part in ("train", "val", "test")}
    config = settings(synthetic_folder, tmp_path, data=data_config(synthetic_folder, metadata=metadata, **files))
    with pytest.raises(ValueError, match=r"column 'subject' has no value for 1 samples .*: fill it in"):
        plan_parts(config)


def test_a_drawn_test_part_has_all_classes_and_whole_groups():
    of, label = dict(zip(IDS, GROUPS, strict=True)), dict(zip(IDS, LABELS, strict=True))
    for seed in range(5):
        fractions = {"test_fraction": 0.3, "val_fraction": 0.3}
        split = draw_once(IDS, **fractions, seed=seed, groups=GROUPS, classes=LABELS)
        parts = [split.train, split.val, split.test]
        assert sorted(sample for part in parts for sample in part) == IDS
        assert sum(len({of[s] for s in part}) for part in parts) == len(set(GROUPS))
        assert {label[s] for s in split.test} == {"a", "b", "c"}
        alone = draw_once(IDS, **fractions, seed=seed, classes=LABELS)
        assert [sum(label[s] == name for s in alone.test) for name in "abc"] == [6, 6, 6]


def test_an_encoder_from_scratch_is_the_one_that_stage_1_would_train(synthetic_folder, tmp_path):
    sizes = {"model": ModelConfig(embedding_dim=16, attention_heads=2, clades=32, asv_layers=1, kmer=4)}
    own = {"train_flags": "--dropout 0.3"}
    config = settings(synthetic_folder, tmp_path, label_fraction=0.5, from_scratch=True, **sizes, **own)
    [part], _ = plan_parts(config)
    first, second = stages_of(config, part, 0)
    spec = make_plan(second).spec
    assert replace(spec.encoder, dropout=0.1) == make_plan(first).spec.encoder
    assert spec.encoder.dropout == 0.3
    assert not spec.freeze_base
    [whole], _ = plan_parts(replace(config, label_fraction=1.0, output_dir=tmp_path / "whole"))
    assert set(part.split.train) < set(whole.split.train)
    assert len(part.split.train) == round(len(whole.split.train) / 2)
    assert set(part.split.val) < set(whole.split.val)
    assert len(part.split.val) == round(len(whole.split.val) / 2)
    assert part.split.test == whole.split.test
    of_all = stages_of(replace(config, output_dir=tmp_path / "whole"), whole, 0)
    of_first, of_whole = (
        make_plan(first).split,
        make_plan(of_all[0]).split,
    )
    assert (of_first.train, of_first.val) == (of_whole.train, of_whole.val) == (whole.pretrain, whole.split.val)


def test_a_share_of_the_labels_is_of_each_class(synthetic_folder, tmp_path):
    loss = TargetConfig(target="site", classifier=True)
    splits = {}
    for share in (0.02, 0.3, 1.0):
        config = settings(synthetic_folder, tmp_path / str(share), loss=loss, label_fraction=share)
        [part], _ = plan_parts(config)
        splits[share] = part.split
    site = make_plan(train_config(synthetic_folder, tmp_path, target=loss)).dataset.metadata["site"]
    for name in ("train", "val"):
        few, some_of, whole = (getattr(split, name) for split in splits.values())
        counts = site[whole].value_counts()
        assert set(few) <= set(some_of) < set(whole)
        assert (site[few].value_counts() == 1).all()
        expected = {label: max(1, round(0.3 * count)) for label, count in counts.items()}
        assert site[some_of].value_counts().to_dict() == expected


def test_what_stage_1_cannot_use_is_told_before_anything_is_trained(synthetic_folder, tmp_path, capsys):
    """Stage 2 takes all reads, stage 1 draws more than most samples have."""
    depths = make_plan(train_config(synthetic_folder, tmp_path)).dataset.depths
    flags = {"train_flags": "--rarefy-depth 0", "pretrain_flags": f"--rarefy-depth {int(np.sort(depths)[-8])}"}
    config = settings(synthetic_folder, tmp_path, folds=4, **flags)
    with pytest.raises(
        ValueError, match=r"fold-\d/(val|test|pretrain).txt: none of its .*fewer reads than --rarefy-depth"
    ):
        evaluate(config)
    assert "models to train" not in capsys.readouterr().out


def test_both_stages_are_trained_for_a_seed_and_only_once(run_here, ray_cluster, synthetic_folder, tmp_path):
    files = {"table": "table.biom", "tree": "tree.nwk", "metadata": "metadata.tsv"}
    flags = [f"--{name}={synthetic_folder / file}" for name, file in files.items()]
    flags += ["--group-column=subject", "--target=site", "--classifier", "--test-fraction=0.3", "--epochs=1",
              "--batch-size=32", "--no-report",
              "--embedding-dim=16", "--attention-heads=2", "--clades=32", "--kmer=3", "--rarefy-depth=200",
              "--skip-baselines", "gradient_boosting", "random_forest", "--train-flags", "--lr 1e-3"]  # fmt: skip
    flags += [f"--output-dir={tmp_path / 'e'}", f"--json={tmp_path / 's.json'}"]
    done = run_here("evaluate.py", *flags)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "s.json").read_text())
    records = [json.loads((tmp_path / "e" / "seed-0" / s / "run.json").read_text()) for s in ("stage1", "stage2")]
    assert [record["config"]["loop"]["lr"] for record in records] == [1e-4, 1e-3]
    assert set(records[0]["split"]["train"]).isdisjoint(records[1]["split"]["test"])
    assert found["caveats"] == []
    assert found["samples"] == len(records[1]["split"]["test"])
    assert [run["seed"] for run in found["model"]["seeds"]] == [0]
    assert set(found["baselines"]) == {"majority", "depth", "logistic"}
    assert 0 <= found["model"]["macro_f1"] <= 1
    again = run_here("evaluate.py", *flags)
    assert again.stdout.count("finished already") == 2
    assert json.loads((tmp_path / "s.json").read_text()) == found


def test_folds_from_scratch_on_half_of_the_labels(run_here, ray_cluster, synthetic_folder, tmp_path):
    flags = [f"--table={synthetic_folder / 'table.biom'}", f"--metadata={synthetic_folder / 'metadata.tsv'}",
             "--group-column=subject", "--target=site", "--classifier", "--class-weights=balanced", "--folds=2",
             "--from-scratch", "--label-fraction=0.5", "--epochs=1", "--batch-size=32", "--no-report",
             "--embedding-dim=16", "--attention-heads=2", "--clades=32", "--kmer=3", "--rarefy-depth=200",
             "--skip-baselines", "gradient_boosting", "random_forest"]  # fmt: skip
    done = run_here("evaluate.py", *flags, f"--output-dir={tmp_path / 'e'}", f"--json={tmp_path / 's.json'}")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "s.json").read_text())
    records = [json.loads((tmp_path / "e" / fold / "seed-0" / "stage2" / "run.json").read_text())
               for fold in ("fold-1", "fold-2")]  # fmt: skip
    tested = [sample for record in records for sample in record["split"]["test"]]
    assert len(tested) == len(set(tested)) == found["samples"]
    assert [record["pretrained"] for record in records] == [None, None]
    assert not (tmp_path / "e" / "fold-1" / "seed-0" / "stage1").exists()
    text = (tmp_path / "e" / "evaluation.md").read_text()
    for note in ("2 folds: each sample is predicted by models", "without stage 1: the encoder learned from the labels",
                 "--label-fraction 0.5 of the training samples and of the validation samples"):  # fmt: skip
        assert note in text
    table = pd.read_csv(tmp_path / "e" / "evaluation.tsv", sep="\t").set_index(["predictor", "metric"])
    assert (
        table.loc[("logistic", "accuracy"), "fold_mean"].item()
        == found["baselines"]["logistic"]["folds"]["mean"]["accuracy"]
    )
    assert set(found["baselines"]) == {"majority", "depth", "logistic"}
