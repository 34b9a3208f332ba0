"""Outputs of a model for samples, and for samples without one of their ASVs; ASVs are encoded once.

Shape letters: B samples, R rows (samples, some of them several times), S ASV slots, U distinct ASVs, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aam.batch import Batch
from aam.config import DataContract
from aam.data.batches import BatchPlan, build_batch
from aam.data.dataset import PreparedDataset
from aam.data.draw import FIXED_DRAW
from aam.model.sequence_encoder import SequenceEncoder

CHUNK = 1024
"""ASVs at a time."""
ROWS = 64
"""Samples at a time."""
MOST_SAMPLES, MOST_ASVS = 300, 5000
"""What is encoded for a report, at most: on two CPU cores and with the default model, about 20 seconds."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Samples, drawn as in validation, and the vectors of their ASVs; on the device of the model."""

    batch: Batch
    vectors: Tensor
    """[U, D]"""

    @property
    def size(self) -> int:
        """B."""
        return len(self.batch.sample_ids)


def affordable(
    dataset: PreparedDataset,
    contract: DataContract,
    sample_ids: list[str],
    *,
    most_samples: int = MOST_SAMPLES,
    most_asvs: int = MOST_ASVS,
) -> list[str]:
    """As many of the samples as may be encoded, in their order; the same ones always."""
    plan = BatchPlan(dataset=dataset, sample_ids=sample_ids, contract=contract, batch_size=1)
    order = np.random.default_rng(0).permutation(len(sample_ids))[:most_samples]
    seen, chosen = np.zeros(len(dataset.lengths), dtype=bool), []
    for i in order.tolist():
        seen[plan.draw(sample_ids[i], FIXED_DRAW)[0]] = True
        if chosen and seen.sum() > most_asvs:
            break
        chosen.append(i)
    return [sample_ids[i] for i in sorted(chosen)]


@torch.no_grad()
def encode(
    encoder: SequenceEncoder, dataset: PreparedDataset, contract: DataContract, sample_ids: list[str]
) -> Encoded:
    """Draw samples and encode their ASVs."""
    plan = BatchPlan(dataset=dataset, sample_ids=sample_ids, contract=contract, batch_size=len(sample_ids))
    device = next(encoder.parameters()).device
    batch = build_batch(plan, np.arange(len(sample_ids)), epoch=FIXED_DRAW, index=0).to(device)
    vectors_UD, _ = encoder.asv_encoder(batch.tokens, padded=batch.asvs_padded, chunk_size=CHUNK)
    return Encoded(batch=batch, vectors=vectors_UD)


@torch.no_grad()
def outputs(
    model: nn.Module, encoded: Encoded, rows: np.ndarray | None = None, without: np.ndarray | None = None
) -> Iterator[tuple[Batch, Any]]:
    """Samples, some at a time, and the output of a model for them.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode.
    encoded : Encoded
        Samples.
    rows : ndarray of int [R], optional
        Which of them; all by default.
    without : ndarray of int [R], optional
        Slot of each row whose ASV is taken away; the abundances of the others then add up to 1 again.
    """
    rows = np.arange(encoded.size) if rows is None else rows
    for start in range(0, len(rows), ROWS):
        part = slice(start, start + ROWS)
        batch = rows_of(encoded.batch, rows[part])
        if without is not None:
            batch = without_slot(batch, without[part])
        yield batch, model(batch, cached_vectors=encoded.vectors)


def rows_of(batch: Batch, rows: np.ndarray) -> Batch:
    """Some samples of a batch, as a batch with the same distinct ASVs."""
    index = torch.as_tensor(rows, device=batch.slot.device)
    mask = batch.slot_mask[index]
    width = int(mask.any(dim=0).nonzero().max()) + 1
    return dataclasses.replace(
        batch,
        sample_ids=[batch.sample_ids[int(row)] for row in rows],
        slot=batch.slot[index, :width],
        slot_mask=mask[:, :width],
        log_abundance=batch.log_abundance[index, :width],
        global_rows=slice(0, len(rows)),
        rank_sizes=[len(rows)],
    )


def without_slot(batch: Batch, slots: np.ndarray) -> Batch:
    """A batch whose samples each lack the ASV in one slot, as if its reads had never been there."""
    row = torch.arange(len(slots), device=batch.slot.device)
    slot = torch.as_tensor(slots, device=batch.slot.device)
    mask_BS = batch.slot_mask.clone()
    assert bool(mask_BS[row, slot].all()), "an empty slot"
    mask_BS[row, slot] = False
    assert bool(mask_BS.any(dim=1).all()), "a sample must keep an ASV"
    left_B = -torch.expm1(batch.log_abundance[row, slot].double())
    log_BS = batch.log_abundance - left_B.log().float()[:, None]
    return dataclasses.replace(batch, slot_mask=mask_BS, log_abundance=torch.where(mask_BS, log_BS, 0.0))


def collect(parts: Iterator[tuple[Batch, Any]], read: Callable[[Any], Tensor]) -> np.ndarray:
    """One tensor of all outputs, rows one after the other."""
    return np.concatenate([read(output).float().cpu().numpy() for _, output in parts])
