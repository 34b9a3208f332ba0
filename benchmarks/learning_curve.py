"""Draw learning curves: scores over the share of labels, from the JSON files that jobs/evaluate.py writes."""

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
    """Scores by who has them and by the share of labels, one for each file.

    Parameters
    ----------
    pattern : str
        Path of the files, {} in the place of the share of labels (0.1, or 1 for all); * stands for anything
        else, seeds say.
    metric : str
        Which score.
    """
    found: dict[str, dict[float, list[float]]] = {}
    parts = re.split(r"(\{\}|\*)", pattern)
    expression = "".join({"{}": r"(\d+\.?\d*)", "*": ".*"}.get(part, re.escape(part)) for part in parts)
    for path in sorted(Path().glob(pattern.replace("{}", "*"))):
        share = re.fullmatch(expression, str(path))
        if share is None:
            continue
        scores = json.loads(path.read_text())
        said = {"model": scores["model"], "network": scores.get("network"), BASELINE: scores["baselines"][BASELINE]}
        for who, of in said.items():
            if of is not None:
                found.setdefault(who, {}).setdefault(float(share[1]), []).append(of[metric])
    if not found:
        raise SystemExit(f"{pattern}: no such files (with {{}} in the place of the share of labels)")
    return found


def draw(axes: plt.Axes, label: str, scores: dict[float, list[float]], **style: str) -> None:
    """A line through the means, with their standard deviations; printed too."""
    shares = sorted(scores)
    means = [float(np.mean(scores[share])) for share in shares]
    spreads = [float(np.std(scores[share], ddof=1)) if len(scores[share]) > 1 else 0.0 for share in shares]
    axes.errorbar([100 * share for share in shares], means, spreads, label=label, capsize=3, **style)
    for share, mean, spread in zip(shares, means, spreads, strict=True):
        print(f"{label}\t{share:g}\t{mean:.4g}\t{spread:.2g}\t{len(scores[share])} runs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "curves",
        nargs="+",
        metavar="LABEL=PATTERN",
        help="with stage 1=runs/with-{}-*.json, say, for runs/with-0.1-0.json and others",
    )
    parser.add_argument("--metric", default="mae")
    parser.add_argument("--output", type=Path, required=True, help="picture to write: .png, .svg")
    arguments = parser.parse_args()
    figure, axes = plt.subplots(figsize=(5.5, 4), layout="constrained")
    baseline: dict[float, list[float]] = {}
    for number, curve in enumerate(arguments.curves):
        label, _, pattern = curve.partition("=")
        found = read(pattern, arguments.metric)
        baseline |= found[BASELINE]
        draw(axes, label, found["model"], marker="o", color=f"C{number}")
        if "network" in found:
            draw(axes, f"{label}, network alone", found["network"], marker="o", color=f"C{number}", linestyle=":")
    draw(axes, "random forest", baseline, marker="s", color="0.5")
    shares = sorted(baseline)
    axes.set(xscale="log", xlabel="training labels used (%)", ylabel=arguments.metric, xticks=[100 * s for s in shares])
    axes.set_xticklabels([f"{100 * s:g}" for s in shares])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(arguments.output, dpi=150)


if __name__ == "__main__":
    main()
