"""How much of a sample each of some groups of similar ASVs is, in a form that networks learn from.

Shape letters: B samples, S ASV slots, U distinct ASVs, D width, P groups.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_SHARE = 1e-4
"""Shares are told apart from about here upwards: a read in ten thousand."""
SHARPNESS = 4.0
"""Of new groups: an ASV counts for a centre `exp(SHARPNESS)` times as much as for one whose squared distance is more by
that between neighbouring centres."""


class ASVGroups(nn.Module):
    """Logarithms of the shares of a sample's reads that groups of similar ASVs have.

    An ASV belongs to all groups, mostly to those whose centres are near its vector (a softmax of squared distances).
    No sum over ASVs of functions of their abundances can tell what a group that is spread over many ASVs amounts to
    on a logarithmic scale, on which abundances are compared: here the logarithm comes after the sum. The norm over the
    groups takes out what all have in common, as a centred log-ratio does.

    Parameters
    ----------
    dim : int
        D, width of the ASV vectors.
    groups : int
        P.
    """

    def __init__(self, dim: int, groups: int) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.randn(groups, dim))
        self.log_sharpness = nn.Parameter(torch.tensor(math.log(SHARPNESS / dim)))
        self.norm = nn.LayerNorm(groups)

    def forward(self, vectors_UD: Tensor, slot_BS: Tensor, mask_BS: Tensor, log_abundance_BS: Tensor) -> Tensor:
        """Describe samples.

        Parameters
        ----------
        vectors_UD : Tensor
            Vectors of the distinct ASVs.
        slot_BS : Tensor of int64
            Which of them stands in a slot.
        mask_BS : Tensor of bool
            True where a slot holds an ASV.
        log_abundance_BS : Tensor of float32
            Natural log of the relative abundance.

        Returns
        -------
        Tensor of float32 [B, P]
        """
        # float32 under autocast too: differences of squares, and shares down to one in ten thousand.
        with torch.autocast(vectors_UD.device.type, enabled=False):
            vectors_UD = vectors_UD.to(self.centers.dtype)
            # Without the square of the vector itself, which is the same for all groups.
            closeness_UP = 2 * vectors_UD @ self.centers.T - self.centers.square().sum(dim=1)
            belongs_UP = (closeness_UP * self.log_sharpness.exp()).softmax(dim=1)
            share_BS = log_abundance_BS.exp().to(belongs_UP.dtype) * mask_BS
            share_BP = F.embedding_bag(slot_BS, belongs_UP, per_sample_weights=share_BS, mode="sum")
            return self.norm(torch.log10(1 + share_BP / LEAST_SHARE))

    @torch.no_grad()
    def start_from(self, vectors: Tensor, seed: int) -> None:
        """Put the centres where vectors of ASVs are dense (k-means), and the sharpness to how far apart they are.

        Parameters
        ----------
        vectors : Tensor of float32 [ASVs, D]
            At least one. Where there are fewer than groups, several groups have the same centre and share what it gets.
        seed : int
            Of k-means.
        """
        from sklearn.cluster import KMeans  # here: processes that only predict do without

        groups, rows = len(self.centers), vectors.cpu().numpy()
        fitted = KMeans(min(groups, len(rows)), random_state=seed).fit(rows)
        found = torch.from_numpy(fitted.cluster_centers_).to(self.centers)
        self.centers.copy_(found[torch.arange(groups, device=found.device) % len(found)])
        apart = torch.cdist(found, found).square().fill_diagonal_(math.inf).min(dim=1).values
        typical = apart[apart.isfinite() & (apart > 0)]
        if len(typical):
            self.log_sharpness.fill_(math.log(SHARPNESS / typical.median().item()))
