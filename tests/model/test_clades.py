"""Soft clades against plain loops, and against UniFrac itself where the clades are the branches of a tree."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from skbio import TreeNode
from skbio.diversity import alpha_diversity, beta_diversity
from torch import Tensor

from aam.data import unifrac
from aam.data.tree import parse_newick, root_paths
from aam.model import clades
from aam.model.clades import Clades, Profiles, Tips, common_tips, profiles, unweighted_unifrac, weighted_unifrac

ASVS, CLADES = 9, 7
READS = [{0: 50, 3: 30, 8: 20}, {2: 7}, {1: 900, 2: 99, 5: 1}, {0: 5, 3: 3, 8: 2}, {4: 1, 3: 1}]
"""Reads of each sample, by ASV; the first and the fourth have the same shares."""
FUNCTIONS = {"unweighted": unweighted_unifrac, "weighted": weighted_unifrac}


def uniform(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def slots(reads=READS, *, empty: int = 0, order: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Slot, mask and log abundance; empty slots point at ASV 0 and have a log abundance of 0, as in batches."""
    width = max(map(len, reads)) + empty
    slot, mask = torch.zeros(len(reads), width, dtype=torch.int64), torch.zeros(len(reads), width, dtype=torch.bool)
    log_abundance = torch.zeros(len(reads), width)
    for b, sample in enumerate(reads):
        for s, (asv, count) in enumerate([*sample.items()][::order]):
            slot[b, s], mask[b, s], log_abundance[b, s] = asv, True, math.log(count / sum(sample.values()))
    return slot, mask, log_abundance


TIP_LENGTHS = 0.1 + uniform(ASVS, seed=5)


def of_samples(memberships: Tensor, **settings) -> Profiles:
    return profiles(memberships, TIP_LENGTHS.to(memberships), *slots(**settings))


def tips_of(metric: str, tip_lengths: Tensor, reads=READS, *, kept: int | None = None) -> Tips:
    """Tips of samples among themselves: of the first ones to all, as of a worker that has these."""
    slot, mask, log_abundance = slots(reads, empty=2)
    abundance = log_abundance.exp() * mask
    weight = mask.float() if metric == "unweighted" else abundance
    totals = (tip_lengths[slot] * weight).sum(dim=1)
    here = torch.isin(slot, slot[:kept][mask[:kept]]) & mask
    shared = torch.where(here, slot, len(tip_lengths))
    shared_weight = torch.ones_like(weight) if metric == "unweighted" else abundance
    common = common_tips(tip_lengths, slot[:kept], weight[:kept], shared, shared_weight)
    return Tips(totals[:kept], totals, common)


# The formulas, in loops


def unweighted_in_loops(x: Tensor, y: Tensor, lengths: Tensor) -> Tensor:
    """1 - sum(l * min) / sum(l * max)."""
    rows = []
    for a in x:
        shared = [sum(w * min(p, q) for w, p, q in zip(lengths, a, b, strict=True)) for b in y]
        either = [sum(w * max(p, q) for w, p, q in zip(lengths, a, b, strict=True)) for b in y]
        rows.append(torch.stack([1 - s / e for s, e in zip(shared, either, strict=True)]))
    return torch.stack(rows)


def weighted_in_loops(x: Tensor, y: Tensor, lengths: Tensor) -> Tensor:
    """sum(l * |x - y|) / sum(l * (x + y))."""
    rows = []
    for a in x:
        apart = [sum(w * abs(p - q) for w, p, q in zip(lengths, a, b, strict=True)) for b in y]
        reach = [sum(w * (p + q) for w, p, q in zip(lengths, a, b, strict=True)) for b in y]
        rows.append(torch.stack([s / e for s, e in zip(apart, reach, strict=True)]))
    return torch.stack(rows)


LOOPS = {"unweighted": unweighted_in_loops, "weighted": weighted_in_loops}


def three(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Profiles of 4 and of 6 samples, no two alike, and lengths."""
    return (
        uniform(4, CLADES, seed=seed, dtype=dtype),
        uniform(6, CLADES, seed=seed + 1, dtype=dtype),
        3 * uniform(CLADES, seed=seed + 2, dtype=dtype),
    )


@pytest.mark.parametrize("metric", FUNCTIONS)
@pytest.mark.parametrize("cells", [1, 60, clades.CELLS])
def test_distances_are_those_of_the_formula(monkeypatch, metric, cells):
    monkeypatch.setattr(clades, "CELLS", cells)  # 1 and 60: a row, or a few, at a time
    x, y, lengths = three()
    found, expected = FUNCTIONS[metric](x, y, lengths), LOOPS[metric](x, y, lengths)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("metric", FUNCTIONS)
@pytest.mark.parametrize("cells", [1, 60, clades.CELLS])
def test_gradients_are_those_of_the_formula(monkeypatch, metric, cells):
    monkeypatch.setattr(clades, "CELLS", cells)
    weights = uniform(4, 6, seed=9) - 0.5  # of the distances in a loss: none cancels another
    gradients = []
    for function in (FUNCTIONS[metric], LOOPS[metric]):
        leaves = [leaf.requires_grad_() for leaf in three()]
        gradients.append(torch.autograd.grad((function(*leaves) * weights).sum(), leaves))
    for found, expected in zip(*gradients, strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("metric", FUNCTIONS)
def test_gradients_of_a_batch_with_itself_are_those_of_the_formula(metric):
    """As in a step: the same samples on both sides."""
    weights = uniform(4, 4, seed=9) - 0.5
    gradients = []
    for function in (FUNCTIONS[metric], LOOPS[metric]):
        x, _, lengths = three()
        leaves = [x.requires_grad_(), lengths.requires_grad_()]
        distance = function(x, x, lengths)
        loss = (distance * weights * (1 - torch.eye(4))).sum()  # a sample and itself are in no loss
        gradients.append(torch.autograd.grad(loss, leaves))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("metric", FUNCTIONS)
def test_range_symmetry_and_a_sample_with_itself(metric):
    x = uniform(8, CLADES)
    x[1] = x[0]
    x[2, :3], x[3, 3:] = 0, 0
    x[2, 3:], x[3, :3] = 1, 1  # nothing in common
    found = FUNCTIONS[metric](x, x, 3 * uniform(CLADES, seed=1))
    assert found.diagonal().eq(0).all()
    assert found[0, 1] == 0
    assert found[2, 3].item() == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(found, found.T, rtol=0, atol=1e-6)
    assert found.min() == 0
    assert found.max() <= 1 + 1e-6


@pytest.mark.parametrize("metric", FUNCTIONS)
def test_gradients_of_identical_samples_are_finite(metric):
    x = uniform(1, CLADES).repeat(5, 1).requires_grad_()
    lengths = uniform(CLADES, seed=1).requires_grad_()
    (FUNCTIONS[metric](x, x, lengths) - 0.3).square().sum().backward()
    assert x.grad.isfinite().all()
    assert lengths.grad.isfinite().all()
    apart = uniform(5, CLADES, seed=2).requires_grad_()
    (FUNCTIONS[metric](apart, apart, lengths) - 0.3).square().sum().backward()
    assert apart.grad.abs().max() > 1e-3  # else a gradient that is 0 everywhere would do above


# What a sample holds


def test_presence_is_the_most_and_share_the_weighted_sum():
    memberships = uniform(ASVS, CLADES)
    found = of_samples(memberships, empty=3)
    for b, sample in enumerate(READS):
        of_asvs = memberships[[*sample]]
        share = torch.tensor([*sample.values()]) / sum(sample.values())
        assert torch.equal(found.presence[b], of_asvs.amax(dim=0))
        torch.testing.assert_close(found.share[b], (share[:, None] * of_asvs).sum(dim=0))
        torch.testing.assert_close(found.tips[b], TIP_LENGTHS[[*sample]].sum())
        torch.testing.assert_close(found.tips_by_share[b], (share * TIP_LENGTHS[[*sample]]).sum())


# Tips


@pytest.mark.parametrize("metric", FUNCTIONS)
@pytest.mark.parametrize("cells", [1, 60, clades.CELLS])
@pytest.mark.parametrize("kept", [2, None])
def test_a_tip_is_a_clade_of_one_asv(monkeypatch, metric, cells, kept):
    """Distances and gradients are those of the formula with a column for each ASV."""
    monkeypatch.setattr(clades, "CELLS", cells)
    slot, mask, log_abundance = slots()
    weight = (mask.float() if metric == "unweighted" else log_abundance.exp()) * mask
    has = torch.zeros(len(READS), ASVS).scatter_add_(1, slot, weight)
    weights = uniform(len(READS) if kept is None else kept, len(READS), seed=9) - 0.5
    weights = weights * (1 - torch.eye(len(READS)))[:kept]
    results = []
    for in_columns in (False, True):
        x, lengths = uniform(len(READS), CLADES).requires_grad_(), uniform(CLADES, seed=2).requires_grad_()
        tip_lengths = TIP_LENGTHS.clone().requires_grad_()
        if in_columns:
            whole = torch.cat([x, has], dim=1)
            distance = FUNCTIONS[metric](whole[:kept], whole, torch.cat([lengths, tip_lengths]))
        else:
            distance = FUNCTIONS[metric](x[:kept], x, lengths, tips_of(metric, tip_lengths, kept=kept))
        gradients = torch.autograd.grad((distance * weights).sum(), [x, lengths, tip_lengths])
        results.append([distance, *gradients])
    for found, expected in zip(*results, strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("metric", FUNCTIONS)
def test_samples_with_the_same_asvs_are_not_apart(metric):
    reads = [READS[0], {asv: 2 * count for asv, count in READS[0].items()}, READS[1]]
    x = uniform(1, CLADES).repeat(3, 1)
    found = FUNCTIONS[metric](x, x, uniform(CLADES, seed=1), tips_of(metric, TIP_LENGTHS, reads))
    assert found[:2, :2].abs().max() < 1e-6
    assert found[2, 0] > 0.01


def test_what_does_not_matter_to_profiles():
    memberships = uniform(ASVS, CLADES)
    expected = of_samples(memberships)
    row_of_occurrence = [asv for sample in READS for asv in sample]
    slot, mask, log_abundance = slots()
    own_rows = slot.clone()
    own_rows[mask] = torch.arange(len(row_of_occurrence))
    variants = {
        "empty slots": of_samples(memberships, empty=5),
        "order": of_samples(memberships, order=-1),
        "each occurrence by itself": profiles(
            memberships[row_of_occurrence], TIP_LENGTHS[row_of_occurrence], own_rows, mask, log_abundance
        ),
    }
    for name, found in variants.items():
        torch.testing.assert_close(found.presence, expected.presence, rtol=0, atol=1e-6, msg=name)
        torch.testing.assert_close(found.share, expected.share, rtol=0, atol=1e-6, msg=name)
        torch.testing.assert_close(found.tips, expected.tips, rtol=0, atol=1e-6, msg=name)
        torch.testing.assert_close(found.tips_by_share, expected.tips_by_share, rtol=0, atol=1e-6, msg=name)


def test_all_that_samples_have_gets_a_gradient_and_nothing_else():
    memberships = uniform(ASVS, CLADES).requires_grad_()
    found = of_samples(memberships, empty=2)
    weights = uniform(len(READS), CLADES, seed=4) + 0.1
    (most,) = torch.autograd.grad((found.presence * weights).sum(), memberships)
    (shares,) = torch.autograd.grad((found.share * weights).sum(), memberships)
    expected_most, expected_shares = torch.zeros(ASVS, CLADES), torch.zeros(ASVS, CLADES)
    for b, sample in enumerate(READS):
        asvs = torch.tensor([*sample])
        winner = asvs[memberships.detach()[asvs].argmax(dim=0)]
        expected_most[winner, torch.arange(CLADES)] += weights[b]
        for asv, reads in sample.items():
            expected_shares[asv] += reads / sum(sample.values()) * weights[b]
    torch.testing.assert_close(most, expected_most)
    torch.testing.assert_close(shares, expected_shares)
    absent = [asv for asv in range(ASVS) if not any(asv in sample for sample in READS)]
    assert absent
    assert shares[absent].count_nonzero() == 0


# The module


def made(seed: int = 0) -> Clades:
    torch.manual_seed(seed)
    module = Clades(dim=6, clades=CLADES)
    torch.nn.init.normal_(module.raw_length)
    return module


def test_memberships_are_those_of_each_vector_alone():
    module, vectors = made(), torch.randn(ASVS, 6, generator=torch.Generator().manual_seed(0))
    found = module(vectors)
    assert found.shape == (ASVS, CLADES)
    assert 0 < found.min() < found.max() < 1
    for row, alone in enumerate(vectors):
        torch.testing.assert_close(module(alone[None])[0], found[row], rtol=0, atol=1e-6)


def test_memberships_are_float32_under_autocast():
    module, vectors = made(), torch.randn(ASVS, 6, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = of_samples(module(vectors))
        distances = [FUNCTIONS["unweighted"](found.presence, found.presence, module.lengths)]
        distances.append(FUNCTIONS["weighted"](found.share, found.share, module.lengths))
    expected = of_samples(module(vectors))
    assert torch.equal(found.presence, expected.presence)
    assert torch.equal(found.share, expected.share)
    for metric, of_metric in zip(FUNCTIONS, distances, strict=True):
        own = expected.presence if metric == "unweighted" else expected.share
        assert torch.equal(of_metric, FUNCTIONS[metric](own, own, module.lengths))


def test_faith_pd_and_its_unit():
    module, presence = made(), uniform(4, CLADES)
    assert module.lengths.min() > 0
    sample = Profiles(presence=presence, share=presence, tips=uniform(4, seed=3), tips_by_share=uniform(4))
    plain = sample.tips + sum(length * presence[:, p] for p, length in enumerate(module.lengths))
    torch.testing.assert_close(module.faith_pd(sample), plain)
    module.start_pd_at(42.0)
    found = module.faith_pd(sample)
    torch.testing.assert_close(found / found[0], plain / plain[0])
    new = Clades(dim=6, clades=CLADES)
    new.start_pd_at(42.0)
    typical = replace(sample, presence=torch.full((4, CLADES), clades.FIRST_PRESENCE), tips=torch.zeros(4))
    torch.testing.assert_close(new.faith_pd(typical), torch.full((4,), 42.0))


def test_every_parameter_learns():
    module, vectors = made(), torch.randn(ASVS, 6, generator=torch.Generator().manual_seed(0))
    tip_lengths = module.tip_lengths(vectors)
    assert tip_lengths.min() > 0
    found = profiles(module(vectors), tip_lengths, *slots())
    distances = [
        unweighted_unifrac(found.presence, found.presence, module.lengths, tips_of("unweighted", tip_lengths)),
        weighted_unifrac(found.share, found.share, module.lengths, tips_of("weighted", tip_lengths)),
    ]
    loss = sum((d - 0.7).square().sum() for d in distances) + (module.faith_pd(found) - 9).square().sum()
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in module.parameters())


# A tree

NEWICK = "(((a:1,b:2):1.5,(c:0.5,d:3):0.25):0.75,((e:4,f:0.1):2,g:1):0.3,(h:1,i:0):0.6);"


def test_with_the_branches_of_a_tree_as_clades_it_is_unifrac_itself():
    tips = list("abcdefghi")
    tree = parse_newick(NEWICK, tips, source="test.nwk")
    paths = unifrac.RootPaths(*root_paths(tree), tree.length)
    memberships = torch.zeros(len(tips), len(paths.length), dtype=torch.float64)
    for asv in range(len(tips)):
        memberships[asv, paths.nodes[paths.offsets[asv] : paths.offsets[asv + 1]]] = 1
    lengths = torch.from_numpy(np.array(paths.length))
    assert (lengths > 0).sum() > CLADES
    slot, mask, log_abundance = slots(empty=1)
    no_tips = torch.zeros(len(tips), dtype=torch.float64)
    found = profiles(memberships, no_tips, slot, mask, log_abundance.double())
    asvs = [np.sort([*sample]) for sample in READS]
    counts = [np.array([sample[asv] for asv in sorted(sample)]) for sample in READS]
    table = np.zeros((len(READS), len(tips)), dtype=int)
    for b, sample in enumerate(READS):
        table[b, [*sample]] = [*sample.values()]
    with_tree = {"taxa": tips, "tree": TreeNode.read(io.StringIO(NEWICK)), "validate": False}
    unweighted = unweighted_unifrac(found.presence, found.presence, lengths)
    weighted = weighted_unifrac(found.share, found.share, lengths)
    pd = found.presence @ lengths
    for value, exact, theirs in (
        (
            unweighted,
            unifrac.unweighted_unifrac(asvs, paths),
            beta_diversity("unweighted_unifrac", table, **with_tree).data,
        ),
        (
            weighted,
            unifrac.weighted_unifrac(asvs, counts, paths),
            beta_diversity("weighted_unifrac", table, normalized=True, **with_tree).data,
        ),
        (pd, unifrac.faith_pd(asvs, paths), alpha_diversity("faith_pd", table, **with_tree).to_numpy()),
    ):
        assert np.ptp(exact) > 0.5
        np.testing.assert_allclose(value.numpy(), exact, rtol=0, atol=1e-6)
        np.testing.assert_allclose(value.numpy(), theirs, rtol=0, atol=1e-6)
    module = Clades(dim=6, clades=len(lengths))
    with torch.no_grad():
        module.raw_length.copy_(lengths.clamp(min=1e-7).expm1().log())  # softplus of it is the length
        single = replace(found, presence=found.presence.float(), tips=found.tips.float())
        torch.testing.assert_close(module.faith_pd(single).double(), pd, rtol=0, atol=1e-5)


# Memory

MEMORY = """
import sys, torch
from aam.model.clades import Tips, common_tips, profiles, unweighted_unifrac, weighted_unifrac
torch.set_num_threads(1)
samples, asvs, slots, clades = int(sys.argv[1]), 2000, 1000, 512
draw = torch.Generator().manual_seed(0)
memberships = torch.rand(asvs, clades, generator=draw, requires_grad=True)
lengths = torch.rand(clades, generator=draw, requires_grad=True)
slot = torch.randint(asvs, (samples, slots), generator=draw)
mask = torch.ones(samples, slots, dtype=torch.bool)
tips = torch.rand(asvs, generator=draw, requires_grad=True)
found = profiles(memberships, tips, slot, mask, torch.full((samples, slots), -7.0))
weight = torch.ones(samples, slots)
shared = slot[:, :100]
common = Tips(found.tips, found.tips, common_tips(tips, slot, weight, shared, weight[:, :100]))
truth = torch.rand(samples, samples, generator=draw)
loss = (unweighted_unifrac(found.presence, found.presence, lengths, common) - truth).square().mean()
loss = loss + (weighted_unifrac(found.share, found.share, lengths) - truth).square().mean()
loss.backward()
assert memberships.grad.isfinite().all() and memberships.grad.abs().max() > 0
assert tips.grad.isfinite().all() and tips.grad.abs().max() > 0
# Not ru_maxrss, which a process takes over from the one that started it.
print(*[line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_tensor_has_all_pairs_of_samples_or_all_slots_by_all_clades():
    """Either has 2 GiB at 1,024 samples, 1,000 slots and 512 clades."""
    peaks = []
    for samples in (4, 1024):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(samples)], capture_output=True, text=True, check=True, timeout=300
        )
        peaks.append(int(done.stdout) / 2**20)  # of KiB to GiB
    assert peaks[1] - peaks[0] < 1.2, peaks
