"""Outputs of a checkpoint for samples, and who does the work: this process, or others that are handed shares of it.

Shape letters: n samples, N ASVs of these samples one after the other, O outputs, D width, P clades.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from aam.batch import Batch
from aam.data.batches import BatchPlan, EpochBatches
from aam.data.dataset import PreparedDataset
from aam.data.draw import FIXED_DRAW
from aam.model.sequence_encoder import EncoderOutput
from aam.model.sequence_predictor import PredictorOutput, SequencePredictor
from aam.training.base_cache import BaseCache, encode_asvs, encoder_of
from aam.training.checkpoint import Checkpoint
from aam.training.memory import keep_freed_memory

_BASE = "base."


@dataclass(frozen=True, kw_only=True)
class SampleOutputs:
    """Outputs of a model for samples."""

    target: np.ndarray
    """float32 [n, O]: transformed targets or their quantiles, or logits of the classes; O is 0 in stage 1."""
    features: np.ndarray
    """float32 [n, F]: what the target heads read; F is 0 in stage 1."""
    presence: np.ndarray
    """float32 [n, P]: of the clades."""
    share: np.ndarray
    """float32 [n, P]: of the clades."""
    faith_pd: np.ndarray
    """float32 [n]"""
    richness: np.ndarray
    """int64 [n]: ASVs of each sample."""
    asvs: np.ndarray
    """int64 [N]: rows of the dataset."""
    abundance: np.ndarray
    """float32 [N]: relative, in its sample."""
    tip_lengths: np.ndarray
    """float32 [N]: of the ASVs' own branches."""

    @classmethod
    def of(cls, batch: Batch, output: PredictorOutput | EncoderOutput) -> SampleOutputs:
        """Those of a batch, on the host."""
        base = output.base if isinstance(output, PredictorOutput) else output
        assert base is not None, "only features of samples are cached in training"
        nothing = base.faith_pd.new_empty(len(base.faith_pd), 0)
        target, features = nothing, nothing
        if isinstance(output, PredictorOutput):
            target, features = output.target, output.features
        parts = {
            "target": target,
            "features": features,
            "presence": base.profiles.presence,
            "share": base.profiles.share,
            "faith_pd": base.faith_pd,
            "tip_lengths": base.tip_lengths[batch.slot],
            "abundance": batch.log_abundance.exp(),
        }
        on_host = {name: part.float().cpu().numpy() for name, part in parts.items()}
        mask, asvs = batch.slot_mask.cpu().numpy(), batch.asvs[batch.slot].cpu().numpy()
        of_asvs = {"asvs": asvs[mask], **{name: on_host[name][mask] for name in ("tip_lengths", "abundance")}}
        return cls(**{**on_host, **of_asvs, "richness": mask.sum(axis=1)})

    @classmethod
    def concatenate(cls, parts: Sequence[SampleOutputs]) -> SampleOutputs:
        """Those of several batches, one after the other."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})

    def only(self, names: Collection[str]) -> SampleOutputs:
        """Those named, and those of one number or few a sample; the others empty."""
        large = {"features", "presence", "share", "asvs", "abundance", "tip_lengths"} - {*names}
        return dataclasses.replace(self, **{name: getattr(self, name)[..., :0] for name in large})


@torch.no_grad()
def predict_samples(
    loaded: Checkpoint,
    dataset: PreparedDataset,
    sample_ids: Sequence[str],
    *,
    batch_size: int = 32,
    chunk_size: int = 1024,
    base_cache: bool = True,
    device: torch.device | None = None,
    autocast: torch.dtype | None = None,
    vectors: np.ndarray | None = None,
    draw: int = 0,
) -> SampleOutputs:
    """Run a model on samples.

    Parameters
    ----------
    loaded : Checkpoint
        Of either stage.
    dataset : PreparedDataset
        Holds the samples, each with at least the reads that the model was trained on.
    sample_ids : sequence of str
        Which samples.
    batch_size, chunk_size : int
        Samples, and distinct ASVs, at a time.
    base_cache : bool
        Read and keep on disk what a frozen base says of ASVs.
    device : torch.device, optional
        Default: the GPU where there is one.
    autocast : torch.dtype, optional
        Arithmetic of the forward pass.
    vectors : ndarray of float32 [ASVs, D], optional
        Of the dataset's ASVs, those of these samples at least; computed where they are not given.
    draw : int
        Which of several rarefactions; 0 is that of validation.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = BatchPlan(
        dataset=dataset,
        sample_ids=sample_ids,
        contract=loaded.spec.contract,
        batch_size=batch_size,
        fixed_draw=draw,
    )
    batches = EpochBatches(plan, FIXED_DRAW)
    if vectors is None:
        loaded.model.to(device).eval()
        cache = open_cache(loaded, dataset, autocast, chunk_size=chunk_size, base_cache=base_cache)
        cache.fill([batches])
        vectors = cache.vectors.rows
    of_batches = batch_outputs(loaded, batches, vectors, device, autocast)
    together = SampleOutputs.concatenate([SampleOutputs.of(*of_batch) for of_batch in of_batches])
    if loaded.ensemble is None or loaded.spec.target is None:
        return together
    combined = loaded.ensemble.outputs(together.target, together.features, loaded.spec.target)
    return dataclasses.replace(together, target=combined)


@torch.no_grad()
def batch_outputs(
    loaded: Checkpoint,
    batches: EpochBatches,
    vectors: np.ndarray,
    device: torch.device,
    autocast: torch.dtype | None,
) -> Iterator[tuple[Batch, PredictorOutput | EncoderOutput]]:
    """Each batch and the output of the model for it, on the device; see `predict_samples`.

    Of the networks of an ensemble, the mean.
    """
    model = loaded.model.to(device).eval()
    others = [] if loaded.ensemble is None else [_with_heads(model, of).to(device) for of in loaded.ensemble.networks]
    for index in range(len(batches)):
        batch = batches[index]
        cached_vectors = torch.from_numpy(vectors[batch.asvs.numpy()]).to(device)
        batch = batch.to(device)
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            output = model(batch, cached_vectors=cached_vectors)
            if others:
                assert isinstance(output, PredictorOutput)
                assert output.base is not None
                targets = [output.target, *(other.predict_heads(batch, output.base)[0].mean(dim=1) for other in others)]
                output = dataclasses.replace(output, target=torch.stack(targets).mean(dim=0))
        yield batch, output


def heads_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """What a predictor has beside its base, by the names of its parameters."""
    return {
        name: tensor.detach().cpu().numpy().copy()
        for name, tensor in model.state_dict().items()
        if not name.startswith(_BASE)
    }


def _with_heads(model: torch.nn.Module, heads: Mapping[str, np.ndarray]) -> SequencePredictor:
    """A predictor on the same base with other heads, as of `heads_of`."""
    assert isinstance(model, SequencePredictor)
    other = SequencePredictor(model.base, model.sizes, freeze_base=model.freeze_base)
    missing, unknown = other.load_state_dict({name: torch.tensor(of) for name, of in heads.items()}, strict=False)
    assert not unknown, "heads of another model"
    assert all(name.startswith(_BASE) for name in missing), "heads of another model"
    return other.eval()


def open_cache(
    loaded: Checkpoint,
    dataset: PreparedDataset,
    autocast: torch.dtype | None,
    *,
    chunk_size: int,
    base_cache: bool,
) -> BaseCache:
    """Vectors of ASVs that are there, and room for the others.

    The states of samples are not kept: for tens of thousands they are more than a disk should hold, and a sample is
    seldom predicted twice.
    """
    # A base that was trained along with its heads is not met again by other runs.
    is_met_again = loaded.spec.predictor is None or loaded.spec.freeze_base
    return BaseCache(loaded.model, dataset, autocast, chunk_size=chunk_size, on_disk=base_cache and is_met_again)


@dataclass(frozen=True, kw_only=True)
class Worker:
    """What a process needs for its shares of the work."""

    loaded: Checkpoint
    dataset: PreparedDataset
    batch_size: int
    device: torch.device
    autocast: torch.dtype | None
    kept: frozenset[str] = frozenset()
    """Outputs of samples that are to be returned; see `SampleOutputs.only`."""

    def encode(self, asvs: np.ndarray) -> np.ndarray:
        """Vectors of ASVs, float32 [n, D]."""
        encoder = encoder_of(self.loaded.model.to(self.device).eval())
        return encode_asvs(encoder, self.dataset, asvs, self.autocast)

    def predict(self, sample_ids: Sequence[str], vectors: np.ndarray, draw: int) -> SampleOutputs:
        """Outputs for samples, from the vectors of their ASVs; see `predict_samples`."""
        outputs = predict_samples(
            self.loaded,
            self.dataset,
            sample_ids,
            batch_size=self.batch_size,
            device=self.device,
            autocast=self.autocast,
            vectors=vectors,
            draw=draw,
        )
        return outputs.only(self.kept)


Map = Callable[..., Iterator[tuple[int, Any]]]
"""`map_items(method, items, *shared)`: number and `method(worker, item, *shared)` of each item, in any order."""


@dataclass(frozen=True, kw_only=True)
class Executor:
    """Who does the work."""

    device: torch.device
    """Of each of them."""
    start: Callable[[Worker], Map]
    """Starts the processes, which all have what the worker has."""


def this_process(use_gpu: bool | None = None) -> Executor:
    """This process alone, on its GPU where there is one.

    Raises
    ------
    ValueError
        Where a GPU is asked for and there is none.
    """
    if use_gpu and not torch.cuda.is_available():
        raise ValueError("--use-gpu True: there is no GPU here that torch can use; leave it out")
    on_gpu = torch.cuda.is_available() if use_gpu is None else use_gpu

    def start(worker: Worker) -> Map:
        if not on_gpu:
            keep_freed_memory()
        return lambda method, items, *shared: (
            (number, method(worker, item, *shared)) for number, item in enumerate(items)
        )

    return Executor(device=torch.device("cuda" if on_gpu else "cpu"), start=start)
