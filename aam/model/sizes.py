"""Sizes of a model, all decided: what a checkpoint keeps to build the model anew."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EncoderSizes:
    """Sizes of a SequenceEncoder."""

    embedding_dim: int = 128
    attention_heads: int = 4
    attention_layers: int = 4
    """Layers of the stack over the ASVs of a sample."""
    asv_layers: int = 4
    """Layers of the stack over the nucleotides of an ASV."""
    dropout: float = 0.1
    kmer: int = 5
    max_bp: int = 150


@dataclass(frozen=True, kw_only=True)
class PredictorSizes:
    """Sizes of a SequencePredictor on top of its encoder."""

    attention_layers: int = 4
    """Layers of the target's stack and of the count head's."""
    dropout: float = 0.1
    outputs: int = 1
    """1 for a number, else the number of classes."""
    asv_groups: int = 256
    """Groups of ASVs whose shares the target's head reads; 0: it does without."""
    count_head: bool = True
