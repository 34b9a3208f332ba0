"""Stage 1: samples to vectors whose distances are UniFrac distances.

Shape letters: B samples, G samples over all workers, S ASV slots, U distinct ASVs, K masked positions,
D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aam.batch import Batch
from aam.model.asv_encoder import ASVEncoder
from aam.model.layers import AbundanceEmbedding, SampleSummary, Transformer
from aam.model.sizes import EncoderSizes


@dataclass(frozen=True, kw_only=True)
class KnownOutputs:
    """What an encoder said of a batch before, and need not be asked again."""

    asvs: Tensor
    """[U, D]: vectors of the ASVs."""
    samples: tuple[Tensor, Tensor] | None = None
    """`states` [B, S, D] and `summary` [B, D] of its output, where these are known too."""


@dataclass(frozen=True, kw_only=True)
class EncoderOutput:
    """What a SequenceEncoder says of a batch."""

    vectors: Tensor
    """[U, D]: vectors of the distinct ASVs."""
    asvs: Tensor | None
    """[B, S, D]: vectors of the ASVs alone, without their sample; None where what follows from them is known and no
    abundance is masked: nobody reads them then."""
    states: Tensor
    """[B, S, D]: vectors of the ASVs in the light of their sample."""
    summary: Tensor
    """[B, D]: vector of the sample."""
    embedding: Tensor
    """float32 [B, D]: position of the sample; distances between these are UniFrac distances."""
    offset: Tensor
    """float32 []: a of `distance = a + s * |z_i - z_j|`."""
    scale: Tensor
    """float32 []: s of the same."""
    nucleotide_logits: Tensor | None = None
    """[U, K, V]: scores of the tokens behind masked positions."""


class SequenceEncoder(nn.Module):
    """Nucleotides -> ASVs -> sample.

    A sample is a set: there is no position among its ASVs, and the order in which they come changes nothing.

    Parameters
    ----------
    sizes : EncoderSizes
        Width, heads, layers.
    """

    def __init__(self, sizes: EncoderSizes) -> None:
        super().__init__()
        dim, heads = sizes.embedding_dim, sizes.attention_heads
        self.sizes = sizes
        self.asv_encoder = ASVEncoder(sizes)
        self.abundance = AbundanceEmbedding(dim)
        self.transformer = Transformer(dim, heads, sizes.attention_layers, sizes.dropout)
        self.summary = SampleSummary(dim, heads)
        self.embedding = nn.Linear(dim, dim)
        self.distance_offset = nn.Parameter(torch.zeros(()))
        self.distance_log_scale = nn.Parameter(torch.zeros(()))

    def forward(
        self, batch: Batch, *, chunk_size: int | None = None, known: KnownOutputs | None = None
    ) -> EncoderOutput:
        """Encode a batch.

        Parameters
        ----------
        batch : Batch
            Samples on the device of the model.
        chunk_size : int, optional
            Distinct ASVs encoded at a time.
        known : KnownOutputs, optional
            What is known already; no nucleotide is predicted then.
        """
        if known is None:
            vectors_UD, logits_UKV = self.asv_encoder(
                batch.tokens,
                padded=batch.asvs_padded,
                masked_position_UK=batch.masked_position,
                chunk_size=chunk_size,
            )
        else:
            vectors_UD, logits_UKV = known.asvs, None
        samples = None if known is None else known.samples
        asvs_BSD = None
        if samples is None or batch.count_masked is not None:
            # An embedding look-up: its backward adds in a fixed order, plain indexing on CPU does not.
            asvs_BSD = F.embedding(batch.slot, vectors_UD)
        if samples is None:
            assert asvs_BSD is not None
            states_BSD = self.transformer(asvs_BSD + self.abundance(batch.log_abundance), batch.slot_mask)
            summary_BD = self.summary(states_BSD, batch.slot_mask, batch.log_abundance)
        else:
            states_BSD, summary_BD = samples
        with torch.autocast(summary_BD.device.type, enabled=False):
            embedding_BD = self.embedding(summary_BD.float())
            return EncoderOutput(
                vectors=vectors_UD,
                asvs=asvs_BSD,
                states=states_BSD,
                summary=summary_BD,
                embedding=embedding_BD,
                offset=self.distance_offset * 1.0,  # through the forward pass, where DDP sees it
                scale=self.distance_log_scale.exp(),
                nucleotide_logits=logits_UKV,
            )


def unifrac_distances(rows_BD: Tensor, columns_GD: Tensor, offset: Tensor, scale: Tensor) -> Tensor:
    """Distances `a + s * |z_i - z_j|` between sample embeddings.

    Parameters
    ----------
    rows_BD, columns_GD : Tensor of float32
        Embeddings.
    offset, scale : Tensor of float32 []
        a and s.

    Returns
    -------
    Tensor of float32 [B, G]
        a, not 0, where a sample meets itself: such pairs are never scored.
    """
    squared_BG = (rows_BD[:, None] - columns_GD[None]).square().sum(dim=-1)
    # The square root has no gradient at 0, where a sample meets itself or its double.
    return offset + scale * (squared_BG + 1e-12).sqrt()
