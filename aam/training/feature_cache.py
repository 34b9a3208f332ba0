"""Features of samples whose reads are the same each time, by a frozen base: computed once a run, kept in memory."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from aam.batch import Batch
from aam.data.dataset import PreparedDataset
from aam.model.sequence_predictor import SequencePredictor
from aam.training.base_cache import BaseCache

MOST_BYTES = 2**30
"""Of the features of all samples; with more, they are computed anew for each batch."""


class FeatureCache:
    """Features of samples in their fixed rarefaction.

    Parameters
    ----------
    model : SequencePredictor
        With a frozen base; not wrapped.
    dataset : PreparedDataset
        Whose samples the batches hold.
    vectors : BaseCache
        Of the same base.
    """

    def __init__(self, model: SequencePredictor, dataset: PreparedDataset, vectors: BaseCache) -> None:
        self.model, self.dataset, self.vectors = model, dataset, vectors
        # Pages of samples that no batch shows take no memory.
        self.rows = np.zeros((len(dataset.sample_ids), model.features.width), np.float32)
        self.known = np.zeros(len(self.rows), dtype=bool)

    @staticmethod
    def fits(model: SequencePredictor, dataset: PreparedDataset) -> bool:
        """Whether the heads read nothing else, and there is room for the features of all samples."""
        size = 4 * len(dataset.sample_ids) * model.features.width
        return model.freeze_base and model.reads_features_alone and size <= MOST_BYTES

    @torch.no_grad()
    def features_of(self, batch: Batch) -> Tensor:
        """Features [B, F] of the samples of a batch (on the host), on the device of the model."""
        samples = np.array([self.dataset.row[sample] for sample in batch.sample_ids])
        device = self.vectors.device
        if not self.known[samples].all():
            vectors, autocast = self.vectors.vectors_of(batch), self.vectors.autocast
            batch = batch.to(device)
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                features = self.model.features(batch, self.model.base(batch, cached_vectors=vectors))
            self.rows[samples] = features.cpu().numpy()
            self.known[samples] = True
        return torch.from_numpy(self.rows[samples]).to(device, non_blocking=True)
