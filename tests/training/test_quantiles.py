"""Quantiles of a number: one output each, in order, in the target's own units, and how often the truth lies inside."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from aam.config import TargetConfig
from aam.spec import make_target
from aam.training.logs import write_validation
from aam.training.metrics import EpochArrays
from aam.training.targets import Target, TargetTransform

LOG = TargetTransform.fit("log1p-zscore", np.array([0.0, 10.0, 1000.0]))
TARGET = Target(column="age", loss="quantile", quantiles=(0.05, 0.5, 0.95), transform=LOG)


def test_quantiles_that_cross_are_put_in_order_in_own_units():
    outputs = np.array([[-1.0, 0.0, 1.0], [1.0, -1.0, 0.0]], dtype=np.float32)
    decoded = TARGET.decode(outputs)
    np.testing.assert_array_equal(decoded, LOG.inverse(np.array([[-1.0, 0.0, 1.0]] * 2)))
    assert TARGET.outputs == 3
    assert decoded[0, TARGET.point] == LOG.inverse(np.array(0.0))
    assert TARGET.beside == {"q0.05": 0, "q0.95": 2}


@pytest.mark.parametrize(("given", "point"), [((0.9,), 0.9), ((0.8, 0.1), 0.8), ((0.75, 0.25, 0.5), 0.5)])
def test_the_prediction_is_the_quantile_nearest_to_the_median(given, point):
    target = make_target(TargetConfig(target="age", target_loss="quantile", quantiles=given), [1.0, 2.0])
    assert target.quantiles == tuple(sorted(given))
    assert target.quantiles[target.point] == point
    assert len(target.beside) == len(given) - 1
    assert make_target(TargetConfig(target="age", quantiles=given), [1.0, 2.0]).outputs == 1, "not the quantile loss"


def test_scores_are_of_the_median_and_coverage_of_the_outermost(tmp_path):
    truth = np.array([-1.5, 0.5, 0.2, 3.0])
    outputs = np.array([[-1.0, 0.0, 1.0], [1.0, 0.0, -1.0], [0.0, 0.1, 0.3], [0.0, 1.0, 2.0]])
    arrays = EpochArrays(target=outputs, target_true=truth)
    found = arrays.metrics(TARGET)
    assert found["interval_coverage"] == 0.5
    median = LOG.inverse(np.array([0.0, 0.0, 0.1, 1.0]))
    assert found["mae"] == pytest.approx(np.abs(LOG.inverse(truth) - median).mean())
    alone = Target(column="age", loss="quantile", quantiles=(0.9,), transform=LOG)
    assert "interval_coverage" not in EpochArrays(target=outputs[:, :1], target_true=truth).metrics(alone)

    write_validation(tmp_path / "v.tsv", list("abcd"), arrays, TARGET)
    rows = list(csv.reader((tmp_path / "v.tsv").open(), delimiter="\t"))
    assert rows[0] == ["SampleID", "true", "prediction", "q0.05", "q0.95"]
    np.testing.assert_allclose(np.array([row[2] for row in rows[1:]], float), median)
    assert all(float(row[3]) <= float(row[2]) <= float(row[4]) for row in rows[1:])


@pytest.mark.parametrize(
    ("quantiles", "message"), [((), "one or more"), ((0.5, 0.5), "different"), ((0.0, 0.5), "between 0 and 1")]
)
def test_quantiles_that_are_none(quantiles, message):
    with pytest.raises(ValueError, match=f"--quantiles must be .*{message}"):
        TargetConfig(target="age", target_loss="quantile", quantiles=quantiles)
