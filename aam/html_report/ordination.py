"""UniFrac as it is and as the encoder has it: pair by pair, and as a picture of the samples."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from skbio import DistanceMatrix
from skbio.stats.ordination import pcoa

from aam.data.dataset import PreparedDataset
from aam.data.metadata import numeric_column
from aam.data.unifrac import RootPaths, unweighted_unifrac
from aam.html_report import REPORT
from aam.html_report.encoding import Encoded, affordable, collect, encode, outputs
from aam.html_report.page import Html, element, figure, grid, join, paragraph, tiles
from aam.html_report.pictures import ordination, pair_density
from aam.html_report.run_files import Run, prepared
from aam.model.sequence_encoder import SequenceEncoder, unifrac_distances
from aam.training.base_cache import encoder_of
from aam.training.metrics import regression_metrics

COLOURS = 3
"""Columns of the metadata that pictures of stage 1 are coloured by."""
MOST_CLASSES = 12
FEWEST = 4
"""Samples for a picture."""
_ALIKE = 0.9
"""Correlation beyond which a second column would show the same picture."""


@dataclass(frozen=True, kw_only=True)
class Axes:
    """Samples on the first two axes of an ordination."""

    points: np.ndarray
    """float64 [n, 2]"""
    shares: np.ndarray
    """Share of the variation on each axis."""


def unifrac(run: Run) -> Html:
    """UniFrac distances of validation samples, true and predicted."""
    dataset, reason = _dataset_with_tree(run)
    if dataset is None:
        return paragraph(reason)
    encoder, contract, asked = encoder_of(run.best.model), run.best.spec.contract, run.split("val")
    own = dataset is run.dataset
    if not own:  # with a tree, which not all ASVs are in, nor all samples deep enough without them
        deep = set(np.array(dataset.sample_ids)[dataset.depths >= contract.rarefy_depth])
        asked = [s for s in asked if s in deep]
    ids = run.encoded.batch.sample_ids if own else affordable(dataset, contract, asked)
    if len(ids) < FEWEST:
        return paragraph(f"{len(ids)} validation samples: too few for a picture.")
    encoded = run.encoded if own else encode(encoder, dataset, contract, ids)
    assert dataset.paths is not None
    truth, predicted = distances(encoder, encoded, dataset.paths)
    pair = np.triu_indices(len(ids), k=1)
    scores = regression_metrics(truth[pair], predicted[pair])
    picture = pair_density(truth[pair], predicted[pair], "UniFrac")
    which = f"{len(ids)} validation samples" + ("" if len(ids) == len(asked) else f", drawn, of {len(asked)}")
    return join(
        [
            paragraph(f"All {len(pair[0])} pairs of {which}. {reason}"),
            tiles((name, f"{scores[tag]:.4g}") for tag, name in _SCORES.items() if tag in scores),
            figure(
                picture,
                "Darker: more pairs; on the line, both are equal. The figure of the training, unifrac_r2, is of pairs "
                "within batches, in stage 1 with masked nucleotides, and differs somewhat.",
            ),
            element("h3", "Samples on principal coordinates"),
            *_pictures(run, dataset, ids, truth, predicted),
        ]
    )


_SCORES = {"r2": "R² of the pairs", "mae": "mean absolute error", "spearman": "Spearman's correlation"}


def _dataset_with_tree(run: Run) -> tuple[PreparedDataset | None, str]:
    """The dataset to take true distances from, or why there is none; and what to know of it."""
    if run.target is None and run.record["config"]["loss"]["base_weight"] == 0:
        return None, "The encoder was not trained on UniFrac (--base-weight 0)."
    if run.target is None or run.record["config"]["loss"]["base_weight"] > 0:
        return run.dataset, ""
    if run.record["pretrained"] is None:
        return None, "The encoder was trained from scratch for the target alone: it knows no UniFrac (--base-weight)."
    if run.base_record is None:
        return None, "The run.json of stage 1, which names the tree, is not there: see the report in its run folder."
    if not run.best.spec.freeze_base:
        stage_1 = Path(run.base_record["config"]["output_dir"]) / REPORT
        return None, (
            "The encoder was fine-tuned for the target alone (--base-weight 0), and nothing held it to UniFrac any "
            f"more. How it was before that is in the report of stage 1: {stage_1}"
        )
    if run.base_record["config"]["loss"]["base_weight"] == 0:
        return None, "The frozen encoder was not trained on UniFrac."
    tables = [
        [record["dataset"]["sha256"].get(name) for name in ("table", "sequences")]
        for record in (run.record, run.base_record)
    ]
    if tables[0] != tables[1]:  # its samples are others, even where their ids are the same
        return None, (
            "Stage 1 was trained on another table, or other sequences, and its tree is of those: no true distances of "
            "these samples are known here."
        )
    return prepared(run.base_record), "The encoder is stage 1's, frozen; the tree is the one that stage 1 was given."


@torch.no_grad()
def distances(encoder: SequenceEncoder, encoded: Encoded, paths: RootPaths) -> tuple[np.ndarray, np.ndarray]:
    """UniFrac of all pairs of samples as drawn in validation, true and predicted: float64 [n, n] each."""
    truth = unweighted_unifrac(_present(encoded), paths)
    embedding = torch.from_numpy(collect(outputs(encoder, encoded), lambda out: out.embedding))
    offset, scale = encoder.distance_offset.cpu(), encoder.distance_log_scale.exp().cpu()
    rows = [unifrac_distances(row[None], embedding, offset, scale) for row in embedding]
    predicted = torch.cat(rows).double().numpy().clip(0)
    np.fill_diagonal(predicted, 0)
    return truth, (predicted + predicted.T) / 2


def _present(encoded: Encoded) -> list[np.ndarray]:
    """Rows of the dataset of the ASVs of each sample."""
    asvs, batch = encoded.batch.asvs.cpu().numpy(), encoded.batch
    slots, masks = batch.slot.cpu().numpy(), batch.slot_mask.cpu().numpy()
    return [asvs[slot[mask]] for slot, mask in zip(slots, masks, strict=True)]


def principal_coordinates(matrix: np.ndarray) -> Axes:
    """The first two principal coordinates of distances."""
    with warnings.catch_warnings():
        # UniFrac is not Euclidean: some eigenvalues are below 0, and scikit-bio warns of it.
        warnings.simplefilter("ignore", RuntimeWarning)
        found = pcoa(DistanceMatrix(matrix), warn_neg_eigval=False)
    return Axes(
        points=np.asarray(found.samples)[:, :2],
        shares=np.asarray(found.proportion_explained)[:2],
    )


def _pictures(
    run: Run, dataset: PreparedDataset, ids: list[str], truth: np.ndarray, predicted: np.ndarray
) -> list[Html]:
    true_axes, predicted_axes = principal_coordinates(truth), principal_coordinates(predicted)
    # An axis has no direction of its own: turn those of the prediction the way of the true ones.
    turn = np.sign((true_axes.points * predicted_axes.points).sum(axis=0))
    turned = predicted_axes.points * np.where(turn == 0, 1, turn)
    colours, said = _colours(run, dataset, ids, truth)
    shown = []
    for name, values in colours.items():
        of = f", coloured by {name}" if name else ""
        shown.append(
            grid(
                figure(ordination(true_axes.points, true_axes.shares, values, name), f"True UniFrac{of}."),
                figure(ordination(turned, predicted_axes.shares, values, name), f"Predicted UniFrac{of}."),
                class_="pair",
            )
        )
    return [paragraph(said), *shown]


def _colours(
    run: Run, dataset: PreparedDataset, ids: list[str], truth: np.ndarray
) -> tuple[dict[str, np.ndarray | None], str]:
    """What to colour the samples by, by name; and how it was chosen."""
    said = "In brackets, the share of the variation that an axis explains."
    if run.target is not None:
        values = [run.truth.get(sample) for sample in ids]
        coded = _few_classes(values) if run.target.classes else np.array(values, dtype=np.float64)
        return {run.target.column: coded}, said
    if dataset.metadata is None:
        return {"": None}, f"{said} No colours: the run was given no --metadata."
    found = choose_columns(dataset.metadata.reindex(ids), truth)
    if not found:
        return {"": None}, f"{said} No column of the metadata is fit for colours."
    shares = ", ".join(f"{name} {share:.1%}" for name, (share, _) in found.items())
    return {name: values for name, (_, values) in found.items()}, (
        f"{said} Coloured by the columns that go along best with the true distances (adjusted R² of the squared "
        f"distances: {shares}); chosen for that, they prove nothing."
    )


def _few_classes(values: list[str | None]) -> np.ndarray:
    """Classes, the rare ones together where there are more of them than colours."""
    common = Counter(value for value in values if value is not None).most_common()
    rare = {name for name, _ in common[MOST_CLASSES - 1 :]} if len(common) > MOST_CLASSES else set()
    return np.array([f"{len(rare)} others" if value in rare else value for value in values], dtype=object)


def choose_columns(frame: pd.DataFrame, matrix: np.ndarray) -> dict[str, tuple[float, np.ndarray]]:
    """The columns of a metadata frame that explain most of the distances between its samples.

    Parameters
    ----------
    frame : DataFrame
        Text or None, the samples in the order of the distances.
    matrix : ndarray [n, n]
        Distances.

    Returns
    -------
    dict
        By column, the adjusted R² and the values: float64, NaN where missing, or text, None where missing.
    """
    scored = {}
    for name in frame.columns:
        values = _values(frame, name)
        if values is not None and (share := _explained(values, matrix)) > 0:
            scored[str(name)] = (share, values)
    chosen: dict[str, tuple[float, np.ndarray]] = {}
    for name, (share, values) in sorted(scored.items(), key=lambda item: -item[1][0]):
        if len(chosen) < COLOURS and not any(_alike(values, other) for _, other in chosen.values()):
            chosen[name] = (share, values)
    return chosen


def _values(frame: pd.DataFrame, name: str) -> np.ndarray | None:
    """A column as numbers or classes; None where it is neither, or half of it is missing."""
    text = frame[name].to_numpy(dtype=object, copy=True)
    known = pd.notna(text)
    distinct = len(set(text[known]))
    if distinct < 2 or 2 * known.sum() < len(text):
        return None
    if distinct > min(MOST_CLASSES, known.sum() / 2):
        try:
            return numeric_column(frame, name, source="metadata").to_numpy(dtype=np.float64)
        except ValueError:
            return None
    text[~known] = None
    return text


def _explained(values: np.ndarray, matrix: np.ndarray) -> float:
    """Share of the squared distances that a column explains, adjusted for its number of classes (as in PERMANOVA)."""
    design, known = _design(values)
    n, terms = design.shape
    if n <= terms + 1:
        return 0.0
    squared = -0.5 * matrix[np.ix_(known, known)] ** 2
    centred = squared - squared.mean(axis=0) - squared.mean(axis=1, keepdims=True) + squared.mean()
    basis, _ = np.linalg.qr(design - design.mean(axis=0))
    share = np.trace(basis.T @ centred @ basis) / np.trace(centred)
    return float(1 - (1 - share) * (n - 1) / (n - terms - 1))


def _design(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A column as regressors [n, terms] of the samples that have a value, and which these are."""
    known = np.flatnonzero(pd.notna(values))
    if values.dtype.kind == "f":
        return values[known, None], known
    codes, names = pd.factorize(values[known])
    return np.eye(len(names))[codes][:, 1:], known


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two columns say nearly the same."""
    both = np.flatnonzero(pd.notna(one) & pd.notna(other))
    first, second = (_design(values[both])[0] for values in (one, other))
    if len(both) < 3 or min(first.shape[1], second.shape[1]) == 0:
        return False
    # The largest canonical correlations: 1 where one column follows from the other.
    bases = [np.linalg.qr(design - design.mean(axis=0))[0] for design in (first, second)]
    correlations = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)
    return bool(correlations.mean() > _ALIKE)
