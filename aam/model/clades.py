"""Soft clades: what an ASV belongs to, what a sample holds of it, and UniFrac between samples.

A branch of a tree is in a sample where any of the sample's ASVs lies below it, so UniFrac compares sets of branches.
A clade here is a learned branch: each ASV belongs to it to a degree from 0 to 1, by its own sequence alone. A sample
has a clade as much as the ASV of it that belongs to it most. With learned lengths of the clades, UniFrac then has the
form that it has on a tree, and the tree is no longer needed.

Shape letters: B samples, G samples over all workers, S ASV slots, U distinct ASVs, D width, P clades.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CELLS = 2**25
"""Numbers that an intermediate tensor may have: 128 MiB of them."""
STEEPNESS = 2.0
"""Of the sigmoid of the memberships."""
FIRST_BIAS = -2.0
"""New ASVs belong to few clades: a sample of hundreds of them must not have all clades at once."""
FIRST_LENGTH = math.log(2)
"""softplus(0), the length of a new clade."""
FIRST_PRESENCE = 0.3
"""What a sample has of a new clade, about: sets the unit of Faith's PD before training."""


@dataclass(frozen=True, kw_only=True)
class Profiles:
    """What samples hold of each clade."""

    presence: Tensor
    """float32 [B, P], 0 to 1: of the ASV that belongs to the clade most."""
    share: Tensor
    """float32 [B, P], 0 to 1: summed over the ASVs, weighted by their relative abundance."""


class Clades(nn.Module):
    """Memberships of ASVs in soft clades, profiles of samples, lengths of the clades.

    There is no dropout: of memberships with noise, the largest of hundreds is always too large (NOTES.md).

    Parameters
    ----------
    dim : int
        D, width of the ASV vectors.
    clades : int
        P.
    """

    def __init__(self, dim: int, clades: int) -> None:
        super().__init__()
        self.members = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.GELU(), nn.LayerNorm(2 * dim), nn.Linear(2 * dim, clades)
        )
        last = self.members[-1]
        assert isinstance(last, nn.Linear)
        nn.init.constant_(last.bias, FIRST_BIAS)
        self.raw_length = nn.Parameter(torch.zeros(clades))
        self.log_pd_scale = nn.Parameter(torch.zeros(()))

    def forward(self, vectors_UD: Tensor) -> Tensor:
        """Memberships of ASVs, each from its own vector alone: float32 [U, P], 0 to 1."""
        # float32 under autocast too: a membership of 0.001 counts where a thousand ASVs lack the clade.
        with torch.autocast(vectors_UD.device.type, enabled=False):
            return torch.sigmoid(STEEPNESS * self.members(vectors_UD.float()))

    @property
    def lengths(self) -> Tensor:
        """Lengths of the clades, above 0: float32 [P]."""
        return F.softplus(self.raw_length)

    @torch.no_grad()
    def start_pd_at(self, mean: float) -> None:
        """Set the unit of Faith's PD so that a new model predicts about this mean, in branch lengths of the tree."""
        typical = FIRST_PRESENCE * FIRST_LENGTH * len(self.raw_length)
        self.log_pd_scale.fill_(math.log(mean / typical))

    def faith_pd(self, presence_BP: Tensor) -> Tensor:
        """Faith's phylogenetic diversity, in branch lengths of the tree: float32 [B]."""
        return self.log_pd_scale.exp() * (presence_BP @ self.lengths)


def profiles(memberships_UP: Tensor, slot_BS: Tensor, mask_BS: Tensor, log_abundance_BS: Tensor) -> Profiles:
    """What samples hold of each clade.

    Parameters
    ----------
    memberships_UP : Tensor of float32
        Of the distinct ASVs.
    slot_BS : Tensor of int64
        Which of them stands in a slot.
    mask_BS : Tensor of bool
        True where a slot holds an ASV, at least one in each row.
    log_abundance_BS : Tensor of float32
        Natural log of the relative abundance.
    """
    with torch.autocast(memberships_UP.device.type, enabled=False):
        nothing = len(memberships_UP)
        bag_BS = torch.where(mask_BS, slot_BS, nothing)
        rows_UP = torch.cat([memberships_UP, memberships_UP.new_zeros(1, memberships_UP.shape[1])])
        return Profiles(
            # No tensor [B, S, P] is made: the largest of each is kept with its index.
            presence=F.embedding_bag(bag_BS, rows_UP, mode="max", padding_idx=nothing),
            share=F.embedding_bag(bag_BS, rows_UP, mode="sum", per_sample_weights=log_abundance_BS.exp()),
        )


def unweighted_unifrac(presence_BP: Tensor, presence_GP: Tensor, lengths_P: Tensor) -> Tensor:
    """Unweighted UniFrac of soft clades: 1 - sum(l * min) / sum(l * max) over the clades.

    Parameters
    ----------
    presence_BP, presence_GP : Tensor of float32
        Of the samples on both sides.
    lengths_P : Tensor of float32
        Lengths of the clades.

    Returns
    -------
    Tensor of float32 [B, G]
        0 to 1, and 0 where a sample meets itself.
    """
    with torch.autocast(presence_BP.device.type, enabled=False):
        rows_BP, columns_GP = presence_BP * lengths_P, presence_GP * lengths_P
        apart_BG = _city_block(rows_BP, columns_GP)
        # max = (x + y + |x - y|) / 2, and min = (x + y - |x - y|) / 2
        return 2 * apart_BG / (rows_BP.sum(dim=1)[:, None] + columns_GP.sum(dim=1) + apart_BG)


def weighted_unifrac(share_BP: Tensor, share_GP: Tensor, lengths_P: Tensor) -> Tensor:
    """Normalised weighted UniFrac of soft clades: sum(l * |x - y|) / sum(l * (x + y)); see `unweighted_unifrac`."""
    with torch.autocast(share_BP.device.type, enabled=False):
        rows_BP, columns_GP = share_BP * lengths_P, share_GP * lengths_P
        return _city_block(rows_BP, columns_GP) / (rows_BP.sum(dim=1)[:, None] + columns_GP.sum(dim=1))


def _city_block(rows_BP: Tensor, columns_GP: Tensor) -> Tensor:
    """Sums of absolute differences [B, G], in chunks: on a GPU, the backward pass makes a tensor of all three sizes."""
    step = max(1, CELLS // columns_GP.numel())
    return torch.cat([torch.cdist(rows, columns_GP, p=1.0) for rows in rows_BP.split(step)])
