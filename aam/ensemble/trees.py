"""Trees as arrays: no pickle, and no scikit-learn to apply them.

Shape letters: n samples, m training samples, T trees, N nodes of all trees, F features, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sp


@dataclass(frozen=True, kw_only=True)
class Trees:
    """Binary trees."""

    roots: np.ndarray
    """int32 [T]: root of each tree."""
    feature: np.ndarray
    """int32 [N]: what a node asks for; -1 in leaves."""
    threshold: np.ndarray
    """float64 [N]: up to this, to the left."""
    left: np.ndarray
    """int32 [N]"""
    right: np.ndarray
    """int32 [N]"""

    def apply(self, features_nF: np.ndarray) -> np.ndarray:
        """Leaf of each sample in each tree: int32 [n, T].

        Parameters
        ----------
        features_nF : ndarray of float32
            As in training.
        """
        at = np.tile(self.roots, (len(features_nF), 1))
        rows, columns = np.nonzero(self.feature[at] >= 0)
        while len(rows):
            node = at[rows, columns]
            goes_left = features_nF[rows, self.feature[node]] <= self.threshold[node]
            node = np.where(goes_left, self.left[node], self.right[node])
            at[rows, columns] = node
            inner = self.feature[node] >= 0
            rows, columns = rows[inner], columns[inner]
        return at


@dataclass(frozen=True, kw_only=True)
class Forest(Trees):
    """Trees that do not know of each other, and the leaf in which each training sample lies.

    A new sample is like the training samples of its leaves (Meinshausen 2006, J Mach Learn Res 7:983): their targets,
    weighted, give the median and any other quantile of a number, and the probabilities of classes.
    """

    leaves: np.ndarray
    """int32 [m, T]: leaves of the training samples."""

    def weights(self, features_nF: np.ndarray) -> np.ndarray:
        """How much each training sample counts for each sample: float64 [n, m], rows sum to 1."""
        return shared_leaves(self.apply(features_nF), self.leaves, len(self.feature))


@dataclass(frozen=True, kw_only=True)
class BoostedTrees(Trees):
    """Trees each of which corrects those before it (Friedman 2001, Ann Stat 29:1189)."""

    value: np.ndarray
    """float64 [N]: what a leaf adds."""
    output: np.ndarray
    """int32 [T]: the output that a tree adds to."""
    start: np.ndarray
    """float64 [O]: outputs before the first tree."""

    def first(self, trees: int) -> BoostedTrees:
        """The first of the trees: what was learned by then."""
        nodes = self.roots[trees] if trees < len(self.roots) else len(self.feature)
        of_trees = {name: getattr(self, name)[:trees] for name in ("roots", "output")}
        of_nodes = {name: getattr(self, name)[:nodes] for name in ("feature", "threshold", "left", "right", "value")}
        return replace(self, **of_trees, **of_nodes)

    def outputs(self, features_nF: np.ndarray) -> np.ndarray:
        """Numbers or their quantiles, or scores of classes: float64 [n, O]."""
        added_nT = self.value[self.apply(features_nF)]
        return self.start + added_nT @ (self.output[:, None] == np.arange(len(self.start))).astype(np.float64)


def shared_leaves(leaves_nT: np.ndarray, leaves_mT: np.ndarray, nodes: int) -> np.ndarray:
    """How much each training sample counts for each sample, by the leaves they share: float64 [n, m], rows sum to 1.

    Parameters
    ----------
    leaves_nT, leaves_mT : ndarray of int
        Leaf of each sample, and of each training sample, in each tree; no leaf is of two trees.
    nodes : int
        Of all trees.
    """

    def one_hot(leaves: np.ndarray) -> sp.csr_matrix:
        n, T = leaves.shape
        return sp.csr_matrix((np.ones(n * T), leaves.ravel(), np.arange(0, n * T + 1, T)), (n, nodes))

    own, theirs = one_hot(leaves_nT), one_hot(leaves_mT)
    sizes = np.maximum(np.asarray(theirs.sum(axis=0)).ravel(), 1)
    return sp.csr_matrix(own @ sp.diags(1 / sizes) @ theirs.T).toarray() / leaves_mT.shape[1]


def weighted_quantile(values: np.ndarray, weights: np.ndarray, quantile: float) -> np.ndarray:
    """Lowest value up to which there is the share `quantile` of the weight.

    Parameters
    ----------
    values : ndarray of float64 [m]
        Targets of the training samples.
    weights : ndarray of float64 [n, m]
        Rows sum to 1.
    quantile : float
        Above 0, below 1.

    Returns
    -------
    ndarray of float64 [n]
    """
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[:, order], axis=1)
    return values[order][(reached >= quantile * reached[:, -1:]).argmax(axis=1)]
