"""Reads of a sample as a composition: only their ratios say anything."""

from __future__ import annotations

import numpy as np

PSEUDO_COUNT = 0.5
"""Added to all reads before their logarithm."""


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
