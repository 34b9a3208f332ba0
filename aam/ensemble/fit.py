"""Fitting what stands beside the network, on all labelled samples; fits that leave some out settle who counts how much.

Shape letters: n samples, m training samples, K known ASVs, G groups, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import log_softmax
from sklearn.ensemble import (
    ExtraTreesClassifier,
    ExtraTreesRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.preprocessing import StandardScaler

from aam.data.batches import Draw
from aam.data.composition import LEAST_SAMPLES, prevalent_asvs
from aam.ensemble.ensemble import MEMBERS, Ensemble, combine, linear_inputs
from aam.ensemble.forest import Forest
from aam.ensemble.groups import Groups, log_shares
from aam.training.targets import Target

TREES = 200
"""Of each forest."""
PENALTY = 0.001
"""Of logistic regression, its C: the inverse of what coefficients cost."""
SHARPNESS = 8.0
"""A member's weight goes with its loss to the power of minus this: with a tenth more loss, half the weight."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Samples whose target is known."""

    draws: Sequence[Draw]
    """ASVs and reads of each, as the network sees them."""
    vectors: np.ndarray
    """float32 [ASVs, D]: of the ASVs that the draws name, at least."""
    targets: np.ndarray
    """float or int [n]: as the model learns them."""
    network: np.ndarray
    """float32 [n, O]: what the network says of them."""


def fit_ensemble(
    everything: Part,
    left_out: Sequence[tuple[Part, Part]],
    target: Target,
    *,
    seed: int,
    networks: Sequence[Mapping[str, np.ndarray]] = (),
) -> tuple[Ensemble, np.ndarray]:
    """Fit groups, forests and linear model, and weigh them by samples that they were not fitted to.

    Parameters
    ----------
    everything : Part
        All samples, which the members learn from in the end.
    left_out : sequence of (Part, Part)
        Some of the samples, and others; what the network says of the latter it says without having been trained on
        them. The members are fitted to the former and weighed by the latter, all alike.
    target : Target
        What is predicted.
    seed : int
        Of the forests.
    networks : sequence of mappings
        Parameters of networks that are to speak along with the checkpoint's own.

    Returns
    -------
    ensemble : Ensemble
    said : ndarray of float32 [m, O]
        What it says of the samples left out, in their order, where its members are fitted without them.
    """
    ensemble = _fit_members(everything, target, seed)
    without = [(_fit_members(rest, target, seed), part) for rest, part in left_out]
    outputs = [of.members(part.network, part.draws, part.vectors, target) for of, part in without]
    members = {name: np.concatenate([of[name] for of in outputs]) for name in MEMBERS}
    targets = np.concatenate([part.targets for _, part in without])
    losses = np.array([_loss(members[name], targets, target) for name in MEMBERS])
    member_weights = (losses / losses.min()) ** -SHARPNESS
    member_weights /= member_weights.sum()
    said = combine(members, member_weights, target).astype(np.float32)
    together = _loss(said, targets, target)
    scores = {**dict(zip(MEMBERS, losses.tolist(), strict=True)), "together": together, "samples": len(targets)}
    fitted = replace(
        ensemble, member_weights=member_weights, scores=scores, networks=tuple(dict(of) for of in networks)
    )
    return fitted, said


def _fit_members(train: Part, target: Target, seed: int) -> Ensemble:
    """All but their weights, which are equal."""
    groups = _fit_groups(train)
    shares = groups.shares(train.draws, train.vectors)
    groups = replace(groups, chosen=_choose(shares))
    shares = shares[:, groups.chosen]
    weights = np.asarray(target.class_weights or [1.0] * len(target.classes))
    log_features = log_shares(shares)
    kinds = (
        (RandomForestClassifier, ExtraTreesClassifier)
        if target.classes
        else (RandomForestRegressor, ExtraTreesRegressor)
    )
    mean, slope, intercept = _fit_linear(linear_inputs(shares, train.draws), train.targets, target, weights)
    return Ensemble(
        groups=groups,
        asv_forest=_fit_forest(
            kinds[0], log_features[:, groups.are_single], train.targets, seed, features_a_split="sqrt"
        ),
        group_forest=_fit_forest(kinds[1], log_features, train.targets, seed, features_a_split=0.1),
        targets=train.targets.astype(np.float64),
        class_weights=weights,
        mean=mean,
        slope=slope,
        intercept=intercept,
        member_weights=np.full(len(MEMBERS), 1 / len(MEMBERS)),
        scores={},
    )


def _fit_groups(train: Part) -> Groups:
    known = prevalent_asvs(asvs for asvs, _ in train.draws)
    return Groups.cluster(np.ascontiguousarray(train.vectors[known]))


def _choose(shares: np.ndarray) -> np.ndarray:
    """Groups in enough samples, and of those with the same shares in all samples one."""
    present = (shares > 0).sum(axis=0)
    often = np.flatnonzero(present >= min(LEAST_SAMPLES, present.max()))
    _, first = np.unique(np.round(shares[:, often], 7), axis=1, return_index=True)
    return np.sort(often[first]).astype(np.int32)


def _fit_forest(
    kind: type, features: np.ndarray, targets: np.ndarray, seed: int, *, features_a_split: float | str
) -> Forest:
    fitted = kind(n_estimators=TREES, max_features=features_a_split, random_state=seed, n_jobs=-1)
    trees = [tree.tree_ for tree in fitted.fit(features, targets).estimators_]
    roots = np.cumsum([0, *(tree.node_count for tree in trees)])[:-1]
    parts = {
        "feature": [np.maximum(tree.feature, -1) for tree in trees],
        "left": [tree.children_left + root for tree, root in zip(trees, roots, strict=True)],
        "right": [tree.children_right + root for tree, root in zip(trees, roots, strict=True)],
    }
    forest = Forest(
        roots=roots.astype(np.int32),
        threshold=np.concatenate([tree.threshold for tree in trees]),
        leaves=np.empty((0, len(trees)), np.int32),
        **{name: np.concatenate(arrays).astype(np.int32) for name, arrays in parts.items()},
    )
    return replace(forest, leaves=forest.apply(features))


def _fit_linear(
    inputs: np.ndarray, targets: np.ndarray, target: Target, class_weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean of the inputs, slope for inputs less their mean, intercept."""
    scaler = StandardScaler().fit(inputs)
    scaled = np.asarray(scaler.transform(inputs))
    if target.classes:
        balance = dict(enumerate(class_weights))
        fitted: Any = LogisticRegression(C=PENALTY, class_weight=balance, max_iter=500).fit(scaled, targets)
        slope, intercept = fitted.coef_, fitted.intercept_
        if len(slope) == 1:  # two classes: scikit-learn has the scores of the second alone
            slope, intercept = np.concatenate([0 * slope, slope]), np.concatenate([0 * intercept, intercept])
    else:
        fitted: Any = RidgeCV(alphas=np.logspace(1, 6, 11)).fit(scaled, targets)
        outputs = target.outputs
        slope, intercept = np.tile(fitted.coef_, (outputs, 1)), np.full(outputs, fitted.intercept_)
        if target.quantiles:
            # By the quantiles of its errors: those of each training sample, left out of the fit.
            errors = _left_out_errors(scaled, targets, float(fitted.alpha_))
            intercept = intercept + np.quantile(errors, target.quantiles)
    scale = np.asarray(scaler.scale_)
    return (
        np.asarray(scaler.mean_, np.float32),
        (slope / scale).T.astype(np.float32),
        np.asarray(intercept, np.float64),
    )


def _left_out_errors(inputs: np.ndarray, targets: np.ndarray, alpha: float) -> np.ndarray:
    """Errors of ridge regression on each sample where it is left out of the fit."""
    centred = inputs - inputs.mean(axis=0)
    kernel = centred @ centred.T
    hat = np.linalg.solve(kernel + alpha * np.eye(len(kernel)), kernel) + 1 / len(kernel)
    errors = (targets - targets.mean()) - (hat - 1 / len(kernel)) @ (targets - targets.mean())
    return errors / (1 - np.diag(hat))


def _loss(outputs: np.ndarray, targets: np.ndarray, target: Target) -> float:
    """Mean absolute error in own units, or mean negative log-likelihood."""
    if target.classes:
        return float(-log_softmax(outputs, axis=1)[np.arange(len(targets)), targets.astype(int)].mean())
    said = target.decode(outputs)[:, target.point]
    return float(np.abs(said - target.transform.inverse(targets)).mean())


def describe(ensemble: Ensemble, target: Target) -> str:
    """The members with their losses and weights, in words."""
    what = "log loss" if target.classes else "mean absolute error"
    parts = [
        f"{name} {ensemble.scores[name]:.4g} (weight {weight:.2f})"
        for name, weight in zip(MEMBERS, ensemble.member_weights, strict=True)
    ]
    return (
        f"ensemble: {what} on {ensemble.scores['samples']} samples, fitted without them: {', '.join(parts)}; "
        f"together {ensemble.scores['together']:.4g}"
    )
