"""UniFrac distances and Faith's PD, exact, for the samples of one batch.

Unweighted UniFrac of samples i and j, with E_i the edges from the ASVs of i to the root and l their lengths:
1 - sum(l over E_i & E_j) / sum(l over E_i | E_j). Shapes: B samples of the batch, E' edges that occur in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array
from scipy.spatial.distance import cdist


@dataclass(frozen=True)
class RootPaths:
    """Each ASV's path to the root of the tree, from `aam.data.tree.root_paths`; memory maps will do."""

    offsets: np.ndarray
    """int64 [n+1], the path of ASV i is nodes[offsets[i] : offsets[i + 1]]"""
    nodes: np.ndarray
    """int32 [sum], node ids; a node stands for the edge above it"""
    length: np.ndarray
    """float64 [E], length of the edge above each node"""


@dataclass(frozen=True)
class Incidence:
    """Which samples of a batch hold which edges of the tree."""

    edges: csr_array
    """[B, E'], 1.0 where an ASV of the sample lies below the edge; column indices sorted"""
    length: np.ndarray
    """float64 [E'], length of each edge"""


def incidence(asvs: Sequence[np.ndarray], paths: RootPaths) -> Incidence:
    """Find the edges between the ASVs of each sample and the root.

    Parameters
    ----------
    asvs
        Per sample the indices of the ASVs present, each of which must be in the tree.
    paths
        Root path of each ASV.
    """
    edges, length = _edge_sums(asvs, [np.ones(len(a)) for a in asvs], paths)
    edges.sort_indices()
    edges.data[:] = 1.0
    return Incidence(edges, length)


def unweighted_unifrac(
    asvs: Sequence[np.ndarray], paths: RootPaths, rows: slice | np.ndarray = slice(None)
) -> np.ndarray:
    """Unweighted UniFrac of the samples picked by `rows` against all samples, float64 [len(rows), B].

    Two samples without any edge length between them (0/0) are at distance 0.
    """
    batch = incidence(asvs, paths)
    total = batch.edges @ batch.length
    weighted = batch.edges[rows]
    weighted.data *= batch.length[weighted.indices]
    # Sparse times dense adds up along the sorted columns, for (i, j) as for (j, i): exactly symmetric.
    shared = weighted @ batch.edges.T.toarray(order="C")
    either = total[rows, None] + total - shared
    distance = 1.0 - np.divide(shared, either, out=np.ones_like(shared), where=either > 0)
    picked = np.arange(len(asvs))[rows]
    distance[np.arange(len(picked)), picked] = 0.0
    return distance.clip(0.0, 1.0)


def weighted_unifrac(
    asvs: Sequence[np.ndarray],
    counts: Sequence[np.ndarray],
    paths: RootPaths,
    rows: slice | np.ndarray = slice(None),
) -> np.ndarray:
    """Normalised weighted UniFrac of the samples picked by `rows` against all samples, float64 [len(rows), B].

    With p the share of a sample's reads below an edge: sum(l |p_i - p_j|) / sum(l (p_i + p_j)). Where all
    reads sit at the root itself (0/0) the distance is 0; scikit-bio gives NaN.

    Parameters
    ----------
    asvs
        Per sample the indices of the ASVs present.
    counts
        Per sample the counts of these ASVs.
    paths
        Root path of each ASV.
    rows
        Which samples.
    """
    edges, length = _edge_sums(asvs, [_shares(c) for c in counts], paths)
    height = edges.toarray() * length
    apart = cdist(height[rows], height, "cityblock")
    total = height.sum(axis=1)
    reach = total[rows, None] + total
    return np.divide(apart, reach, out=np.zeros_like(apart), where=reach > 0).clip(0.0, 1.0)


def _shares(counts: np.ndarray) -> np.ndarray:
    total = counts.sum()
    return counts / total if total > 0 else np.zeros(len(counts))


def faith_pd(asvs: Sequence[np.ndarray], paths: RootPaths) -> np.ndarray:
    """Faith's phylogenetic diversity of each sample, up to the root, float64 [B]."""
    batch = incidence(asvs, paths)
    return batch.edges @ batch.length


def _edge_sums(
    asvs: Sequence[np.ndarray], weights: Sequence[np.ndarray], paths: RootPaths
) -> tuple[csr_array, np.ndarray]:
    """Sum the weights of each sample's ASVs on the edges above them: sums [B, E'] and edge lengths [E']."""
    n_asvs = [len(a) for a in asvs]
    distinct, column = np.unique(np.concatenate(asvs), return_inverse=True)
    row_start = np.concatenate([[0], np.cumsum(n_asvs)])
    samples = csr_array((np.concatenate(weights), column, row_start), shape=(len(asvs), len(distinct)))

    first, last = paths.offsets[distinct], paths.offsets[distinct + 1]
    n_nodes = last - first
    assert (n_nodes > 0).all(), "an ASV outside the tree got past data preparation"
    path_start = np.concatenate([[0], np.cumsum(n_nodes)])
    nodes = paths.nodes[np.repeat(first - path_start[:-1], n_nodes) + np.arange(path_start[-1])]
    # Compact the columns by a table over the nodes: faster than sorting them.
    is_used = np.zeros(len(paths.length), dtype=bool)
    is_used[nodes] = True
    used = np.flatnonzero(is_used)
    compact = np.empty(len(paths.length), dtype=np.int32)
    compact[used] = np.arange(len(used), dtype=np.int32)
    above = csr_array((np.ones(len(nodes)), compact[nodes], path_start), shape=(len(distinct), len(used)))
    return samples @ above, np.asarray(paths.length[used])
