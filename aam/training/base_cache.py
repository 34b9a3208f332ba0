"""ASV vectors of a frozen base: computed once, kept on disk, shared by all runs on the same base and dataset.

Shape letters: U distinct ASVs, D width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from aam.batch import Batch
from aam.data.batches import EpochBatches
from aam.data.dataset import PreparedDataset
from aam.model.sequence_encoder import SequenceEncoder
from aam.model.sequence_predictor import SequencePredictor
from aam.training import collectives
from aam.training.row_store import RowStore

CACHE_VERSION = 2
"""Part of the key: raise it when the files change, or when the same weights come to give other outputs."""
CHUNK = 1024
"""ASVs encoded at a time, where the settings do not say."""


class BaseCache:
    """Vectors of ASVs by a base that does not change.

    Files are in `vectors/<key>` beside the prepared dataset; where they cannot be written, the vectors of the
    ASVs are kept in memory. They may be deleted: a run gives the same without them, to rounding.

    Parameters
    ----------
    model : nn.Module
        SequencePredictor with a frozen base, or any model in evaluation mode; not wrapped.
    dataset : PreparedDataset
        Whose ASVs and samples the batches hold.
    autocast : torch.dtype or None
        Arithmetic of the forward pass.
    chunk_size : int, optional
        ASVs encoded at a time.
    on_disk : bool
        False: in memory, for a base that is not met again.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: PreparedDataset,
        autocast: torch.dtype | None,
        *,
        chunk_size: int | None = None,
        on_disk: bool = True,
    ) -> None:
        assert isinstance(model, (SequenceEncoder, SequencePredictor))
        base = encoder_of(model)
        self.base, self.dataset, self.autocast = base, dataset, autocast
        self.chunk_size = chunk_size or CHUNK
        self.device = next(base.parameters()).device
        self.on_disk = on_disk
        self.folder = dataset.folder.parent / "vectors" / cache_key(self.base, dataset, autocast) if on_disk else None
        try:
            self.vectors = self._open()
        except OSError as error:
            self._give_up_disk(error)
            self.vectors = self._open()

    def _open(self) -> RowStore:
        asvs, width = len(self.dataset.lengths), self.base.sizes.embedding_dim
        if self.folder is None:
            return RowStore(None, asvs, width)
        self.folder.mkdir(parents=True, exist_ok=True)
        return RowStore(self.folder / "asvs.rows", asvs, width)

    def _give_up_disk(self, error: OSError) -> None:
        reason = error.strerror or error
        print(f"note: ASV vectors are kept in memory, not in {self.folder}: {reason}", flush=True)
        self.folder = None

    def _go_on_in_memory(self, error: OSError) -> None:
        self._give_up_disk(error)
        self.vectors.to_memory()

    def fill(self, parts: Sequence[EpochBatches], *, verbose: bool = True) -> None:
        """Encode the ASVs that batches will show.

        Parameters
        ----------
        parts : sequence of EpochBatches
            Any epoch of each part of the data.
        verbose : bool
            Whether to `say` how many there were.
        """
        wanted = np.unique(np.concatenate([part.possible_asvs() for part in parts]))
        encoded = self.encode_together(wanted)
        if collectives.rank() == 0 and verbose:
            self.say(encoded, len(wanted))

    def encode_together(self, wanted: np.ndarray) -> int:
        """Encode ASVs, each once by all workers together, and have them on all nodes.

        The workers take turns of a chunk each and tell each other what came out: none is ever waited for longer than
        a chunk takes, however slow its node.

        Parameters
        ----------
        wanted : ndarray of int [n]
            Rows of the dataset, ascending.

        Returns
        -------
        int
            How many were not there already.
        """
        lacks = torch.zeros(len(wanted), dtype=torch.uint8, device=self.device)
        lacks[torch.from_numpy(self.vectors.missing(wanted)).to(self.device)] = 1
        missing = wanted[collectives.all_reduce_max(lacks).cpu().numpy().astype(bool)]
        chunks, world = self.chunks(missing), collectives.world_size()
        for first in range(0, len(chunks), world):
            self._encode_turn(chunks[first : first + world])
        return len(missing)

    def say(self, encoded: int, wanted: int) -> None:
        """Print how many of the ASVs that were wanted had to be encoded; nothing where none could have been there."""
        if self.on_disk:
            where = "in memory" if self.folder is None else f"in {self.folder}"
            print(f"base: {encoded} ASVs encoded, {wanted - encoded} were there already, {where}", flush=True)

    def chunks(self, asvs: np.ndarray) -> list[np.ndarray]:
        """Cut ASVs into what is encoded at a time, of like length: less padding."""
        by_length = asvs[np.argsort(self.dataset.lengths[asvs], kind="stable")]
        return [by_length[i : i + self.chunk_size] for i in range(0, len(by_length), self.chunk_size)]

    def _encode_turn(self, chunks: Sequence[np.ndarray]) -> None:
        """Encode a chunk on each worker, and keep what all of them say."""
        own, width = np.zeros(0, np.float32), self.base.sizes.embedding_dim
        if collectives.rank() < len(chunks):
            own = self._encode(chunks[collectives.rank()])
        rows = collectives.gather_array(own.reshape(-1), self.device).reshape(-1, width)
        self.keep(np.concatenate(chunks), rows)

    def keep(self, asvs: np.ndarray, rows: np.ndarray) -> None:
        """Keep vectors [n, D] of ASVs; what another process of the node has kept meanwhile stays."""
        missing = self.vectors.missing(asvs)
        try:
            self.vectors.write(asvs[missing], rows[missing])
        except OSError as error:
            self._go_on_in_memory(error)
            self.vectors.write(asvs[missing], rows[missing])

    def vectors_of(self, batch: Batch) -> Tensor:
        """Vectors [U, D] of the ASVs of a batch, on the device of the model; missing ones are computed and kept.

        Parameters
        ----------
        batch : Batch
            On the host.
        """
        asvs = batch.asvs.numpy()
        missing = self.vectors.missing(asvs)
        for i in range(0, len(missing), self.chunk_size):
            chunk = asvs[missing[i : i + self.chunk_size]]
            self.keep(chunk, self._encode(chunk))
        return self._to_device(self.vectors.rows[asvs])

    def _encode(self, asvs: np.ndarray) -> np.ndarray:
        return encode_asvs(self.base, self.dataset, asvs, self.autocast)

    def _to_device(self, rows: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(rows)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)


def encoder_of(model: SequenceEncoder | SequencePredictor) -> SequenceEncoder:
    """The encoder of a model of either stage."""
    return model.base if isinstance(model, SequencePredictor) else model


@torch.no_grad()
def encode_asvs(
    base: SequenceEncoder, dataset: PreparedDataset, asvs: np.ndarray, autocast: torch.dtype | None
) -> np.ndarray:
    """Vectors of ASVs, float32 [n, D], on the device of the encoder, all at once.

    Parameters
    ----------
    base : SequenceEncoder
        In evaluation mode.
    dataset : PreparedDataset
        Holds the ASVs.
    asvs : ndarray of int [n]
        Rows of the dataset.
    autocast : torch.dtype or None
        Arithmetic of the forward pass.
    """
    assert not base.training
    device, lengths = next(base.parameters()).device, dataset.lengths[asvs]
    tokens_UL = torch.from_numpy(dataset.tokens[asvs, : lengths.max()]).to(device)
    padded = bool((lengths != lengths.max()).any())
    with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        vectors_UD, _ = base.asv_encoder(tokens_UL, padded=padded)
    # float32 under autocast too, as the encoder gives them: a kept vector equals one computed anew.
    return vectors_UD.float().cpu().numpy()


def cache_key(base: SequenceEncoder, dataset: PreparedDataset, autocast: torch.dtype | None) -> str:
    """Key of what a base says of a dataset: of its weights and sizes, the dataset's contents and the arithmetic."""
    sizes = dataclasses.asdict(dataclasses.replace(base.sizes, dropout=0.0))  # there is none in evaluation
    facts = [CACHE_VERSION, sizes, dataset.folder.name, str(autocast)]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for name, tensor in sorted(base.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
