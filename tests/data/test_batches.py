"""Batches: each sample once, the shares of the workers make up the batch, masks and targets of the draw."""

import dataclasses
import io

import biom
import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from skbio import TreeNode
from skbio.diversity import alpha_diversity, beta_diversity

from aam.config import DataConfig, DataContract
from aam.data.batches import FEWEST_MADE_UP, MOST_PARENTS, BatchPlan, EpochBatches, count_batches, make_up_samples
from aam.data.draw import FIXED_DRAW, draw_sample
from aam.data.prepare import prepare
from aam.data.tokens import PAD, START

WORLDS = [1, 2, 3]
METRICS = ("unweighted", "weighted", "faith_pd")
EPOCHS = [FIXED_DRAW, 1]


@pytest.fixture(scope="module")
def plan(synthetic_folder) -> BatchPlan:
    """All losses have what they need; some ASVs are shorter, 200 reads a sample, and truncation bites."""
    config = DataConfig(table=synthetic_folder / "table.biom", tree=synthetic_folder / "tree.nwk")
    dataset = prepare(config, max_bp=150, use_tree=True)
    usable = [s for s, reads in zip(dataset.sample_ids, dataset.depths, strict=True) if reads >= 200]
    return BatchPlan(
        dataset=dataset,
        sample_ids=usable,
        contract=DataContract(rarefy_depth=200, token_limit=20, seed=4),
        batch_size=7,
        unifrac=METRICS,
        mask_fraction=0.15,
        count_mask_fraction=0.15,
        targets=np.arange(len(usable), dtype=np.float32),
    )


@pytest.fixture(scope="module")
def uneven(plan, tmp_path_factory) -> BatchPlan:
    """The same with ASVs of many lengths, one of 4 nucleotides."""
    folder = tmp_path_factory.mktemp("uneven")
    rng = np.random.default_rng(0)
    sequences = ["ACGT"] + ["".join(rng.choice(list("ACGT"), n)) for n in range(10, 60)]
    counts = rng.poisson(3, (len(sequences), 12)) + (np.arange(len(sequences)) == 0)[:, None]
    with h5py.File(folder / "table.biom", "w") as file:
        biom.Table(counts, sequences, [f"s{i}" for i in range(12)]).to_hdf5(file, "test")
    dataset = prepare(DataConfig(table=folder / "table.biom"), max_bp=150, use_tree=False)
    return BatchPlan(
        dataset=dataset,
        sample_ids=dataset.sample_ids,
        contract=DataContract(rarefy_depth=60),
        batch_size=6,
        mask_fraction=0.15,
    )


def batches_of(plan: BatchPlan, epoch: int, world: int) -> list[list]:
    """For each batch the shares of all workers."""
    of_ranks = [EpochBatches(plan, epoch, rank=rank, world=world) for rank in range(world)]
    return [[of_rank[i] for of_rank in of_ranks] for i in range(len(of_ranks[0]))]


def drawn(plan: BatchPlan, sample: str, epoch: int) -> dict[int, int]:
    asvs, counts = draw_sample(*plan.dataset.sample(plan.dataset.row[sample]), sample, plan.contract, epoch)
    return dict(zip(asvs.tolist(), counts.tolist(), strict=True))


def equal(a, b) -> bool:
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a)]
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


# Each sample once


@given(st.integers(2, 500), st.integers(2, 64), st.data())
def test_batches_hold_each_sample_once_and_suit_all_workers(n, batch_size, data):
    world = data.draw(st.integers(1, batch_size // 2))
    sizes = [len(part) for part in np.array_split(np.arange(n), count_batches(n, batch_size))]
    assert sum(sizes) == n
    assert min(sizes) >= 2
    assert max(sizes) <= max(batch_size, 3)
    if n >= world:
        assert min(sizes) >= world  # no worker is without a sample


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("epoch", EPOCHS)
def test_an_epoch_visits_each_sample_once(plan, world, epoch):
    batches = batches_of(plan, epoch, world)
    visited = [s for shares in batches for share in shares for s in share.sample_ids]
    assert sorted(visited) == sorted(plan.sample_ids)
    assert len(set(visited)) == len(visited)
    if epoch == FIXED_DRAW:
        assert visited == plan.sample_ids


def test_own_positions_are_those_of_the_batches(plan):
    for rank in range(3):
        batches = EpochBatches(plan, 3, rank=rank, world=3)
        found = [[plan.sample_ids[p] for p in positions] for positions in batches.own_positions()]
        assert found == [batches[i].sample_ids for i in range(len(batches))]


@pytest.mark.parametrize("world", [2, 3])
def test_the_shares_make_up_the_batch_of_one_worker(plan, world):
    for [whole], shares in zip(batches_of(plan, 1, 1), batches_of(plan, 1, world), strict=True):
        assert [s for share in shares for s in share.sample_ids] == whole.sample_ids
        assert [s for share in shares for s in whole.sample_ids[share.global_rows]] == whole.sample_ids
        for name in (*METRICS, "target"):
            assert torch.equal(torch.cat([getattr(s, name) for s in shares]), getattr(whole, name)), name
        for share in shares:
            assert share.rank_sizes == [len(s.sample_ids) for s in shares]
            assert share.pair_total == whole.pair_total
            assert share.masked_total == whole.masked_total
            assert share.count_total == whole.count_total


def test_targets_follow_the_shuffled_samples(plan):
    for [batch] in batches_of(plan, 2, 1):
        assert batch.target.tolist() == [plan.sample_ids.index(s) for s in batch.sample_ids]


def test_validation_is_always_the_same_and_training_epochs_differ(plan):
    fixed, again = batches_of(plan, FIXED_DRAW, 1), batches_of(plan, FIXED_DRAW, 1)
    assert all(equal(a, b) for [a], [b] in zip(fixed, again, strict=True))
    first, repeated, second = (batches_of(plan, epoch, 1) for epoch in (1, 1, 2))
    assert all(equal(a, b) for [a], [b] in zip(first, repeated, strict=True))
    assert [b.sample_ids for [b] in first] != [b.sample_ids for [b] in second]
    sample = plan.sample_ids[0]
    assert drawn(plan, sample, 1) != drawn(plan, sample, 2)


# The draw


@pytest.mark.parametrize("world", WORLDS)
def test_slots_and_abundances_give_the_draw_back(plan, world):
    for shares in batches_of(plan, 1, world):
        for batch in shares:
            for row, sample in enumerate(batch.sample_ids):
                draw, mask = drawn(plan, sample, 1), batch.slot_mask[row]
                asvs = batch.asvs[batch.slot[row][mask]].tolist()
                assert asvs == list(draw)
                reads = np.array(list(draw.values()))
                share = batch.log_abundance[row][mask].double().exp().numpy()
                np.testing.assert_allclose(share, reads / reads.sum(), rtol=1e-5)
                assert not batch.slot[row][~mask].any()
                assert not batch.log_abundance[row][~mask].any()
            assert batch.slot_mask.any(dim=1).all()
            assert batch.slot_mask.any(dim=0).all()  # no wider than the longest sample


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("epoch", [FIXED_DRAW, 1])
def test_shared_asvs_are_those_of_the_whole_batch_that_a_worker_has_too(plan, world, epoch):
    plan = dataclasses.replace(plan, unifrac=("weighted",))
    whole = EpochBatches(plan, epoch)[0]
    expected = shares_by_asv(whole, whole.slot, whole.log_abundance.exp(), whole.slot_mask)
    for rank in range(world):
        batch = EpochBatches(plan, epoch, rank=rank, world=world)[0]
        here = batch.shared < len(batch.asvs)
        found = shares_by_asv(batch, batch.shared, batch.shared_abundance, here)
        own = set(batch.asvs.tolist())
        assert found == [{asv: of for asv, of in sample.items() if asv in own} for sample in expected]
        assert batch.shared_abundance[~here].count_nonzero() == 0


def shares_by_asv(batch, slot, abundance, mask):
    """Relative abundance by ASV, of each sample."""
    return [
        {int(batch.asvs[u]): round(float(a), 5) for u, a, is_there in zip(*row, strict=True) if is_there}
        for row in zip(slot, abundance, mask, strict=True)
    ]


@pytest.mark.parametrize("case", ["plan", "uneven"])
def test_each_distinct_asv_is_there_once(case, request):
    plan = request.getfixturevalue(case)
    for shares in batches_of(plan, 1, 2):
        for batch in shares:
            expected = sorted(set().union(*(drawn(plan, s, 1) for s in batch.sample_ids)))
            assert batch.asvs.tolist() == expected
            lengths = plan.dataset.lengths[expected]
            assert batch.tokens.shape == (len(expected), lengths.max())
            assert batch.tokens.dtype == torch.uint8
            np.testing.assert_array_equal(batch.tokens, plan.dataset.tokens[expected][:, : lengths.max()])
            assert batch.asvs_padded == bool((batch.tokens == PAD).any())
    assert plan.dataset.lengths.min() < plan.dataset.lengths.max() or case == "plan"


def scikit_bio(metric: str, reads: list[dict[int, float]], sequences: list[str], tree: TreeNode) -> np.ndarray:
    """A metric of samples whose reads, or their shares, are given by ASV."""
    counts = np.zeros((len(reads), len(sequences)), dtype=np.int64)  # scikit-bio cuts fractions off
    for row, sample in enumerate(reads):
        shares = np.array([*sample.values()]) / sum(sample.values())
        counts[row, [*sample]] = np.round(shares * 10**9)
    settings = {"taxa": sequences, "tree": tree, "validate": False}
    if metric == "faith_pd":
        return alpha_diversity("faith_pd", counts, **settings).to_numpy()
    normalized = {"normalized": True} if metric == "weighted" else {}
    return beta_diversity(f"{metric}_unifrac", counts, **settings, **normalized).data


@pytest.fixture(scope="module")
def tree(synthetic_folder) -> TreeNode:
    return TreeNode.read(io.StringIO((synthetic_folder / "tree.nwk").read_text()))


def test_unifrac_is_that_of_scikit_bio_on_the_truncated_draw(plan, tree):
    for [batch] in batches_of(plan, 1, 1):
        reads = [drawn(plan, sample, 1) for sample in batch.sample_ids]
        assert max(map(len, reads)) == plan.contract.token_limit  # truncation happened
        for metric in METRICS:
            found = getattr(batch, metric)
            assert found.dtype == torch.float32
            expected = scikit_bio(metric, reads, plan.dataset.sequences, tree)
            np.testing.assert_allclose(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_one_metric_alone(plan, metric):
    alone = EpochBatches(dataclasses.replace(plan, unifrac=(metric,)), 1)[0]
    beside = EpochBatches(plan, 1)[0]
    assert torch.equal(getattr(alone, metric), getattr(beside, metric))
    assert all(getattr(alone, other) is None for other in METRICS if other != metric)


# Made-up samples


@pytest.fixture(scope="module")
def padded(plan) -> BatchPlan:
    """With made-up samples, as stage 1 trains."""
    return dataclasses.replace(plan, made_up_fraction=0.5, targets=None, count_mask_fraction=0.0)


def reads_of(batch, row: int) -> dict[int, float]:
    """Shares of a sample's ASVs, as the model sees them."""
    slots = batch.slot_mask[row]
    asvs = batch.asvs[batch.slot[row][slots]].tolist()
    return dict(zip(asvs, batch.log_abundance[row][slots].double().exp().tolist(), strict=True))


def test_training_batches_have_so_many_made_up_samples_more(plan, padded):
    for fraction in (0.3, 0.5, 2.0):
        more = dataclasses.replace(padded, made_up_fraction=fraction)
        for [batch], [real] in zip(batches_of(more, 1, 1), batches_of(plan, 1, 1), strict=True):
            number = len(real.sample_ids)
            assert batch.sample_ids[:number] == real.sample_ids
            made_up = batch.sample_ids[number:]
            assert made_up == [f"made-up {i}" for i in range(1, round(fraction * number) + 1)]
            assert len(made_up) > 0
            for row in range(number):
                assert reads_of(batch, row) == reads_of(real, row)
            assert torch.equal(batch.unweighted[:number, :number], real.unweighted)
            assert batch.pair_total == batch.global_size * (batch.global_size - 1) > real.pair_total


def test_validation_has_none(plan, padded):
    for [batch], [real] in zip(batches_of(padded, FIXED_DRAW, 1), batches_of(plan, FIXED_DRAW, 1), strict=True):
        assert batch.sample_ids == real.sample_ids
        assert torch.equal(batch.unweighted, real.unweighted)


def test_made_up_samples_follow_from_seed_epoch_and_batch(padded):
    def made_up(plan, epoch: int) -> list[list[dict[int, float]]]:
        return [
            [reads_of(b, row) for row, s in enumerate(b.sample_ids) if s.startswith("made-up")]
            for [b] in batches_of(plan, epoch, 1)
        ]

    first = made_up(padded, 1)
    assert made_up(padded, 1) == first
    assert all(one != other for one, other in zip(made_up(padded, 2), first, strict=True))
    assert first[0] != first[1]
    # With draws that are the same in all epochs, those of an epoch are still its own.
    same_draws = dataclasses.replace(padded, fixed_rarefaction=True)
    other_seed = dataclasses.replace(padded, contract=dataclasses.replace(padded.contract, seed=5))
    assert made_up(same_draws, 1) != made_up(same_draws, 2)
    assert made_up(other_seed, 1) != first


@pytest.mark.parametrize("world", [2, 3])
def test_the_workers_make_up_the_same_samples_and_share_them(padded, world):
    for [whole], shares in zip(batches_of(padded, 1, 1), batches_of(padded, 1, world), strict=True):
        assert [s for share in shares for s in share.sample_ids] == whole.sample_ids
        assert max(map(len, (s.sample_ids for s in shares))) - min(map(len, (s.sample_ids for s in shares))) <= 1
        together = [reads_of(share, row) for share in shares for row in range(len(share.sample_ids))]
        assert together == [reads_of(whole, row) for row in range(len(whole.sample_ids))]
        for metric in METRICS:
            assert torch.equal(torch.cat([getattr(s, metric) for s in shares]), getattr(whole, metric)), metric
        for share in shares:
            assert share.sample_ids == whole.sample_ids[share.global_rows]
            assert share.rank_sizes == [len(s.sample_ids) for s in shares]
            assert (share.pair_total, share.masked_total) == (whole.pair_total, whole.masked_total)
        assert sum(int(share.masked_scored.sum()) for share in shares) == whole.masked_total


def test_unifrac_of_made_up_samples_is_that_of_scikit_bio(padded, tree):
    for [batch] in batches_of(padded, 1, 1):
        assert any(s.startswith("made-up") for s in batch.sample_ids)
        reads = [reads_of(batch, row) for row in range(batch.global_size)]
        for metric in METRICS:
            expected = scikit_bio(metric, reads, padded.dataset.sequences, tree)
            np.testing.assert_allclose(getattr(batch, metric), expected, atol=1e-6, rtol=1e-6)


@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 40))
def test_a_made_up_sample_is_a_part_of_a_mixture(seed, samples, most):
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(samples):
        asvs = np.sort(rng.choice(60, rng.integers(1, most + 1), replace=False))
        draws.append((asvs, rng.integers(1, 100, len(asvs))))
    made_up = make_up_samples(draws, 12, np.random.default_rng(seed))
    assert len(made_up) == 12
    again = make_up_samples(draws, 12, np.random.default_rng(seed))
    for (asvs, reads), (other_asvs, other_reads) in zip(made_up, again, strict=True):
        np.testing.assert_array_equal(asvs, other_asvs)
        np.testing.assert_array_equal(reads, other_reads)
    everything = np.unique(np.concatenate([asvs for asvs, _ in draws]))
    sizes = sorted((len(asvs) for asvs, _ in draws), reverse=True)
    for asvs, reads in made_up:
        assert np.isin(asvs, everything).all()
        assert (np.diff(asvs) > 0).all()  # ascending, each once
        assert len(reads) == len(asvs)
        assert reads.min() > 0
        assert reads.sum() <= 1 + 1e-9
        assert min(FEWEST_MADE_UP, sizes[-1]) <= len(asvs) <= min(len(everything), sum(sizes[:MOST_PARENTS]))


def test_made_up_samples_of_one_sample_have_its_proportions():
    asvs, reads = np.arange(30), np.arange(1, 31)
    made_up = make_up_samples([(asvs, reads)], 50, np.random.default_rng(0))
    for kept, share in made_up:
        np.testing.assert_allclose(share, reads[kept] / reads.sum())
    sizes = np.array([len(kept) for kept, _ in made_up])
    assert sizes.min() >= FEWEST_MADE_UP
    assert sizes.max() > 20
    assert len(set(sizes.tolist())) > 10


def test_what_is_not_asked_for_is_not_there(plan):
    bare = dataclasses.replace(plan, unifrac=(), mask_fraction=0.0, count_mask_fraction=0.0, targets=None)
    batch = EpochBatches(bare, 1)[0]
    for name in (*METRICS, "shared", "shared_abundance", "masked_position", "masked_scored", "count_masked", "target"):
        assert getattr(batch, name) is None
    assert batch.masked_total == batch.count_total == 0


# Masks


def scored_positions(batch) -> dict[int, list[int]]:
    """ASV to its masked positions, of those that this worker scores."""
    found = {}
    for asv, position, scored in zip(batch.asvs.tolist(), batch.masked_position, batch.masked_scored, strict=True):
        if scored.any():
            found[asv] = position[scored].tolist()
    return found


def masked_positions(batch) -> dict[int, set[int]]:
    return {a: set(p.tolist()) for a, p in zip(batch.asvs.tolist(), batch.masked_position, strict=True)}


@pytest.mark.parametrize("case", ["plan", "uneven"])
@pytest.mark.parametrize("epoch", EPOCHS)
def test_15_percent_of_the_letters_are_masked_and_nothing_else(case, epoch, request):
    plan = request.getfixturevalue(case)
    for [batch] in batches_of(plan, epoch, 1):
        masked = masked_positions(batch)
        for row, asv in enumerate(batch.asvs.tolist()):
            letters = int(plan.dataset.lengths[asv]) - 1
            assert len(masked[asv]) == max(1, round(0.15 * letters))
            tokens = batch.tokens[row][batch.masked_position[row]]
            assert not ((tokens == START) | (tokens == PAD)).any()
        scored = scored_positions(batch)
        assert {asv: set(positions) for asv, positions in scored.items()} == masked
        assert sum(map(len, scored.values())) == sum(map(len, masked.values()))  # repeats are not scored
        assert batch.masked_total == int(batch.masked_scored.sum())


def test_all_positions_are_masked_in_time(uneven):
    found: dict[int, set[int]] = {}
    for epoch in range(1, 60):
        for asv, positions in masked_positions(EpochBatches(uneven, epoch)[0]).items():
            found.setdefault(asv, set()).update(positions)
    asv = uneven.dataset.sequences.index("ACGT")
    assert found[asv] == {1, 2, 3, 4}


@pytest.mark.parametrize("case", ["plan", "uneven"])
@pytest.mark.parametrize("world", [2, 3])
def test_the_workers_mask_alike_and_score_each_asv_once(case, world, request):
    plan = request.getfixturevalue(case)
    shared = 0
    for [whole], shares in zip(batches_of(plan, 1, 1), batches_of(plan, 1, world), strict=True):
        expected = masked_positions(whole)
        for share in shares:
            masked = masked_positions(share)
            assert masked == {asv: expected[asv] for asv in masked}
        scored = [scored_positions(share) for share in shares]
        together = {asv: positions for part in scored for asv, positions in part.items()}
        assert sum(map(len, scored)) == len(together)  # by one worker only
        assert {a: sorted(p) for a, p in together.items()} == {a: sorted(p) for a, p in scored_positions(whole).items()}
        assert sum(int(share.masked_scored.sum()) for share in shares) == whole.masked_total
        shared += sum(len(share.asvs) for share in shares) - len(whole.asvs)
    assert shared > 0  # some ASVs were in the samples of several workers


@pytest.mark.parametrize("world", WORLDS)
def test_abundances_are_masked_alike_at_any_number_of_workers(plan, world):
    for [whole], shares in zip(batches_of(plan, 1, 1), batches_of(plan, 1, world), strict=True):
        row = 0
        for share in shares:
            assert not (share.count_masked & ~share.slot_mask).any()
            for slots, masked in zip(share.slot_mask, share.count_masked, strict=True):
                n = int(slots.sum())
                assert int(masked.sum()) == max(1, round(0.15 * n))
                assert torch.equal(masked[:n], whole.count_masked[row][:n])
                row += 1
        assert sum(int(share.count_masked.sum()) for share in shares) == whole.count_total


def test_masks_differ_between_epochs(plan):
    fixed = dataclasses.replace(plan, contract=dataclasses.replace(plan.contract, rarefy_depth=0, token_limit=999))
    first, second = (batches_of(fixed, epoch, 1) for epoch in (1, 2))
    nucleotides = [{a: p for [b] in epoch for a, p in masked_positions(b).items()} for epoch in (first, second)]
    assert nucleotides[0] != nucleotides[1]

    def masked(epoch, sample):
        return next(b.count_masked[b.sample_ids.index(sample)] for [b] in epoch if sample in b.sample_ids)

    assert masked(first, plan.sample_ids[0]).nonzero().tolist() != masked(second, plan.sample_ids[0]).nonzero().tolist()


def test_a_data_loader_in_other_processes_gives_the_same(plan):
    batches = EpochBatches(plan, 1)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=1)
    loaded = list(loader)
    assert len(loaded) == len(batches)
    assert all(equal(a, batches[i]) for i, a in enumerate(loaded))


def test_a_training_batch_hides_the_same_k_mers_on_all_workers_and_validation_none(plan):
    hiding = dataclasses.replace(plan, kmers=64, kmer_dropout=0.25)
    of_epochs = {}
    for epoch in (1, 2):
        for world in (1, 2):
            kept = [[batch.kmers_kept.tolist() for batch in of_rank] for of_rank in batches_of(hiding, epoch, world)]
            for of_batch in kept:
                assert all(of_rank == of_batch[0] for of_rank in of_batch)
            of_epochs[epoch, world] = [of_batch[0] for of_batch in kept]
        assert of_epochs[epoch, 1] == of_epochs[epoch, 2]
    assert of_epochs[1, 1] != of_epochs[2, 1]
    assert of_epochs[1, 1][0] != of_epochs[1, 1][1]
    assert 0.65 < np.mean(of_epochs[1, 1]) < 0.85
    for of_rank in batches_of(hiding, FIXED_DRAW, 1):
        assert all(batch.kmers_kept is None for batch in of_rank)
