"""Soft clades: what an ASV belongs to, what a sample holds of it, and UniFrac between samples.

A branch of a tree is in a sample where any of the sample's ASVs lies below it, so UniFrac compares sets of branches.
A clade here is a learned branch: each ASV belongs to it to a degree from 0 to 1, by its own sequence alone. A sample
has a clade as much as the ASV of it that belongs to it most. Each ASV also has a branch of its own, its tip, which two
samples share only where both have that very ASV. With learned lengths of clades and tips, UniFrac then has the form
that it has on a tree, and the tree is no longer needed.

Shape letters: B samples, G samples over all workers, S ASV slots, T ASVs shared with a sample, U distinct ASVs,
D width, P clades.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CELLS = 2**25
"""Numbers that an intermediate tensor may have: 128 MiB of them."""
STEEPNESS = 2.0
"""Of the sigmoid of the memberships."""
FIRST_BIAS = -2.0
"""New ASVs belong to few clades: a sample of hundreds of them must not have all clades at once."""
FIRST_TIP = -2.5
"""softplus of it is the length of a new tip: a tenth of a clade's."""
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
    tips: Tensor
    """float32 [B]: lengths of the tips, summed over the ASVs."""
    tips_by_share: Tensor
    """float32 [B]: the same, weighted by the relative abundance of the ASVs."""

    def of(self, metric: str) -> Tensor:
        """What unweighted or weighted UniFrac compares: clades, and tips as the last column: float32 [B, P + 1]."""
        if metric == "unweighted":
            return torch.cat([self.presence, self.tips[:, None]], dim=1)
        return torch.cat([self.share, self.tips_by_share[:, None]], dim=1)


class Tips(NamedTuple):
    """Lengths of the tips of samples on both sides of their pairs, and of those that a pair has in common."""

    rows: Tensor
    """float32 [B]"""
    columns: Tensor
    """float32 [G]"""
    common: Tensor
    """float32 [B, G]"""


class Clades(nn.Module):
    """Memberships of ASVs in soft clades, and the lengths of clades and tips.

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
        self.tip = nn.Linear(dim, 1)
        nn.init.zeros_(self.tip.weight)
        nn.init.constant_(self.tip.bias, FIRST_TIP)
        self.log_pd_scale = nn.Parameter(torch.zeros(()))

    def forward(self, vectors_UD: Tensor) -> Tensor:
        """Memberships of ASVs, each from its own vector alone: float32 [U, P], 0 to 1."""
        # float32 under autocast too: a membership of 0.001 counts where a thousand ASVs lack the clade.
        with torch.autocast(vectors_UD.device.type, enabled=False):
            return torch.sigmoid(STEEPNESS * self.members(vectors_UD.float()))

    def tip_lengths(self, vectors_UD: Tensor) -> Tensor:
        """Lengths of the tips of ASVs, above 0, each from its own vector alone: float32 [U]."""
        with torch.autocast(vectors_UD.device.type, enabled=False):
            return F.softplus(self.tip(vectors_UD.float()).squeeze(-1))

    @property
    def lengths(self) -> Tensor:
        """Lengths of the clades, above 0: float32 [P]."""
        return F.softplus(self.raw_length)

    @torch.no_grad()
    def start_pd_at(self, mean: float) -> None:
        """Set the unit of Faith's PD so that a new model predicts about this mean, in branch lengths of the tree."""
        typical = FIRST_PRESENCE * FIRST_LENGTH * len(self.raw_length)
        self.log_pd_scale.fill_(math.log(mean / typical))

    def faith_pd(self, of_samples: Profiles) -> Tensor:
        """Faith's phylogenetic diversity, in branch lengths of the tree: float32 [B]."""
        return self.log_pd_scale.exp() * (of_samples.presence @ self.lengths + of_samples.tips)


def profiles(
    memberships_UP: Tensor, tip_lengths_U: Tensor, slot_BS: Tensor, mask_BS: Tensor, log_abundance_BS: Tensor
) -> Profiles:
    """What samples hold of each clade, and of tips.

    Parameters
    ----------
    memberships_UP : Tensor of float32
        Of the distinct ASVs.
    tip_lengths_U : Tensor of float32
        Of the same.
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
        rows_UP, tips_U1 = F.pad(memberships_UP, (0, 0, 0, 1)), F.pad(tip_lengths_U, (0, 1))[:, None]
        abundance_BS = log_abundance_BS.exp()
        return Profiles(
            # No tensor [B, S, P] is made: the largest of each is kept with its index.
            presence=F.embedding_bag(bag_BS, rows_UP, mode="max", padding_idx=nothing),
            share=F.embedding_bag(bag_BS, rows_UP, mode="sum", per_sample_weights=abundance_BS),
            tips=F.embedding_bag(bag_BS, tips_U1, mode="sum").squeeze(-1),
            tips_by_share=F.embedding_bag(bag_BS, tips_U1, mode="sum", per_sample_weights=abundance_BS).squeeze(-1),
        )


def common_tips(
    tip_lengths_U: Tensor, slot_BS: Tensor, weight_BS: Tensor, shared_GT: Tensor, shared_weight_GT: Tensor
) -> Tensor:
    """Lengths of the tips that samples have in common, by the smaller of the weights that an ASV has in both.

    Parameters
    ----------
    tip_lengths_U : Tensor of float32
        Of the distinct ASVs.
    slot_BS : Tensor of int64
        Which of these stands in a slot of the samples of the rows.
    weight_BS : Tensor of float32
        Their weights: 1 for unweighted, the relative abundance for weighted UniFrac; 0 in empty slots.
    shared_GT : Tensor of int64
        Which of these the samples of the columns have; U where there is none.
    shared_weight_GT : Tensor of float32
        Their weights; any number where there is none.

    Returns
    -------
    Tensor of float32 [B, G]
    """
    with torch.autocast(weight_BS.device.type, enabled=False):
        # An embedding look-up: its backward adds in a fixed order, plain indexing on CPU does not.
        tips_U1 = F.pad(tip_lengths_U, (0, 1))[:, None]
        length_GT = F.embedding(shared_GT, tips_U1).squeeze(-1)
        step = max(1, CELLS // max(1, shared_GT.numel()))
        chunks = [
            (len(tips_U1), *rows, length_GT, shared_GT, shared_weight_GT)
            for rows in zip(slot_BS.split(step), weight_BS.split(step), strict=True)
        ]
        if len(chunks) == 1 or not torch.is_grad_enabled():
            return torch.cat([_common(*chunk) for chunk in chunks])
        return torch.cat([checkpoint(_common, *chunk, use_reentrant=False) for chunk in chunks])


def _common(
    kinds: int, slot_bS: Tensor, weight_bS: Tensor, length_GT: Tensor, shared_GT: Tensor, shared_weight_GT: Tensor
) -> Tensor:
    """See `common_tips`: of some of the rows."""
    weight_Ub = weight_bS.new_zeros(kinds, len(slot_bS))
    weight_Ub.T.scatter_add_(1, slot_bS, weight_bS)  # an empty slot adds 0 to the first ASV
    smaller_GTb = torch.minimum(weight_Ub[shared_GT], shared_weight_GT[..., None])
    return (length_GT[:, None] @ smaller_GTb).squeeze(1).T


def unweighted_unifrac(presence_BP: Tensor, presence_GP: Tensor, lengths_P: Tensor, tips: Tips | None = None) -> Tensor:
    """Unweighted UniFrac of soft clades: 1 - sum(l * min) / sum(l * max) over the clades and the tips.

    Parameters
    ----------
    presence_BP, presence_GP : Tensor of float32
        Of the samples on both sides.
    lengths_P : Tensor of float32
        Lengths of the clades.
    tips : Tips, optional
        Of the samples; without them, of clades alone.

    Returns
    -------
    Tensor of float32 [B, G]
        0 to 1, and 0 where a sample meets itself.
    """
    with torch.autocast(presence_BP.device.type, enabled=False):
        apart_BG, both_BG = _apart_and_both(presence_BP * lengths_P, presence_GP * lengths_P, tips)
        # max = (x + y + |x - y|) / 2, and min = (x + y - |x - y|) / 2
        return 2 * apart_BG / (both_BG + apart_BG)


def weighted_unifrac(share_BP: Tensor, share_GP: Tensor, lengths_P: Tensor, tips: Tips | None = None) -> Tensor:
    """Normalised weighted UniFrac of soft clades: sum(l * |x - y|) / sum(l * (x + y)); see `unweighted_unifrac`."""
    with torch.autocast(share_BP.device.type, enabled=False):
        apart_BG, both_BG = _apart_and_both(share_BP * lengths_P, share_GP * lengths_P, tips)
        return apart_BG / both_BG


def _apart_and_both(rows_BP: Tensor, columns_GP: Tensor, tips: Tips | None) -> tuple[Tensor, Tensor]:
    """Sums of |x - y| and of x + y over clades and tips, of all pairs: [B, G] each."""
    apart_BG = _city_block(rows_BP, columns_GP)
    rows_B, columns_G = rows_BP.sum(dim=1), columns_GP.sum(dim=1)
    if tips is not None:
        # |x - y| = x + y - 2 min(x, y), which rounding brings below 0 where x = y
        apart_BG = apart_BG + (tips.rows[:, None] + tips.columns - 2 * tips.common).clamp(min=0)
        rows_B, columns_G = rows_B + tips.rows, columns_G + tips.columns
    return apart_BG, rows_B[:, None] + columns_G


def _city_block(rows_BP: Tensor, columns_GP: Tensor) -> Tensor:
    """Sums of absolute differences [B, G], in chunks: on a GPU, the backward pass makes a tensor of all three sizes."""
    step = max(1, CELLS // columns_GP.numel())
    return torch.cat([torch.cdist(rows, columns_GP, p=1.0) for rows in rows_BP.split(step)])


DISTANCES = {"unweighted": unweighted_unifrac, "weighted": weighted_unifrac}
"""By metric."""
