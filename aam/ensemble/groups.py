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

from aam.data.batches import Draw
from aam.model.sample_features import LEAST_SHARE

_ROWS = 2048
"""ASVs that are compared with the known ones at a time."""
_SAME = 0.02
"""Vectors whose distance is at most this share of their length are of one ASV: the arithmetic makes differences of
0.003 (bf16), another ASV of 0.06 or more (pmi, ibd)."""


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """Known ASVs that the ASVs of a dataset count for; rows of which nobody asked are not set."""

    known: np.ndarray
    """int32 [ASVs]: the one that is nearest."""
    is_same: np.ndarray
    """bool [ASVs]: whether it is the same ASV."""


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

    def shares(self, draws: Sequence[Draw], vectors: np.ndarray | Nearest) -> np.ndarray:
        """Share of each sample's reads that each group has; an ASV counts for the known one nearest to it.

        Parameters
        ----------
        draws : sequence of (ndarray, ndarray)
            ASVs and reads of each sample.
        vectors : ndarray of float32 [ASVs, D], or Nearest
            Of the ASVs that the draws name, at least; or what `nearest` has found for these.

        Returns
        -------
        ndarray of float32 [n, G]
        """
        return self.shares_and_own(draws, vectors)[0]

    def shares_and_own(self, draws: Sequence[Draw], vectors: np.ndarray | Nearest) -> tuple[np.ndarray, sp.csr_matrix]:
        """Shares of the groups, and of the known ASVs by themselves.

        Parameters
        ----------
        draws, vectors
            As for `shares`.

        Returns
        -------
        shares : ndarray of float32 [n, G]
            See `shares`.
        own : csr_matrix of float64 [n, K]
            Share of each sample's reads that each known ASV has, without those that are only near to it.
        """
        asvs = np.concatenate([asvs for asvs, _ in draws])
        nearest = vectors if isinstance(vectors, Nearest) else self.nearest(vectors, np.unique(asvs))
        share = np.concatenate([reads / reads.sum() for _, reads in draws])
        starts = np.concatenate([[0], np.cumsum([len(asvs) for asvs, _ in draws])])
        shape = (len(draws), len(self.vectors))
        known_nK, own_nK = (
            sp.csr_matrix((of, nearest.known[asvs], starts), shape=shape)
            for of in (share, share * nearest.is_same[asvs])
        )
        own_nK.sum_duplicates()
        own_nK.eliminate_zeros()
        return sp.csr_matrix(known_nK @ self._membership()).toarray().astype(np.float32), own_nK

    def nearest(self, vectors: np.ndarray, asvs: np.ndarray) -> Nearest:
        """The known ASV that is nearest to each of those asked for.

        Parameters
        ----------
        vectors : ndarray of float32 [ASVs, D]
            Of the dataset's ASVs, those asked for at least.
        asvs : ndarray of int
            Which of them.
        """
        found = Nearest(known=np.zeros(len(vectors), np.int32), is_same=np.zeros(len(vectors), bool))
        most = _SAME * np.linalg.norm(self.vectors, axis=1)
        for start in range(0, len(asvs), _ROWS):
            rows = asvs[start : start + _ROWS]
            squares = cdist(vectors[rows], self.vectors, "sqeuclidean")
            found.known[rows] = squares.argmin(axis=1)
            found.is_same[rows] = np.sqrt(squares.min(axis=1)) <= most[found.known[rows]]
        return found

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
