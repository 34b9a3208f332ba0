"""Fitting each member of an ensemble but the network.

Shape letters: n samples, m training samples, K known ASVs, G groups, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse as sp
from sklearn.ensemble import (
    ExtraTreesClassifier,
    ExtraTreesRegressor,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.preprocessing import StandardScaler

from aam.data.batches import Draw
from aam.data.composition import LEAST_SAMPLES, prevalent_asvs
from aam.ensemble.ensemble import MEMBERS, Ensemble, boosting_inputs
from aam.ensemble.groups import Groups, log_shares
from aam.ensemble.linear import Linear, linear_inputs
from aam.ensemble.trees import BoostedTrees, Forest
from aam.training.targets import Target

TREES = 200
"""Of each forest."""
ROUNDS = 300
"""Of boosting."""
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
PENALTY = 0.001
"""Of logistic regression, its C: the inverse of what coefficients cost."""


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


def fit_members(train: Part, target: Target, seed: int) -> Ensemble:
    """Fit all members; they count alike.

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
    shares, single = shares[:, groups.chosen], groups.are_single
    logs = log_shares(shares)
    boosted = _most_prevalent(own)
    weights = np.asarray(target.class_weights or [1.0] * len(target.classes))
    kinds = (
        (RandomForestClassifier, ExtraTreesClassifier)
        if target.classes
        else (RandomForestRegressor, ExtraTreesRegressor)
    )
    return Ensemble(
        groups=groups,
        asv_forest=_fit_forest(kinds[0], logs[:, single], train.targets, seed, features_a_split="sqrt"),
        group_forest=_fit_forest(kinds[1], logs, train.targets, seed, features_a_split=0.1),
        boosting=_fit_boosting(boosting_inputs(own, boosted), train.targets, target, weights, seed),
        boosted=boosted,
        linear=_fit_linear(linear_inputs(shares, train.draws), train.targets, target, weights),
        targets=train.targets.astype(np.float64),
        class_weights=weights,
        member_weights=np.full(len(MEMBERS), 1 / len(MEMBERS)),
        temperatures=np.ones(len(MEMBERS)),
        stretch=np.array([0.0, 1.0]),
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


def _fit_boosting(
    features: np.ndarray, targets: np.ndarray, target: Target, class_weights: np.ndarray, seed: int
) -> BoostedTrees:
    settings: dict[str, Any] = {**BOOSTING, "max_iter": ROUNDS, "random_state": seed}
    if target.classes:
        balance = dict(enumerate(class_weights))
        models = [HistGradientBoostingClassifier(**settings, class_weight=balance).fit(features, targets)]
    else:
        # The median, as of the forests: it is the absolute error that weighs the members.
        models = [
            HistGradientBoostingRegressor(loss="quantile", quantile=q, **settings).fit(features, targets)
            for q in target.quantiles or (0.5,)
        ]
    return _as_arrays(models, target.outputs)


def _as_arrays(models: Sequence[Any], outputs: int) -> BoostedTrees:
    """Trees of scikit-learn's boosting, of one model for all outputs or of a model for each.

    It has no public way to them; a test holds that these say what its models say.
    """
    # Of two classes, scikit-learn boosts the scores of the second alone.
    first = outputs - sum(model.n_trees_per_iteration_ for model in models)
    trees, output = [], []
    start = np.zeros(outputs)
    for model in models:
        for round_ in model._predictors:
            for number, tree in enumerate(round_):
                trees.append(tree.nodes)
                output.append(first + number)
        begun = np.ravel(model._baseline_prediction)
        start[first : first + len(begun)] = begun
        first += len(begun)
    is_leaf = np.concatenate([tree["is_leaf"] for tree in trees]).astype(bool)

    def joined(name: str) -> np.ndarray:
        return np.concatenate([tree[name] for tree in trees])

    return BoostedTrees(
        feature=np.where(is_leaf, -1, joined("feature_idx")).astype(np.int32),
        threshold=joined("num_threshold"),
        value=np.where(is_leaf, joined("value"), 0.0),
        output=np.array(output, np.int32),
        start=start,
        **_links([tree["left"] for tree in trees], [tree["right"] for tree in trees]),
    )


def _fit_linear(inputs: np.ndarray, targets: np.ndarray, target: Target, class_weights: np.ndarray) -> Linear:
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
    return Linear(
        mean=np.asarray(scaler.mean_, np.float32),
        slope=(slope / np.asarray(scaler.scale_)).T.astype(np.float32),
        intercept=np.asarray(intercept, np.float64),
    )


def _left_out_errors(inputs: np.ndarray, targets: np.ndarray, alpha: float) -> np.ndarray:
    """Errors of ridge regression on each sample where it is left out of the fit."""
    centred = inputs - inputs.mean(axis=0)
    kernel = centred @ centred.T
    hat = np.linalg.solve(kernel + alpha * np.eye(len(kernel)), kernel) + 1 / len(kernel)
    errors = (targets - targets.mean()) - (hat - 1 / len(kernel)) @ (targets - targets.mean())
    return errors / (1 - np.diag(hat))
