"""The network, or several, and what stands beside it as one predictor; how it is applied and stored.

Shape letters: n samples, F features, O outputs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from scipy.special import log_softmax, logsumexp

from aam.data.files import replacing
from aam.ensemble.trees import BoostedTrees
from aam.training.checkpoint import ENSEMBLE
from aam.training.targets import Target

MEMBERS = ("network", "boosting")
_NETWORK = "network."


@dataclass(frozen=True, kw_only=True)
class Weights:
    """How the members are put together."""

    of_members: np.ndarray
    """float64 [members]: in the order of `MEMBERS`; they sum to 1."""
    temperatures: np.ndarray
    """float64 [members]: divisors of the logits of classes, which calibrate probabilities; 1 in a regression."""
    calibration: np.ndarray
    """float64 [2]: centre and slope by which predicted numbers are spread out, as a mean of members predicts too little
    of what is far from the mean; 0 and 1 for classes."""

    @classmethod
    def equal(cls) -> Weights:
        """Equal weights, nothing calibrated."""
        ones = np.ones(len(MEMBERS))
        return cls(of_members=ones / len(ones), temperatures=ones, calibration=np.array([0.0, 1.0]))

    @property
    def by_name(self) -> dict[str, float]:
        """`of_members` by the names of the members."""
        return dict(zip(MEMBERS, self.of_members.tolist(), strict=True))

    def combine(self, members: Mapping[str, np.ndarray], target: Target) -> np.ndarray:
        """Weighted mean of the outputs [n, O] of the members; of classes, of their probabilities.

        float64 [n, O]: for classes, logarithms of the probabilities.
        """
        stacked = np.stack([members[name] for name in MEMBERS])
        if target.classes:
            logs = log_softmax(stacked / self.temperatures[:, None, None], axis=2)
            return np.asarray(logsumexp(logs, axis=0, b=self.of_members[:, None, None]))
        centre, slope = self.calibration
        return centre + slope * (np.tensordot(self.of_members, stacked, axes=1) - centre)


_PARTS = {"boosting": BoostedTrees, "weights": Weights}


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """What stands beside the network in a checkpoint."""

    boosting: BoostedTrees
    """Gradient boosting on the shares of single ASVs."""
    weights: Weights
    scores: dict[str, float]
    """Loss of each member, and of all together, on the samples that set the weights, and how many these are."""
    networks: tuple[Mapping[str, np.ndarray], ...] = ()
    """Parameters of heads, each trained on other samples, which are averaged with the checkpoint's own."""

    def outputs(self, network: np.ndarray, features: np.ndarray, target: Target) -> np.ndarray:
        """Outputs of all members together.

        Parameters
        ----------
        network : ndarray of float32 [n, O]
            Of the networks: transformed numbers or their quantiles, or logits of classes.
        features : ndarray of float32 [n, F]
            Of the same samples, by the checkpoint's own network.
        target : Target
            What is predicted.

        Returns
        -------
        ndarray of float32 [n, O]
            The same of all: for classes, logarithms of their probabilities.
        """
        return self.weights.combine(self.members(network, features), target).astype(np.float32)

    def members(self, network: np.ndarray, features: np.ndarray) -> dict[str, np.ndarray]:
        """Outputs of each member, float64 [n, O]; see `outputs`."""
        return {"network": network.astype(np.float64), "boosting": self.boosting.outputs(read_by_trees(features))}

    def save(self, folder: Path) -> None:
        """Write it beside the weights of the network."""
        apart = (*_PARTS, "scores", "networks")
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}
        for number, network in enumerate(self.networks):
            arrays |= {f"{_NETWORK}{number}.{name}": array for name, array in network.items()}
        for name in _PARTS:
            part = getattr(self, name)
            arrays |= {f"{name}.{f.name}": getattr(part, f.name) for f in fields(part)}
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        with replacing(folder / ENSEMBLE) as scratch:
            save_file(arrays, scratch, metadata={"scores": json.dumps(self.scores)})

    @classmethod
    def load(cls, folder: Path) -> Ensemble:
        """Read that of a checkpoint which has one.

        Raises
        ------
        ValueError
            Where it has other members: another version of AAM wrote it.
        """
        with safe_open(folder / ENSEMBLE, "numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            scores = json.loads(file.metadata()["scores"])
        try:
            parts = {
                name: kind(**{f.name: arrays.pop(f"{name}.{f.name}") for f in fields(kind)})
                for name, kind in _PARTS.items()
            }
            networks: dict[int, dict[str, np.ndarray]] = {}
            for name in [name for name in arrays if name.startswith(_NETWORK)]:
                number, parameter = name.removeprefix(_NETWORK).split(".", 1)
                networks.setdefault(int(number), {})[parameter] = arrays.pop(name)
            return cls(scores=scores, networks=tuple(networks[i] for i in sorted(networks)), **parts, **arrays)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{folder / ENSEMBLE}: another version of AAM wrote it, with other members ({error}): delete it, and "
                "train once more with --resume, which fits it anew"
            ) from None


def read_by_trees(features: np.ndarray) -> np.ndarray:
    """The features [n, F] that boosting reads: the first half, which is of single ASVs.

    Groups of ASVs beside them made it worse (NOTES.md).
    """
    return features[:, : features.shape[1] // 2]
