"""The one thing that data makes, the model reads and the losses score: a batch of samples.

Shape letters: B samples of this worker, G samples of the batch over all workers, S ASV slots of a sample,
T ASVs that a sample shares with this worker's, U distinct ASVs of the worker's samples, L tokens of an ASV,
K masked positions of an ASV.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One worker's share of a batch. A target that a run does not have is None."""

    sample_ids: list[str]
    """Ids of the B samples."""
    tokens: Tensor
    """uint8 [U, L]: the distinct ASVs, each once, START first and PAD last."""
    asvs: Tensor
    """int64 [U]: rows of the prepared dataset."""
    slot: Tensor
    """int64 [B, S]: which of the U ASVs stands in a slot; 0 where there is none."""
    slot_mask: Tensor
    """bool [B, S]: True where a slot holds an ASV. No row is empty."""
    log_abundance: Tensor
    """float32 [B, S]: natural log of the relative abundance; 0 in empty slots."""
    asvs_padded: bool
    """Whether any of the U sequences ends before L."""
    global_rows: slice
    """Which of the G samples these B are."""
    rank_sizes: list[int]
    """Samples of each worker; their sum is G."""
    kmers_kept: Tensor | None = None
    """bool [4 ** k]: k-mers that are read, of all ASVs alike; None for all of them."""
    masked_position: Tensor | None = None
    """int64 [U, K]: masked tokens; a sequence with fewer than K repeats its first."""
    masked_scored: Tensor | None = None
    """bool [U, K]: True where the loss counts the position: once over all workers, repeats never."""
    masked_total: int = 0
    """Scored positions over all workers."""
    unweighted: Tensor | None = None
    """float32 [B, G]: unweighted UniFrac of these samples to all of the batch."""
    weighted: Tensor | None = None
    """float32 [B, G]: normalised weighted UniFrac of the same."""
    faith_pd: Tensor | None = None
    """float32 [B]: Faith's PD of these samples, in branch lengths of the tree."""
    shared: Tensor | None = None
    """int64 [G, T]: which of the U ASVs each sample of the batch has too; U where there is none. For distances."""
    shared_abundance: Tensor | None = None
    """float32 [G, T]: relative abundance of these in that sample; 0 where there is none."""
    target: Tensor | None = None
    """float32 [B] (transformed) or int64 [B] (class)."""
    count_masked: Tensor | None = None
    """bool [B, S]: slots whose abundance the count head has to fill in."""
    count_total: int = 0
    """Such slots over all workers."""

    @property
    def global_size(self) -> int:
        """G, the samples of the batch over all workers."""
        return sum(self.rank_sizes)

    @property
    def pair_total(self) -> int:
        """Ordered pairs of different samples over all workers."""
        return self.global_size * (self.global_size - 1)

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device, without waiting for the copies."""
        moved = {
            f.name: value.to(device, non_blocking=True)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, **moved)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; torch's DataLoader calls this."""
        pinned = {
            f.name: value.pin_memory()
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, **pinned)
