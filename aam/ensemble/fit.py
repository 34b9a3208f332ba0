"""Fitting an ensemble to all labelled samples; fits that leave some out set the weights of its members."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from aam.ensemble.ensemble import MEMBERS, Ensemble, Weights
from aam.ensemble.members import Part, fit_members
from aam.training.targets import Target

SHARPNESS = 8.0
"""A member's weight goes with its loss to the power of minus this: with a tenth more loss, half the weight."""
TEMPERATURES = (0.25, 16.0)
"""Least and most temperature."""
SLOPES = (0.5, 2.0)
"""Least and most calibration slope."""
BELIEVED_FROM = 10
"""Groups of samples with which half of the slope that fits them best is taken."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is chosen by samples that the members were not fitted to."""

    rounds: int
    """Of boosting, by its number in `ROUNDS`."""
    weights: Weights
    losses: dict[str, float]
    """Of each member, at its temperature."""

    def apply(self, outputs: Mapping[str, np.ndarray], target: Target) -> np.ndarray:
        """Outputs [n, O] of all together, from those of the candidates [candidates, n, O]."""
        chosen = {name: of[self.rounds if name == "boosting" else 0] for name, of in outputs.items()}
        return self.weights.combine(chosen, target)


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Samples that set the weights of members that were fitted to others."""

    fitted: Part
    left_out: Part
    network: np.ndarray
    """float32 [n, O]: outputs of a network for the samples left out, which it was not trained on."""


def fit_ensemble(
    everything: Part,
    folds: Sequence[Fold],
    target: Target,
    *,
    seed: int,
    networks: Sequence[Mapping[str, np.ndarray]] = (),
) -> tuple[Ensemble, np.ndarray]:
    """Fit trees, and set weights and rounds by samples that they were not fitted to.

    Parameters
    ----------
    everything : Part
        All samples, which the members learn from in the end.
    folds : sequence of Fold
        Of them; all samples left out count alike.
    target : Target
        What is predicted.
    seed : int
        Of the trees.
    networks : sequence of mappings
        Parameters of networks to be averaged with the checkpoint's own.

    Returns
    -------
    ensemble : Ensemble
    said : ndarray of float32 [m, O]
        Its outputs for the samples left out, in their order, where its members are fitted without them; their weights
        come from the other folds too, where there are any.
    """
    parts = [fold.left_out for fold in folds]
    outputs = [
        fit_members(fold.fitted, target, seed).outputs(fold.network, part)
        for fold, part in zip(folds, parts, strict=True)
    ]

    def weigh_by(numbers: Sequence[int]) -> Choice:
        said = {name: np.concatenate([outputs[i][name] for i in numbers], axis=1) for name in MEMBERS}
        targets, groups = (np.concatenate([getattr(parts[i], of) for i in numbers]) for of in ("targets", "groups"))
        return weigh(said, targets, groups, target)

    every = range(len(parts))
    others = [[i for i in every if i != number] or every for number in every]
    said = [weigh_by(rest).apply(outputs[number], target) for number, rest in enumerate(others)]
    said, targets = np.concatenate(said).astype(np.float32), np.concatenate([part.targets for part in parts])
    choice = weigh_by(every)
    ensemble = replace(
        fit_members(everything, target, seed).choose(choice.rounds),
        weights=choice.weights,
        scores={**choice.losses, "together": loss(said, targets, target), "samples": len(targets)},
        networks=tuple(dict(of) for of in networks),
    )
    return ensemble, said


def weigh(said: Mapping[str, np.ndarray], targets: np.ndarray, groups: np.ndarray, target: Target) -> Choice:
    """Choose the rounds of boosting, the weights of the members, temperatures of classes, and the calibration slope.

    Parameters
    ----------
    said : mapping of str to ndarray of float64 [candidates, n, O]
        Outputs of each candidate of each member for samples that it was not fitted to.
    targets : ndarray [n]
        Their targets, as the model learns them.
    groups : ndarray [n]
        Their groups.
    target : Target
        What is predicted.
    """
    best = {name: min(_at_best(of, targets, target)) for name, of in said.items()}
    losses = np.array([best[name][0] for name in MEMBERS])
    least = max(losses.min(), np.finfo(np.float32).tiny)  # of a few samples, a member may be right on each
    of_members = (np.maximum(losses, least) / least) ** -SHARPNESS
    weights = replace(
        Weights.equal(),
        of_members=of_members / of_members.sum(),
        temperatures=np.array([best[name][2] for name in MEMBERS]),
    )
    choice = Choice(
        rounds=best["boosting"][1],
        weights=weights,
        losses=dict(zip(MEMBERS, losses.tolist(), strict=True)),
    )
    if target.classes:
        return choice
    calibration = _calibration(choice.apply(said, target), targets, len(np.unique(groups)), target)
    return replace(choice, weights=replace(weights, calibration=calibration))


def _at_best(said: np.ndarray, targets: np.ndarray, target: Target) -> Iterator[tuple[float, int, float]]:
    """Loss of each candidate [candidates, n, O], its number, and the temperature that it is at."""
    for number, of in enumerate(said):
        temperature = _temperature(of, targets, target) if target.classes else 1.0
        yield loss(of / temperature, targets, target), number, temperature


def _temperature(scores: np.ndarray, targets: np.ndarray, target: Target) -> float:
    """The divisor of the logits for the least loss (Guo et al. 2017, ICML)."""
    bounds = tuple(np.log(TEMPERATURES))
    found = minimize_scalar(lambda t: loss(scores / np.exp(t), targets, target), bounds=bounds, method="bounded")
    return float(np.exp(found.x))


def _calibration(outputs: np.ndarray, targets: np.ndarray, groups: int, target: Target) -> np.ndarray:
    """Centre and slope for the least loss; the fewer the groups, the nearer the slope is to 1."""
    centre = float(outputs[:, target.point].mean())
    found = minimize_scalar(
        lambda slope: loss(centre + slope * (outputs - centre), targets, target),
        bounds=SLOPES,
        method="bounded",
    )
    return np.array([centre, 1 + groups / (groups + BELIEVED_FROM) * (float(found.x) - 1)])


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
        return float(np.average(of_each, weights=target.weight_of_classes[codes]))
    said = target.decode(outputs)[:, target.point]
    return float(np.abs(said - target.transform.inverse(targets)).mean())


def describe(ensemble: Ensemble, target: Target) -> str:
    """The members with their losses and weights, in words."""
    what = "log loss" if target.classes else "mean absolute error"
    parts = [
        f"{name} {ensemble.scores[name]:.4g} (weight {weight:.2f})" for name, weight in ensemble.weights.by_name.items()
    ]
    spread = "" if target.classes else f", calibration slope {ensemble.weights.calibration[1]:.2f}"
    return (
        f"ensemble: {what} on {ensemble.scores['samples']} samples, fitted without them: {', '.join(parts)}; "
        f"together {ensemble.scores['together']:.4g}{spread}"
    )
