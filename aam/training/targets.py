"""Targets in their own units, and as the model learns them: one object each way, kept in the checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from aam.config import UnifracMetric


@dataclass(frozen=True, kw_only=True)
class TargetTransform:
    """`(f(y) - shift) / scale`, with f the identity or log(1 + y).

    Parameters
    ----------
    kind : str
        none, zscore, minmax or log1p-zscore.
    shift, scale : float
        Fitted on the training samples.
    """

    kind: str = "none"
    shift: float = 0.0
    scale: float = 1.0

    @classmethod
    def fit(cls, kind: str, values: np.ndarray) -> TargetTransform:
        """Fit a transform.

        Parameters
        ----------
        kind : str
            Which one.
        values : ndarray of float64 [n]
            Targets of the training samples alone, in their own units.

        Raises
        ------
        ValueError
            For an unknown kind, a constant target, or log1p of values at or below -1.
        """
        if kind not in ("none", "zscore", "minmax", "log1p-zscore"):
            raise ValueError(f"target transform must be none, zscore, minmax or log1p-zscore, not {kind!r}")
        constant = f"the target is {values[0]:g} for all training samples: nothing to learn"
        if values.min() == values.max():
            raise ValueError(constant)
        if kind == "none":
            return cls()
        if kind == "log1p-zscore" and values.min() <= -1:
            raise ValueError(f"--target-transform log1p-zscore needs targets above -1; the lowest is {values.min():g}")
        scaled = np.log1p(values) if kind == "log1p-zscore" else values
        spread = float(np.ptp(values) if kind == "minmax" else scaled.std())
        if spread == 0:  # the same after the logarithm
            raise ValueError(constant)
        return cls(kind=kind, shift=float(scaled.min() if kind == "minmax" else scaled.mean()), scale=spread)

    def forward(self, values: np.ndarray) -> np.ndarray:
        """Own units [n] to what the model learns."""
        values = np.log1p(values) if self.kind == "log1p-zscore" else values
        return (values - self.shift) / self.scale

    def inverse(self, values: np.ndarray) -> np.ndarray:
        """What the model says [n] to own units, in float64."""
        # A wild prediction stays below 1e30, where the square of an error is still a number.
        values = np.asarray(values, dtype=np.float64) * self.scale + self.shift
        return np.expm1(np.minimum(values, math.log(1e30))) if self.kind == "log1p-zscore" else values


@dataclass(frozen=True, kw_only=True)
class UnifracTarget:
    """A UniFrac metric that an encoder learned, with its mean and variance among the training samples."""

    metric: UnifracMetric
    mean: float
    variance: float
    """The unit of its loss."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What stage 2 predicts: part of every checkpoint.

    Parameters
    ----------
    column : str
        Metadata column.
    classes : tuple of str
        Names of the classes in the order of the model's outputs; empty for a number.
    transform : TargetTransform
        Of a number.
    loss : str
        huber, mse, mae or quantile; cross_entropy for classes.
    quantiles : tuple of float
        Ascending, one for each output, for the quantile loss; empty for the others.
    class_weights : tuple of float
        Of the cross entropy; empty for none.
    """

    column: str
    classes: tuple[str, ...] = ()
    transform: TargetTransform = TargetTransform()
    loss: str = "huber"
    quantiles: tuple[float, ...] = ()
    class_weights: tuple[float, ...] = ()

    @property
    def outputs(self) -> int:
        """Outputs of the model."""
        return len(self.classes) or len(self.quantiles) or 1

    @property
    def weight_of_classes(self) -> np.ndarray:
        """`class_weights`, or 1 for each class: float64 [classes]."""
        return np.asarray(self.class_weights or [1.0] * len(self.classes))

    @property
    def point(self) -> int:
        """Output that is the prediction of a number: the only one, or the quantile nearest to 0.5."""
        return min(range(len(self.quantiles)), key=lambda i: abs(self.quantiles[i] - 0.5), default=0)

    @property
    def beside(self) -> dict[str, int]:
        """Name and output of each quantile that stands beside the prediction."""
        return {f"q{q:g}": i for i, q in enumerate(self.quantiles) if i != self.point}

    def decode(self, outputs: np.ndarray) -> np.ndarray:
        """What the model says of a number [n, O] to own units, in float64; quantiles that cross are put in order."""
        return self.transform.inverse(np.sort(outputs, axis=1))

    def encode(self, values: Sequence[Any]) -> np.ndarray:
        """Targets in own units or class names to what batches hold, float32 or int64 [n].

        Raises
        ------
        ValueError
            For a class that the training samples do not have.
        """
        if not self.classes:
            return self.transform.forward(np.asarray(values, dtype=np.float64)).astype(np.float32)
        code = {name: i for i, name in enumerate(self.classes)}
        unknown = sorted({v for v in values if v not in code})
        if unknown:
            raise ValueError(
                f"column {self.column!r}: classes {unknown} are in the validation samples but in no training "
                f"sample (which have {list(self.classes)})"
            )
        return np.asarray([code[v] for v in values], dtype=np.int64)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Target:
        """The reverse of `to_dict`, also after a trip through JSON."""
        return cls(
            **{
                **data,
                "classes": tuple(data["classes"]),
                "quantiles": tuple(data["quantiles"]),
                "class_weights": tuple(data["class_weights"]),
                "transform": TargetTransform(**data["transform"]),
            }
        )
