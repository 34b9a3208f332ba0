"""Groups of similar ASVs, and how much of a sample each group is.

Shape letters: n samples, K known ASVs, G groups, U distinct ASVs, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import cdist

from aam.model.asv_groups import LEAST_SHARE

_ROWS = 2048
"""ASVs that are compared with the known ones at a time."""


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Nested groups of known ASVs: single ones, and each union that the clustering made."""

    vectors: np.ndarray
    """float32 [K, D]: of the known ASVs."""
    parent: np.ndarray
    """int32 [2K - 1]: the union that each group went into; -1 for the last. Known ASVs first."""
    chosen: np.ndarray
    """int32 [G]: the groups that are features."""

    @classmethod
    def cluster(cls, vectors_KD: np.ndarray) -> Groups:
        """Cluster known ASVs by Ward's method; all groups are chosen.

        Parameters
        ----------
        vectors_KD : ndarray of float32
            At least one row.
        """
        K = len(vectors_KD)
        parent = np.full(2 * K - 1, -1, np.int32)
        if K > 1:
            for union, (left, right) in enumerate(linkage(vectors_KD, "ward")[:, :2].astype(int), start=K):
                parent[[left, right]] = union
        return cls(vectors=vectors_KD, parent=parent, chosen=np.arange(2 * K - 1, dtype=np.int32))

    @property
    def are_single(self) -> np.ndarray:
        """Which of the chosen groups are single ASVs: bool [G]."""
        return self.chosen < len(self.vectors)

    def shares(self, draws: Sequence[tuple[np.ndarray, np.ndarray]], vectors: np.ndarray) -> np.ndarray:
        """Share of each sample's reads that each group has; an ASV counts for the known one nearest to it.

        Parameters
        ----------
        draws : sequence of (ndarray, ndarray)
            ASVs and reads of each sample.
        vectors : ndarray of float32 [ASVs, D]
            Of the ASVs that the draws name, at least.

        Returns
        -------
        ndarray of float32 [n, G]
        """
        asvs_U, where = np.unique(np.concatenate([asvs for asvs, _ in draws]), return_inverse=True)
        nearest_U = np.concatenate(
            [
                cdist(vectors[asvs_U[i : i + _ROWS]], self.vectors, "sqeuclidean").argmin(axis=1)
                for i in range(0, len(asvs_U), _ROWS)
            ]
        )
        sizes = [len(asvs) for asvs, _ in draws]
        share = np.concatenate([reads / reads.sum() for _, reads in draws])
        starts = np.concatenate([[0], np.cumsum(sizes)])
        known_nK = sp.csr_matrix((share, nearest_U[where], starts), shape=(len(draws), len(self.vectors)))
        return sp.csr_matrix(known_nK @ self._membership()).toarray().astype(np.float32)

    def _membership(self) -> sp.csr_matrix:
        """Which known ASVs [K] are in which of the chosen groups [G]."""
        rows, columns = [], []
        known = at = np.arange(len(self.vectors))
        while len(at):
            rows.append(known)
            columns.append(at)
            above = self.parent[at]
            known, at = known[above >= 0], above[above >= 0]
        rows, columns = np.concatenate(rows), np.concatenate(columns)
        shape = (len(self.vectors), len(self.parent))
        return sp.csr_matrix(sp.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=shape)[:, self.chosen])


def log_shares(shares: np.ndarray) -> np.ndarray:
    """Shares [n, G] on a logarithmic scale on which none is 0 and all is 4."""
    return np.log10(1 + shares / LEAST_SHARE).astype(np.float32)
