"""What the target head reads of a sample: clades, well-known ASVs, and groups of ASVs around these.

Shape letters: B samples, S ASV slots, U distinct ASVs, L tokens of an ASV, P clades, K known ASVs, F features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aam.batch import Batch
from aam.model.sequence_encoder import EncoderOutput

LEAST_SHARE = 1e-4
"""Shares are told apart from about here upwards: a read in ten thousand."""
SHARPNESS = 60.0
"""Of groups: how much more an ASV counts for the known ASV whose clades are most like its own."""
MOST_APART = 1.0
"""Standard deviations from the mean, at most: beyond it a feature is high or low, as for a tree (NOTES.md)."""
LEAST_DEVIATION = 0.01
"""Of the mean standard deviation, which is added to that of each feature."""
_MULTIPLIER = 6364136223846793005  # of Knuth's MMIX; odd, so that no letter is lost in the powers


class SampleFeatures(nn.Module):
    """Features of samples, standardised as among the training samples.

    - log shares of K known ASVs, the most prevalent of the training samples: a closed vocabulary, which tells single
      ASVs apart that clades do not;
    - log shares of K groups, one around each known ASV: an ASV is shared out over them by how much its clades are
      like theirs, so that ASVs that no training sample has count too;
    - with no known ASVs, log shares and presences of the P clades in their place.

    Known ASVs, their clades, means and deviations are those of the start of stage 2, also where the encoder is
    trained further.

    Parameters
    ----------
    clades : int
        P.
    known : int
        K; 0 for the clades alone.
    longest : int
        L, tokens of the longest known ASV.
    """

    def __init__(self, clades: int, known: int, longest: int) -> None:
        super().__init__()
        self.known, self.width = known, 2 * (known or clades)
        self.tokens: Tensor
        self.anchors: Tensor
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("tokens", torch.zeros(known, longest, dtype=torch.uint8))
        self.register_buffer("anchors", torch.zeros(known, clades))
        self.register_buffer("mean", torch.zeros(self.width))
        self.register_buffer("scale", torch.ones(self.width))

    def forward(self, batch: Batch, base: EncoderOutput) -> Tensor:
        """Features of the samples of a batch, before they are standardised: float32 [B, F]."""
        with torch.autocast(base.memberships.device.type, enabled=False):
            if not self.known:
                return torch.cat([log_shares(base.profiles.share), base.profiles.presence], dim=1)
            abundance_BS = batch.log_abundance.exp() * batch.slot_mask
            near_UK = (_unit(base.memberships) @ self.anchors.T * SHARPNESS).softmax(dim=1)
            near_BK = F.embedding_bag(batch.slot, near_UK, per_sample_weights=abundance_BS, mode="sum")
            return torch.cat([log_shares(self._own(batch, abundance_BS)), log_shares(near_BK)], dim=1)

    def standardised(self, features_BF: Tensor) -> Tensor:
        """Features less their mean and over their standard deviation among the training samples, within `MOST_APART`.

        Many are 0 in nearly all samples: a sample that has one is dozens of standard deviations from the mean.
        """
        return ((features_BF - self.mean) * self.scale).clamp(-MOST_APART, MOST_APART)

    def _own(self, batch: Batch, abundance_BS: Tensor) -> Tensor:
        """Share of each known ASV itself: float32 [B, K]."""
        known_K, order_K = sequence_hash(self.tokens).sort()
        hash_U = sequence_hash(batch.tokens)
        place_U = torch.searchsorted(known_K, hash_U).clamp(max=self.known - 1)
        which_U = torch.where(known_K[place_U] == hash_U, order_K[place_U], self.known)
        shares = abundance_BS.new_zeros(len(abundance_BS), self.known + 1)
        return shares.scatter_add_(1, which_U[batch.slot], abundance_BS)[:, : self.known]

    @torch.no_grad()
    def know(self, tokens_KL: Tensor, memberships_KP: Tensor) -> None:
        """Take the known ASVs: their tokens (padded or cut to L, PAD being 0) and memberships; fewer than K will do."""
        self.tokens.zero_()
        self.anchors.zero_()
        rows, columns = len(tokens_KL), min(tokens_KL.shape[1], self.tokens.shape[1])
        self.tokens[:rows, :columns] = tokens_KL[:, :columns]
        self.anchors[:rows] = _unit(memberships_KP)

    @torch.no_grad()
    def standardise(self, features_NF: Tensor) -> None:
        """Take mean and standard deviation of the features of the training samples."""
        self.mean.copy_(features_NF.mean(dim=0))
        deviation_F = (features_NF - self.mean).square().mean(dim=0).sqrt()
        varies_F = deviation_F > 0  # those of known ASVs that there are not do not
        typical = (deviation_F * varies_F).sum() / varies_F.sum().clamp(min=1)
        self.scale.copy_(torch.where(varies_F, 1 / (deviation_F + LEAST_DEVIATION * typical).clamp(min=1e-6), 0.0))


def log_shares(share: Tensor) -> Tensor:
    """Shares on a logarithmic scale on which none is 0 and all is 4."""
    return torch.log10(1 + share / LEAST_SHARE)


def sequence_hash(tokens_UL: Tensor) -> Tensor:
    """A number for each sequence, the same however much PAD (0) follows it: int64 [U]."""
    powers_L = torch.full((tokens_UL.shape[1],), _MULTIPLIER, device=tokens_UL.device).cumprod(dim=0)  # modulo 2 ** 64
    return (tokens_UL * powers_L).sum(dim=1)


def _unit(memberships: Tensor) -> Tensor:
    return F.normalize(memberships, dim=1)
