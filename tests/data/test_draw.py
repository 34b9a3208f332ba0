"""Rarefaction and truncation as pure functions of seed, epoch and sample."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aam.config import DataContract
from aam.data.draw import FIXED_DRAW, draw_sample, generator

CONTRACT = DataContract(rarefy_depth=100, token_limit=1000, seed=3)
ASVS = np.arange(0, 120, 2, dtype=np.int32)
COUNTS = np.random.default_rng(5).geometric(0.02, len(ASVS))


def drawn(*, epoch=1, sample="s", asvs=ASVS, counts=COUNTS, **changed):
    contract = dataclasses.replace(CONTRACT, **changed)
    found, reads = draw_sample(asvs, counts, sample, contract, epoch)
    return dict(zip(found.tolist(), reads.tolist(), strict=True))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.data())
def test_a_draw_has_the_depth_and_no_more_of_an_asv_than_there_is(counts, data):
    depth = data.draw(st.integers(1, sum(counts)))
    held = dict(zip(range(len(counts)), counts, strict=True))
    found = drawn(asvs=np.arange(len(counts)), counts=np.array(counts), rarefy_depth=depth)
    assert sum(found.values()) == depth
    assert all(0 < reads <= held[asv] for asv, reads in found.items())
    assert list(found) == sorted(found)


def test_the_whole_sample_is_drawn_at_its_own_depth():
    assert drawn(rarefy_depth=int(COUNTS.sum())) == dict(zip(ASVS.tolist(), COUNTS.tolist(), strict=True))


def test_depth_0_does_not_rarefy():
    assert drawn(rarefy_depth=0) == dict(zip(ASVS.tolist(), COUNTS.tolist(), strict=True))


def test_the_same_key_gives_the_same_draw():
    first = drawn()
    drawn(sample="another")  # draws of others leave no trace
    assert drawn() == first


@pytest.mark.parametrize("changed", [{"epoch": 2}, {"epoch": FIXED_DRAW}, {"sample": "t"}, {"seed": 4}])
def test_another_key_gives_another_draw(changed):
    assert drawn(**changed) != drawn()


def test_the_numbers_of_asvs_in_the_table_do_not_matter():
    # The table may list other ASVs before and between: the numbers shift, their order stays.
    shifted = dict(zip((7 * ASVS + 3).tolist(), ASVS.tolist(), strict=True))
    found = drawn(asvs=7 * ASVS + 3, token_limit=20, token_choice="random")
    assert {shifted[asv]: reads for asv, reads in found.items()} == drawn(token_limit=20, token_choice="random")


def test_a_draw_is_the_same_in_another_process():
    code = "from aam.data.draw import generator; print(generator(0, 1, 'größe', 2).integers(2**62))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) == generator(0, 1, "größe", 2).integers(2**62)


def test_keys_are_not_run_together():
    assert generator(1, 23).integers(2**62) != generator(12, 3).integers(2**62)


def test_draws_have_the_mean_and_variance_of_draws_without_replacement():
    draws, depth, total = 2000, 100, COUNTS.sum()
    found = np.zeros((draws, len(ASVS)))
    for epoch in range(draws):
        asvs, reads = draw_sample(ASVS, COUNTS, "s", CONTRACT, epoch)
        found[epoch, asvs // 2] = reads
    share = COUNTS / total
    variance = depth * share * (1 - share) * (total - depth) / (total - 1)
    error = np.sqrt(variance / draws)
    assert np.abs(found.mean(axis=0) - depth * share).max() < 5 * error.max()
    # Squared deviations of counts: their spread is at most that of a Poisson variable, some 5 errors of it.
    np.testing.assert_allclose(found.var(axis=0), variance, rtol=0.4)
    assert found.var(axis=0).sum() == pytest.approx(variance.sum(), rel=0.05)


def test_abundance_keeps_the_most_abundant():
    counts = np.array([5, 9, 5, 1, 7])
    found = drawn(asvs=np.arange(5), counts=counts, rarefy_depth=0, token_limit=3)
    assert found == {0: 5, 1: 9, 4: 7}  # of equals the first


def test_first_keeps_the_first():
    assert list(drawn(rarefy_depth=0, token_limit=4, token_choice="first")) == [0, 2, 4, 6]


def test_random_keeps_any_and_others_each_epoch():
    epochs = [drawn(rarefy_depth=0, token_limit=30, token_choice="random", epoch=e) for e in range(1, 40)]
    held = dict(zip(ASVS.tolist(), COUNTS.tolist(), strict=True))
    for found in epochs:
        assert len(found) == 30
        assert list(found) == sorted(found)
        assert found.items() <= held.items()
    assert set().union(*epochs) == set(ASVS.tolist())
    assert epochs[0] != epochs[1]


def test_the_limit_is_applied_after_rarefaction():
    found, all_found = drawn(token_limit=10), drawn()
    assert len(all_found) > 10
    assert found.items() <= all_found.items()
    assert sorted(found.values()) == sorted(all_found.values())[-10:]
