"""Stage 1: nucleotides -> ASVs -> soft clades and tips -> profile of a sample.

Shape letters: B samples, U distinct ASVs, K masked positions, D width, P clades, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from aam.batch import Batch
from aam.model.asv_encoder import ASVEncoder
from aam.model.clades import Clades, Profiles, profiles
from aam.model.sizes import EncoderSizes


@dataclass(frozen=True, kw_only=True)
class EncoderOutput:
    """Output of a SequenceEncoder for a batch."""

    vectors: Tensor
    """[U, D]: vectors of the distinct ASVs."""
    memberships: Tensor
    """float32 [U, P]: to which degree each ASV belongs to each clade."""
    profiles: Profiles
    """What each sample holds of each clade, and of tips."""
    tip_lengths: Tensor
    """float32 [U]: lengths of the ASVs' own branches."""
    lengths: Tensor
    """float32 [P]: lengths of the clades."""
    faith_pd: Tensor
    """float32 [B]: Faith's PD of each sample, in branch lengths of the tree."""
    nucleotide_logits: Tensor | None = None
    """[U, K, V]: logits of the tokens behind masked positions."""


class SequenceEncoder(nn.Module):
    """ASVs to soft clades, samples to what they hold of each.

    A sample is a set: there is no position among its ASVs, and the order in which they come changes nothing. An ASV's
    vector and clades depend on its own sequence alone.

    Parameters
    ----------
    sizes : EncoderSizes
        Width, clades, layers.
    """

    def __init__(self, sizes: EncoderSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.asv_encoder = ASVEncoder(sizes)
        self.clades = Clades(sizes.embedding_dim, sizes.clades)

    def forward(
        self, batch: Batch, *, chunk_size: int | None = None, cached_vectors: Tensor | None = None
    ) -> EncoderOutput:
        """Encode a batch.

        Parameters
        ----------
        batch : Batch
            Samples on the device of the model.
        chunk_size : int, optional
            Distinct ASVs encoded at a time.
        cached_vectors : Tensor [U, D], optional
            Vectors of the ASVs, computed before; no nucleotide is predicted then.
        """
        vectors_UD, logits_UKV = cached_vectors, None
        if vectors_UD is None:
            vectors_UD, logits_UKV = self.asv_encoder(
                batch.tokens,
                padded=batch.asvs_padded,
                masked_position_UK=batch.masked_position,
                kmers_kept=batch.kmers_kept,
                chunk_size=chunk_size,
            )
        memberships_UP = self.clades(vectors_UD)
        tip_lengths_U = self.clades.tip_lengths(vectors_UD)
        of_samples = profiles(memberships_UP, tip_lengths_U, batch.slot, batch.slot_mask, batch.log_abundance)
        return EncoderOutput(
            vectors=vectors_UD,
            memberships=memberships_UP,
            profiles=of_samples,
            tip_lengths=tip_lengths_U,
            lengths=self.clades.lengths,  # through the forward pass, where DDP sees them
            faith_pd=self.clades.faith_pd(of_samples),
            nucleotide_logits=logits_UKV,
        )
