"""Trees as arrays: no pickle, and no scikit-learn to apply them.

Shape letters: n samples, T trees, N nodes of all trees, F features, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True, kw_only=True)
class BoostedTrees:
    """Binary trees each of which corrects those before it (Friedman 2001, Ann Stat 29:1189)."""

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
    value: np.ndarray
    """float64 [N]: what a leaf adds."""
    output: np.ndarray
    """int32 [T]: the output that a tree adds to."""
    start: np.ndarray
    """float64 [O]: outputs before the first tree."""

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
