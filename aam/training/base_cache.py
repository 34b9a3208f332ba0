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
    model : nn.Module
        SequencePredictor with a frozen base, or any model in evaluation mode; not wrapped.
    dataset : PreparedDataset
        Whose ASVs and samples the batches hold.
    contract : DataContract or None
        How samples are drawn. None: of the ASVs alone is kept what the base says.
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
        contract: DataContract | None,
        autocast: torch.dtype | None,
        *,
        chunk_size: int | None = None,
        on_disk: bool = True,
    ) -> None:
        assert isinstance(model, (SequenceEncoder, SequencePredictor))
        base = encoder_of(model)
        self.base, self.dataset, self.contract, self.autocast = base, dataset, contract, autocast
        self.chunk_size = chunk_size or CHUNK
        self.device = next(base.parameters()).device
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
        if self.contract is None:
            return vectors, None
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
            self.vectors.write(asvs[missing], list(rows[missing, None]))
        except OSError as error:
            self._go_on_in_memory(error)
            self.vectors.write(asvs[missing], list(rows[missing, None]))

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
            chunk = asvs[missing[i : i + self.chunk_size]]
            self.keep(chunk, self._encode(chunk))
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

    def _encode(self, asvs: np.ndarray) -> np.ndarray:
        return encode_asvs(self.base, self.dataset, asvs, self.autocast)

    @torch.no_grad()
    def _encode_sample(self, batch: Batch, b: int, known: KnownOutputs) -> np.ndarray:
        """Summary and states of a sample by itself: what is kept does not depend on the batch it came with."""
        assert not self.base.training
        n = int(batch.slot_mask[b].sum())
        alone = Batch(
            sample_ids=batch.sample_ids[b : b + 1],
            tokens=batch.tokens[:0],  # known already: of all of the batch, not to be moved for each sample
            asvs=batch.asvs[:0],
            slot=batch.slot[b : b + 1, :n],
            slot_mask=batch.slot_mask[b : b + 1, :n],
            log_abundance=batch.log_abundance[b : b + 1, :n],
            asvs_padded=batch.asvs_padded,
            global_rows=slice(0, 1),
            rank_sizes=[1],
        ).to(self.device)
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            output = self.base(alone, known=known)
        return torch.cat([output.summary.float(), output.states[0].float()]).cpu().numpy()

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


def _draw_key(contract: DataContract) -> str:
    """Of all that a fixed draw depends on; NumPy promises no more than that a version's random numbers stay."""
    facts = [np.__version__, dataclasses.asdict(contract)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
