"""Pictures of an epoch's predictions."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import ConfusionMatrixDisplay

from aam.training.metrics import UNIFRAC_NAMES, UNIFRAC_TAGS, EpochArrays
from aam.training.targets import Target

DPI = 100
MAX_POINTS = 20_000
_AS_TEXT: dict[Any, Any] = {"text.parse_math": False}
"""A class may be named $10_$20."""


@mpl.rc_context(_AS_TEXT)
def make_figures(arrays: EpochArrays, target: Target | None) -> dict[str, Figure]:
    """Pictures of what was predicted; predicted against true or, for classes, the confusion matrix.

    Parameters
    ----------
    arrays : EpochArrays
        Predictions and truths, all of them finite.
    target : Target or None
        None in stage 1.

    Returns
    -------
    dict of str to Figure
        Those of the UniFrac metrics, `target`, `confusion_matrix` and `counts` that the predictions allow.
    """
    figures = {}
    for metric, scored in arrays.unifrac.items():
        figures[UNIFRAC_TAGS[metric]] = _scatter(scored.truth, scored.predicted, UNIFRAC_NAMES[metric])
    if target is not None and arrays.target is not None and arrays.target_true is not None:
        if target.classes:
            figures["confusion_matrix"] = _confusion(arrays.target_true, arrays.target.argmax(axis=1), target)
        else:
            truth = target.transform.inverse(arrays.target_true)
            predicted = target.decode(arrays.target)[:, target.point]
            figures["target"] = _scatter(truth, predicted, shorten(target.column))
    if arrays.count is not None and arrays.count_true is not None:
        figures["counts"] = _scatter(arrays.count_true, arrays.count, "log relative abundance of masked ASVs")
    return figures


def draw(figure: Figure) -> np.ndarray:
    """Pixels of a picture, (height, width, RGBA).

    Drawing is what takes the time: what is drawn once can be written to several places.
    """
    canvas = FigureCanvasAgg(figure)
    with mpl.rc_context(_AS_TEXT):  # some texts are made only now
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def shorten(name: str, most: int = 24) -> str:
    """A name that fits into a picture: its two ends, as what tells taxa apart stands last."""
    first = most // 3
    return name if len(name) <= most else f"{name[:first]}…{name[first + 1 - most :]}"


def _new_figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5, 5), dpi=DPI, layout="constrained")
    return figure, figure.subplots()


def _scatter(truth: np.ndarray, predicted: np.ndarray, name: str) -> Figure:
    figure, axes = _new_figure()
    stride = -(-len(truth) // MAX_POINTS)  # more points than that show nothing more
    axes.plot(truth[::stride], predicted[::stride], ".", alpha=0.4, markersize=4)
    low, high = min(truth.min(), predicted.min()), max(truth.max(), predicted.max())
    axes.plot([low, high], [low, high], "k-", linewidth=0.8)
    axes.set(xlabel=f"true {name}", ylabel=f"predicted {name}", title=f"validation, n = {len(truth)}")
    return figure


def _confusion(truth: np.ndarray, predicted: np.ndarray, target: Target) -> Figure:
    figure, axes = _new_figure()
    ConfusionMatrixDisplay.from_predictions(
        truth,
        predicted,
        labels=np.arange(len(target.classes)),
        display_labels=[shorten(name) for name in target.classes],
        xticks_rotation="vertical",
        colorbar=False,
        ax=axes,
    )
    axes.set_title(f"validation, {shorten(target.column)}, n = {len(truth)}")
    return figure


def sweep_figure(curves: dict[str, list[float]], learning_rates: dict[str, float]) -> Figure:
    """Validation losses of the trials of a sweep by epoch and, where they differ, by learning rate.

    Parameters
    ----------
    curves : dict of str to list of float
        Validation loss of each epoch, by trial.
    learning_rates : dict of str to float
        Of each trial; empty where the sweep did not vary it.
    """
    figure = Figure(figsize=(12, 5) if learning_rates else (7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if learning_rates else 1, squeeze=False)[0]
    best = min((name for name in curves if curves[name]), key=lambda name: min(curves[name]), default=None)
    for name, losses in curves.items():
        shown = {"color": "black", "linewidth": 2.5, "zorder": 3} if name == best else {"alpha": 0.7}
        axes[0].plot(range(1, len(losses) + 1), losses, marker="o", markersize=3, label=name, **shown)
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set(xlabel="epoch", ylabel="validation loss", title=f"best: {best}")
    if len(curves) <= 12:
        axes[0].legend(fontsize="x-small")
    if learning_rates:
        done = [name for name in curves if curves[name]]
        colors = ["black" if name == best else "tab:blue" for name in done]
        axes[1].scatter([learning_rates[n] for n in done], [min(curves[n]) for n in done], c=colors)
        axes[1].set(xscale="log", xlabel="learning rate", ylabel="best validation loss")
        axes[1].tick_params(axis="x", which="both", labelsize="small", rotation=30)
    return figure
