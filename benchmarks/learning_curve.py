"""Draw learning curves: scores over the share of labels, from the JSON files that jobs/evaluate.py writes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BASELINE = "random_forest"


def read(pattern: str, metric: str) -> dict[float, tuple[float, float]]:
    """Scores of the model and of the random forest by the share of labels; `pattern` has {} in the place of it."""
    found = {}
    for path in sorted(Path().glob(pattern.replace("{}", "*"))):
        before, after = pattern.split("{}")
        share = float(str(path)[len(before) : len(str(path)) - len(after)])
        scores = json.loads(path.read_text())
        found[share] = (scores["model"][metric], scores["baselines"][BASELINE][metric])
    if not found:
        raise SystemExit(f"{pattern}: no such files (with {{}} in the place of the share of labels)")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("curves", nargs="+", metavar="LABEL=PATTERN", help="with stage 1=runs/with-{}.json, say")
    parser.add_argument("--metric", default="mae")
    parser.add_argument("--output", type=Path, required=True, help="picture to write: .png, .svg")
    arguments = parser.parse_args()
    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    baseline: dict[float, float] = {}
    for curve in arguments.curves:
        label, _, pattern = curve.partition("=")
        found = read(pattern, arguments.metric)
        baseline |= {share: of_forest for share, (_, of_forest) in found.items()}
        axes.plot([100 * s for s in found], [of_model for of_model, _ in found.values()], marker="o", label=label)
        print(label, {share: round(of_model, 3) for share, (of_model, _) in found.items()})
    shares = sorted(baseline)
    axes.plot([100 * s for s in shares], [baseline[s] for s in shares], marker="s", color="0.5", label="random forest")
    print("random forest", {share: round(baseline[share], 3) for share in shares})
    axes.set(xscale="log", xlabel="training labels used (%)", ylabel=arguments.metric, xticks=[100 * s for s in shares])
    axes.set_xticklabels([f"{100 * s:g}" for s in shares])
    axes.legend(frameon=False)
    figure.savefig(arguments.output, dpi=150)


if __name__ == "__main__":
    main()
