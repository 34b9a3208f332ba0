"""Pictures as inline SVG, in colours that also those tell apart who do not see all of them."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from aam.html_report.page import Html
from aam.training.figures import shorten

BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#57606a"
PALETTE = (BLUE, ORANGE, GREEN, "#cc79a7", "#e69f00", "#56b4e9", "#8a7f00", "#333333")
"""Okabe and Ito's, its yellow made darker for a light ground."""
MARKERS = "os^DvP"
_LETTERS = 60
"""Of a legend, in the width of a picture."""
MANY = 2000
"""Points beyond which they are drawn as pixels: each would be an element of the page."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a column may be named $x$
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.titlesize": "medium",
    "axes.unicode_minus": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "savefig.dpi": 150,
}
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Control characters, which XML has no way to write."""
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_REFERS = ("href", f"{{{_XLINK}}}href")


def draw(paint: Callable[[Axes], None], label: str, *, size: tuple[float, float] = (4.4, 3.3)) -> Html:
    """Draw a picture.

    Parameters
    ----------
    paint : callable
        Takes the axes to draw on.
    label : str
        What the picture is, for those who do not see it.
    size : tuple of float
        Width and height, inches: what matters is their ratio, and how large they make the text.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size)
        FigureCanvasSVG(figure)
        figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        paint(axes)
        with io.StringIO() as file, warnings.catch_warnings():
            # A font of this machine that lacks a letter: the reader's browser has its own.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
            return _inline(_NOT_XML.sub("\ufffd", file.getvalue()), _NOT_XML.sub("\ufffd", label))


def _inline(svg: str, label: str) -> Html:
    """An SVG file as an element of a page, where ids of other pictures must not be met, at the page's width."""
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(svg)
    own = "p" + hashlib.blake2b(svg.encode(), digest_size=6).hexdigest()
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
        for name, value in parent.attrib.items():
            if name == "id":
                parent.set(name, f"{own}-{value}")
            elif name in _REFERS and value.startswith("#"):
                parent.set(name, f"#{own}-{value[1:]}")
            elif "url(#" in value:
                parent.set(name, value.replace("url(#", f"url(#{own}-"))
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", label)
    return Html(ElementTree.tostring(root, encoding="unicode"))


def curves(label: str, lines: dict[str, list[tuple[float, float]]], best: float) -> Html:
    """Values by epoch; `lines` has those of `train` and `validation`, `best` is the epoch to mark."""

    def paint(axes: Axes) -> None:
        for name, color, style in (("train", BLUE, "--"), ("validation", ORANGE, "-")):
            if name in lines:
                x, y = zip(*lines[name], strict=True)
                marker = "o" if len(x) < 30 else None
                axes.plot(x, y, style, color=color, label=name, marker=marker, markersize=3, linewidth=1.5)
        axes.axvline(best, color=GREY, linewidth=1, linestyle=":", label=f"best epoch, {best:g}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="epoch", ylabel=label)
        axes.legend()

    return draw(paint, f"{label} by epoch")


def true_against_predicted(
    truth: np.ndarray, predicted: np.ndarray, interval: np.ndarray | None, name: str, color: str = BLUE
) -> Html:
    """Predicted values, with their intervals [n, 2], by true ones, and the line on which they would be equal."""

    def paint(axes: Axes) -> None:
        if interval is not None:
            axes.vlines(truth, *interval.T, color=color, linewidth=0.8, alpha=0.3)
        _points(axes, truth, predicted, color)
        low, high = min(truth.min(), predicted.min()), max(truth.max(), predicted.max())
        axes.plot([low, high], [low, high], color=GREY, linewidth=1)
        axes.set(xlabel=f"true {name}", ylabel=f"predicted {name}")

    return draw(paint, f"predicted {name} against true {name}")


def residuals(truth: np.ndarray, predicted: np.ndarray, name: str, color: str = BLUE) -> Html:
    """Errors by true values."""

    def paint(axes: Axes) -> None:
        _points(axes, truth, predicted - truth, color)
        axes.axhline(0, color=GREY, linewidth=1)
        axes.set(xlabel=f"true {name}", ylabel="predicted - true")

    return draw(paint, f"errors of {name} by true {name}")


def _points(axes: Axes, x: np.ndarray, y: np.ndarray, color: str) -> None:
    axes.scatter(x, y, s=14, color=color, alpha=0.6, linewidths=0, rasterized=len(x) > MANY)


def pair_density(truth: np.ndarray, predicted: np.ndarray, name: str) -> Html:
    """Predicted values by true ones, where there are too many of them to see each."""

    def paint(axes: Axes) -> None:
        low, high = min(truth.min(), predicted.min()), max(truth.max(), predicted.max())
        box = (low, high, low, high)
        cells = axes.hexbin(
            truth, predicted, gridsize=40, mincnt=1, cmap="cividis_r", extent=box, linewidths=0, rasterized=True
        )
        axes.plot([low, high], [low, high], color=ORANGE, linewidth=1)
        axes.set(xlabel=f"true {name}", ylabel=f"predicted {name}")
        axes.figure.colorbar(cells, ax=axes, label="pairs")

    return draw(paint, f"predicted {name} against true {name}, by the number of pairs")


def confusion(counts: np.ndarray, classes: Sequence[str]) -> Html:
    """How often each true class was given each predicted one; the shade is the share of the true class."""
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)

    def paint(axes: Axes) -> None:
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        ticks = np.arange(len(classes))
        axes.set_xticks(ticks, [shorten(name) for name in classes], rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(ticks, [shorten(name) for name in classes])
        axes.set(xlabel="predicted", ylabel="true")
        if len(classes) <= 15:
            for (row, column), count in np.ndenumerate(counts):
                color = "white" if share[row, column] > 0.6 else "#1c2126"
                axes.text(column, row, str(count), ha="center", va="center", color=color)

    side = min(8.0, 2.8 + 0.35 * len(classes))
    return draw(paint, "confusion matrix", size=(side + 0.6, side))


def reliability(confidence: np.ndarray, accuracy: np.ndarray) -> Html:
    """Share of right predictions by the probability that the model gave them."""

    def paint(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=1)
        axes.plot(confidence, accuracy, "o-", color=BLUE, markersize=5)
        axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="probability of the predicted class", ylabel="share right")

    return draw(paint, "reliability curve", size=(4.4, 3.8))


def ordination(points: np.ndarray, shares: np.ndarray, color: np.ndarray | None, name: str) -> Html:
    """The first two axes of an ordination.

    Parameters
    ----------
    points : ndarray [n, 2]
        Where the samples are.
    shares : ndarray [2]
        What each axis explains.
    color : ndarray [n], optional
        Numbers, or text; NaN or None where there is none.
    name : str
        Of what the colours mean.
    """
    texts = color if color is not None and color.dtype.kind != "f" else None
    classes = [] if texts is None else sorted({value for value in texts if value is not None})
    columns = max(1, min(3, _LETTERS // max([4 + len(shorten(value)) for value in classes], default=1)))
    rows = -(-(len(classes) + 1) // columns)

    def paint(axes: Axes) -> None:
        x, y = points.T
        if color is None:
            axes.scatter(x, y, s=16, color=BLUE, alpha=0.75, linewidths=0)
        elif texts is None:
            missing = np.isnan(color)
            axes.scatter(x[missing], y[missing], s=14, facecolors="none", edgecolors="#b0b7be", linewidths=0.7)
            shown = axes.scatter(x[~missing], y[~missing], s=16, c=color[~missing], cmap="viridis", linewidths=0)
            axes.figure.colorbar(shown, ax=axes, label=shorten(name))
        else:
            handles, names = zip(*_classes(axes, x, y, texts, classes), strict=True)
            place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.18), "ncols": columns, "handletextpad": 0.1}
            # By handles: of its own accord, matplotlib leaves out names that begin with an underscore.
            axes.legend(handles, names, title=shorten(name), **place)
        axes.set(xlabel=f"axis 1 ({shares[0]:.1%})", ylabel=f"axis 2 ({shares[1]:.1%})")
        axes.set_aspect("equal", adjustable="datalim")

    label = f"samples on the first two axes, coloured by {name}" if name else "samples on two axes"
    return draw(paint, label, size=(4.4, 3.3 + 0.19 * max(0, rows - 1)))


def _classes(
    axes: Axes, x: np.ndarray, y: np.ndarray, values: np.ndarray, classes: list[str]
) -> Iterator[tuple[Any, str]]:
    """Points of each class, and its name in the legend."""
    missing = np.array([value is None for value in values])
    if missing.any():
        yield axes.scatter(x[missing], y[missing], s=14, facecolors="none", edgecolors="#b0b7be"), "no value"
    for number, value in enumerate(classes):
        of_class = values == value
        points = axes.scatter(
            x[of_class],
            y[of_class],
            s=18,
            color=PALETTE[number % len(PALETTE)],
            marker=MARKERS[number % len(MARKERS)],
            alpha=0.8,
            linewidths=0,
        )
        yield points, shorten(value)


def effects(names: Sequence[str], values: np.ndarray, unit: str) -> Html:
    """Bars to the left and right of 0, one for each name."""

    def paint(axes: Axes) -> None:
        rows = np.arange(len(names))
        axes.barh(rows, values, color=[ORANGE if value > 0 else BLUE for value in values], height=0.7)
        axes.axvline(0, color=GREY, linewidth=1)
        axes.set_yticks(rows, names)
        axes.invert_yaxis()
        axes.set(xlabel=unit)

    return draw(paint, f"{unit}, by ASV", size=(4.4, 1.0 + 0.2 * len(names)))
