"""The network, or several, two forests and a linear model as one predictor; how it is applied and stored.

Shape letters: n samples, m training samples, G groups, O outputs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from scipy.special import log_softmax, logsumexp

from aam.data.batches import Draw
from aam.data.composition import centred_log_ratios
from aam.ensemble.forest import Forest, weighted_quantile
from aam.ensemble.groups import Groups, log_shares
from aam.training.checkpoint import ENSEMBLE
from aam.training.targets import Target

MEMBERS = ("network", "asv_forest", "group_forest", "linear")
_PARTS = {"groups": Groups, "asv_forest": Forest, "group_forest": Forest}
_NETWORK = "network."
_BLOCK = 512
"""Samples at a time: their weights on all training samples are held."""


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """What stands beside the network in a checkpoint."""

    groups: Groups
    asv_forest: Forest
    """Random forest on the known ASVs, each by itself."""
    group_forest: Forest
    """Extremely randomised trees on all groups."""
    targets: np.ndarray
    """float64 [m]: what the model learns of the training samples: transformed numbers, or codes of classes."""
    class_weights: np.ndarray
    """float64 [classes]: of the training samples in the forests; empty for a number."""
    mean: np.ndarray
    """float32 [G]: of the linear model's inputs, the centred log-ratios of the groups."""
    slope: np.ndarray
    """float32 [G, O]"""
    intercept: np.ndarray
    """float64 [O]"""
    member_weights: np.ndarray
    """float64 [members]: in the order of `MEMBERS`; they sum to 1."""
    scores: dict[str, float]
    """Loss of each member, and of all together, on the samples that weighed them, and how many these are."""
    networks: tuple[Mapping[str, np.ndarray], ...] = ()
    """Parameters of heads, each trained on other samples, that speak along with the checkpoint's own: the network is
    the mean of all of them."""

    def outputs(self, network: np.ndarray, draws: Sequence[Draw], vectors: np.ndarray, target: Target) -> np.ndarray:
        """Outputs of all members together.

        Parameters
        ----------
        network : ndarray of float32 [n, O]
            Of the networks: transformed numbers or their quantiles, or scores of classes.
        draws : sequence of (ndarray, ndarray)
            ASVs and reads of the same samples, as the network sees them.
        vectors : ndarray of float32 [ASVs, D]
            Of the ASVs that the draws name, at least.
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
            members = self.members(network[rows], draws[rows], vectors, target)
            combined[rows] = combine(members, self.member_weights, target)
        return combined

    def members(
        self, network: np.ndarray, draws: Sequence[Draw], vectors: np.ndarray, target: Target
    ) -> dict[str, np.ndarray]:
        """Outputs of each member, float64 [n, O]; see `outputs`."""
        shares_nG = self.groups.shares(draws, vectors)
        shares = log_shares(shares_nG)
        return {
            "network": network.astype(np.float64),
            "asv_forest": self._of_forest(self.asv_forest, shares[:, self.groups.are_single], target),
            "group_forest": self._of_forest(self.group_forest, shares, target),
            "linear": (linear_inputs(shares_nG, draws) - self.mean) @ self.slope.astype(np.float64) + self.intercept,
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
        scratch = folder / f"{ENSEMBLE}.writing"
        save_file(arrays, scratch, metadata={"scores": json.dumps(self.scores)})
        scratch.replace(folder / ENSEMBLE)

    @classmethod
    def load(cls, folder: Path) -> Ensemble:
        """Read that of a checkpoint which has one."""
        with safe_open(folder / ENSEMBLE, "numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            scores = json.loads(file.metadata()["scores"])
        parts = {
            name: kind(**{f.name: arrays.pop(f"{name}.{f.name}") for f in fields(kind)})
            for name, kind in _PARTS.items()
        }
        networks: dict[int, dict[str, np.ndarray]] = {}
        for name in [name for name in arrays if name.startswith(_NETWORK)]:
            number, parameter = name.removeprefix(_NETWORK).split(".", 1)
            networks.setdefault(int(number), {})[parameter] = arrays.pop(name)
        return cls(scores=scores, networks=tuple(networks[i] for i in sorted(networks)), **parts, **arrays)


def linear_inputs(shares_nG: np.ndarray, draws: Sequence[Draw]) -> np.ndarray:
    """What the linear model reads of groups, centred log-ratios of their reads: float32 [n, G]."""
    depths = np.array([reads.sum() for _, reads in draws])
    return centred_log_ratios(shares_nG * depths[:, None]).astype(np.float32)


def combine(members: dict[str, np.ndarray], weights: np.ndarray, target: Target) -> np.ndarray:
    """Weighted mean of what the members say, of probabilities where it is classes: float64 [n, O]."""
    stacked = np.stack([members[name] for name in MEMBERS])
    if not target.classes:
        return np.tensordot(weights, stacked, axes=1)
    return np.asarray(logsumexp(log_softmax(stacked, axis=2), axis=0, b=weights[:, None, None]))
