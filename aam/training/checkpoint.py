"""Checkpoints: a directory that describes itself. No pickle anywhere.

- `model.safetensors`   weights, unwrapped
- `config.json`         what the model is, how samples are drawn, the target, metrics and versions
- `training_state.pt`   what a resumed run needs; loads with `weights_only=True`
- `ensemble.safetensors` what predicts along with the network, where it was trained with `--ensemble`
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from aam.config import DataContract
from aam.model.sequence_encoder import SequenceEncoder
from aam.model.sequence_predictor import SequencePredictor
from aam.model.sizes import EncoderSizes, PredictorSizes
from aam.training.targets import Target, UnifracTarget

if TYPE_CHECKING:
    from aam.ensemble.ensemble import Ensemble

FORMAT_VERSION = 2
WEIGHTS, CONFIG, STATE = "model.safetensors", "config.json", "training_state.pt"
ENSEMBLE = "ensemble.safetensors"


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """All that it takes to build a model and to draw samples for it."""

    encoder: EncoderSizes
    contract: DataContract
    predictor: PredictorSizes | None = None
    """None in stage 1."""
    target: Target | None = None
    """None in stage 1."""
    freeze_base: bool = False
    unifrac: tuple[UnifracTarget, ...] = ()
    """Metrics that the encoder's clades predict; none where it never learned them, or was fine-tuned for a target."""

    def build(self) -> SequenceEncoder | SequencePredictor:
        """A model with new weights, from torch's random state."""
        encoder = SequenceEncoder(self.encoder)
        if self.predictor is None:
            return encoder
        return SequencePredictor(encoder, self.predictor, freeze_base=self.freeze_base)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelSpec:
        """The reverse of `to_dict`."""
        predictor, target = data["predictor"], data["target"]
        return cls(
            **{
                **data,
                "encoder": EncoderSizes(**data["encoder"]),
                "contract": DataContract(**data["contract"]),
                "predictor": None if predictor is None else PredictorSizes(**predictor),
                "target": None if target is None else Target.from_dict(target),
                "unifrac": tuple(UnifracTarget(**learned) for learned in data["unifrac"]),
            }
        )


@dataclass
class TrainingState:
    """Where a run stands."""

    epoch: int = 0
    """Epochs done."""
    update: int = 0
    """Updates done, skipped ones counted in."""
    best_loss: float = float("inf")
    best_epoch: int = 0
    bad_epochs: int = 0
    """Epochs since the best."""
    skipped: int = 0
    """Updates skipped for a non-finite loss or gradient."""
    skipped_in_a_row: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    """Metrics of each epoch."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint as loaded."""

    path: Path
    spec: ModelSpec
    model: SequenceEncoder | SequencePredictor
    """On the CPU, in evaluation mode."""
    metrics: dict[str, float]
    """Of the epoch that wrote it."""
    ensemble: Ensemble | None = None
    """What predicts along with the network, where it was trained with `--ensemble`."""


def save(
    path: Path,
    model: torch.nn.Module,
    spec: ModelSpec,
    state: TrainingState,
    optimizer_state: dict[str, Any],
    rng_states: list[dict[str, torch.Tensor]],
) -> None:
    """Write a checkpoint under a temporary name, then rename it: it is there whole or not at all.

    Parameters
    ----------
    path : Path
        Directory of the checkpoint; one that is there already is replaced.
    model : nn.Module
        Not wrapped.
    spec : ModelSpec
        Describes it.
    state : TrainingState
        Where the run stands.
    optimizer_state : dict
        `optimizer.state_dict()`.
    rng_states : list of dict
        Random states of each worker.
    """

    def write(scratch: Path) -> None:
        save_file({k: v.detach().contiguous() for k, v in model.state_dict().items()}, scratch / WEIGHTS)
        names = ("aam", "torch", "numpy", "scikit-bio")
        described = {
            "format_version": FORMAT_VERSION,
            "kind": type(model).__name__,
            "spec": spec.to_dict(),
            "metrics": state.history[-1] if state.history else {},
            "versions": {name: _version(name) for name in names},
        }
        (scratch / CONFIG).write_text(json.dumps(described, indent=1))
        torch.save({"loop": asdict(state), "optimizer": optimizer_state, "rng": rng_states}, scratch / STATE)

    replace_directory(path, write)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # aam itself, run from the working directory of a Ray job
        return "not installed"


def replace_directory(path: Path, write: Callable[[Path], None]) -> None:
    """Fill a directory under a temporary name, then put it in the place of `path`.

    Parameters
    ----------
    path : Path
        One that is there already is whole until the new one is.
    write : callable
        Takes the directory to fill.
    """
    scratch, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():
        old.rename(path)  # a process was lost between the two renames below
    for leftover in (scratch, old):
        shutil.rmtree(leftover, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        write(scratch)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    if path.exists():
        path.rename(old)
    scratch.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def is_checkpoint(path: Path) -> bool:
    """Whether a directory is a checkpoint."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def load(path: Path) -> Checkpoint:
    """Load a checkpoint.

    Parameters
    ----------
    path : Path
        Its directory.

    Raises
    ------
    ValueError
        For a directory that is no checkpoint, one of another format, or weights that do not fit.
    """
    if not is_checkpoint(path):
        raise ValueError(f"{path}: not a checkpoint (a folder with {WEIGHTS} and {CONFIG})")
    described = json.loads((path / CONFIG).read_text())
    if described.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: a checkpoint of format {described.get('format_version')}, and this version of aam reads "
            f"format {FORMAT_VERSION}; train it anew, or use the version of aam that wrote it"
        )
    spec = ModelSpec.from_dict(described["spec"])
    model = spec.build()
    load_weights(model, load_file(path / WEIGHTS), source=path)
    return Checkpoint(
        path=path, spec=spec, model=model.eval(), metrics=described["metrics"], ensemble=_load_ensemble(path)
    )


def _load_ensemble(path: Path) -> Ensemble | None:
    if not (path / ENSEMBLE).is_file():
        return None
    # Here and not above: it imports more of SciPy than processes that train need.
    from aam.ensemble.ensemble import Ensemble

    return Ensemble.load(path)


def load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], *, source: Path) -> None:
    """Load weights, every one of them; any that is missing, left over or of another shape is an error.

    Parameters
    ----------
    model : nn.Module
        Not wrapped; changed in place, or not at all.
    weights : dict of str to Tensor
        A state dict.
    source : Path
        Where they come from, for the message.

    Raises
    ------
    ValueError
        Names the first few weights that do not fit.
    """
    own = model.state_dict()
    wrong = [f"missing {k}" for k in own.keys() - weights.keys()]
    wrong += [f"unknown {k}" for k in weights.keys() - own.keys()]
    wrong += [
        f"{k} has shape {tuple(weights[k].shape)}, not {tuple(own[k].shape)}"
        for k in own.keys() & weights.keys()
        if own[k].shape != weights[k].shape
    ]
    if wrong:
        raise ValueError(f"{source}: {len(wrong)} weights do not fit the model: {', '.join(sorted(wrong)[:5])}")
    model.load_state_dict(weights)


def load_training_state(
    path: Path,
) -> tuple[TrainingState, dict[str, Any], list[dict[str, torch.Tensor]]]:
    """State of the loop, of the optimizer, and of the random generators of each worker.

    Parameters
    ----------
    path : Path
        Directory of the checkpoint.
    """
    saved = torch.load(path / STATE, map_location="cpu", weights_only=True)
    return TrainingState(**saved["loop"]), saved["optimizer"], saved["rng"]
