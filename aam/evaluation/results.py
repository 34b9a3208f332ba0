"""An evaluation as tables: JSON for scripts, TSV, Markdown."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from aam.baselines import TOP_FEATURES
from aam.evaluation.scores import LEAST_UNITS, RESAMPLES, Comparison, Samples, Scores, compare, mean_scores, score

FEW_UNITS = 10
"""Groups, or samples on their own. With fewer, a percentile interval is too narrow to trust."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A model beside baselines on the same test samples."""

    column: str
    samples: Samples
    model: Scores
    runs: list[tuple[int, int]]
    """Repeat and seed of each run of the model."""
    seed_average: dict[str, float]
    """Scores of the mean prediction of all seeds; empty for one seed."""
    network: Scores | None
    """Of the network alone, where the model is an ensemble."""
    baselines: dict[str, Scores]
    comparisons: dict[str, Comparison]
    """Of the model with each baseline."""
    caveats: list[str]
    """What makes the scores too good."""
    notes: list[str]
    predictions: pd.DataFrame
    """Truth, and what was said, of each sample."""
    command: str = ""
    """That does it again."""


def assess(
    column: str,
    samples: Samples,
    model: dict[tuple[int, int], np.ndarray],
    baselines: dict[str, dict[int, np.ndarray]],
    *,
    network: Sequence[np.ndarray] = (),
    seed: int,
    reads: str = "all reads",
    caveats: list[str],
    notes: list[str],
) -> Evaluation:
    """Score what was said.

    Parameters
    ----------
    column : str
        Name of the target.
    samples : Samples
        Those scored.
    model : dict
        Repeat and seed to what that run says.
    baselines : dict
        Name to repeat to what that baseline says.
    network : sequence of ndarray
        What the network of each run says alone, where the model is an ensemble.
    seed : int
        Of the bootstrap.
    reads : str
        What the baselines have of each sample.
    caveats, notes : list of str
        What is to be known beside the scores.
    """
    weights = samples.weights(seed)
    said, others = list(model.values()), {name: list(runs.values()) for name, runs in baselines.items()}
    scored = {name: score(samples, others[name], weights, list(runs)) for name, runs in baselines.items()}
    repeats = [repeat for repeat, _ in model]
    return Evaluation(
        column=column,
        samples=samples,
        model=score(samples, said, weights, repeats),
        runs=list(model),
        seed_average=_seed_average(samples, model),
        network=score(samples, [*network], weights, repeats) if network else None,
        baselines=scored,
        comparisons={name: compare(samples, said, runs, weights) for name, runs in others.items()},
        caveats=[*caveats, *_of_depth(samples, others, scored, weights)],
        notes=[*notes, *_notes(samples, baselines, reads)],
        predictions=_predictions(samples, model, baselines),
    )


def _seed_average(samples: Samples, model: dict[tuple[int, int], np.ndarray]) -> dict[str, float]:
    repeats = sorted({repeat for repeat, _ in model})
    if len(repeats) == len(model):
        return {}
    means = [np.mean([said for (repeat, _), said in model.items() if repeat == r], axis=0) for r in repeats]
    return mean_scores([samples.scores(said) for said in means])


def _of_depth(
    samples: Samples, baselines: dict[str, list[np.ndarray]], scored: dict[str, Scores], weights: np.ndarray
) -> list[str]:
    """Whether the target goes along with how deeply samples were sequenced."""
    if samples.units < LEAST_UNITS or "depth" not in baselines:
        return []
    alone = scored["depth"].mean
    if samples.classes:
        # By macro-F1, guessing beats always saying the most frequent class.
        metric, guessing = "balanced_accuracy", 1 / len(np.unique(samples.truth))
        low, _ = scored["depth"].interval[metric]
        is_told, than = low > guessing + 1e-9, f"guessing, which has {guessing:.4g}"
    else:
        metric = samples.main_metric
        found = compare(samples, baselines["depth"], baselines["mean"], weights) if "mean" in baselines else None
        is_told = found is not None and found.interval[1] < 0
        than = "" if found is None else f"mean by {abs(found.difference):.4g}"
    if not is_told:
        return []
    return [
        f"SEQUENCING DEPTH alone, the number of reads of a sample, has {metric} {alone[metric]:.4g}, better than "
        f"{than}: what is found in unrarefied reads may be the sequencing, not the microbes. With --rarefy-depth N the "
        "model sees the same number of reads of each sample, and with --rarefied-baselines they do"
    ]


def _verdict(samples: Samples, found: Comparison) -> str:
    """What the interval says of the first of the two compared."""
    if samples.units < LEAST_UNITS:
        return "not told apart (too few)"
    gain = found.interval if samples.classes else (-found.interval[1], -found.interval[0])
    return "better" if gain[0] > 0 else "worse" if gain[1] < 0 else "not told apart"


def _notes(samples: Samples, baselines: Collection[str], reads: str) -> list[str]:
    what = "samples" if samples.groups is None else "groups"
    over = what if samples.groups is None else f"groups ({samples.units})"
    lines = [f"in brackets: 95 % bootstrap interval over test {over}, {RESAMPLES} resamples; not over training"]
    if samples.units < FEW_UNITS:
        lines.append(f"{samples.units} {what} only: the intervals are too narrow, and a difference means little")
    if baselines:
        balance = "; classes weigh as the model's do" if samples.classes else ""
        lines.append(
            f"the baselines are not tuned: fixed settings, {reads}; random forests on the shares of all ASVs, the "
            f"others on the {TOP_FEATURES} most prevalent{balance}. They were trained on the "
            "training and the validation samples, which the model has had both: a network chooses its best epoch by "
            "the latter, and the other members of an ensemble learn from them"
        )
        if "median" in baselines:
            lines.append(
                "baselines predict means, but for those with median in their name. Of numbers with a long tail, "
                "medians have the lower MAE: a model that learned by it (--target-loss mae) gains that beside what it "
                "knows"
            )
        if samples.groups is not None:
            lines.append(
                "the p-values take samples for independent, which those of a group are not: go by the interval"
            )
    return lines


def _predictions(
    samples: Samples, model: dict[tuple[int, int], np.ndarray], baselines: dict[str, dict[int, np.ndarray]]
) -> pd.DataFrame:
    """A row for each sample; classes by their names."""
    several = len({repeat for repeat, _ in model}) > 1

    def label(name: str, repeat: int) -> str:
        return f"{name}_repeat{repeat}" if several else name

    columns: dict[str, Any] = {"SampleID": samples.ids, "truth": _named(samples, samples.truth)}
    if samples.groups is not None:
        columns["group"] = samples.groups
    columns |= {label("fold", repeat): fold for repeat, fold in samples.folds.items()}
    for (repeat, seed), said in model.items():
        columns[f"{label('model', repeat)}_seed{seed}"] = _named(samples, said)
    for name, runs in baselines.items():
        columns |= {label(name, repeat): _named(samples, said) for repeat, said in runs.items()}
    return pd.DataFrame(columns)


def _named(samples: Samples, said: np.ndarray) -> np.ndarray:
    if not samples.classes:
        return said
    return np.array(samples.classes)[said if said.ndim == 1 else said.argmax(axis=1)]


def to_json(found: Evaluation) -> dict[str, Any]:
    """As JSON types; `["model"]["mae"]` and `["baselines"][NAME]["mae"]` are the means over the runs."""
    runs = [{"repeat": r, "seed": s, **scores} for (r, s), scores in zip(found.runs, found.model.runs, strict=True)]
    model = {**_plain(found.model), "seeds": runs}
    if found.seed_average:
        model["seed_average"] = found.seed_average
    network = {} if found.network is None else {"network": _plain(found.network)}
    baselines = {}
    for name, scores in found.baselines.items():
        of_repeats = {"repeats": scores.runs} if len(scores.runs) > 1 else {}
        against = {"metric": found.samples.main_metric, **asdict(found.comparisons[name])}
        baselines[name] = {**_plain(scores), **of_repeats, "model_minus_baseline": against}
    groups = found.samples.groups
    return {
        "target": found.column,
        "classes": list(found.samples.classes),
        "samples": len(found.samples.ids),
        "groups": None if groups is None else len(np.unique(groups)),
        "command": found.command,
        "caveats": found.caveats,
        "notes": found.notes,
        "model": model,
        **network,
        "baselines": baselines,
    }


def _plain(scores: Scores) -> dict[str, Any]:
    spread = {"spread": scores.spread} if scores.spread else {}
    folds = {"folds": {"mean": scores.fold_mean, "spread": scores.fold_spread}} if scores.fold_mean else {}
    return {**scores.mean, "interval": {name: list(ends) for name, ends in scores.interval.items()}, **spread, **folds}


def to_table(found: Evaluation) -> pd.DataFrame:
    """A row for each metric of each predictor, and of each run of the model."""
    rows = []
    for name, scores in _predictors(found).items():
        for metric, value in scores.mean.items():
            low, high = scores.interval.get(metric, (None, None))
            folds = (of.get(metric) for of in (scores.fold_mean, scores.fold_spread))
            rows.append((name, None, None, metric, value, low, high, scores.spread.get(metric), *folds))
    for (repeat, seed), scores in zip(found.runs, found.model.runs, strict=True):
        rows += [("model", repeat, seed, metric, value, *[None] * 5) for metric, value in scores.items()]
    columns = ["predictor", "repeat", "seed", "metric", "value", "low", "high", "spread", "fold_mean", "fold_spread"]
    return pd.DataFrame(rows, columns=columns).astype({"repeat": "Int64", "seed": "Int64"})


def _predictors(found: Evaluation) -> dict[str, Scores]:
    alone = {} if found.network is None else {"network": found.network}
    return {"model": found.model, **alone, **found.baselines}


def to_markdown(found: Evaluation) -> str:
    """The evaluation to read."""
    groups = "" if found.samples.groups is None else f" of {len(np.unique(found.samples.groups))} groups"
    parts = [
        f"# {found.column}: {len(found.samples.ids)} test samples{groups}",
        "\n\n".join(f"**{caveat}**" for caveat in found.caveats),
        _score_table(found),
        _comparison_table(found) if found.comparisons else "",
        _fold_table(found) if found.model.fold_mean else "",
        "\n".join(f"- {note}" for note in found.notes),
        f"```bash\n{found.command}\n```" if found.command else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _score_table(found: Evaluation) -> str:
    names = list(found.model.mean)

    def row(label: str, values: dict[str, float], interval: dict[str, tuple[float, float]] | None = None) -> str:
        cells = [f"{values[name]:.4g}" if name in values else "-" for name in names]
        ends = interval or {}
        beside = [f" ({ends[n][0]:.4g} to {ends[n][1]:.4g})" if n in ends else "" for n in names]
        return f"| {label} | {' | '.join(c + b for c, b in zip(cells, beside, strict=True))} |"

    several = len(found.runs) > 1
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines.append(row(f"model, mean of {len(found.runs)} runs" if several else "model", found.model.mean,
                     found.model.interval))  # fmt: skip
    if several:
        lines.append(row("model, standard deviation over runs", found.model.spread))
        for (repeat, seed), scores in zip(found.runs, found.model.runs, strict=True):
            which = f"repeat {repeat}, seed {seed}" if len({r for r, _ in found.runs}) > 1 else f"seed {seed}"
            lines.append(row(f"model, {which}", scores))
    if found.seed_average:
        lines.append(row("model, prediction averaged over seeds", found.seed_average))
    if found.network is not None:
        lines.append(row("its network alone", found.network.mean, found.network.interval))
    lines += [row(name, scores.mean, scores.interval) for name, scores in found.baselines.items()]
    return "\n".join(lines)


def _comparison_table(found: Evaluation) -> str:
    metric = found.samples.main_metric
    tests = sorted({comparison.test for comparison in found.comparisons.values()})
    lines = [f"| model less | {metric} (95 %) | the model is | p ({', '.join(tests)}) |", "|---|---|---|---|"]
    for name, comparison in found.comparisons.items():
        low, high = comparison.interval
        shown = f"{comparison.difference:+.4g} ({low:+.4g} to {high:+.4g})"
        lines.append(f"| {name} | {shown} | {_verdict(found.samples, comparison)} | {comparison.p_value:.2g} |")
    return "\n".join(lines)


def _fold_table(found: Evaluation) -> str:
    names = list(found.model.fold_mean)
    lines = [f"| each fold by itself: mean (sd) | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for name, scores in _predictors(found).items():
        label = "its network alone" if name == "network" else name
        of = {n: f"{scores.fold_mean[n]:.4g} ({scores.fold_spread.get(n, 0):.2g})" for n in scores.fold_mean}
        lines.append(f"| {label} | {' | '.join(of.get(name, '-') for name in names)} |")
    if lost := [name for name in found.model.mean if name not in names]:
        lines.append(f"\nNot of single folds, as some have too few samples or classes for it: {', '.join(lost)}.")
    return "\n".join(lines)
