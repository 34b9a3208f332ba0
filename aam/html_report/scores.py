"""How well the target is predicted: validation samples, test samples, and baselines on the same ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from aam.baselines import baseline_names, fit_predict, reads_of
from aam.html_report.page import Html, bullets, element, figure, grid, join, paragraph, table, tiles
from aam.html_report.pictures import BLUE, GREEN, confusion, reliability, residuals, true_against_predicted
from aam.html_report.run_files import Run, Scored, draw
from aam.report import METRIC_NAMES
from aam.training.figures import shorten

MOST_TRAINING_SAMPLES = 2000
"""Training samples of the baselines: a report must not take long."""
_BASELINES = {
    "mean": "always the mean of the training samples",
    "majority": "always the shares of the classes in training",
    "depth": "random forest on the number of reads alone",
    "ridge": "ridge regression",
    "logistic": "logistic regression",
    "random_forest": "random forest",
}


def predictions(run: Run) -> Html:
    """Predicted and true values of validation and test samples, apart from each other."""
    parts = [
        element("h3", f"Validation: {len(run.validation.sample_ids)} samples"),
        paragraph(_about_validation(run)),
        *_of_part(run.validation, BLUE),
    ]
    if run.test is not None:
        parts += [
            element("h3", f"Test: {len(run.test.sample_ids)} held-out samples"),
            bullets(_left_out(run, run.test)),
            *_of_part(run.test, GREEN),
        ]
    elif kept := len(run.split("test")):
        parts += [
            element("h3", f"Test: {kept} held-out samples"),
            paragraph("Not shown: fewer than two of them have a value of the target that the model could predict."),
        ]
    return join(parts)


def _about_validation(run: Run) -> str:
    if run.best.ensemble is None:
        return "These samples chose the best epoch; nothing else was fitted to them."
    if run.best.ensemble.networks:
        return (
            "What is shown of each of these samples was predicted by an ensemble whose members, its network too, were "
            "fitted, chosen and given their weights in folds without it. In the end they learned from these samples "
            "too, and the run's own network, of which these chose the best epoch, is averaged with them."
        )
    return (
        "These samples chose the best epoch, the weights of the ensemble's members, the temperature of class "
        "probabilities, the calibration slope of predicted numbers and the rounds of boosting: scores and calibration "
        "are a little too good for that. The members learned from them afterwards."
    )


def _use_of_validation(run: Run) -> str:
    if run.best.ensemble is None:
        return "The validation samples chose the best epoch of this model, and nothing of theirs."
    return (
        "The validation samples chose the best epoch of this model and, in predictions of the test samples, its "
        "ensemble learned from them; the baselines have not met them."
    )


def _left_out(run: Run, test: Scored) -> list[str]:
    missing = len(run.split("test")) - len(test.sample_ids)
    reason = "more than a report predicts, or of classes that no training sample has"
    return [f"{missing} of {len(run.split('test'))} test samples are not shown: {reason}"] if missing else []


def _of_part(scored: Scored, color: str) -> Iterator[Html]:
    yield tiles((METRIC_NAMES.get(name, name), f"{value:.4g}") for name, value in scored.scores().items())
    if scored.target.classes:
        yield from _classes(scored)
        return
    name = shorten(scored.target.column, 30)
    yield grid(
        figure(
            true_against_predicted(scored.truth, scored.predicted, scored.interval, name, color),
            "A point is a sample; on the line, prediction and truth are equal." + _of_intervals(scored),
        ),
        figure(
            residuals(scored.truth, scored.predicted, name, color),
            "By how much predictions are too high (above 0) or too low; a slope: extremes are drawn to the mean.",
        ),
    )


def _of_intervals(scored: Scored) -> str:
    if scored.interval is None:
        return ""
    low, high = scored.interval.T
    inside = ((low <= scored.truth) & (scored.truth <= high)).mean()
    lowest, highest = min(scored.target.quantiles), max(scored.target.quantiles)
    return (
        f" Bars reach from quantile {lowest:g} to {highest:g}: they should hold {highest - lowest:.0%} of the true "
        f"values, and hold {inside:.0%}."
    )


def _classes(scored: Scored) -> Iterator[Html]:
    classes, probabilities = scored.target.classes, scored.predicted
    predicted, codes = probabilities.argmax(axis=1), np.arange(len(classes))
    right, confidence = predicted == scored.truth, probabilities.max(axis=1)
    bins = int(np.clip(len(predicted) // 15, 2, 8))
    accuracy, mean_confidence = calibration_curve(right, confidence, n_bins=bins, strategy="quantile")
    counts = confusion_matrix(scored.truth, predicted, labels=codes)
    yield grid(
        figure(confusion(counts, classes), "Samples by true and predicted class; darker is more of the true class."),
        figure(
            reliability(mean_confidence, accuracy),
            f"Calibration, in {len(accuracy)} bins of equal size: below the line the model is too sure of itself. On "
            f"average it gives {confidence.mean():.1%} to the class it predicts, and is right in {right.mean():.1%}.",
        ),
    )
    zero: Any = 0  # the hints of scikit-learn say text
    scores = precision_recall_fscore_support(scored.truth, predicted, labels=codes, zero_division=zero)
    rows = [
        (name, f"{n:.0f}", *(f"{value:.3f}" for value in values))
        for name, (*values, n) in zip(classes, np.array(scores).T, strict=True)
    ]
    caption = (
        "precision: the share of those predicted that are right; recall: the share of those there are that is found"
    )
    yield table(caption, ("class", "samples", "precision", "recall", "F1"), rows)


def baselines(run: Run) -> Html:
    """Scores of the model and of baselines, on the same samples."""
    target = run.validation.target
    names = [name for name in baseline_names(classifier=bool(target.classes)) if name in _BASELINES]
    trained = [s for s in run.split("train") if s in run.truth]
    chosen = draw(trained, MOST_TRAINING_SAMPLES)
    parts = {"validation": run.validation} | ({} if run.test is None else {"test": run.test})
    train_x = reads_of(run.dataset, chosen)
    train_y = np.array([run.truth[s] for s in chosen])
    other_x = reads_of(run.dataset, [s for scored in parts.values() for s in scored.sample_ids])
    ends = np.cumsum([len(scored.sample_ids) for scored in parts.values()])[:-1]
    seed = run.record["config"]["loop"]["seed"]
    scores = {part: {"this model": scored.scores()} for part, scored in parts.items()}
    for name in names:
        predicted = fit_predict(
            name,
            train_x,
            train_y,
            other_x,
            classes=target.classes,
            balanced=bool(target.class_weights),
            seed=seed,
            jobs=-1,
        )
        for (part, scored), values in zip(parts.items(), np.split(predicted, ends), strict=True):
            scores[part][_BASELINES[name]] = scored.scores(values)
    how_many = f"all {len(trained)}" if len(chosen) == len(trained) else f"{len(chosen)}, drawn, of {len(trained)}"
    return join(
        [
            paragraph(
                f"Baselines, not tuned, trained on {how_many} training samples, with all reads of a sample. "
                + _use_of_validation(run)
            ),
            *(_beside_each_other(part, len(parts[part].sample_ids), rows) for part, rows in scores.items()),
        ]
    )


def _beside_each_other(part: str, samples: int, scores: dict[str, dict[str, float]]) -> Html:
    names = [name for name in METRIC_NAMES if any(name in found for found in scores.values())]
    rows = [
        (model, *(f"{found[name]:.4g}" if name in found else "-" for name in names)) for model, found in scores.items()
    ]
    return table(f"{part}, {samples} samples", ("", *(METRIC_NAMES[name] for name in names)), rows)
