"""Batches made by hand, so that a test can say what is in them and in which order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from aam.batch import Batch
from aam.data import tokens
from aam.model.cpu import Dropout
from aam.model.sizes import EncoderSizes, PredictorSizes

SIZES = EncoderSizes(embedding_dim=16, clades=12, attention_heads=2, asv_layers=2, dropout=0.0, kmer=3, max_bp=40)
PREDICTOR = PredictorSizes(attention_layers=2, dropout=0.0, known_asvs=5, longest_known=25, heads=3, hidden=16)

M = TypeVar("M", bound=nn.Module)
Sample = Sequence[tuple[int, int]]
"""Pairs of an ASV and its reads."""


def without_dropout(model: M) -> M:
    """The same model with no dropout anywhere: the target heads have some that no setting takes away."""
    for module in model.modules():
        if isinstance(module, Dropout):
            module.p = 0.0
    return model


def random_sequences(number: int, *, seed: int = 0, shortest: int = 12, longest: int = 24) -> list[str]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(shortest, longest + 1, number)
    return ["".join(rng.choice(list("ACGT"), n)) for n in lengths]


def make_batch(
    sequences: Sequence[str],
    samples: Sequence[Sample],
    *,
    repeated: bool = False,
    extra_slots: int = 0,
    extra_tokens: int = 0,
    masked: int = 0,
    count_masked: Sequence[tuple[int, int]] = (),
    **fields,
) -> Batch:
    """Batch of one worker.

    `repeated` gives each occurrence of an ASV a row of its own; `masked` positions of each ASV are masked,
    the same ones wherever it stands; `count_masked` are pairs of a sample and an ASV.
    """
    if repeated:
        rows = [asv for sample in samples for asv, _ in sample]
    else:
        rows = sorted({asv for sample in samples for asv, _ in sample})
    encoded, lengths = tokens.encode([sequences[asv] for asv in rows])
    encoded = np.pad(encoded, ((0, 0), (0, extra_tokens)), constant_values=tokens.PAD)
    width = max(map(len, samples)) + extra_slots
    slot, abundance = np.zeros((len(samples), width), int), np.zeros((len(samples), width), np.float32)
    mask, hidden = np.zeros((len(samples), width), bool), np.zeros((len(samples), width), bool)
    used = 0
    for b, sample in enumerate(samples):
        for s, (asv, reads) in enumerate(sample):
            slot[b, s] = used if repeated else rows.index(asv)
            used += 1
            mask[b, s], hidden[b, s] = True, (b, asv) in count_masked
            abundance[b, s] = math.log(reads / sum(r for _, r in sample))
    if masked:
        position = [np.random.default_rng(asv).permutation(12)[:masked] + 1 for asv in rows]
        fields["masked_position"] = torch.tensor(np.array(position))
        fields["masked_scored"] = torch.ones(len(rows), masked, dtype=torch.bool)
        fields["masked_total"] = len(rows) * masked
    if count_masked:
        fields |= {"count_masked": torch.from_numpy(hidden), "count_total": len(count_masked)}
    defaults = {
        "shared": torch.from_numpy(np.where(mask, slot, len(rows))),
        "shared_abundance": torch.from_numpy(np.exp(abundance) * mask),
        "global_rows": slice(0, len(samples)),
        "rank_sizes": [len(samples)],
        "sample_ids": [f"s{b}" for b in range(len(samples))],
    }
    return Batch(
        tokens=torch.from_numpy(encoded),
        asvs=torch.tensor(rows),
        slot=torch.from_numpy(slot),
        slot_mask=torch.from_numpy(mask),
        log_abundance=torch.from_numpy(abundance),
        asvs_padded=bool(extra_tokens or (lengths != lengths.max()).any()),
        **{**defaults, **fields},
    )
