"""Trees as arrays, and all members as one predictor in the checkpoint."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file, save_file
from scipy.special import log_softmax, softmax
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
)

from aam.config import PredictConfig, TargetConfig
from aam.data.synthetic import SyntheticConfig, generate, write
from aam.distributed.run import complete_ensemble
from aam.ensemble import add, fit, members
from aam.ensemble.ensemble import MEMBERS, Ensemble, Weights, read_by_trees
from aam.html_report.run_files import Run
from aam.html_report.scores import predictions
from aam.html_report.write import write_report
from aam.plan import RunPlan, make_plan
from aam.predict import predict
from aam.predict.samples import predict_samples
from aam.training import checkpoint
from aam.training.targets import Target, TargetTransform
from runs import data_config, fit_here, pretrain_config, train_config

NUMBER = Target(column="y", transform=TargetTransform(kind="zscore", shift=3.0, scale=2.0))
CLASSES = Target(column="y", classes=("a", "b", "c"), loss="cross_entropy")


@pytest.fixture
def few_trees(monkeypatch):
    monkeypatch.setattr(members, "ROUNDS", (3, 7))


@pytest.fixture(scope="module")
def pretrained(synthetic_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    fit_here(pretrain_config(synthetic_folder, folder, max_updates=1))
    return folder


def a_part(rng, target: Target, n: int = 60, features: int = 24) -> members.Part:
    targets = rng.integers(0, 3, n) if target.classes else rng.normal(size=n)
    shares = np.log10(1 + rng.integers(0, 9, (n, features)) * 100.0).astype(np.float32)
    return members.Part(features=shares, targets=targets, groups=rng.integers(0, 6, n))


def a_fold(rng, target: Target, fitted: members.Part, n: int = 60) -> fit.Fold:
    network = rng.normal(size=(n, target.outputs)).astype(np.float32)
    return fit.Fold(fitted=fitted, left_out=a_part(rng, target, n=n), network=network)


def members_of(ensemble: Ensemble, fold: fit.Fold, target: Target) -> dict[str, np.ndarray]:
    return ensemble.members(fold.network, fold.left_out.features)


@pytest.mark.parametrize(("classes", "boostings"), [(2, 5), (3, 5), (6, 2)])
def test_boosted_trees_as_arrays_have_the_probabilities_of_scikit_learn_s(classes, boostings, monkeypatch):
    monkeypatch.setattr(members, "ROUNDS", (25, 100))
    rng = np.random.default_rng(11)
    features, new = (np.log1p(rng.integers(0, 9, (n, 6))).astype(np.float32) for n in (80, 30))
    targets, balance = rng.integers(0, classes, 80), tuple(np.arange(1.0, classes + 1))
    target = Target(column="y", classes=tuple("abcdef"[:classes]), loss="cross_entropy", class_weights=balance)
    after = members._fit_boosting(features, targets, target, seed=3)
    for ours, rounds in zip(after, members.ROUNDS, strict=True):
        scores = []
        for seed in np.random.SeedSequence(3).generate_state(boostings).tolist():
            theirs = HistGradientBoostingClassifier(
                **members.BOOSTING, max_iter=rounds, random_state=seed, class_weight=dict(enumerate(balance))
            ).fit(features, targets)
            own = theirs.decision_function(new)
            scores.append(np.stack([0 * own, own], axis=1) if classes == 2 else own)
        np.testing.assert_allclose(ours.outputs(new), np.mean(scores, axis=0), atol=1e-12)
    assert np.ptp(theirs.predict_proba(new)) > 0.5, "it learned something"
    assert np.ptp(scores, axis=0).max() > 0.1, "the seeds say the same"


@pytest.mark.parametrize("quantiles", [(), (0.1, 0.5, 0.9)])
def test_boosted_trees_as_arrays_have_the_quantiles_of_scikit_learn_s(quantiles, monkeypatch):
    monkeypatch.setattr(members, "ROUNDS", (25, 100))
    rng = np.random.default_rng(12)
    features, new = (np.log1p(rng.integers(0, 9, (n, 6))).astype(np.float32) for n in (80, 30))
    targets = features[:, 0] + rng.normal(size=80)
    target = dataclasses.replace(NUMBER, quantiles=quantiles)
    after = members._fit_boosting(features, targets, target, seed=3)
    for ours, rounds in zip(after, members.ROUNDS, strict=True):
        said = ours.outputs(new)
        assert said.shape == (30, target.outputs)
        for output, quantile in zip(said.T, quantiles or (0.5,), strict=True):
            theirs = HistGradientBoostingRegressor(
                **members.BOOSTING, max_iter=rounds, loss="quantile", quantile=quantile, random_state=3
            ).fit(features, targets)
            np.testing.assert_allclose(output, theirs.predict(new), atol=1e-12)


def test_probabilities_are_averaged_and_numbers_as_the_model_learns_them():
    rng = np.random.default_rng(5)
    shares, temperatures = rng.dirichlet(np.ones(len(MEMBERS))), rng.uniform(0.5, 3, len(MEMBERS))
    weights = Weights(of_members=shares, temperatures=temperatures, calibration=np.array([0.5, 1.2]))
    said = {name: rng.normal(size=(6, 3)) for name in MEMBERS}
    mixed = sum(w * softmax(said[name] / t, axis=1) for w, t, name in zip(shares, temperatures, MEMBERS, strict=True))
    np.testing.assert_allclose(weights.combine(said, CLASSES), np.log(mixed))
    mean = sum(w * said[name] for w, name in zip(shares, MEMBERS, strict=True))
    np.testing.assert_allclose(weights.combine(said, NUMBER), 0.5 + 1.2 * (mean - 0.5))


def test_of_the_candidates_of_a_member_the_one_with_the_least_loss_speaks():
    rng = np.random.default_rng(16)
    truth = rng.normal(size=200)
    errors = {"network": [0.3], "boosting": [0.5, 0.1, 0.4]}
    said = {
        name: np.stack([(truth + error * rng.normal(size=200))[:, None] for error in errors.get(name, [0.7])])
        for name in MEMBERS
    }
    found = fit.weigh(said, truth, np.arange(200), NUMBER)
    assert found.rounds == 1
    assert found.losses["boosting"] < found.losses["network"]
    best = {name: of[found.rounds if name == "boosting" else 0] for name, of in said.items()}
    np.testing.assert_array_equal(found.apply(said, NUMBER), found.weights.combine(best, NUMBER))
    # Of classes, each at the temperature that suits it: what is sure and right beats what is neither.
    codes = rng.integers(0, 3, 200)
    sure, not_so = (np.eye(3)[codes] + noise * rng.normal(size=(200, 3)) for noise in (0.3, 2))
    said = {name: np.stack([not_so, 50 * sure]) for name in MEMBERS}
    assert fit.weigh(said, codes, np.arange(200), CLASSES).rounds == 1


def test_of_numbers_all_members_are_worth_the_same():
    rng = np.random.default_rng(17)
    found = fit.weigh(dict.fromkeys(MEMBERS, np.zeros((1, 30, 1))), rng.normal(size=30), np.arange(30), NUMBER)
    assert found.weights.by_name == pytest.approx(dict.fromkeys(MEMBERS, 1 / len(MEMBERS)))


def test_a_member_that_is_too_sure_of_itself_is_cooled_down():
    rng = np.random.default_rng(13)
    truth = 2 * rng.normal(size=(4000, 3))
    targets = np.array([rng.choice(3, p=p) for p in softmax(truth, axis=1)])
    said = {name: (truth * (1 + number))[None] for number, name in enumerate(MEMBERS)}
    groups = np.arange(4000)
    found = fit.weigh(said, targets, groups, CLASSES)
    np.testing.assert_allclose(found.weights.temperatures, np.arange(1, len(MEMBERS) + 1), rtol=0.1)
    np.testing.assert_allclose([*found.losses.values()], found.losses["network"], rtol=1e-6)
    assert found.weights.by_name == pytest.approx(dict.fromkeys(MEMBERS, 1 / len(MEMBERS)), rel=1e-4)
    assert found.weights.calibration.tolist() == [0, 1]
    never_wrong = fit.weigh(dict.fromkeys(MEMBERS, np.eye(3)[targets][None]), targets, groups, CLASSES)
    np.testing.assert_allclose(never_wrong.weights.temperatures, fit.TEMPERATURES[0], rtol=1e-3)


def test_numbers_that_say_too_little_are_spread_out_as_far_as_there_are_groups_to_tell():
    rng = np.random.default_rng(14)
    truth = rng.normal(size=3000)
    said = dict.fromkeys(MEMBERS, (5 + truth / 1.5 + 0.01 * rng.normal(size=3000))[None, :, None])
    many = fit.weigh(said, truth + 5, np.arange(3000), NUMBER)
    np.testing.assert_allclose(many.weights.calibration, [5 + truth.mean() / 1.5, 1.5], rtol=0.01)
    np.testing.assert_allclose(many.apply(said, NUMBER)[:, 0], truth + 5, atol=0.1)
    few = fit.weigh(said, truth + 5, np.arange(3000) % fit.BELIEVED_FROM, NUMBER)
    np.testing.assert_allclose(few.weights.calibration[1], 1.25, rtol=0.01)
    assert (few.weights.temperatures == 1).all()
    right = dict.fromkeys(MEMBERS, truth[None, :, None])
    np.testing.assert_allclose(fit.weigh(right, truth, np.arange(3000), NUMBER).weights.calibration[1], 1, atol=1e-3)
    centre, factor = few.weights.calibration
    wanted = centre + factor * (said["network"][0] - centre)
    np.testing.assert_allclose(few.apply(said, NUMBER), wanted)


@pytest.mark.parametrize(
    "target", [NUMBER, CLASSES, dataclasses.replace(NUMBER, loss="quantile", quantiles=(0.1, 0.5, 0.9))]
)
def test_saved_and_loaded_it_says_the_same_in_any_order(target, few_trees, tmp_path):
    rng = np.random.default_rng(6)
    train = a_part(rng, target)
    fold = a_fold(rng, target, train)
    val = fold.left_out
    networks = [{"head.weight": rng.normal(size=(2, number + 1)).astype(np.float32)} for number in range(11)]
    ensemble, _ = fit.fit_ensemble(train, [fold], target, seed=0, networks=networks)
    assert ensemble.weights.of_members.sum() == pytest.approx(1)
    said = ensemble.outputs(fold.network, val.features, target)
    assert said.shape == (60, target.outputs)
    ensemble.save(tmp_path)
    loaded = Ensemble.load(tmp_path)
    assert loaded.scores == ensemble.scores
    for own, given in zip(loaded.networks, networks, strict=True):
        np.testing.assert_equal(own, given)
    np.testing.assert_array_equal(loaded.outputs(fold.network, val.features, target), said)
    order = rng.permutation(60)
    shuffled = loaded.outputs(fold.network[order], val.features[order], target)
    np.testing.assert_allclose(shuffled, said[order], rtol=1e-5, atol=1e-6)


def test_trees_read_single_asvs_alone(few_trees):
    rng = np.random.default_rng(18)
    train = a_part(rng, NUMBER)
    fold = a_fold(rng, NUMBER, train)
    changed = fold.left_out.features.copy()
    changed[:, read_by_trees(changed).shape[1] :] = 0
    ensemble = members.fit_members(train, NUMBER, seed=0).ensemble
    for name, outputs in ensemble.members(fold.network, changed).items():
        np.testing.assert_array_equal(outputs, members_of(ensemble, fold, NUMBER)[name])


@pytest.mark.parametrize("fault", ["lacks", "has"])
def test_an_ensemble_of_other_members_is_refused(fault, few_trees, tmp_path):
    rng = np.random.default_rng(9)
    train = a_part(rng, NUMBER)
    members.fit_members(train, NUMBER, seed=0).ensemble.save(tmp_path)
    file = tmp_path / checkpoint.ENSEMBLE
    arrays = load_file(file)
    if fault == "lacks":
        del arrays["boosting.value"]
    else:
        arrays["slope"] = np.zeros(3)
    save_file(arrays, file, metadata={"scores": "{}"})
    with pytest.raises(ValueError, match=r"another version of AAM wrote it.*delete it.*--resume"):
        Ensemble.load(tmp_path)


@pytest.mark.parametrize("target", [NUMBER, CLASSES])
def test_members_are_weighed_by_samples_that_they_were_not_fitted_to(target, few_trees):
    rng = np.random.default_rng(8)
    everything = a_part(rng, target)
    folds = [a_fold(rng, target, a_part(rng, target, n=40), n) for n in (20, 15)]
    alone, _ = fit.fit_ensemble(everything, folds[:1], target, seed=0)
    ensemble, together = fit.fit_ensemble(everything, folds, target, seed=0)
    assert (alone.scores["samples"], ensemble.scores["samples"]) == (20, 35)
    fitted = [members.fit_members(fold.fitted, target, seed=0) for fold in folds]
    said = [of.outputs(fold.network, fold.left_out) for of, fold in zip(fitted, folds, strict=True)]
    of_both = {name: np.concatenate([of[name] for of in said], axis=1) for name in MEMBERS}
    truth = np.concatenate([fold.left_out.targets for fold in folds])

    def loss(of: np.ndarray, temperature: float) -> float:
        if not target.classes:
            return np.abs(of[:, 0] - truth).mean() * 2.0  # a z-score is in units of 2
        return -log_softmax(of / temperature, axis=1)[np.arange(35), truth].mean()

    choice = fit.weigh(of_both, truth, np.arange(35), target)
    losses = []
    for name, temperature in zip(MEMBERS, ensemble.weights.temperatures, strict=True):
        losses.append(loss(of_both[name][choice.rounds if name == "boosting" else 0], temperature))
        for of in of_both[name]:
            for other in np.geomspace(*fit.TEMPERATURES, 50) if target.classes else [1.0]:
                assert loss(of, other) >= losses[-1] - 1e-4, name
    np.testing.assert_allclose([ensemble.scores[name] for name in MEMBERS], losses)
    wanted = np.array(losses) ** -fit.SHARPNESS
    np.testing.assert_allclose(ensemble.weights.of_members, wanted / wanted.sum())
    assert not np.allclose(ensemble.weights.of_members, alone.weights.of_members)
    # A sample is not among those that choose and weigh what is said of it.
    by_other = [fit.weigh(said[i], folds[i].left_out.targets, folds[i].left_out.groups, target) for i in (1, 0)]
    of_each = [by_other[i].apply(said[i], target) for i in range(2)]
    np.testing.assert_allclose(together, np.concatenate(of_each), rtol=1e-5)
    for field in dataclasses.fields(Weights):
        np.testing.assert_array_equal(*(getattr(of.weights, field.name) for of in (alone, by_other[1])))
    # In the end the chosen ones are fitted to all samples.
    for found, chosen in ((ensemble, choice), (alone, by_other[1])):
        wanted = members.fit_members(everything, target, seed=0).choose(chosen.rounds)
        np.testing.assert_equal(dataclasses.asdict(found.boosting), dataclasses.asdict(wanted.boosting))


@pytest.mark.parametrize("classifier", [False, True])
def test_folds_are_predicted_by_networks_that_did_not_see_them(synthetic_folder, pretrained, classifier, tmp_path):
    column = "site" if classifier else "gradient"
    target = TargetConfig(target=column, classifier=classifier, ensemble=True, ensemble_folds=3)
    config = train_config(
        synthetic_folder,
        tmp_path / "run",
        target=target,
        pretrained=pretrained,
        freeze_base=True,
        max_updates=3,
        lr=0.01,
    )
    plan = fit_here(config)
    loaded = checkpoint.load(tmp_path / "run" / "best")
    folds, ids = add._folds(plan, loaded.spec.target), np.array([*plan.split.train, *plan.split.val])
    assert sorted(np.concatenate(folds)) == list(range(len(ids)))
    subjects = [{plan.groups[s] for s in ids[fold]} for fold in folds]
    assert len(folds) == 3
    assert len(set.union(*subjects)) == sum(map(len, subjects)), "a subject is in one fold"

    def network(of) -> np.ndarray:
        everything, _ = add._predicted(loaded, of)
        fold, _ = add._left_out(loaded, of, folds[0], epochs=1)
        assert len(fold.fitted.features) + len(fold.left_out.features) == len(everything.features)
        np.testing.assert_array_equal(fold.left_out.targets, everything.targets[folds[0]])
        return fold.network

    said = network(plan)

    def with_others(fold: np.ndarray) -> RunPlan:
        """The same plan, in which the targets of the fold's samples are those of others."""
        values = {s: plan.targets[s] for s in ids[fold]}
        return dataclasses.replace(
            plan, targets=plan.targets | dict(zip(values, [*values.values()][::-1], strict=True))
        )

    np.testing.assert_array_equal(network(with_others(folds[0])), said, err_msg="it knew their targets")
    assert not np.array_equal(network(with_others(folds[1])), said), "it did not learn from the others"


@pytest.mark.parametrize("classifier", [False, True])
def test_the_networks_of_the_folds_speak_along_and_the_validation_samples_are_predicted_by_those_without_them(
    synthetic_folder, pretrained, few_trees, classifier, tmp_path
):
    column = "site" if classifier else "gradient"
    target = TargetConfig(target=column, classifier=classifier, ensemble=True, ensemble_folds=3)
    frozen = {"pretrained": pretrained, "freeze_base": True, "max_updates": 3, "lr": 0.01}
    config = train_config(synthetic_folder, tmp_path / "run", target=target, **frozen)
    plan = fit_here(config)
    best = tmp_path / "run" / "best"
    alone = checkpoint.load(best)
    assert alone.spec.target is not None
    add.add_ensemble(best, plan, epochs=1)
    loaded = checkpoint.load(best)
    assert loaded.ensemble is not None
    assert len(loaded.ensemble.networks) == 3

    ids = [*plan.split.train, *plan.split.val]
    said = [predict_samples(alone, plan.dataset, ids).target]
    for heads in loaded.ensemble.networks:
        one = checkpoint.load(best)
        own = one.model.state_dict()
        assert {name for name in own if not name.startswith("base.")} == set(heads)
        one.model.load_state_dict(own | {name: torch.from_numpy(array) for name, array in heads.items()})
        said.append(predict_samples(dataclasses.replace(one, ensemble=None), plan.dataset, ids).target)
        assert not np.allclose(said[-1], said[0]), "it learned nothing"
    only = np.array([1.0, *[0] * (len(MEMBERS) - 1)])
    networks_only = dataclasses.replace(loaded.ensemble, weights=dataclasses.replace(Weights.equal(), of_members=only))
    together = predict_samples(dataclasses.replace(loaded, ensemble=networks_only), plan.dataset, ids).target
    mean = np.mean(said, axis=0)
    np.testing.assert_allclose(together, log_softmax(mean, axis=1) if classifier else mean, rtol=1e-4, atol=1e-5)

    everything, _ = add._predicted(alone, plan)
    folds = add._folds(plan, alone.spec.target)
    left_out = [add._left_out(alone, plan, fold, epochs=1)[0] for fold in folds]
    _, outputs = fit.fit_ensemble(everything, left_out, alone.spec.target, seed=plan.loop.seed)
    wanted = dict(zip([ids[i] for fold in folds for i in fold], outputs, strict=True))
    outputs = np.array([wanted[s] for s in plan.split.val])
    kept = pd.read_csv(tmp_path / "run" / "validation_predictions.tsv", sep="\t", dtype={"SampleID": str})
    assert kept["SampleID"].tolist() == plan.split.val
    if classifier:
        np.testing.assert_allclose(kept[list(alone.spec.target.classes)], np.exp(outputs), rtol=1e-4)
    else:
        wanted_values = alone.spec.target.decode(outputs.astype(np.float32))[:, alone.spec.target.point]
        np.testing.assert_allclose(kept["prediction"], wanted_values, rtol=1e-4)

    (tmp_path / "run" / "run.json").write_text(json.dumps(plan.describe(config)))
    assert f"Validation: {len(plan.split.val)} samples" in predictions(Run.read(tmp_path / "run"))


@pytest.mark.filterwarnings("ignore:The least populated class")
def test_folds_that_cannot_be_are_said(synthetic_folder, pretrained, tmp_path, capsys):
    target = TargetConfig(target="site", classifier=True, ensemble=True)
    config = train_config(synthetic_folder, tmp_path / "run", target=target, pretrained=pretrained, freeze_base=True)
    plan = make_plan(config, (pretrained / "best", checkpoint.load(pretrained / "best").spec))
    one_group = dataclasses.replace(plan, groups=dict.fromkeys(plan.groups, "one"))
    number = Target(column="gradient")
    gradient = dict(zip(plan.targets, map(float, range(len(plan.targets))), strict=True))
    assert add._folds(dataclasses.replace(one_group, targets=gradient), number) == []
    assert "ensemble: no folds: " in capsys.readouterr().out
    first = next(iter(plan.groups))
    rare = {sample: "b" if plan.groups[sample] == plan.groups[first] else "a" for sample in plan.groups}
    lacking = Target(column="site", classes=("a", "b"), loss="cross_entropy")
    assert add._folds(dataclasses.replace(plan, targets=rare), lacking) == []
    said = capsys.readouterr().out
    assert "one always had all samples of a class; the validation samples weigh its members" in said
    # Beside two classes of many groups, it is learned from in every fold, unless validation samples are of it.
    of_three = {sample: name if name == "b" else "ac"[i % 2] for i, (sample, name) in enumerate(rare.items())}
    three = Target(column="site", classes=("a", "b", "c"), loss="cross_entropy")
    ids = np.array([*plan.split.train, *plan.split.val])
    groups = dict(plan.groups) | dict.fromkeys(plan.split.val, "of validation")
    folds = add._folds(dataclasses.replace(plan, targets=of_three, groups=groups), three)
    assert len(folds) == 4
    left_out = ids[np.concatenate(folds)]
    assert len(left_out) == len(set(left_out))
    alone = {s for s, name in of_three.items() if name == "b"} - set(plan.split.val)
    assert alone
    assert set(left_out) == set(ids) - alone


def test_what_belongs_together_is_told_or_found_in_the_id_files(synthetic_folder, pretrained, tmp_path):
    plan = make_plan(train_config(synthetic_folder, tmp_path / "first"))
    files = {}
    for part in ("train", "val"):
        files[f"{part}_ids"] = tmp_path / f"{part}.txt"
        files[f"{part}_ids"].write_text("\n".join(getattr(plan.split, part)))
    frozen = {"target": TargetConfig(target="gradient", ensemble=True), "freeze_base": True, "pretrained": pretrained}
    base = (pretrained / "best", checkpoint.load(pretrained / "best").spec)

    def planned(**changed) -> RunPlan:
        config = train_config(synthetic_folder, tmp_path / "run", **{**frozen, **changed})
        return make_plan(config, None if config.pretrained is None else base)

    told = planned(data=data_config(synthetic_folder, **files))
    assert told.ensemble_folds == 4
    assert set(told.groups) == {*told.split.train, *told.split.val}
    assert len(set(told.groups.values())) < len(told.groups)
    silent = planned(data=data_config(synthetic_folder, group_column=None, **files))
    assert (silent.ensemble_folds, silent.groups) == (4, told.groups)
    count = len(set(told.groups.values()))
    said = f"folds of the ensemble keep the {count} values of 'subject' together, as the id files do; --group-column"
    assert any(note.startswith(said) for note in silent.notes)
    assert not any("folds of the ensemble" in note for note in told.notes)
    drawn = planned(data=data_config(synthetic_folder, group_column=None))
    assert drawn.groups == {s: s for s in (*drawn.split.train, *drawn.split.val)}, "drawn one by one"
    assert not any("folds of the ensemble" in note for note in drawn.notes)
    mixed = [[*plan.split.train[1:], plan.split.val[0]], [plan.split.train[0], *plan.split.val[1:]]]
    for part, ids in zip(("train", "val"), mixed, strict=True):
        files[f"{part}_ids"].write_text("\n".join(ids))
    apart = planned(data=data_config(synthetic_folder, group_column=None, **files))
    assert apart.groups == {s: s for s in (*apart.split.train, *apart.split.val)}
    assert any(note.startswith("folds of the ensemble take each sample for itself") for note in apart.notes)
    for changed in (
        {"freeze_base": False, "pretrained": None},
        {"target": TargetConfig(target="gradient", ensemble=True, ensemble_folds=0)},
        {"target": TargetConfig(target="gradient")},
    ):
        assert planned(**changed).ensemble_folds == 0
    for wrong in (1, -1):
        with pytest.raises(ValueError, match="--ensemble-folds must be 0 or at least 2"):
            TargetConfig(ensemble_folds=wrong)


def test_a_run_with_an_ensemble_predicts_by_all_members(synthetic_folder, few_trees, tmp_path):
    target = TargetConfig(target="gradient", ensemble=True)
    config = train_config(synthetic_folder, tmp_path / "run", epochs=1, target=target)
    plan, best = fit_here(config), tmp_path / "run" / "best"
    alone = checkpoint.load(best)
    assert alone.ensemble is None
    assert complete_ensemble(plan, str(tmp_path / "run"), best)
    loaded = checkpoint.load(best)
    assert loaded.ensemble is not None
    written = (best / checkpoint.ENSEMBLE).stat().st_mtime_ns
    assert not complete_ensemble(plan, str(tmp_path / "run"), best)
    assert (best / checkpoint.ENSEMBLE).stat().st_mtime_ns == written, "fitted again"

    record = json.loads(json.dumps(plan.describe(config)))
    asked = PredictConfig(
        checkpoint=str(best), table=config.data.table, output=tmp_path / "p.tsv", part="val", base_cache=False
    )
    said, network = (predict(asked, which, record).predictions for which in (loaded, alone))
    direct = predict_samples(loaded, said.dataset, said.sample_ids[::-1], base_cache=False).target[::-1]
    np.testing.assert_allclose(said.values, said.target.decode(direct)[:, said.target.point], rtol=1e-4)
    truth = np.array([plan.targets[s] for s in said.sample_ids])
    kept = pd.read_csv(tmp_path / "run" / "validation_predictions.tsv", sep="\t", dtype={"SampleID": str})
    assert kept["SampleID"].tolist() == said.sample_ids
    for who, values in (("together", kept["prediction"]), ("network", network.values)):
        error = np.abs(np.array(values) - truth).mean()
        assert error == pytest.approx(loaded.ensemble.scores[who], rel=1e-4), who
    labelled = said.target.encode([plan.targets[s] for s in (*plan.split.train, *plan.split.val)])
    assert loaded.ensemble.boosting.start[0] == pytest.approx(np.median(labelled)), "in the end it learns from all"

    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    page = write_report(tmp_path / "run").read_text()
    share = loaded.ensemble.weights.of_members[MEMBERS.index("network")]
    assert f"{share:.0%}" in page

    # Another study: other samples, and ASVs that no training sample has.
    write(generate(SyntheticConfig(samples=12, subjects=4, asvs=200, seed=99)), tmp_path / "other")
    elsewhere = dataclasses.replace(asked, table=tmp_path / "other" / "table.biom", part="all")
    found = predict(elsewhere, loaded).predictions
    assert len(found.values) > 6
    assert np.isfinite(pd.Series(found.values)).all()
