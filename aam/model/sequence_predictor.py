"""Stage 2: a target head and a count head on a stage 1 encoder.

Shape letters: B samples, S ASV slots, U distinct ASVs, D width, F features of a sample, H heads of the target,
O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aam.batch import Batch
from aam.model.cpu import Dropout
from aam.model.layers import AbundanceEmbedding, SampleSummary, Transformer
from aam.model.sample_features import SampleFeatures
from aam.model.sequence_encoder import EncoderOutput, SequenceEncoder
from aam.model.sizes import PredictorSizes

INPUT_DROPOUT = 0.5
"""Of the features, unless there is no dropout at all: a head that never sees all of them at once must not rest on a few
(NOTES.md)."""


@dataclass(frozen=True, kw_only=True)
class PredictorOutput:
    """Output of a SequencePredictor for a batch."""

    target: Tensor
    """float32 [B, O]: transformed target, or logits of the classes; the mean of the heads."""
    heads: Tensor
    """float32 [B, H, O]: of each head."""
    features: Tensor
    """float32 [B, F]: what the heads read, before it is standardised."""
    base: EncoderOutput | None
    """Output of its encoder; None where the features were cached."""
    log_abundance: Tensor | None = None
    """float32 [B, S]: log relative abundances, for the slots where they were masked."""


class SequencePredictor(nn.Module):
    """A SequenceEncoder with heads for a target and for masked abundances.

    The target has several heads, each a small network on the features of a sample, trained side by side: their mean is
    the prediction.

    The count head reads the vectors of the ASVs alone and the abundances that are left, by attention of its own, so
    that the target heads always see all abundances, in training as in prediction.

    Parameters
    ----------
    base : SequenceEncoder
        The encoder, pretrained or not.
    sizes : PredictorSizes
        Layers, features and outputs.
    freeze_base : bool
        Keep the encoder as it is: no gradients, and evaluation mode (no dropout) always.
    """

    def __init__(self, base: SequenceEncoder, sizes: PredictorSizes, *, freeze_base: bool = False) -> None:
        super().__init__()
        dim, attention_heads = base.sizes.embedding_dim, base.sizes.attention_heads
        self.sizes, self.freeze_base = sizes, freeze_base
        self.base = base.requires_grad_(not freeze_base)
        self.features = SampleFeatures(base.sizes.clades, sizes.known_asvs, sizes.longest_known)
        read = self.features.width
        if sizes.attention_layers:
            self.target_abundance = AbundanceEmbedding(dim)
            self.target_encoder = Transformer(dim, attention_heads, sizes.attention_layers, sizes.dropout)
            self.target_summary = SampleSummary(dim, attention_heads)
            self.target_norm = nn.LayerNorm(dim)
            read += dim
        self.target_heads = nn.ModuleList(_head(read, sizes) for _ in range(sizes.heads))
        if sizes.count_head:
            self.count_abundance = AbundanceEmbedding(dim, hideable=True)
            self.count_encoder = Transformer(dim, attention_heads, max(1, sizes.attention_layers), sizes.dropout)
            self.count_head = nn.Linear(dim, 1)
        self.train()

    def train(self, mode: bool = True) -> SequencePredictor:
        """As in torch, but a frozen base stays in evaluation mode."""
        super().train(mode)
        if self.freeze_base:
            self.base.eval()
        return self

    def forward(
        self,
        batch: Batch,
        *,
        chunk_size: int | None = None,
        cached_vectors: Tensor | None = None,
        cached_features: Tensor | None = None,
    ) -> PredictorOutput:
        """Predict the target of a batch.

        Parameters
        ----------
        batch, chunk_size, cached_vectors
            See `SequenceEncoder.forward`.
        cached_features : Tensor of float32 [B, F], optional
            Features of the samples, computed before, for a model whose heads read nothing else.
        """
        if cached_features is not None:
            assert self.reads_features_alone, "its heads read the ASVs too"
            heads_BHO = self._heads(cached_features, None)
            return PredictorOutput(target=heads_BHO.mean(dim=1), heads=heads_BHO, features=cached_features, base=None)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_base):
            base = self.base(batch, chunk_size=chunk_size, cached_vectors=cached_vectors)
        log_abundance_BS = None
        if batch.count_masked is not None:
            abundance_BSD = self.count_abundance(batch.log_abundance, batch.count_masked)
            count_BSD = self.count_encoder(_by_slot(batch, base) + abundance_BSD, batch.slot_mask)
            log_abundance_BS = self.count_head(count_BSD).squeeze(-1).float()
        heads_BHO, features_BF = self.predict_heads(batch, base)
        return PredictorOutput(
            target=heads_BHO.mean(dim=1),
            heads=heads_BHO,
            features=features_BF,
            base=base,
            log_abundance=log_abundance_BS,
        )

    @property
    def reads_features_alone(self) -> bool:
        """Whether the features of a sample are all that the heads read."""
        return not self.sizes.attention_layers and not self.sizes.count_head

    def predict_heads(self, batch: Batch, base: EncoderOutput) -> tuple[Tensor, Tensor]:
        """Outputs [B, H, O] of the target heads, given that of the encoder, and the features [B, F] that they read."""
        summary_BD = None
        if self.sizes.attention_layers:
            states_BSD = _by_slot(batch, base) + self.target_abundance(batch.log_abundance)
            states_BSD = self.target_encoder(states_BSD, batch.slot_mask)
            summary_BD = self.target_norm(self.target_summary(states_BSD, batch.slot_mask, batch.log_abundance))
        features_BF = self.features(batch, base)
        return self._heads(features_BF, summary_BD), features_BF

    def _heads(self, features_BF: Tensor, summary_BD: Tensor | None) -> Tensor:
        read_BF = self.features.standardised(features_BF)
        if summary_BD is not None:
            read_BF = torch.cat([read_BF, summary_BD.float()], dim=1)
        return torch.stack([head(read_BF).float() for head in self.target_heads], dim=1)


def _head(read: int, sizes: PredictorSizes) -> nn.Module:
    hidden = sizes.hidden
    return nn.Sequential(
        Dropout(INPUT_DROPOUT if sizes.dropout else 0.0),
        nn.Linear(read, hidden),
        nn.GELU(),
        Dropout(sizes.dropout),
        nn.Linear(hidden, hidden // 2),
        nn.GELU(),
        Dropout(sizes.dropout),
        nn.Linear(hidden // 2, sizes.outputs),
    )


def _by_slot(batch: Batch, base: EncoderOutput) -> Tensor:
    """Vectors of the ASVs of each sample: [B, S, D]."""
    # An embedding look-up: its backward adds in a fixed order, plain indexing on CPU does not.
    return F.embedding(batch.slot, base.vectors)
