"""Outputs of a frozen base: computed once, kept on disk, shared by all runs on the same base and dataset.

Shape letters: B samples, S ASV slots, U distinct ASVs, D width.
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
from aam.config import DataContract
from aam.data.batches import EpochBatches
from aam.data.dataset import PreparedDataset
from aam.model.sequence_encoder import KnownOutputs, SequenceEncoder
from aam.model.sequence_predictor import SequencePredictor
from aam.training import collectives
from aam.training.row_store import RowStore

CACHE_VERSION = 1
"""Part of the key: raise it when the files change, or when the same weights come to give other outputs."""
CHUNK = 1024
"""ASVs encoded at a time, where the settings do not say."""


class BaseCache:
    """What a base that does not change says of ASVs and, where their draw does not change either, of samples.

    Files are in `vectors/<key>` beside the prepared dataset; where they cannot be written, the vectors of the
    ASVs are kept in memory. They may be deleted: a run gives the same without them, to rounding.

    Parameters
    ----------
    predictor : nn.Module
        SequencePredictor with a frozen base, or any in evaluation mode; not wrapped.
    dataset : PreparedDataset
        Whose ASVs and samples the batches hold.
    contract : DataContract
        How samples are drawn.
    autocast : torch.dtype or None
        Arithmetic of the forward pass.
    chunk_size : int, optional
        ASVs encoded at a time.
    on_disk : bool
        False: in memory, for a base that is not met again.
    """

    def __init__(
        self,
        predictor: nn.Module,
        dataset: PreparedDataset,
        contract: DataContract,
        autocast: torch.dtype | None,
        *,
        chunk_size: int | None = None,
        on_disk: bool = True,
    ) -> None:
        assert isinstance(predictor, SequencePredictor)
        self.base, self.dataset, self.contract, self.autocast = predictor.base, dataset, contract, autocast
        self.chunk_size = chunk_size or CHUNK
        self.device = next(predictor.parameters()).device
        self.on_disk = on_disk
        self.folder = dataset.folder.parent / "vectors" / cache_key(self.base, dataset, autocast) if on_disk else None
        try:
            self.vectors, self.samples = self._open()
        except OSError as error:
            self._give_up_disk(error)
            self.vectors, self.samples = self._open()

    def _open(self) -> tuple[RowStore, RowStore | None]:
        """Vectors of the ASVs, and summary and states of each sample in its fixed draw."""
        width, one_each = self.base.sizes.embedding_dim, np.arange(len(self.dataset.lengths) + 1)
        if self.folder is None:
            # Without the samples: states of all of them are too much to hold for each worker.
            return RowStore(None, one_each, width), None
        self.folder.mkdir(parents=True, exist_ok=True)
        vectors = RowStore(self.folder / "asvs.rows", one_each, width)
        most = np.minimum(self.dataset.richness, self.contract.token_limit)
        if self.contract.rarefy_depth:
            most = np.minimum(most, self.contract.rarefy_depth)
        starts = np.concatenate([[0], np.cumsum(most + 1)])
        return vectors, RowStore(self.folder / f"samples-{_draw_key(self.contract)}.rows", starts, width)

    def _give_up_disk(self, error: OSError) -> None:
        reason = error.strerror or error
        print(f"note: what the base says is kept in memory, not in {self.folder}: {reason}", flush=True)
        self.folder = None

    def _go_on_in_memory(self, error: OSError) -> None:
        self._give_up_disk(error)
        self.vectors.to_memory()
        self.samples = None

    def fill(self, parts: Sequence[EpochBatches]) -> None:
        """Encode the ASVs that batches will show, all workers together; each sees to it that its node has them all.

        Parameters
        ----------
        parts : sequence of EpochBatches
            Any epoch of each part of the data.
        """
        wanted = np.unique(np.concatenate([part.possible_asvs() for part in parts]))
        missing = wanted[self.vectors.missing(wanted)]
        # All cut the same into chunks before any has changed what is there.
        collectives.barrier(self.device)
        by_length = missing[np.argsort(self.dataset.lengths[missing], kind="stable")]
        chunks = [by_length[i : i + self.chunk_size] for i in range(0, len(by_length), self.chunk_size)]
        for number in turns(len(chunks), collectives.rank(), collectives.world_size()):
            if len(self.vectors.missing(chunks[number])):
                self._encode(chunks[number])
        if collectives.rank() == 0 and self.on_disk:
            where = "in memory" if self.folder is None else f"in {self.folder}"
            print(
                f"base: {len(missing)} ASVs encoded, {len(wanted) - len(missing)} were there already, {where}",
                flush=True,
            )

    def known(self, batch: Batch, *, fixed_draws: bool) -> KnownOutputs:
        """What the base says of a batch, on the device of the model; what is not there is computed and kept.

        Parameters
        ----------
        batch : Batch
            On the host.
        fixed_draws : bool
            Whether its samples are drawn as always (`EpochBatches.has_fixed_draws`).
        """
        asvs = batch.asvs.numpy()
        missing = self.vectors.missing(asvs)
        for i in range(0, len(missing), self.chunk_size):
            self._encode(asvs[missing[i : i + self.chunk_size]])
        known = KnownOutputs(asvs=self._to_device(self.vectors.rows[asvs]))
        if not fixed_draws or self.samples is None:
            return known
        items = np.array([self.dataset.row[sample_id] for sample_id in batch.sample_ids])
        sizes = batch.slot_mask.sum(dim=1).numpy()
        missing = self.samples.missing(items, sizes + 1)
        if len(missing):
            rows = [self._encode_sample(batch, int(b), known) for b in missing]
            try:
                self.samples.write(items[missing], rows)
            except OSError as error:
                self._go_on_in_memory(error)
                return known
        return dataclasses.replace(known, samples=self._read_samples(items, sizes))

    def _read_samples(self, items: np.ndarray, sizes: np.ndarray) -> tuple[Tensor, Tensor]:
        """States [B, S, D] and summary [B, D]."""
        assert self.samples is not None
        rows, starts = self.samples.rows, self.samples.starts[items]
        states_BSD = np.zeros((len(items), sizes.max(), rows.shape[1]), np.float32)
        for of_sample, start, size in zip(states_BSD, starts, sizes, strict=True):
            of_sample[:size] = rows[start + 1 : start + 1 + size]
        return self._to_device(states_BSD), self._to_device(rows[starts])

    @torch.no_grad()
    def _encode(self, asvs: np.ndarray) -> None:
        assert not self.base.training
        lengths = self.dataset.lengths[asvs]
        tokens_UL = torch.from_numpy(self.dataset.tokens[asvs, : lengths.max()]).to(self.device)
        padded = bool((lengths != lengths.max()).any())
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            vectors_UD, _ = self.base.asv_encoder(tokens_UL, padded=padded)
        # float32 under autocast too, as the encoder gives them: a kept vector equals one computed anew.
        rows = vectors_UD.float().cpu().numpy()[:, None]
        try:
            self.vectors.write(asvs, rows)
        except OSError as error:
            self._go_on_in_memory(error)
            self.vectors.write(asvs, rows)

    @torch.no_grad()
    def _encode_sample(self, batch: Batch, b: int, known: KnownOutputs) -> np.ndarray:
        """Summary and states of a sample by itself: what is kept does not depend on the batch it came with."""
        assert not self.base.training
        n = int(batch.slot_mask[b].sum())
        of_sample = {name: getattr(batch, name)[b : b + 1, :n] for name in ("slot", "slot_mask", "log_abundance")}
        alone = dataclasses.replace(batch, sample_ids=batch.sample_ids[b : b + 1], **of_sample).to(self.device)
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            output = self.base(alone, known=known)
        return torch.cat([output.summary.float(), output.states[0].float()]).cpu().numpy()

    def _to_device(self, rows: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(rows)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)


def cache_key(base: SequenceEncoder, dataset: PreparedDataset, autocast: torch.dtype | None) -> str:
    """Key of what a base says of a dataset: of its weights and sizes, the dataset's contents and the arithmetic."""
    sizes = dataclasses.asdict(dataclasses.replace(base.sizes, dropout=0.0))  # there is none in evaluation
    facts = [CACHE_VERSION, sizes, dataset.folder.name, str(autocast)]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for name, tensor in sorted(base.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _draw_key(contract: DataContract) -> str:
    """Of all that a fixed draw depends on; NumPy promises no more than that a version's random numbers stay."""
    facts = [np.__version__, dataclasses.asdict(contract)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def turns(chunks: int, rank: int, world: int) -> list[int]:
    """Numbers of chunks in the order in which a worker takes them.

    Its own share, then the others', last first: what they have not come to yet, or will not do on this node.
    """
    shares = np.array_split(np.arange(chunks), world)
    others = [shares[(rank + i) % world][::-1] for i in range(1, world)]
    return np.concatenate([shares[rank], *others]).tolist()
