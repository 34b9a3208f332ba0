"""The learning rate at the ends of warm-up and run."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aam.training.schedule import DEFAULT_WARMUP, Schedule, make_schedule


def test_warmup_then_cosine_to_0():
    schedule = Schedule(peak=2.0, warmup=10, total=111)
    assert schedule.lr(0) == pytest.approx(0.2)  # not 0, and not the peak
    assert schedule.lr(8) == pytest.approx(1.8)
    assert schedule.lr(9) == 2.0
    assert schedule.lr(10) == 2.0
    assert schedule.lr(60) == pytest.approx(1.0)  # half-way between 10 and 110
    assert schedule.lr(110) == 0.0
    assert [schedule.lr(update) for update in (111, 160, 10_000)] == [0.0, 0.0, 0.0]  # never rises again


def test_without_warmup():
    schedule = Schedule(peak=1.0, warmup=0, total=5)
    expected = [(1 + math.cos(math.pi * u / 4)) / 2 for u in range(5)]
    assert [schedule.lr(u) for u in range(5)] == pytest.approx(expected)
    assert schedule.lr(0) == 1.0


@pytest.mark.parametrize("warmup", [0, 1])
def test_a_run_of_one_update(warmup):
    schedule = Schedule(peak=1.0, warmup=warmup, total=1)
    assert schedule.lr(0) == 1.0
    assert schedule.lr(1) == 0.0


@pytest.mark.parametrize("warmup", [100, 101, 250])
def test_warmup_as_long_as_the_run_or_longer(warmup):
    schedule = Schedule(peak=1.0, warmup=warmup, total=100)
    assert [schedule.lr(u) for u in (0, 49, 99)] == pytest.approx([1 / warmup, 50 / warmup, 100 / warmup])
    assert schedule.lr(100) == schedule.lr(warmup) == 0.0


@given(warmup=st.integers(0, 300), total=st.integers(1, 200), update=st.integers(0, 600))
def test_always_between_0_and_the_peak(warmup, total, update):
    schedule = Schedule(peak=0.1, warmup=warmup, total=total)
    assert 0 <= schedule.lr(update) <= 0.1
    if warmup <= update:
        assert schedule.lr(update + 1) <= schedule.lr(update)
    elif update + 1 < min(warmup, total):
        assert schedule.lr(update + 1) > schedule.lr(update)


@given(total=st.integers(1, 10**6))
def test_default_warmup_is_a_tenth_of_the_run_at_most(total):
    schedule, warning = make_schedule(1e-4, None, total)
    assert schedule.warmup <= min(DEFAULT_WARMUP, total / 10)
    assert schedule.warmup == min(10_000, total // 10)
    assert warning is None


def test_a_warmup_that_fits_is_taken_without_a_word():
    schedule, warning = make_schedule(1e-4, 100, 1000)
    assert (schedule.warmup, schedule.total, schedule.peak) == (100, 1000, 1e-4)
    assert warning is None
    assert make_schedule(1e-4, 0, 5)[1] is None


def test_a_warmup_of_more_than_a_tenth_is_said():
    schedule, warning = make_schedule(1e-4, 300, 1000)
    assert schedule.warmup == 300  # as it was asked for
    assert warning == "WARNING: --warmup-steps 300 is 30% of the 1000 updates of this run"


def test_a_warmup_longer_than_the_run_says_what_the_rate_will_be():
    schedule, warning = make_schedule(1e-4, 10_000, 2450)
    assert warning is not None
    assert warning.startswith("WARNING: --warmup-steps 10000 is 408% of the 2450 updates of this run")
    assert "2.45e-05" in warning
    assert max(schedule.lr(u) for u in range(2450)) == pytest.approx(2.45e-5)
