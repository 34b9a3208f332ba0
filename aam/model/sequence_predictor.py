"""Stage 2: a target head and a count head on a stage 1 encoder.

Shape letters: B samples, S ASV slots, U distinct ASVs, D width, P groups of ASVs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aam.batch import Batch
from aam.model.asv_groups import ASVGroups
from aam.model.cpu import Dropout
from aam.model.layers import AbundanceEmbedding, SampleSummary, Transformer
from aam.model.sequence_encoder import EncoderOutput, KnownOutputs, SequenceEncoder
from aam.model.sizes import PredictorSizes


@dataclass(frozen=True, kw_only=True)
class PredictorOutput:
    """What a SequencePredictor says of a batch."""

    base: EncoderOutput
    """What its encoder says."""
    target: Tensor
    """float32 [B, O]: transformed target, or scores of the classes."""
    log_abundance: Tensor | None = None
    """float32 [B, S]: log relative abundances, for the slots where they were masked."""


class SequencePredictor(nn.Module):
    """A SequenceEncoder with heads for a target and for masked abundances.

    The target's head reads two summaries of a sample, that of the encoder and one of its own, and how much of it are
    which groups of similar ASVs.

    The count head reads the vectors of the ASVs alone and the abundances that are left, by an encoder of its
    own, so that the target's head always sees all abundances, in training as in prediction.

    Parameters
    ----------
    base : SequenceEncoder
        The encoder, pretrained or not.
    sizes : PredictorSizes
        Layers and outputs.
    freeze_base : bool
        Keep the encoder as it is: no gradients, and evaluation mode (no dropout) always.
    """

    def __init__(self, base: SequenceEncoder, sizes: PredictorSizes, *, freeze_base: bool = False) -> None:
        super().__init__()
        dim, heads = base.sizes.embedding_dim, base.sizes.attention_heads
        self.sizes, self.freeze_base = sizes, freeze_base
        self.base = base.requires_grad_(not freeze_base)
        self.target_abundance = AbundanceEmbedding(dim)
        self.target_encoder = Transformer(dim, heads, sizes.attention_layers, sizes.dropout)
        self.target_summary = SampleSummary(dim, heads)
        self.target_norm, self.base_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.target_groups = ASVGroups(dim, sizes.asv_groups) if sizes.asv_groups else None
        self.target_head = nn.Sequential(
            Dropout(sizes.dropout),
            nn.Linear(2 * dim + sizes.asv_groups, 2 * dim),
            nn.GELU(),
            Dropout(sizes.dropout),
            nn.Linear(2 * dim, sizes.outputs),
        )
        if sizes.count_head:
            self.count_abundance = AbundanceEmbedding(dim, hideable=True)
            self.count_encoder = Transformer(dim, heads, sizes.attention_layers, sizes.dropout)
            self.count_head = nn.Linear(dim, 1)
        self.train()

    def train(self, mode: bool = True) -> SequencePredictor:
        """As in torch, but a frozen base stays in evaluation mode."""
        super().train(mode)
        if self.freeze_base:
            self.base.eval()
        return self

    def forward(
        self, batch: Batch, *, chunk_size: int | None = None, known: KnownOutputs | None = None
    ) -> PredictorOutput:
        """Predict the target of a batch; see `SequenceEncoder.forward` for the parameters."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_base):
            base = self.base(batch, chunk_size=chunk_size, known=known)
        target_BO = self.of_target(batch, base)
        if batch.count_masked is None:
            return PredictorOutput(base=base, target=target_BO)
        abundance_BSD = self.count_abundance(batch.log_abundance, batch.count_masked)
        assert base.asvs is not None
        count_BSD = self.count_encoder(base.asvs + abundance_BSD, batch.slot_mask)
        log_abundance_BS = self.count_head(count_BSD).squeeze(-1).float()
        return PredictorOutput(base=base, target=target_BO, log_abundance=log_abundance_BS)

    def of_target(self, batch: Batch, base: EncoderOutput) -> Tensor:
        """What the target's head says of a batch, given what the encoder says: float32 [B, O]."""
        # Stage 1 may have learned to look past abundances, which most targets depend on.
        states_BSD = base.states + self.target_abundance(batch.log_abundance)
        states_BSD = self.target_encoder(states_BSD, batch.slot_mask)
        summary_BD = self.target_summary(states_BSD, batch.slot_mask, batch.log_abundance)
        parts = [self.target_norm(summary_BD), self.base_norm(base.summary)]
        if self.target_groups is not None:
            parts.append(self.target_groups(base.vectors, batch.slot, batch.slot_mask, batch.log_abundance))
        return self.target_head(torch.cat([part.float() for part in parts], dim=-1)).float()
