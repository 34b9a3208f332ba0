"""Draw learning curves: scores over the fraction of labels, from the JSON files that jobs/evaluate.py writes."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

BASELINE = "random_forest"


def read(pattern: str, metric: str) -> dict[str, dict[float, list[float]]]:
    """Scores by model and by the fraction of labels, one for each file.

    Parameters
    ----------
    pattern : str
        Path of the files, {} in the place of the fraction of labels (0.1, or 1 for all); * stands for anything
        else, seeds say.
    metric : str
        Which score.
    """
    curves: dict[str, dict[float, list[float]]] = {}
    parts = re.split(r"(\{\}|\*)", pattern)
    expression = "".join({"{}": r"(\d+\.?\d*)", "*": ".*"}.get(part, re.escape(part)) for part in parts)
    for path in sorted(Path().glob(pattern.replace("{}", "*"))):
        fraction = re.fullmatch(expression, str(path))
        if fraction is None:
            continue
        scores = json.loads(path.read_text())
        models = {"model": scores["model"], "network": scores.get("network"), BASELINE: scores["baselines"][BASELINE]}
        for name, of_model in models.items():
            if of_model is not None:
                curves.setdefault(name, {}).setdefault(float(fraction[1]), []).append(of_model[metric])
    if not curves:
        raise SystemExit(f"{pattern}: no such files (with {{}} in the place of the fraction of labels)")
    return curves


def draw(axes: plt.Axes, label: str, scores: dict[float, list[float]], **style: str) -> None:
    """A line through the means, with their standard deviations; printed too."""
    fractions = sorted(scores)
    means = [float(np.mean(scores[fraction])) for fraction in fractions]
    deviations = [float(np.std(scores[f], ddof=1)) if len(scores[f]) > 1 else 0.0 for f in fractions]
    axes.errorbar([100 * fraction for fraction in fractions], means, deviations, label=label, capsize=3, **style)
    for fraction, mean, deviation in zip(fractions, means, deviations, strict=True):
        print(f"{label}\t{fraction:g}\t{mean:.4g}\t{deviation:.2g}\t{len(scores[fraction])} runs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "curves",
        nargs="+",
        metavar="LABEL=PATTERN",
        help="with stage 1=runs/with-{}-*.json, say, for runs/with-0.1-0.json and others",
    )
    parser.add_argument("--metric", default="mae")
    parser.add_argument("--output", type=Path, required=True, help="figure to write: .png, .svg")
    arguments = parser.parse_args()
    figure, axes = plt.subplots(figsize=(5.5, 4), layout="constrained")
    baseline: dict[float, list[float]] = {}
    for number, curve in enumerate(arguments.curves):
        label, _, pattern = curve.partition("=")
        scores = read(pattern, arguments.metric)
        baseline |= scores[BASELINE]
        draw(axes, label, scores["model"], marker="o", color=f"C{number}")
        if "network" in scores:
            draw(axes, f"{label}, network alone", scores["network"], marker="o", color=f"C{number}", linestyle=":")
    draw(axes, "random forest", baseline, marker="s", color="0.5")
    percent = [100 * fraction for fraction in sorted(baseline)]
    axes.set(xscale="log", xlabel="training labels used (%)", ylabel=arguments.metric, xticks=percent)
    axes.set_xticklabels([f"{p:g}" for p in percent])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(arguments.output, dpi=150)


if __name__ == "__main__":
    main()
