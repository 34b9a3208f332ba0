"""Sizes of a model, all decided: what a checkpoint keeps to build the model anew."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EncoderSizes:
    """Sizes of a SequenceEncoder."""

    embedding_dim: int = 128
    clades: int = 512
    """Soft clades that ASVs belong to."""
    asv_layers: int = 0
    """Layers of the stack over the nucleotides of an ASV; 0: its k-mers alone."""
    attention_heads: int = 4
    """Of that stack, and of the heads of stage 2."""
    dropout: float = 0.1
    """Of the nucleotide stack."""
    kmer: int = 5
    """Length of the k-mers; 0: the nucleotide stack alone."""
    max_bp: int = 150
    """Longest sequence that the nucleotide stack can read; without one there is no limit."""


@dataclass(frozen=True, kw_only=True)
class PredictorSizes:
    """Sizes of a SequencePredictor on top of its encoder."""

    attention_layers: int = 0
    """Layers of the target head's attention over ASVs; of the count head's too, which has one at least."""
    dropout: float = 0.1
    outputs: int = 1
    """1 for a number, else the number of classes."""
    known_asvs: int = 500
    """Most prevalent ASVs of the training samples that the target head tells apart; 0: it reads clades alone."""
    longest_known: int = 151
    """Tokens of the longest of them, START among them."""
    heads: int = 4
    """Heads of the target, whose mean is the prediction."""
    hidden: int = 128
    """Width of each."""
    count_head: bool = True
