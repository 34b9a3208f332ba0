"""The baselines are what scikit-learn makes of the reads, at the settings that are said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import sparse
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import accuracy_score, mean_absolute_error
from sklearn.preprocessing import StandardScaler

from aam.baselines import RIDGE_PENALTIES, baseline_names, fit_predict, reads_of
from aam.config import DataConfig, DataContract
from aam.data.batches import BatchPlan, EpochBatches
from aam.data.dataset import PreparedDataset
from aam.data.draw import FIXED_DRAW
from aam.data.prepare import prepare
from aam.data.sources import read_table

CLASSES = ("gut", "skin", "soil")


@pytest.fixture(scope="module")
def dataset(synthetic_folder) -> PreparedDataset:
    data = DataConfig(table=synthetic_folder / "table.biom", metadata=synthetic_folder / "metadata.tsv")
    return prepare(data, max_bp=150, use_tree=False)


@pytest.fixture(scope="module")
def halves(dataset):
    """Ids, dense reads, number and class of the samples that have both; to train on, and others."""
    frame = dataset.metadata
    ids = [s for s in dataset.sample_ids if frame.loc[s, ["gradient", "site"]].notna().all()]
    parts = []
    for part in (ids[::2], ids[1::2]):
        counts = reads_of(dataset, part)
        parts.append((part, counts, frame.loc[part, "gradient"].to_numpy(float), frame.loc[part, "site"].to_numpy(str)))
    return parts


def test_reads_are_those_of_the_table(dataset, synthetic_folder):
    table = read_table(synthetic_folder / "table.biom", None)
    ids = table.sample_ids[5:2:-1]
    at = [table.sequences.index(sequence) for sequence in dataset.sequences]
    counts = table.counts.toarray()[5:2:-1][:, at]
    np.testing.assert_array_equal(reads_of(dataset, ids).toarray(), counts)


def test_reads_that_a_model_sees_are_those_of_its_draws(dataset):
    contract = DataContract(max_bp=150, rarefy_depth=200, token_limit=2000, seed=3)
    deep = [s for s in dataset.sample_ids if dataset.depths[dataset.row[s]] >= 200][::-1]
    found = reads_of(dataset, deep, contract)
    assert set(found.sum(axis=1).tolist()) == {200}
    plan = BatchPlan(dataset=dataset, sample_ids=deep, contract=contract, batch_size=len(deep))
    batch = EpochBatches(plan, FIXED_DRAW)[0]
    for row, sample in enumerate(batch.sample_ids):
        seen = np.zeros(found.shape[1])
        mask = batch.slot_mask[row]
        seen[batch.asvs[batch.slot[row][mask]]] = batch.log_abundance[row][mask].exp() * 200
        np.testing.assert_allclose(found[[deep.index(sample)]].toarray()[0], seen, atol=1e-3)


def features(halves, name: str) -> list:
    """As the documentation says, from dense reads."""
    dense = [counts.toarray() for _, counts, _, _ in halves]
    shares = [(counts / counts.sum(axis=1, keepdims=True)).astype(np.float32) for counts in dense]
    if name == "depth":
        return [np.log(counts.sum(axis=1, keepdims=True)) for counts in dense]
    if name.startswith("random_forest"):
        return [sparse.csr_array(part) for part in shares]  # trees draw features of dense ones in another order
    top = np.argsort(-(dense[0] > 0).sum(axis=0), kind="stable")[:500]
    if name == "gradient_boosting":
        return [part[:, top] for part in shares]
    logs = [np.log(part[:, top] + 0.5) for part in dense]
    ratios = [part - part.mean(axis=1, keepdims=True) for part in logs]
    scaler = StandardScaler().fit(ratios[0])
    return [scaler.transform(part) for part in ratios]


@pytest.mark.parametrize(
    ("name", "estimator"),
    [
        ("ridge", RidgeCV(alphas=RIDGE_PENALTIES)),
        ("depth", RandomForestRegressor(500, min_samples_leaf=5, random_state=3)),
        ("random_forest", RandomForestRegressor(500, max_features="sqrt", random_state=3)),
        ("random_forest_third", RandomForestRegressor(500, max_features=1 / 3, random_state=3)),
        ("gradient_boosting", HistGradientBoostingRegressor(max_iter=300, learning_rate=0.05, random_state=3)),
    ],
)
def test_numbers_are_what_scikit_learn_says(halves, name, estimator):
    (_, train, numbers, _), (_, other, _, _) = halves
    expected = features(halves, name)
    said = fit_predict(name, train, numbers, other, seed=3)
    assert said.dtype == np.float64
    np.testing.assert_allclose(said, estimator.fit(expected[0], numbers).predict(expected[1]))


def test_a_forest_of_medians_says_the_median_of_its_leaves(halves):
    (_, train, numbers, _), (_, other, _, _) = halves
    features_of, features_of_other = features(halves, "random_forest")
    forest = RandomForestRegressor(500, max_features="sqrt", random_state=3).fit(features_of, numbers)
    trained = forest.apply(features_of)
    said = fit_predict("random_forest_median", train, numbers, other, seed=3)
    for leaves, median in zip(forest.apply(features_of_other), said, strict=True):
        here = trained == leaves
        weights = (here / here.sum(axis=0)).sum(axis=1)
        below, above = (weights[side].sum() / 500 for side in (numbers < median, numbers > median))
        assert max(below, above) <= 0.5 + 1e-9
        assert median in numbers


@pytest.mark.parametrize(
    ("name", "estimator"),
    [
        ("logistic", LogisticRegression(C=0.001, max_iter=2000)),
        ("depth", RandomForestClassifier(500, min_samples_leaf=5, random_state=3)),
        ("random_forest", RandomForestClassifier(500, max_features="sqrt", random_state=3)),
        ("gradient_boosting", HistGradientBoostingClassifier(max_iter=300, learning_rate=0.05, random_state=3)),
    ],
)
def test_probabilities_are_what_scikit_learn_says_in_the_order_asked_for(halves, name, estimator):
    (_, train, _, classes), (_, other, _, _) = halves
    expected = features(halves, name)
    wanted = ("soil", "nowhere", "gut", "skin")
    said = fit_predict(name, train, classes, other, classes=wanted, seed=3)
    direct = estimator.fit(expected[0], classes).predict_proba(expected[1])
    assert tuple(estimator.classes_) == CLASSES
    np.testing.assert_allclose(said[:, [2, 3, 0]], direct)
    assert not said[:, 1].any(), "no training sample is of this class"


@pytest.mark.parametrize("name", ["logistic", "depth", "random_forest", "gradient_boosting"])
def test_balanced_classes_weigh_inversely_to_their_frequency(halves, name):
    (_, train, _, classes), (_, other, _, _) = halves
    frequent = np.flatnonzero(classes != "soil")[:40]
    rows = np.concatenate([frequent, np.flatnonzero(classes == "soil")[:4]])
    said = {
        balanced: fit_predict(name, train[rows], classes[rows], other, classes=CLASSES, balanced=balanced)
        for balanced in (False, True)
    }
    assert said[True][:, 2].sum() > said[False][:, 2].sum(), "the rare one is taken more seriously"


def test_mean_and_majority(halves):
    (_, train, numbers, classes), (_, other, _, _) = halves
    np.testing.assert_allclose(fit_predict("mean", train, numbers, other), numbers.mean())
    np.testing.assert_allclose(fit_predict("median", train, numbers, other), np.median(numbers))
    said = fit_predict("majority", train, classes, other, classes=CLASSES)
    np.testing.assert_allclose(said, [[(classes == name).mean() for name in CLASSES]] * other.shape[0])


def test_scores_on_real_data_are_near_those_found_before(real_data: Path):
    """By child in ecam, by person in ibd; forests of other seeds differ by 2 days, and by 5 samples of 74."""
    for study, column, known in (
        ("ecam", "day_of_life", {"mean": 154.0, "ridge": 82.3, "random_forest": 76.5}),
        ("ibd", "surgery_and_ibd", {"majority": 0.568, "logistic": 0.608, "random_forest": 0.77}),
    ):
        folder = real_data / study
        sources = DataConfig(table=folder / "table.biom", metadata=folder / "metadata.tsv")
        found = prepare(sources, max_bp=150, use_tree=False)
        ids = {part: (folder / f"{part}.txt").read_text().split() for part in ("train", "test")}
        truth = {part: found.metadata.loc[names, column].to_numpy(str) for part, names in ids.items()}
        reads = {part: reads_of(found, names) for part, names in ids.items()}
        is_class = study == "ibd"
        assert set(known) < set(baseline_names(classifier=is_class))
        for name, expected in known.items():
            if is_class:
                classes = tuple(sorted(set(truth["train"])))
                said = fit_predict(name, reads["train"], truth["train"], reads["test"], classes=classes, jobs=-1)
                score = accuracy_score(truth["test"], np.array(classes)[said.argmax(axis=1)])
                assert score == pytest.approx(expected, abs=0.07), name
            else:
                said = fit_predict(name, reads["train"], truth["train"].astype(float), reads["test"], jobs=-1)
                assert mean_absolute_error(truth["test"].astype(float), said) == pytest.approx(expected, abs=2), name
