"""Shares of groups of ASVs: against the formula in loops, and where groups start."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aam.model.asv_groups import LEAST_SHARE, SHARPNESS, ASVGroups

ASVS, DIM, GROUPS = 9, 4, 3
SHARES = [{0: 0.5, 3: 0.3, 8: 0.2}, {2: 1.0}, {1: 0.9, 2: 0.0999, 5: 0.0001}]
"""Of the reads of each sample, by ASV."""


def vectors(seed: int = 0, rows: int = ASVS) -> torch.Tensor:
    return torch.randn(rows, DIM, generator=torch.Generator().manual_seed(seed))


def slots(shares=SHARES, *, empty: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Slot, mask and log abundance; empty slots point at ASV 0, as in batches."""
    width = max(map(len, shares)) + empty
    slot, mask = torch.zeros(len(shares), width, dtype=torch.int64), torch.zeros(len(shares), width, dtype=torch.bool)
    log_abundance = torch.zeros(len(shares), width)
    for b, of_sample in enumerate(shares):
        for s, (asv, share) in enumerate(of_sample.items()):
            slot[b, s], mask[b, s], log_abundance[b, s] = asv, True, float(np.log(share))
    return slot, mask, log_abundance


def made(seed: int = 1) -> ASVGroups:
    torch.manual_seed(seed)
    groups = ASVGroups(DIM, GROUPS)
    groups.start_from(vectors(), seed=0)
    return groups


def by_loops(groups: ASVGroups) -> np.ndarray:
    centers, sharpness = groups.centers.detach().double().numpy(), groups.log_sharpness.exp().item()
    rows = []
    for of_sample in SHARES:
        amount = np.zeros(GROUPS)
        for asv, share in of_sample.items():
            nearness = np.exp(-sharpness * ((vectors()[asv].double().numpy() - centers) ** 2).sum(axis=1))
            amount += share * nearness / nearness.sum()
        logs = np.log10(1 + amount / LEAST_SHARE)
        rows.append((logs - logs.mean()) / np.sqrt(logs.var() + groups.norm.eps))
    return np.array(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_formula(dtype):
    groups = made()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype == torch.bfloat16):
        found = groups(vectors(), *slots())
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.detach().numpy(), by_loops(groups), atol=2e-5)


def test_all_parts_learn():
    groups, known = made(), vectors().requires_grad_()
    (groups(known, *slots()) * torch.tensor([1.0, -2.0, 0.5])).sum().backward()
    for name, gradient in [*((n, p.grad) for n, p in groups.named_parameters()), ("vectors", known.grad)]:
        assert gradient.abs().sum() > 0, name
    absent = [asv for asv in range(ASVS) if not any(asv in of_sample for of_sample in SHARES)]
    assert absent
    assert known.grad[absent].abs().sum() == 0


def test_groups_start_where_asvs_are():
    corners = torch.tensor([[5.0, 0, 0, 0], [0, 5, 0, 0], [0, 0, 5, 0]])
    crowd = corners.repeat(20, 1) + 0.01 * vectors(rows=60)
    groups = ASVGroups(DIM, GROUPS)
    groups.start_from(crowd, seed=0)
    distances = torch.cdist(corners, groups.centers)
    assert sorted(distances.argmin(dim=1).tolist()) == [0, 1, 2]
    assert distances.min(dim=1).values.max() < 0.1
    # The corners are at a squared distance of 50 from each other, and that is what sharpness goes by.
    assert groups.log_sharpness.exp().item() == pytest.approx(SHARPNESS / 50, rel=0.02)


def test_fewer_asvs_than_groups():
    """Several groups with one centre share what it gets; nothing is lost, and all is finite."""
    groups = ASVGroups(DIM, GROUPS)
    groups.start_from(vectors(rows=2), seed=0)
    assert len(groups.centers.unique(dim=0)) == 2
    slot, mask, log_abundance = slots([{0: 0.25, 1: 0.75}])
    assert groups(vectors(rows=2), slot, mask, log_abundance).isfinite().all()
    alone = ASVGroups(DIM, GROUPS)
    before = alone.log_sharpness.item()
    alone.start_from(vectors(rows=1), seed=0)
    assert len(alone.centers.unique(dim=0)) == 1
    assert alone.log_sharpness.item() == before
