"""Samples to batches: every worker makes its own share, knowing what the others make.

The draw of a sample is cheap and a pure function, so each worker draws the whole batch (its ASVs and reads)
and builds tensors for its own samples only. That gives each the UniFrac distances to all samples of the
batch, and the totals by which sums over the workers are divided, without any communication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from aam.batch import Batch
from aam.config import DataContract, UnifracMetric
from aam.data.dataset import PreparedDataset
from aam.data.draw import FIXED_DRAW, draw_sample, generator
from aam.data.unifrac import RootPaths, faith_pd, unweighted_unifrac, weighted_unifrac

Draw = tuple[np.ndarray, np.ndarray]
"""ASVs of a sample, ascending, and their reads."""
MOST_PARENTS = 3
"""Samples that a made-up one is mixed of."""
FEWEST_MADE_UP = 8
"""ASVs of a made-up sample."""


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """What batches are made of, the same on all workers."""

    dataset: PreparedDataset
    sample_ids: Sequence[str]
    """The samples of this part of the split."""
    contract: DataContract
    batch_size: int
    """Samples of a batch over all workers."""
    unifrac: tuple[UnifracMetric, ...] = ()
    """Which UniFrac targets batches hold."""
    made_up_fraction: float = 0.0
    """Made-up samples that a training batch has beside its own, per sample of its own."""
    kmers: int = 0
    """4 ** k, kinds of k-mers that the model reads."""
    kmer_dropout: float = 0.0
    """Fraction of these that a training batch hides."""
    mask_fraction: float = 0.0
    """Share of each sequence's nucleotides that are masked."""
    count_mask_fraction: float = 0.0
    """Share of a sample's ASVs whose abundance is masked for the count head."""
    targets: np.ndarray | None = None
    """float32 (transformed) or int64 (classes), by position in `sample_ids`."""
    fixed_rarefaction: bool = False
    """Whether all epochs see one draw of each sample, the one of validation; they still shuffle and mask anew."""
    fixed_draw: int = 0
    """Which of several draws that is, for predictions that are the mean over some."""

    def draw_epoch(self, epoch: int) -> int:
        """Key of an epoch's draws: `FIXED_DRAW`, or below it, where these are the same in all epochs."""
        is_fixed = epoch == FIXED_DRAW or self.fixed_rarefaction or not self.contract.is_random
        return FIXED_DRAW - self.fixed_draw if is_fixed else epoch

    def draw(self, sample_id: str, epoch: int) -> Draw:
        """What an epoch sees of a sample."""
        asvs, counts = self.dataset.sample(self.dataset.row[sample_id])
        return draw_sample(asvs, counts, sample_id, self.contract, self.draw_epoch(epoch))


class EpochBatches(torch.utils.data.Dataset):
    """The batches of one epoch, this worker's share of each; item i is batch i.

    Parameters
    ----------
    plan : BatchPlan
        Samples and settings.
    epoch : int
        Training epoch from 1: shuffled, drawn and masked anew. `FIXED_DRAW`: in order, always the same.
    rank, world : int
        This worker, and the number of workers.
    most : int, optional
        Batches after which the epoch ends; by default those of all samples.
    """

    def __init__(self, plan: BatchPlan, epoch: int, *, rank: int = 0, world: int = 1, most: int | None = None) -> None:
        self.plan, self.epoch, self.rank, self.world = plan, epoch, rank, world
        positions = np.arange(len(plan.sample_ids))
        if epoch != FIXED_DRAW:
            generator(plan.contract.seed, epoch, "shuffle").shuffle(positions)
        self.batches = np.array_split(positions, count_batches(len(positions), plan.batch_size))[:most]

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def has_fixed_draws(self) -> bool:
        """Whether a sample is the same here as in validation and prediction."""
        return self.plan.draw_epoch(self.epoch) <= FIXED_DRAW

    def possible_asvs(self) -> np.ndarray:
        """ASVs, ascending, that this epoch, or one that draws like it, can show on any worker."""
        plan, shown = self.plan, np.zeros(len(self.plan.dataset.lengths), dtype=bool)
        for sample_id in plan.sample_ids:
            if self.has_fixed_draws:
                asvs = plan.draw(sample_id, self.epoch)[0]
            else:
                asvs = plan.dataset.sample(plan.dataset.row[sample_id])[0]
            shown[asvs] = True
        return np.flatnonzero(shown)

    def own_positions(self) -> list[np.ndarray]:
        """Positions in the plan's `sample_ids` of this worker's share of each batch."""
        return [np.array_split(batch, self.world)[self.rank] for batch in self.batches]

    def __getitem__(self, index: int) -> Batch:
        return build_batch(
            self.plan, self.batches[index], epoch=self.epoch, index=index, rank=self.rank, world=self.world
        )


def count_batches(samples: int, batch_size: int) -> int:
    """Batches of nearly equal size that hold each sample once: none is dropped, none has a single sample."""
    return max(1, min(-(-samples // batch_size), samples // 2))


def build_batch(
    plan: BatchPlan, positions: np.ndarray, *, epoch: int, index: int, rank: int = 0, world: int = 1
) -> Batch:
    """One worker's share of a batch.

    Parameters
    ----------
    plan : BatchPlan
        Samples and settings.
    positions : ndarray of int [G]
        The batch, over all workers, as positions in `plan.sample_ids`.
    epoch, index : int
        Epoch (or `FIXED_DRAW`) and number of the batch: the keys of the masks.
    rank, world : int
        This worker, and the number of workers.
    """
    ids = [plan.sample_ids[int(p)] for p in positions]
    draws = [plan.draw(sample_id, epoch) for sample_id in ids]
    if plan.made_up_fraction and epoch != FIXED_DRAW:
        made_up = make_up_samples(
            draws, round(plan.made_up_fraction * len(draws)), generator(plan.contract.seed, epoch, index, "made up")
        )
        draws += made_up
        ids += [f"made-up {number}" for number in range(1, len(made_up) + 1)]
    shares = np.array_split(np.arange(len(ids)), world)
    own = slice(int(shares[rank][0]), int(shares[rank][-1]) + 1)
    distinct, slot, mask, log_abundance = _slots(draws[own])
    lengths = plan.dataset.lengths[distinct]
    longest = int(lengths.max())
    fields = {}
    if plan.kmers and plan.kmer_dropout and epoch != FIXED_DRAW:
        kept = generator(plan.contract.seed, epoch, index, "k-mers").random(plan.kmers) >= plan.kmer_dropout
        fields["kmers_kept"] = torch.from_numpy(kept)
    if plan.mask_fraction:
        fields |= _nucleotide_mask(plan, draws, shares, rank, distinct, (plan.contract.seed, epoch, index))
    if {"unweighted", "weighted"}.intersection(plan.unifrac):
        fields |= _shared(draws, distinct)
    for metric in plan.unifrac:
        fields[metric] = torch.from_numpy(exact_unifrac(metric, draws, plan.dataset.paths, own).astype(np.float32))
    if plan.targets is not None:
        fields["target"] = torch.from_numpy(plan.targets[positions[own]])
    if plan.count_mask_fraction:
        fields |= _count_mask(plan, ids, draws, own, mask.shape, epoch)
    return Batch(
        sample_ids=ids[own],
        tokens=torch.from_numpy(plan.dataset.tokens[distinct, :longest]),
        asvs=torch.from_numpy(distinct.astype(np.int64)),
        slot=torch.from_numpy(slot),
        slot_mask=torch.from_numpy(mask),
        log_abundance=torch.from_numpy(log_abundance),
        asvs_padded=bool((lengths != longest).any()),
        global_rows=own,
        rank_sizes=[len(share) for share in shares],
        **fields,
    )


def exact_unifrac(
    metric: UnifracMetric, draws: Sequence[Draw], paths: RootPaths | None, rows: slice = slice(None)
) -> np.ndarray:
    """Exact values of a metric for some samples of a batch.

    Returns
    -------
    ndarray of float64
        Distances [len(rows), G] to all of the batch; of Faith's PD, one value a sample.
    """
    assert paths is not None, "UniFrac needs a dataset with a tree"
    asvs = [asvs for asvs, _ in draws]
    if metric == "faith_pd":
        return faith_pd(asvs[rows], paths)
    if metric == "weighted":
        return weighted_unifrac(asvs, [counts for _, counts in draws], paths, rows)
    return unweighted_unifrac(asvs, paths, rows)


def make_up_samples(draws: Sequence[Draw], number: int, rng: np.random.Generator) -> list[Draw]:
    """Make up samples of the ASVs of others: pairs that real samples do not offer, whose UniFrac is exact all the same.

    Each mixes one to three samples, by random weights, and keeps a random subset of their ASVs, of a size between
    `FEWEST_MADE_UP` and all, drawn log-uniformly.

    Parameters
    ----------
    draws : sequence of (ndarray, ndarray)
        ASVs and reads of the samples.
    number : int
        How many to make up.
    rng : Generator
        Decides on all.
    """
    made_up = []
    for _ in range(number):
        parents = rng.choice(len(draws), min(len(draws), int(rng.integers(1, MOST_PARENTS + 1))), replace=False)
        weights = rng.dirichlet(np.ones(len(parents)))
        asvs = np.concatenate([draws[p][0] for p in parents])
        reads = np.concatenate([w * draws[p][1] / draws[p][1].sum() for w, p in zip(weights, parents, strict=True)])
        asvs, column = np.unique(asvs, return_inverse=True)
        reads = np.bincount(column, weights=reads)
        least = min(FEWEST_MADE_UP, len(asvs))
        size = round(least * (len(asvs) / least) ** rng.random())
        kept = np.sort(rng.choice(len(asvs), size, replace=False))
        made_up.append((asvs[kept], reads[kept]))
    return made_up


def _slots(draws: list[Draw]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Distinct ASVs [U] of some samples; slots [B, S] that point at them, their mask and log abundance."""
    distinct = np.unique(np.concatenate([asvs for asvs, _ in draws]))
    width = max(len(asvs) for asvs, _ in draws)
    slot = np.zeros((len(draws), width), dtype=np.int64)
    mask = np.zeros((len(draws), width), dtype=bool)
    log_abundance = np.zeros((len(draws), width), dtype=np.float32)
    for row, (asvs, counts) in enumerate(draws):
        slot[row, : len(asvs)] = np.searchsorted(distinct, asvs)
        mask[row, : len(asvs)] = True
        log_abundance[row, : len(asvs)] = np.log(counts / counts.sum())
    return distinct, slot, mask, log_abundance


def _shared(draws: list[Draw], distinct: np.ndarray) -> dict:
    """Which of this worker's distinct ASVs each sample of the whole batch has, and how much of each."""
    asvs = np.concatenate([asvs for asvs, _ in draws])
    abundance = np.concatenate([counts / counts.sum() for _, counts in draws])
    row = np.repeat(np.arange(len(draws)), [len(asvs) for asvs, _ in draws])
    place = np.searchsorted(distinct, asvs).clip(max=len(distinct) - 1)
    here = distinct[place] == asvs
    place, abundance, row = place[here], abundance[here], row[here]
    number = np.bincount(row, minlength=len(draws))
    column = np.arange(len(row)) - np.repeat(np.cumsum(number) - number, number)
    shared = np.full((len(draws), number.max()), len(distinct), dtype=np.int64)
    shared_abundance = np.zeros(shared.shape, dtype=np.float32)
    shared[row, column], shared_abundance[row, column] = place, abundance
    return {"shared": torch.from_numpy(shared), "shared_abundance": torch.from_numpy(shared_abundance)}


def _nucleotide_mask(
    plan: BatchPlan,
    draws: list[Draw],
    shares: list[np.ndarray],
    rank: int,
    distinct: np.ndarray,
    key: tuple[int, int, int],
) -> dict:
    """Masked positions of this worker's ASVs, drawn for the whole batch.

    An ASV in the samples of several workers is masked the same by each and scored by the first, so that the
    loss does not depend on the number of workers.
    """
    of_ranks = [np.unique(np.concatenate([draws[i][0] for i in share])) for share in shares]
    everywhere = np.unique(np.concatenate(of_ranks))
    nucleotides = plan.dataset.lengths[everywhere].astype(np.int64) - 1
    number = np.maximum(1, np.round(plan.mask_fraction * nucleotides)).astype(np.int64)
    order = generator(*key, "mask").random((len(everywhere), int(nucleotides.max())), dtype=np.float32)
    order[np.arange(order.shape[1]) >= nucleotides[:, None]] = 2.0  # behind the end: never chosen
    position = np.argsort(order, axis=1, kind="stable")[:, : number.max()] + 1  # START is never masked
    own = np.searchsorted(everywhere, distinct)
    valid = np.arange(position.shape[1]) < number[own, None]
    before = np.concatenate(of_ranks[:rank]) if rank else np.zeros(0, dtype=distinct.dtype)
    first_here = ~np.isin(distinct, before)
    position = np.where(valid, position[own], position[own, :1])
    return {
        "masked_position": torch.from_numpy(position),
        "masked_scored": torch.from_numpy(valid & first_here[:, None]),
        "masked_total": int(number.sum()),
    }


def _count_mask(
    plan: BatchPlan,
    ids: list[str],
    draws: list[Draw],
    own: slice,
    shape: tuple[int, ...],
    epoch: int,
) -> dict:
    """Slots whose abundance the count head fills in, and how many there are over all workers."""
    masked = np.zeros(shape, dtype=bool)
    numbers = [max(1, round(plan.count_mask_fraction * len(asvs))) for asvs, _ in draws]
    for row, i in enumerate(range(own.start, own.stop)):
        rng = generator(plan.contract.seed, epoch, ids[i], "count")
        masked[row, rng.choice(len(draws[i][0]), numbers[i], replace=False)] = True
    return {"count_masked": torch.from_numpy(masked), "count_total": sum(numbers)}
