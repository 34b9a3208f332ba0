"""Fitting the members of an ensemble beside the network; needs scikit-learn, as predicting does not.

Shape letters: n samples, F features, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from sklearn.base import clone
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
)

from aam.ensemble.ensemble import Ensemble, Weights, read_by_trees
from aam.ensemble.trees import BoostedTrees
from aam.training.targets import Target

BOOSTINGS = 5
"""Of classes: with other seeds, their mean is one member. Which features a split may ask for is drawn, and classes gain
by more than one draw; numbers do not, for five times the time of fitting and predicting (NOTES.md)."""
TREES_A_ROUND = 15
"""Of all boostings together, about: with many classes, of which each has a tree, there are fewer boostings."""
ROUNDS = (25, 50, 100, 200, 300)
"""Of boosting: of few groups, classes above all, late trees learn what is of these groups alone."""
BOOSTING: dict[str, Any] = {
    "learning_rate": 0.05,
    # Few bins and few features a split: less to learn by heart, and a tenth of the time (NOTES.md).
    "max_bins": 32,
    "max_features": 0.1,
    "early_stopping": False,
}
"""Its settings, by scikit-learn's names."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Samples whose target is known."""

    features: np.ndarray
    """float32 [n, F]: of the network that is trained with them."""
    targets: np.ndarray
    """float or int [n]: as the model learns them."""
    groups: np.ndarray
    """[n] of each: samples of a group go together, or each is its own."""

    def take(self, rows: np.ndarray) -> Part:
        """Some of the samples."""
        return Part(features=self.features[rows], targets=self.targets[rows], groups=self.groups[rows])


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Members, of one of which the number of rounds is still to be chosen."""

    ensemble: Ensemble
    """With the fewest rounds of boosting, all members with equal weights."""
    boosting: Sequence[BoostedTrees]
    """After each of `ROUNDS`."""

    def choose(self, rounds: int) -> Ensemble:
        """The ensemble with this number in `ROUNDS`."""
        return replace(self.ensemble, boosting=self.boosting[rounds])

    def outputs(self, network: np.ndarray, part: Part) -> dict[str, np.ndarray]:
        """Outputs of each candidate of each member: float64 [candidates, n, O]; see `Ensemble.outputs`."""
        read = read_by_trees(part.features)
        boosting = np.stack([candidate.outputs(read) for candidate in self.boosting])
        return {"network": network.astype(np.float64)[None], "boosting": boosting}


def fit_members(train: Part, target: Target, seed: int) -> Fitted:
    """Fit the members beside the network.

    Parameters
    ----------
    train : Part
        Samples to learn from.
    target : Target
        What is predicted.
    seed : int
        Of the trees.
    """
    read = read_by_trees(train.features)
    boosting = _fit_boosting(read, train.targets, target, seed)
    ensemble = Ensemble(
        boosting=boosting[0],
        weights=Weights.equal(),
        scores={},
    )
    return Fitted(ensemble=ensemble, boosting=boosting)


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
    """Trees of scikit-learn's boosting, round by round: their output is the mean of the fits'.

    Each fit is one model for all outputs, or a model for each. There is no public way to its trees; a test holds them
    against scikit-learn's models.
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
