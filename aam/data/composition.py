"""Reads of a sample as a composition: only their ratios say anything."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

PSEUDO_COUNT = 0.5
"""Added to all reads before their logarithm."""
MOST_KNOWN = 3000
"""ASVs that are grouped, the most prevalent; others count for those that they are near to."""
LEAST_SAMPLES = 3
"""Samples that an ASV must be in to be grouped, where any is in so many."""


def prevalent_asvs(asvs_of_samples: Iterable[np.ndarray], *, most: int = MOST_KNOWN) -> np.ndarray:
    """ASVs that samples have often enough to say something of other samples.

    Parameters
    ----------
    asvs_of_samples : iterable of ndarray of int
        Distinct ASVs of each sample; at least one sample.
    most : int
        How many to return at most.

    Returns
    -------
    ndarray of int
        Ascending.
    """
    asvs, samples = np.unique(np.concatenate(list(asvs_of_samples)), return_counts=True)
    often = samples >= min(LEAST_SAMPLES, samples.max())
    asvs, samples = asvs[often], samples[often]
    return np.sort(asvs[np.argsort(-samples, kind="stable")[:most]])


def centred_log_ratios(reads: np.ndarray) -> np.ndarray:
    """Logarithms of reads over their mean in the sample (Aitchison 1982, J R Stat Soc B 44:139).

    Parameters
    ----------
    reads : ndarray [n, features]
        0 or more.

    Returns
    -------
    ndarray of float64 [n, features]
        Rows sum to 0.
    """
    logs = np.log(reads + PSEUDO_COUNT)
    return logs - logs.mean(axis=1, keepdims=True)
