"""Targets: there and back again."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from aam.training.targets import Target, TargetTransform

KINDS = ["none", "zscore", "minmax", "log1p-zscore"]
PLAIN = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20)
POSITIVE = st.lists(st.floats(0, 1e9), min_size=2, max_size=20)


def fitted(kind: str, values: list[float]) -> tuple[TargetTransform, np.ndarray]:
    array = np.array(values)
    assume(np.ptp(array) > 1e-3 * max(1.0, np.abs(array).max()))
    return TargetTransform.fit(kind, array), array


@pytest.mark.parametrize("kind", KINDS)
@given(values=POSITIVE)
def test_inverse_undoes_forward(kind, values):
    transform, array = fitted(kind, values)
    back = transform.inverse(transform.forward(array))
    np.testing.assert_allclose(back, array, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("kind", ["none", "zscore", "minmax"])
@given(values=PLAIN)
def test_inverse_undoes_forward_of_negative_values(kind, values):
    transform, array = fitted(kind, values)
    np.testing.assert_allclose(transform.inverse(transform.forward(array)), array, rtol=1e-9, atol=1e-6)


@given(values=PLAIN, kind=st.sampled_from(["none", "zscore", "minmax"]))
def test_what_batches_hold_is_close_to_the_target(values, kind):
    transform, array = fitted(kind, values)
    encoded = Target(column="c", transform=transform).encode(values)
    assert encoded.dtype == np.float32
    error = np.abs(transform.inverse(encoded) - array).max()
    assert error <= 1e-6 * (np.ptp(array) + np.abs(array).max())


@given(values=PLAIN)
def test_zscore_has_mean_0_and_spread_1(values):
    transform, array = fitted("zscore", values)
    assert transform.forward(array).mean() == pytest.approx(0, abs=1e-6)
    assert transform.forward(array).std() == pytest.approx(1, abs=1e-6)


@given(values=PLAIN)
def test_minmax_goes_from_0_to_1(values):
    transform, array = fitted("minmax", values)
    scaled = transform.forward(array)
    assert (scaled.min(), scaled.max()) == (0, 1)


def test_log1p_zscore_by_hand():
    transform = TargetTransform.fit("log1p-zscore", np.array([0.0, np.e**2 - 1]))
    assert (transform.shift, transform.scale) == pytest.approx((1.0, 1.0))
    np.testing.assert_allclose(transform.forward(np.array([np.e**4 - 1])), [3.0])


def test_none_changes_nothing():
    transform = TargetTransform.fit("none", np.array([3.0, 4.0]))
    assert transform.forward(np.array([3.0, -1.5])).tolist() == [3.0, -1.5]


@pytest.mark.parametrize("kind", ["zscore", "minmax", "log1p-zscore"])
def test_values_that_it_was_not_fitted_on_are_transformed_the_same_way(kind):
    training = np.array([1.0, 2.0, 4.0])
    transform = TargetTransform.fit(kind, training)
    with_others = transform.forward(np.array([1.0, 2.0, 4.0, 1000.0, 0.5]))
    np.testing.assert_array_equal(with_others[:3], transform.forward(training))
    assert with_others[3] > with_others[:3].max()  # beyond the training range, and not clamped
    assert with_others[4] < with_others[:3].min()
    np.testing.assert_allclose(transform.inverse(with_others)[3:], [1000.0, 0.5])


def test_a_wild_prediction_stays_a_number():
    transform = TargetTransform.fit("log1p-zscore", np.array([0.0, 10.0]))
    wild = transform.inverse(np.array([1e4, -1e4], dtype=np.float32))
    assert np.isfinite(wild**2).all()
    assert wild[0] > 1e29
    assert wild[1] == pytest.approx(-1)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("zscore", [2.5, 2.5], "2.5 for all training samples"),
        ("minmax", [0.1] * 3, "0.1 for all training samples"),
        ("zscore", [0.1] * 3, "0.1 for all training samples"),
        ("log1p-zscore", [1e18, 1e18 + 256], "for all training samples"),  # the same after log1p
        ("log1p-zscore", [3.0, -1.0], "above -1; the lowest is -1"),
        ("sqrt", [1.0, 2.0], "not 'sqrt'"),
    ],
)
def test_what_cannot_be_fitted(kind, values, message):
    with pytest.raises(ValueError, match=message):
        TargetTransform.fit(kind, np.array(values))


def test_classes_have_the_codes_of_the_outputs():
    target = Target(column="site", classes=("gut", "oral", "skin"), loss="cross_entropy")
    assert target.outputs == 3
    encoded = target.encode(["skin", "gut", "gut", "oral"])
    assert encoded.dtype == np.int64
    assert encoded.tolist() == [2, 0, 0, 1]
    assert Target(column="age").outputs == 1


def test_a_class_that_no_training_sample_has():
    target = Target(column="site", classes=("gut", "oral"), loss="cross_entropy")
    with pytest.raises(ValueError, match=r"'site'.*\['nose', 'skin'\].*\['gut', 'oral'\]"):
        target.encode(["gut", "skin", "nose", "skin"])


@pytest.mark.parametrize(
    "target",
    [
        Target(column="age", transform=TargetTransform.fit("log1p-zscore", np.array([0.1, 1 / 3, 70.0]))),
        Target(column="age", loss="quantile", quantiles=(0.05, 0.5)),
        Target(column="site", classes=("007", "b\tc"), loss="cross_entropy", class_weights=(0.1, 1 / 3)),
    ],
)
def test_json_round_trip(target):
    back = Target.from_dict(json.loads(json.dumps(target.to_dict())))
    assert back == target
    assert hash(back) == hash(target)  # tuples, not lists
