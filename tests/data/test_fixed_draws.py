"""One draw for all epochs: by --fixed-rarefaction, or because nothing is drawn."""

import dataclasses

import numpy as np
import pytest

from aam.config import DataConfig, DataContract
from aam.data.batches import BatchPlan, EpochBatches
from aam.data.draw import FIXED_DRAW
from aam.data.prepare import prepare


@pytest.fixture(scope="module")
def plan(synthetic_folder) -> BatchPlan:
    dataset = prepare(DataConfig(table=synthetic_folder / "table.biom"), max_bp=150, use_tree=False)
    return BatchPlan(
        dataset=dataset,
        sample_ids=[s for s, reads in zip(dataset.sample_ids, dataset.depths, strict=True) if reads >= 200],
        contract=DataContract(rarefy_depth=200, token_limit=20, seed=4),
        batch_size=7,
        count_mask_fraction=0.15,
    )


def samples_of(plan: BatchPlan, epoch: int) -> dict[str, tuple[dict[int, float], list[int]]]:
    """Abundance of each ASV, and masked slots, of each sample, in the order of the epoch."""
    batches, found = EpochBatches(plan, epoch), {}
    for index in range(len(batches)):
        batch = batches[index]
        for b, sample_id in enumerate(batch.sample_ids):
            n = int(batch.slot_mask[b].sum())
            asvs = batch.asvs[batch.slot[b, :n]].tolist()
            abundances = dict(zip(asvs, batch.log_abundance[b, :n].tolist(), strict=True))
            found[sample_id] = abundances, batch.count_masked[b].nonzero().flatten().tolist()
    return found


def test_fixed_draws_are_those_of_validation_and_the_rest_varies(plan):
    fixed = dataclasses.replace(plan, fixed_rarefaction=True)
    always = samples_of(fixed, FIXED_DRAW)
    first, second = samples_of(fixed, 1), samples_of(fixed, 2)
    assert list(first) != list(second) != list(always)
    for sample_id, (abundances, _) in always.items():
        assert first[sample_id][0] == second[sample_id][0] == abundances
    assert any(first[s][1] != second[s][1] for s in always), "the count masks"
    redrawn = samples_of(plan, 1)
    assert any(redrawn[s][0] != always[s][0] for s in always)


def test_draws_are_fixed_too_where_nothing_is_drawn(plan):
    for change, expected in (
        ({"rarefy_depth": 0}, True),
        ({"rarefy_depth": 0, "token_choice": "random"}, False),
        ({}, False),
    ):
        contract = dataclasses.replace(DataContract(rarefy_depth=200, token_limit=10), **change)
        of_contract = dataclasses.replace(plan, contract=contract)
        batches = EpochBatches(of_contract, 3)
        assert batches.has_fixed_draws == expected
        assert EpochBatches(of_contract, FIXED_DRAW).has_fixed_draws
        one, other = samples_of(of_contract, 3), samples_of(of_contract, FIXED_DRAW)
        assert all(one[s][0] == other[s][0] for s in one) == expected


@pytest.mark.parametrize("fixed", [False, True])
def test_the_asvs_that_epochs_can_show(plan, fixed):
    of_kind = dataclasses.replace(plan, fixed_rarefaction=fixed)
    possible = EpochBatches(of_kind, 1).possible_asvs().tolist()
    shown = [{a for seen, _ in samples_of(of_kind, epoch).values() for a in seen} for epoch in (1, 2)]
    if fixed:
        assert shown[0] == shown[1] == set(possible)
    else:
        rows = [plan.dataset.sample(plan.dataset.row[s])[0] for s in plan.sample_ids]
        assert possible == np.unique(np.concatenate(rows)).tolist()
        assert shown[0] != shown[1]
        assert shown[0] | shown[1] <= set(possible)
