"""Vectors of ASVs under a frozen encoder: each is computed once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from aam.batch import Batch
from aam.data.dataset import PreparedDataset
from aam.model.sequence_predictor import SequencePredictor

CHUNK = 1024


class ASVCache:
    """Vectors of the ASVs of a dataset, filled as batches ask for them.

    Parameters
    ----------
    predictor : nn.Module
        SequencePredictor with a frozen base, or any in evaluation mode; not wrapped.
    dataset : PreparedDataset
        Whose ASVs the batches point at.
    autocast : torch.dtype or None
        Arithmetic of the forward pass.
    chunk_size : int
        ASVs encoded at a time.
    """

    def __init__(
        self,
        predictor: nn.Module,
        dataset: PreparedDataset,
        autocast: torch.dtype | None,
        chunk_size: int = CHUNK,
    ) -> None:
        assert isinstance(predictor, SequencePredictor)
        self.encoder = predictor.base.asv_encoder
        self.autocast, self.chunk_size = autocast, chunk_size
        self.device = next(predictor.parameters()).device
        self.known = np.zeros(len(dataset.lengths), dtype=bool)
        # float32 under autocast too, as the encoder gives them: a kept vector equals one computed anew.
        self.store = torch.zeros(len(dataset.lengths), predictor.base.sizes.embedding_dim, device=self.device)

    @torch.no_grad()
    def vectors(self, asvs_U: Tensor, batch: Batch) -> Tensor:
        """Vectors [U, D] of a batch's ASVs.

        Parameters
        ----------
        asvs_U : Tensor of int64
            The batch's `asvs` on the host.
        batch : Batch
            On the device.
        """
        new = np.flatnonzero(~self.known[asvs_U.numpy()])
        if len(new):
            rows = torch.from_numpy(new).to(self.device)
            with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
                encoded, _ = self.encoder(batch.tokens[rows], padded=batch.asvs_padded, chunk_size=self.chunk_size)
            self.store[batch.asvs[rows]] = encoded.float()
            self.known[asvs_U.numpy()[new]] = True
        return self.store[batch.asvs]
