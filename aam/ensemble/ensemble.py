"""The network, or several, and what stands beside it as one predictor; how it is applied and stored.

Shape letters: n samples, m training samples, K known ASVs, G groups, O outputs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from safetensors import safe_open
from safetensors.numpy import save_file
from scipy.special import log_softmax, logsumexp

from aam.data.batches import Draw
from aam.data.files import replacing
from aam.ensemble.groups import Groups, Nearest, log_shares
from aam.ensemble.linear import Linear, linear_inputs
from aam.ensemble.trees import BoostedTrees, Forest, weighted_quantile
from aam.training.checkpoint import ENSEMBLE
from aam.training.targets import Target

MEMBERS = ("network", "asv_forest", "group_forest", "boosting", "linear")
_NETWORK = "network."
_BLOCK = 512
"""Samples at a time: their weights on all training samples are held."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """How the members are put together."""

    of_members: np.ndarray
    """float64 [members]: in the order of `MEMBERS`; they sum to 1."""
    temperatures: np.ndarray
    """float64 [members]: what the scores of classes are divided by, so that probabilities are what comes true; 1 for
    numbers."""
    stretch: np.ndarray
    """float64 [2]: about which number, and by how much, a predicted number is spread out, as a mean of members says too
    little of what is far from the mean; 0 and 1 for classes."""

    @classmethod
    def alike(cls) -> Weights:
        """All members count alike, as they are."""
        alike = np.ones(len(MEMBERS))
        return cls(of_members=alike / len(alike), temperatures=alike, stretch=np.array([0.0, 1.0]))

    @property
    def by_name(self) -> dict[str, float]:
        """`of_members` by the names of the members."""
        return dict(zip(MEMBERS, self.of_members.tolist(), strict=True))

    def combine(self, members: Mapping[str, np.ndarray], target: Target) -> np.ndarray:
        """What the members [n, O] say together: their weighted mean, of probabilities where it is classes.

        float64 [n, O]: for classes, logarithms of the probabilities.
        """
        stacked = np.stack([members[name] for name in MEMBERS])
        if target.classes:
            logs = log_softmax(stacked / self.temperatures[:, None, None], axis=2)
            return np.asarray(logsumexp(logs, axis=0, b=self.of_members[:, None, None]))
        centre, factor = self.stretch
        return centre + factor * (np.tensordot(self.of_members, stacked, axes=1) - centre)


_PARTS = {
    "groups": Groups,
    "asv_forest": Forest,
    "group_forest": Forest,
    "boosting": BoostedTrees,
    "linear": Linear,
    "weights": Weights,
}


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """What stands beside the network in a checkpoint."""

    groups: Groups
    asv_forest: Forest
    """Random forest on the known ASVs, each by itself."""
    group_forest: Forest
    """Extremely randomised trees on all groups."""
    boosting: BoostedTrees
    """Gradient boosting on the known ASVs that most training samples have, without what is only near to them."""
    boosted: np.ndarray
    """int32: which of the known ASVs these are."""
    linear: Linear
    """On all groups."""
    targets: np.ndarray
    """float64 [m]: what the model learns of the training samples: transformed numbers, or codes of classes."""
    class_weights: np.ndarray
    """float64 [classes]: of the training samples in the forests; empty for a number."""
    weights: Weights
    scores: dict[str, float]
    """Loss of each member, and of all together, on the samples that weighed them, and how many these are."""
    networks: tuple[Mapping[str, np.ndarray], ...] = ()
    """Parameters of heads, each trained on other samples, that speak along with the checkpoint's own: the network is
    the mean of all of them."""

    def outputs(
        self, network: np.ndarray, draws: Sequence[Draw], vectors: np.ndarray | Nearest, target: Target
    ) -> np.ndarray:
        """Outputs of all members together.

        Parameters
        ----------
        network : ndarray of float32 [n, O]
            Of the networks: transformed numbers or their quantiles, or scores of classes.
        draws : sequence of (ndarray, ndarray)
            ASVs and reads of the same samples, as the network sees them.
        vectors : ndarray of float32 [ASVs, D], or Nearest
            See `Groups.shares`.
        target : Target
            What is predicted.

        Returns
        -------
        ndarray of float32 [n, O]
            The same of all: for classes, logarithms of their probabilities.
        """
        combined = np.empty(network.shape, np.float32)
        for start in range(0, len(network), _BLOCK):
            rows = slice(start, start + _BLOCK)
            members = self.members(network[rows], self.inputs(draws[rows], vectors), target)
            combined[rows] = self.weights.combine(members, target)
        return combined

    def inputs(self, draws: Sequence[Draw], vectors: np.ndarray | Nearest) -> dict[str, np.ndarray]:
        """What each member but the network reads of samples, float32 [n, features]; see `outputs`."""
        shares_nG, own_nK = self.groups.shares_and_own(draws, vectors)
        return inputs_of(shares_nG, own_nK, draws, self.groups, self.boosted)

    def members(self, network: np.ndarray, inputs: Mapping[str, np.ndarray], target: Target) -> dict[str, np.ndarray]:
        """Outputs of each member, float64 [n, O], of the network's and of what the others read."""
        return {
            "network": network.astype(np.float64),
            "asv_forest": self._of_forest(self.asv_forest, inputs["asv_forest"], target),
            "group_forest": self._of_forest(self.group_forest, inputs["group_forest"], target),
            "boosting": self.boosting.outputs(inputs["boosting"]),
            "linear": self.linear.outputs(inputs["linear"]),
        }

    def _of_forest(self, forest: Forest, features: np.ndarray, target: Target) -> np.ndarray:
        weights_nm = forest.weights(features)
        if not target.classes:
            quantiles = target.quantiles or (0.5,)
            return np.stack([weighted_quantile(self.targets, weights_nm, q) for q in quantiles], axis=1)
        of_class = (self.targets[:, None] == np.arange(len(target.classes))) * self.class_weights
        votes = weights_nm @ of_class
        # A class that no tree speaks for is unlikely, not impossible.
        return np.log(votes / votes.sum(axis=1, keepdims=True) + 1 / (2 * len(self.targets)))

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


def inputs_of(
    shares_nG: np.ndarray, own_nK: sp.csr_matrix, draws: Sequence[Draw], groups: Groups, boosted: np.ndarray
) -> dict[str, np.ndarray]:
    """What each member but the network reads, of shares of chosen groups and of known ASVs: float32 [n, features]."""
    logs = log_shares(shares_nG)
    return {
        "asv_forest": logs[:, groups.are_single],
        "group_forest": logs,
        "boosting": own_nK[:, boosted].toarray().astype(np.float32),
        "linear": linear_inputs(shares_nG, draws),
    }
