"""Fitting an ensemble to all labelled samples; fits that leave some out settle who counts how much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from aam.ensemble.ensemble import MEMBERS, Ensemble, combine, stretched
from aam.ensemble.members import Part, fit_members
from aam.training.targets import Target

SHARPNESS = 8.0
"""A member's weight goes with its loss to the power of minus this: with a tenth more loss, half the weight."""
TEMPERATURES = (0.25, 16.0)
"""Least and most that the scores of classes are divided by."""
STRETCHES = (0.5, 2.0)
"""Least and most that a predicted number is spread out."""
STRETCHED_FROM = 10
"""Groups of samples with which half of the spread that fits them best is believed."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """How the members are put together; see `Ensemble`."""

    member_weights: np.ndarray
    temperatures: np.ndarray
    stretch: np.ndarray
    losses: dict[str, float]
    """Of each member, at its temperature."""

    def apply(self, members: Mapping[str, np.ndarray], target: Target) -> np.ndarray:
        """What the members [n, O] say together: float64 [n, O]."""
        return stretched(combine(members, self.member_weights, self.temperatures, target), self.stretch)


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Samples that weigh the members, which are fitted to others for it."""

    fitted: Part
    left_out: Part
    network: np.ndarray
    """float32 [n, O]: what a network says of the samples left out, which it was not trained on."""


def fit_ensemble(
    everything: Part,
    folds: Sequence[Fold],
    target: Target,
    *,
    seed: int,
    networks: Sequence[Mapping[str, np.ndarray]] = (),
) -> tuple[Ensemble, np.ndarray]:
    """Fit groups, trees and a linear model, and weigh them by samples that they were not fitted to.

    Parameters
    ----------
    everything : Part
        All samples, which the members learn from in the end.
    folds : sequence of Fold
        Of them; the samples left out of each weigh the members, all alike.
    target : Target
        What is predicted.
    seed : int
        Of the trees.
    networks : sequence of mappings
        Parameters of networks that are to speak along with the checkpoint's own.

    Returns
    -------
    ensemble : Ensemble
    said : ndarray of float32 [m, O]
        What it says of the samples left out, in their order, where its members are fitted without them; they are
        weighed without them too, by the other folds, where there are any.
    """
    ensemble = fit_members(everything, target, seed)
    parts = [fold.left_out for fold in folds]
    outputs = [
        fit_members(fold.fitted, target, seed).members(fold.network, part.draws, part.vectors, target)
        for fold, part in zip(folds, parts, strict=True)
    ]

    def weigh_by(numbers: Sequence[int]) -> Weights:
        members = {name: np.concatenate([outputs[i][name] for i in numbers]) for name in MEMBERS}
        targets, groups = (np.concatenate([getattr(parts[i], of) for i in numbers]) for of in ("targets", "groups"))
        return weigh(members, targets, groups, target)

    every = range(len(parts))
    others = [[i for i in every if i != number] or every for number in every]
    said = [weigh_by(rest).apply(outputs[number], target) for number, rest in enumerate(others)]
    said, targets = np.concatenate(said).astype(np.float32), np.concatenate([part.targets for part in parts])
    weights = weigh_by(every)
    scores = {**weights.losses, "together": loss(said, targets, target), "samples": len(targets)}
    fitted = replace(
        ensemble,
        member_weights=weights.member_weights,
        temperatures=weights.temperatures,
        stretch=weights.stretch,
        scores=scores,
        networks=tuple(dict(of) for of in networks),
    )
    return fitted, said


def weigh(members: Mapping[str, np.ndarray], targets: np.ndarray, groups: np.ndarray, target: Target) -> Weights:
    """Settle how much each member counts, how sure of itself it may be, and how far apart numbers are.

    Parameters
    ----------
    members : mapping of str to ndarray of float64 [n, O]
        What each says of samples that it was not fitted to.
    targets : ndarray [n]
        Their targets, as the model learns them.
    groups : ndarray [n]
        Their groups.
    target : Target
        What is predicted.
    """
    temperatures = np.ones(len(MEMBERS))
    if target.classes:
        temperatures = np.array([_temperature(members[name], targets, target) for name in MEMBERS])
    losses = np.array([loss(members[name] / t, targets, target) for name, t in zip(MEMBERS, temperatures, strict=True)])
    least = max(losses.min(), np.finfo(np.float32).tiny)  # of a few samples, a member may be right on each
    member_weights = (np.maximum(losses, least) / least) ** -SHARPNESS
    member_weights /= member_weights.sum()
    stretch = np.array([0.0, 1.0])
    if not target.classes:
        together = combine(members, member_weights, temperatures, target)
        stretch = _stretch(together, targets, len(np.unique(groups)), target)
    return Weights(
        member_weights=member_weights,
        temperatures=temperatures,
        stretch=stretch,
        losses=dict(zip(MEMBERS, losses.tolist(), strict=True)),
    )


def _temperature(scores: np.ndarray, targets: np.ndarray, target: Target) -> float:
    """What the scores are divided by for the least loss (Guo et al. 2017, ICML)."""
    bounds = tuple(np.log(TEMPERATURES))
    found = minimize_scalar(lambda t: loss(scores / np.exp(t), targets, target), bounds=bounds, method="bounded")
    return float(np.exp(found.x))


def _stretch(said: np.ndarray, targets: np.ndarray, groups: int, target: Target) -> np.ndarray:
    """Centre and factor for the least loss; the fewer the groups, the nearer the factor is to 1."""
    centre = float(said[:, target.point].mean())
    found = minimize_scalar(
        lambda factor: loss(stretched(said, np.array([centre, factor])), targets, target),
        bounds=STRETCHES,
        method="bounded",
    )
    return np.array([centre, 1 + groups / (groups + STRETCHED_FROM) * (float(found.x) - 1)])


def loss(outputs: np.ndarray, targets: np.ndarray, target: Target) -> float:
    """Mean absolute error in own units, or mean negative log-likelihood, with the weights of the classes.

    Parameters
    ----------
    outputs : ndarray [n, O]
        Of a member, or of all together.
    targets : ndarray [n]
        As the model learns them.
    target : Target
        What is predicted.
    """
    if target.classes:
        codes = targets.astype(int)
        of_each = -log_softmax(outputs, axis=1)[np.arange(len(codes)), codes]
        return float(
            np.average(of_each, weights=np.asarray(target.class_weights or [1.0] * len(target.classes))[codes])
        )
    said = target.decode(outputs)[:, target.point]
    return float(np.abs(said - target.transform.inverse(targets)).mean())


def describe(ensemble: Ensemble, target: Target) -> str:
    """The members with their losses and weights, in words."""
    what = "log loss" if target.classes else "mean absolute error"
    parts = [
        f"{name} {ensemble.scores[name]:.4g} (weight {weight:.2f})"
        for name, weight in zip(MEMBERS, ensemble.member_weights, strict=True)
    ]
    spread = "" if target.classes else f", spread out by {ensemble.stretch[1]:.2f}"
    return (
        f"ensemble: {what} on {ensemble.scores['samples']} samples, fitted without them: {', '.join(parts)}; "
        f"together {ensemble.scores['together']:.4g}{spread}"
    )
