"""Fitting each member of an ensemble but the network.

Shape letters: n samples, m training samples, K known ASVs, G groups, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import scipy.sparse as sp
from sklearn.base import clone
from sklearn.ensemble import (
    ExtraTreesClassifier,
    ExtraTreesRegressor,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from aam.data.batches import Draw
from aam.data.composition import LEAST_SAMPLES, prevalent_asvs
from aam.ensemble.ensemble import Ensemble, Weights, inputs_of
from aam.ensemble.groups import Groups
from aam.ensemble.linear import Linear
from aam.ensemble.trees import BoostedTrees, Forest
from aam.training.targets import Target

TREES = 200
"""Of each forest."""
BOOSTINGS = 5
"""Of classes: with other seeds, their mean is one member. Which ASVs a split may ask for is drawn, and classes gain by
more than one draw; numbers do not, for five times the time of fitting and predicting (NOTES.md)."""
TREES_A_ROUND = 15
"""Of all boostings together, about: with many classes, of which each has a tree, there are fewer boostings."""
ROUNDS = (25, 50, 100, 200, 300)
"""Of boosting: of few groups, classes above all, late trees learn what is of these groups alone."""
BOOSTING: dict[str, Any] = {
    "learning_rate": 0.05,
    # Few bins and few ASVs a split: less to learn by heart, and a tenth of the time (NOTES.md).
    "max_bins": 32,
    "max_features": 0.1,
    "early_stopping": False,
}
"""Its settings, by scikit-learn's names."""
BOOSTED_ASVS = 500
"""The most prevalent ASVs, on which trees are boosted."""
PENALTIES = (1e2, 10**2.5, 1e3, 10**3.5, 1e4, 10**4.5, 1e5)
"""Of linear models: the alpha of ridge regression, 1 / C of logistic regression."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Samples whose target is known."""

    draws: Sequence[Draw]
    """ASVs and reads of each, as the network sees them."""
    vectors: np.ndarray
    """float32 [ASVs, D]: of the ASVs that the draws name, at least."""
    targets: np.ndarray
    """float or int [n]: as the model learns them."""
    groups: np.ndarray
    """[n] of each: samples of a group go together, or each is its own."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Members, of some of which one of several is to be chosen."""

    ensemble: Ensemble
    """With the first of each, all counting alike."""
    candidates: dict[str, Sequence[BoostedTrees] | Sequence[Linear]]
    """By the name of the member."""

    def choose(self, numbers: Mapping[str, int]) -> Ensemble:
        """The ensemble with these of the candidates."""
        return replace(self.ensemble, **{name: of[numbers[name]] for name, of in self.candidates.items()})

    def outputs(self, network: np.ndarray, part: Part, target: Target) -> dict[str, np.ndarray]:
        """What each member says, each candidate of it: float64 [candidates, n, O]; see `Ensemble.outputs`."""
        inputs = self.ensemble.inputs(part.draws, part.vectors)
        said = {name: of[None] for name, of in self.ensemble.members(network, inputs, target).items()}
        for name, of in self.candidates.items():
            said[name] = np.stack([candidate.outputs(inputs[name]) for candidate in of])
        return said


def fit_members(train: Part, target: Target, seed: int) -> Fitted:
    """Fit all members.

    Parameters
    ----------
    train : Part
        Samples to learn from.
    target : Target
        What is predicted.
    seed : int
        Of the trees.
    """
    groups = _fit_groups(train)
    shares, own = groups.shares_and_own(train.draws, train.vectors)
    groups = replace(groups, chosen=_choose(shares))
    boosted = _most_prevalent(own)
    inputs = inputs_of(shares[:, groups.chosen], own, train.draws, groups, boosted)
    kinds = (
        (RandomForestClassifier, ExtraTreesClassifier)
        if target.classes
        else (RandomForestRegressor, ExtraTreesRegressor)
    )
    candidates = {
        "boosting": _fit_boosting(inputs["boosting"], train.targets, target, seed),
        "linear": _fit_linear(inputs["linear"], train.targets, target),
    }
    ensemble = Ensemble(
        groups=groups,
        asv_forest=_fit_forest(kinds[0], inputs["asv_forest"], train.targets, seed, features_a_split="sqrt"),
        group_forest=_fit_forest(kinds[1], inputs["group_forest"], train.targets, seed, features_a_split=0.1),
        boosted=boosted,
        targets=train.targets.astype(np.float64),
        class_weights=target.weight_of_classes,
        weights=Weights.alike(),
        scores={},
        **{name: of[0] for name, of in candidates.items()},
    )
    return Fitted(ensemble=ensemble, candidates=candidates)


def _fit_groups(train: Part) -> Groups:
    known = prevalent_asvs(asvs for asvs, _ in train.draws)
    return Groups.cluster(np.ascontiguousarray(train.vectors[known]))


def _choose(shares: np.ndarray) -> np.ndarray:
    """Groups in enough samples, and of those with the same shares in all samples one."""
    present = (shares > 0).sum(axis=0)
    often = np.flatnonzero(present >= min(LEAST_SAMPLES, present.max()))
    _, first = np.unique(np.round(shares[:, often], 7), axis=1, return_index=True)
    return np.sort(often[first]).astype(np.int32)


def _most_prevalent(own_nK: sp.csr_matrix) -> np.ndarray:
    """Known ASVs that most samples have."""
    present = own_nK.getnnz(axis=0)
    return np.argsort(-present, kind="stable")[:BOOSTED_ASVS].astype(np.int32)


def _fit_forest(
    kind: type, features: np.ndarray, targets: np.ndarray, seed: int, *, features_a_split: float | str
) -> Forest:
    fitted = kind(n_estimators=TREES, max_features=features_a_split, random_state=seed, n_jobs=-1)
    trees = [tree.tree_ for tree in fitted.fit(features, targets).estimators_]
    forest = Forest(
        feature=np.concatenate([np.maximum(tree.feature, -1) for tree in trees]).astype(np.int32),
        threshold=np.concatenate([tree.threshold for tree in trees]),
        leaves=np.empty((0, len(trees)), np.int32),
        **_links([tree.children_left for tree in trees], [tree.children_right for tree in trees]),
    )
    return replace(forest, leaves=forest.apply(features))


def _links(left: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Roots and children among the nodes of all trees, from the children of each tree among its own."""
    roots = np.cumsum([0, *map(len, left)])[:-1]
    children = {
        name: np.concatenate([of.astype(int) + root for of, root in zip(each, roots, strict=True)])
        for name, each in (("left", left), ("right", right))
    }
    return {name: of.astype(np.int32) for name, of in {"roots": roots, **children}.items()}


def _fit_boosting(features: np.ndarray, targets: np.ndarray, target: Target, seed: int) -> list[BoostedTrees]:
    """Boosted trees after each of `ROUNDS`."""
    seeds = [seed]
    if target.classes:
        boostings = max(1, min(BOOSTINGS, TREES_A_ROUND // target.outputs))
        seeds = np.random.SeedSequence(seed).generate_state(boostings).tolist()
        balance = dict(enumerate(target.weight_of_classes))
        kinds: list[Any] = [HistGradientBoostingClassifier(class_weight=balance)]
    else:
        # The median, as of the forests: it is the absolute error that weighs the members.
        kinds = [HistGradientBoostingRegressor(loss="quantile", quantile=q) for q in target.quantiles or (0.5,)]
    fits = []
    for own_seed in seeds:
        settings = {**BOOSTING, "max_iter": max(ROUNDS), "random_state": own_seed}
        fits.append([cast(Any, clone(kind)).set_params(**settings).fit(features, targets) for kind in kinds])
    trees = _as_arrays(fits, target.outputs)
    return [trees.first(len(trees.roots) * rounds // max(ROUNDS)) for rounds in ROUNDS]


def _as_arrays(fits: Sequence[Sequence[Any]], outputs: int) -> BoostedTrees:
    """Trees of scikit-learn's boosting, round by round: they say the mean of what the fits say.

    Each fit is one model for all outputs, or a model for each. There is no public way to its trees; a test holds that
    these say what scikit-learn's models say.
    """
    models = [model for fit in fits for model in fit]
    # Of two classes, scikit-learn boosts the scores of the second alone.
    first = outputs - sum(model.n_trees_per_iteration_ for model in fits[0])
    rounds = [[tree.nodes for of in each for tree in of] for each in zip(*(m._predictors for m in models), strict=True)]
    trees = [tree for each in rounds for tree in each]
    start = np.zeros(outputs)
    baselines = np.concatenate([np.ravel(model._baseline_prediction) for model in models])
    start[first:] = baselines.reshape(len(fits), -1).mean(axis=0)
    is_leaf = np.concatenate([tree["is_leaf"] for tree in trees]).astype(bool)

    def joined(name: str) -> np.ndarray:
        return np.concatenate([tree[name] for tree in trees])

    return BoostedTrees(
        feature=np.where(is_leaf, -1, joined("feature_idx")).astype(np.int32),
        threshold=joined("num_threshold"),
        value=np.where(is_leaf, joined("value") / len(fits), 0.0),
        output=np.tile(np.arange(first, outputs, dtype=np.int32), len(rounds) * len(fits)),
        start=start,
        **_links([tree["left"] for tree in trees], [tree["right"] for tree in trees]),
    )


def _fit_linear(inputs: np.ndarray, targets: np.ndarray, target: Target) -> list[Linear]:
    """A linear model for each of `PENALTIES`."""
    scaler = StandardScaler().fit(inputs)
    scaled = np.asarray(scaler.transform(inputs))
    found = []
    for penalty in PENALTIES:
        slope, intercept = _fit_slope(scaled, targets, target, penalty)
        found.append(
            Linear(
                mean=np.asarray(scaler.mean_, np.float32),
                slope=(slope / np.asarray(scaler.scale_)).T.astype(np.float32),
                intercept=np.asarray(intercept, np.float64),
            )
        )
    return found


def _fit_slope(
    scaled: np.ndarray, targets: np.ndarray, target: Target, penalty: float
) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients [O, F] of standardised inputs, and intercepts [O]."""
    if target.classes:
        balance = dict(enumerate(target.weight_of_classes))
        fitted: Any = LogisticRegression(C=1 / penalty, class_weight=balance, max_iter=500).fit(scaled, targets)
        slope, intercept = fitted.coef_, fitted.intercept_
        if len(slope) == 1:  # two classes: scikit-learn has the scores of the second alone
            slope, intercept = np.concatenate([0 * slope, slope]), np.concatenate([0 * intercept, intercept])
        return slope, intercept
    fitted: Any = Ridge(alpha=penalty).fit(scaled, targets)
    slope, intercept = np.tile(fitted.coef_, (target.outputs, 1)), np.full(target.outputs, fitted.intercept_)
    if target.quantiles:
        # By the quantiles of its errors: those of each training sample, left out of the fit.
        intercept = intercept + np.quantile(_left_out_errors(scaled, targets, penalty), target.quantiles)
    return slope, intercept


def _left_out_errors(inputs: np.ndarray, targets: np.ndarray, alpha: float) -> np.ndarray:
    """Errors of ridge regression on each sample where it is left out of the fit."""
    centred = inputs - inputs.mean(axis=0)
    kernel = centred @ centred.T
    hat = np.linalg.solve(kernel + alpha * np.eye(len(kernel)), kernel) + 1 / len(kernel)
    errors = (targets - targets.mean()) - (hat - 1 / len(kernel)) @ (targets - targets.mean())
    return errors / (1 - np.diag(hat))
