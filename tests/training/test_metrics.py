"""The metrics on numbers made by hand, and against scikit-learn."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from scipy.special import softmax
from scipy.stats import spearmanr
from sklearn import metrics as sk

from aam.training.losses import Losses, LossTerm, LossWeights
from aam.training.metrics import (
    EpochArrays,
    EpochRecord,
    Scored,
    class_probabilities,
    classification_metrics,
    regression_metrics,
)
from aam.training.step import Objective, Predictions
from aam.training.targets import Target, TargetTransform
from tensors import make_batch, random_sequences

CPU = torch.device("cpu")
SEQUENCES = random_sequences(4)
SAMPLES = [[(0, 5), (1, 90), (2, 1)], [(1, 7), (3, 7)], [(2, 3), (0, 2)]]


def test_regression_by_hand():
    found = regression_metrics(np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 2.0, 3.0, 5.0]))
    assert found == pytest.approx({"mae": 0.25, "rmse": 0.5, "r2": 0.8, "spearman": 1.0})


def test_regression_against_sklearn():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=60).astype(np.float32)
    predicted = (truth + rng.normal(size=60)).astype(np.float32).round(1)  # with ties
    assert regression_metrics(truth, predicted) == pytest.approx(
        {
            "mae": sk.mean_absolute_error(truth, predicted),
            "rmse": math.sqrt(sk.mean_squared_error(truth, predicted)),
            "r2": sk.r2_score(truth, predicted),
            "spearman": spearmanr(truth, predicted).statistic,
        },
        rel=1e-5,
    )


@pytest.mark.parametrize(
    ("truth", "predicted", "expected"),
    [
        ([2.0, 2.0, 2.0], [1.0, 2.0, 3.0], {"mae", "rmse"}),  # constant truth
        ([1.0, 2.0, 3.0], [2.0, 2.0, 2.0], {"mae", "rmse", "r2"}),  # constant prediction
        ([1.0], [2.0], {"mae", "rmse"}),
        ([], [], set()),
    ],
)
@pytest.mark.filterwarnings("error")
def test_regression_metrics_that_are_not_defined_are_absent(truth, predicted, expected):
    found = regression_metrics(np.array(truth), np.array(predicted))
    assert found.keys() == expected
    assert all(math.isfinite(value) for value in found.values())


def test_binary_classification_by_hand():
    chance = np.array([0.1, 0.6, 0.7, 0.4])
    found = classification_metrics(np.array([0, 0, 1, 1]), np.stack([1 - chance, chance], axis=1))
    expected = {"accuracy": 0.5, "balanced_accuracy": 0.5, "macro_f1": 0.5, "auroc": 0.75}
    assert found == pytest.approx(expected)


def test_classification_against_sklearn():
    rng = np.random.default_rng(0)
    truth, probabilities = np.arange(90) % 3, softmax(rng.normal(size=(90, 3)), axis=1)
    truth[:30] = 0  # unbalanced
    predicted = probabilities.argmax(axis=1)
    assert classification_metrics(truth, probabilities) == pytest.approx(
        {
            "accuracy": sk.accuracy_score(truth, predicted),
            "balanced_accuracy": sk.balanced_accuracy_score(truth, predicted),
            "macro_f1": sk.f1_score(truth, predicted, average="macro"),
            "auroc": sk.roc_auc_score(truth, probabilities, multi_class="ovr"),
        }
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("truth", [[0, 0, 0], [0, 1, 1]])
def test_auroc_is_absent_where_a_class_does_not_occur(truth):
    probabilities = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7]])
    found = classification_metrics(np.array(truth), probabilities)
    assert found.keys() == {"accuracy", "balanced_accuracy", "macro_f1"}
    # The third sample is taken for a class that no sample has: it counts against the class it is of.
    assert found["balanced_accuracy"] == pytest.approx({0: 1 / 3, 1: 3 / 4}[truth[1]])
    # F1 of the classes that occur: (2 * 1 / (3 + 1)); (2 * 1 / (1 + 1) + 2 * 1 / (2 + 1)) / 2.
    assert found["macro_f1"] == pytest.approx({0: 1 / 2, 1: 5 / 6}[truth[1]])


def test_class_probabilities_of_large_scores():
    scores = np.array([[1000.0, 999.0, -1000.0], [0.0, 0.0, 0.0]], dtype=np.float32)
    found = class_probabilities(scores)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, softmax(scores.astype(np.float64), axis=1), rtol=1e-12)


def record_of(**weights) -> EpochRecord:
    return EpochRecord(Objective(weights=LossWeights(**weights)), CPU)


def add(record: EpochRecord, *, finite=None, **terms: tuple[float, int]) -> None:
    losses = {name: LossTerm(torch.tensor(value), count) for name, (value, count) in terms.items()}
    batch = make_batch(SEQUENCES, SAMPLES)
    record.add(batch, Losses(**losses), Predictions(), None if finite is None else torch.tensor(finite))


def test_losses_are_means_over_items_not_over_steps():
    record = record_of(base=2.0, nuc=0.5)
    add(record, base=(6.0, 2), nuc=(3.0, 3))
    add(record, base=(2.0, 6), nuc=(9.0, 1))
    expected = {"base_loss": 1.0, "nuc_loss": 3.0, "total_loss": 2.0 * 1.0 + 0.5 * 3.0}
    assert record.losses() == pytest.approx(expected)


def test_losses_of_a_long_epoch_keep_their_digits():
    record = record_of(nuc=1.0)
    for _ in range(3):
        add(record, nuc=(2.0**24, 2**24))
        add(record, nuc=(1.0, 1))
    assert record.losses()["nuc_loss"] == 1.0
    assert record.counts["nuc"].item() == 3 * 2**24 + 3


def test_a_step_that_was_not_finite_adds_nothing():
    record = record_of(base=1.0)
    add(record, base=(6.0, 2), finite=True)
    add(record, base=(math.nan, 50), finite=False)
    assert record.losses() == {"base_loss": 3.0, "total_loss": 3.0}


def test_losses_are_absent_where_no_step_was_finite():
    record = record_of(base=1.0)
    add(record, base=(math.inf, 50), finite=False)
    assert record.losses() == {}


def losses_of_two_workers(folder: Path) -> None:
    """Two steps of 8 items; in the second, the share of worker 1 is not finite."""
    record, own = record_of(base=1.0), float(dist.get_rank())
    add(record, base=(4.0 + own, 8), finite=True)
    add(record, base=(4.0 if own == 0 else math.nan, 8), finite=own == 0)
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(record.losses()))


def test_workers_agree_on_the_losses_where_one_was_not_finite(two_workers, tmp_path):
    two_workers(losses_of_two_workers, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["base_loss"] == pytest.approx((4 + 5 + 4) / (8 + 4))  # half of the second step's items


def step_of(metrics: dict[str, tuple[torch.Tensor, torch.Tensor]], rows: slice) -> tuple:
    """Batch and predictions of the worker whose samples these rows are, of 5."""
    truths = {metric: truth[rows] for metric, (_, truth) in metrics.items()}
    batch = make_batch(SEQUENCES, SAMPLES, **truths, global_rows=rows, rank_sizes=[3, 2])
    return batch, Losses(), Predictions(unifrac={m: predicted[rows] for m, (predicted, _) in metrics.items()})


def test_unifrac_pairs_are_kept_once_and_samples_too():
    record, rng = record_of(base=1.0), torch.Generator().manual_seed(0)
    made = {m: [torch.rand(5, 5, generator=rng) for _ in range(2)] for m in ("unweighted", "weighted")}
    made["faith_pd"] = [torch.rand(5, generator=rng) for _ in range(2)]
    for rows in (slice(0, 3), slice(3, 5)):  # as two workers would
        record.add(*step_of(made, rows))
    i, j = np.triu_indices(5, k=1)
    arrays = record.arrays()
    assert arrays.unifrac.keys() == made.keys()
    expected = {}
    for metric, prefix in (("unweighted", "unifrac"), ("weighted", "weighted_unifrac"), ("faith_pd", "faith_pd")):
        predicted, truth = (values.numpy() for values in made[metric])
        if truth.ndim == 2:
            predicted, truth = predicted[i, j], truth[i, j]
        np.testing.assert_array_equal(arrays.unifrac[metric].predicted, predicted)
        np.testing.assert_array_equal(arrays.unifrac[metric].truth, truth)
        expected[f"{prefix}_mae"] = sk.mean_absolute_error(truth, predicted)
        expected[f"{prefix}_r2"] = sk.r2_score(truth, predicted)
        expected[f"{prefix}_std_ratio"] = predicted.std() / truth.std()
    assert arrays.metrics(None) == pytest.approx(expected, rel=1e-5)


def test_a_metric_alone_has_its_tags_alone():
    record = record_of(base=1.0)
    values = torch.rand(5, 5, generator=torch.Generator().manual_seed(0))
    record.add(*step_of({"weighted": (values, values)}, slice(0, 5)))
    found = record.arrays().metrics(None)
    assert found == pytest.approx({f"weighted_unifrac_{name}": v for name, v in
                                   (("mae", 0), ("r2", 1), ("std_ratio", 1))}, abs=1e-6)  # fmt: skip


def test_losses_of_several_metrics_stand_beside_their_mean():
    record = record_of(base=2.0)
    batch = make_batch(SEQUENCES, SAMPLES)
    for of_pairs, of_samples in ((6.0, 1.0), (2.0, 3.0)):
        metrics = {"unweighted": LossTerm(torch.tensor(of_pairs), 8), "faith_pd": LossTerm(torch.tensor(of_samples), 4)}
        record.add(batch, Losses(base=LossTerm(torch.tensor(of_pairs + of_samples), 8), metrics=metrics), Predictions())
    base = (7 + 5) / 16
    assert record.losses() == pytest.approx(
        {"total_loss": 2 * base, "base_loss": base, "unifrac_loss": 8 / 16, "faith_pd_loss": 4 / 8}
    )


def test_collapsed_distances_show():
    truth = np.linspace(0, 1, 20, dtype=np.float32)
    scored = Scored(predicted=np.full(20, 0.5, dtype=np.float32), truth=truth)
    found = EpochArrays(unifrac={"unweighted": scored}).metrics(None)
    assert found["unifrac_std_ratio"] == 0
    assert found["unifrac_r2"] == pytest.approx(0, abs=1e-5)


def test_counts_are_scored_where_they_were_masked():
    record = record_of(count=1.0)
    batch = make_batch(SEQUENCES, SAMPLES, count_masked=[(0, 1), (1, 3), (2, 0)])
    predicted = torch.where(batch.count_masked, batch.log_abundance + 0.5, 100.0)
    record.add(batch, Losses(), Predictions(log_abundance=predicted))
    found = record.arrays().metrics(None)
    assert found.keys() == {"count_mae", "count_r2"}
    assert found["count_mae"] == pytest.approx(0.5)


def test_nucleotide_accuracy_over_all_steps():
    record = record_of(nuc=1.0)
    for right in (2.0, 7.0):
        batch = make_batch(SEQUENCES, SAMPLES, masked=3)  # 4 ASVs
        record.add(batch, Losses(), Predictions(nucleotides_right=torch.tensor(right)))
    assert record.arrays().metrics(None) == {"nuc_accuracy": 9 / 24}


def test_target_metrics_are_in_its_own_units():
    truth = np.array([10.0, 20.0, 30.0, 60.0])
    target = Target(column="c", transform=TargetTransform.fit("zscore", truth))
    record = record_of(target=1.0)
    encoded = torch.from_numpy(target.encode(truth))
    for rows in (slice(0, 3), slice(3, 4)):
        predicted = torch.from_numpy(target.encode(truth[rows] + 5))[:, None]
        batch = make_batch(SEQUENCES, SAMPLES, target=encoded[rows])
        record.add(batch, Losses(), Predictions(target=predicted))
    found = record.arrays().metrics(target)
    assert found == pytest.approx(regression_metrics(truth, truth + 5), rel=1e-5)
    assert found["mae"] == pytest.approx(5, rel=1e-5)


def test_class_scores_keep_their_shape():
    target = Target(column="c", classes=("a", "b", "c"), loss="cross_entropy")
    scores = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 2.0, 0.0]])
    record = record_of(target=1.0)
    batch = make_batch(SEQUENCES, SAMPLES, target=torch.tensor([0, 1, 2]))
    record.add(batch, Losses(), Predictions(target=scores))
    arrays = record.arrays()
    np.testing.assert_array_equal(arrays.target, scores.numpy())
    assert arrays.metrics(target)["accuracy"] == pytest.approx(2 / 3)


def test_predictions_without_truth_have_no_metrics():
    record = record_of(target=1.0)
    record.add(make_batch(SEQUENCES, SAMPLES), Losses(), Predictions(target=torch.zeros(3, 1)))
    assert record.arrays().metrics(Target(column="c")) == {}


def test_predictions_of_a_skipped_step_are_not_scored():
    truth = np.array([1.0, 2.0, 3.0, 4.0], dtype=np.float32)
    broken = np.array([1.0, np.nan, 3.0, np.inf], dtype=np.float32)
    arrays = EpochArrays(
        target=broken[:, None],
        target_true=truth,
        unifrac={"unweighted": Scored(predicted=broken, truth=truth)},
        count=np.full(4, np.nan),
        count_true=truth,
    )
    found = arrays.metrics(Target(column="c"))
    expected = {"mae": 0, "rmse": 0, "r2": 1, "spearman": 1}
    expected |= {"unifrac_mae": 0, "unifrac_r2": 1, "unifrac_std_ratio": 1}
    assert found == pytest.approx(expected)
    classes = Target(column="c", classes=("a", "b"), loss="cross_entropy")
    arrays = EpochArrays(target=np.full((2, 2), np.nan), target_true=np.array([0, 1]))
    assert arrays.metrics(classes) == {}
