"""Linear models on centred log-ratios of reads.

Shape letters: n samples, F features, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aam.data.batches import Draw
from aam.data.composition import centred_log_ratios


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear model."""

    mean: np.ndarray
    """float32 [F]: of the inputs in training."""
    slope: np.ndarray
    """float32 [F, O]"""
    intercept: np.ndarray
    """float64 [O]"""

    def outputs(self, inputs_nF: np.ndarray) -> np.ndarray:
        """Numbers or their quantiles, or scores of classes: float64 [n, O]."""
        return (inputs_nF - self.mean) @ self.slope.astype(np.float64) + self.intercept


def linear_inputs(shares_nF: np.ndarray, draws: Sequence[Draw]) -> np.ndarray:
    """What a linear model reads of groups of ASVs, or of ASVs: centred log-ratios of their reads, float32 [n, F]."""
    depths = np.array([reads.sum() for _, reads in draws])
    return centred_log_ratios(shares_nF * depths[:, None]).astype(np.float32)
