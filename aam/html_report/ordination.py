"""UniFrac as it is and as the encoder has it: pair by pair, and as a picture of the samples."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from skbio import DistanceMatrix
from skbio.stats.ordination import pcoa

from aam.config import DistanceMetric
from aam.data.batches import Draw, exact_unifrac
from aam.data.dataset import PreparedDataset
from aam.data.unifrac import RootPaths
from aam.evaluation.distances import score_matrices, score_values
from aam.html_report import REPORT
from aam.html_report.columns import MOST_CLASSES, choose_columns
from aam.html_report.encoding import Encoded, affordable, encode, outputs
from aam.html_report.page import Html, element, figure, grid, join, paragraph, tiles
from aam.html_report.pictures import ordination, pair_density, true_against_predicted
from aam.html_report.run_files import Run, prepared
from aam.model.sequence_encoder import SequenceEncoder
from aam.predict.distances import distance_matrix
from aam.predict.samples import SampleOutputs
from aam.training.base_cache import encoder_of
from aam.training.metrics import UNIFRAC_NAMES

FEWEST = 4
"""Samples for a figure."""


@dataclass(frozen=True, kw_only=True)
class Axes:
    """Samples on the first two axes of an ordination."""

    points: np.ndarray
    """float64 [n, 2]"""
    shares: np.ndarray
    """Share of the variation on each axis."""


def unifrac(run: Run) -> Html:
    """UniFrac distances and Faith's PD of validation samples, true and predicted."""
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
        return paragraph(f"{len(ids)} validation samples: too few for a figure.")
    encoded = run.encoded if own else encode(encoder, dataset, contract, ids)
    assert dataset.paths is not None
    which = f"{len(ids)} validation samples" + ("" if len(ids) == len(asked) else f", drawn, of {len(asked)}")
    parts = []
    for learned in run.best.spec.unifrac:
        if learned.metric == "faith_pd":
            parts += _of_faith_pd(encoder, encoded, dataset.paths)
        else:
            truth, predicted = distances(encoder, encoded, dataset.paths, learned.metric)
            parts += _of_distances(learned.metric, truth, predicted)
            parts += _figures(run, dataset, ids, UNIFRAC_NAMES[learned.metric], truth, predicted)
    return join([paragraph(f"Of {which}, by pairs where it is a distance. {reason}"), *parts])


def _of_distances(metric: DistanceMetric, truth: np.ndarray, predicted: np.ndarray) -> list[Html]:
    pair = np.triu_indices(len(truth), k=1)
    name, scores = UNIFRAC_NAMES[metric], score_matrices(truth, predicted)
    return [
        element("h3", f"{name[0].upper()}{name[1:]}: all {len(pair[0])} pairs"),
        tiles((label, f"{scores[tag]:.4g}") for tag, label in _SCORES.items() if tag in scores),
        figure(
            pair_density(truth[pair], predicted[pair], name),
            "Darker: more pairs; on the line, both are equal. The figure of the training is of pairs within batches, "
            "and differs somewhat.",
        ),
    ]


def _of_faith_pd(encoder: SequenceEncoder, encoded: Encoded, paths: RootPaths) -> list[Html]:
    truth = exact_unifrac("faith_pd", _draws(encoded), paths)
    predicted = _outputs(encoder, encoded).faith_pd.astype(np.float64)
    scores = score_values(truth, predicted)
    return [
        element("h3", "Faith's PD"),
        tiles((label, f"{scores[tag]:.4g}") for tag, label in _SCORES.items() if tag in scores),
        figure(
            true_against_predicted(truth, predicted, None, UNIFRAC_NAMES["faith_pd"]),
            "A point is a sample; on the line, both are equal. In branch lengths of the tree.",
        ),
    ]


_SCORES = {"r2": "R²", "mae": "mean absolute error", "spearman": "Spearman's correlation", "mantel": "Mantel's r"}


def _dataset_with_tree(run: Run) -> tuple[PreparedDataset | None, str]:
    """The dataset to take true distances from, or why there is none; and what to know of it."""
    spec, base_weight = run.best.spec, run.record["config"]["loss"]["base_weight"]
    if not spec.unifrac:
        return None, _why_no_unifrac(run)
    if run.target is None or base_weight > 0:
        return run.dataset, ""
    if run.base_record is None:
        return None, "The run.json of stage 1, which names the tree, is not there: see the report in its run folder."
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


def _why_no_unifrac(run: Run) -> str:
    if run.target is None:
        return "The encoder was not trained on UniFrac (--base-weight 0)."
    if run.record["pretrained"] is None:
        return "The encoder was trained from scratch for the target alone: it knows no UniFrac (--base-weight)."
    if run.best.spec.freeze_base:
        return "The frozen encoder was not trained on UniFrac."
    before = ""
    if run.base_record is not None:
        report = Path(run.base_record["config"]["output_dir"]) / REPORT
        before = f" How it was before that is in the report of stage 1: {report}"
    return (
        "The encoder was fine-tuned for the target alone (--base-weight 0), and nothing held it to UniFrac any more."
        + before
    )


def distances(
    encoder: SequenceEncoder, encoded: Encoded, paths: RootPaths, metric: DistanceMetric
) -> tuple[np.ndarray, np.ndarray]:
    """UniFrac of all pairs of samples as drawn in validation, true and predicted: float64 [n, n] each."""
    lengths = encoder.clades.lengths.detach().cpu().numpy()
    return exact_unifrac(metric, _draws(encoded), paths), distance_matrix(_outputs(encoder, encoded), lengths, metric)


@torch.no_grad()
def _outputs(encoder: SequenceEncoder, encoded: Encoded) -> SampleOutputs:
    return SampleOutputs.concatenate([SampleOutputs.of(*of) for of in outputs(encoder, encoded)])


def _draws(encoded: Encoded) -> list[Draw]:
    """Rows of the dataset of the ASVs of each sample, and their relative abundances."""
    batch = encoded.batch
    asvs, slots, masks = (of.cpu().numpy() for of in (batch.asvs, batch.slot, batch.slot_mask))
    shares = batch.log_abundance.double().exp().cpu().numpy()
    return [(asvs[slot[mask]], share[mask]) for slot, mask, share in zip(slots, masks, shares, strict=True)]


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


def _figures(
    run: Run, dataset: PreparedDataset, ids: list[str], metric: str, truth: np.ndarray, predicted: np.ndarray
) -> list[Html]:
    """Samples on the principal coordinates of true and predicted distances, beside each other."""
    true_axes, predicted_axes = principal_coordinates(truth), principal_coordinates(predicted)
    # An axis has no direction of its own: turn those of the prediction the way of the true ones.
    turn = np.sign((true_axes.points * predicted_axes.points).sum(axis=0))
    turned = predicted_axes.points * np.where(turn == 0, 1, turn)
    colours, about = _colours(run, dataset, ids, truth)
    shown = []
    for name, values in colours.items():
        of = f", coloured by {name}" if name else ""
        shown.append(
            grid(
                figure(ordination(true_axes.points, true_axes.shares, values, name), f"True {metric}{of}."),
                figure(ordination(turned, predicted_axes.shares, values, name), f"Predicted {metric}{of}."),
                class_="pair",
            )
        )
    mantel = score_matrices(truth, predicted).get("mantel")
    alike = "" if mantel is None else f" Mantel's correlation of the true and the predicted distances is {mantel:.3f}."
    return [element("h4", "Samples on principal coordinates"), paragraph(f"{about}{alike}"), *shown]


def _colours(
    run: Run, dataset: PreparedDataset, ids: list[str], truth: np.ndarray
) -> tuple[dict[str, np.ndarray | None], str]:
    """What to colour the samples by, by name; and how it was chosen."""
    about = "In brackets, the share of the variation that an axis explains."
    if run.target is not None:
        values = [run.truth.get(sample) for sample in ids]
        coded = _few_classes(values) if run.target.classes else np.array(values, dtype=np.float64)
        return {run.target.column: coded}, about
    if dataset.metadata is None:
        return {"": None}, f"{about} No colours: the run was given no --metadata."
    found = choose_columns(dataset.metadata.reindex(ids), truth)
    if not found:
        return {"": None}, f"{about} No column of the metadata is fit for colours."
    shares = ", ".join(f"{name} {share:.1%}" for name, (share, _) in found.items())
    return {name: values for name, (_, values) in found.items()}, (
        f"{about} Coloured by the columns that go along best with the true distances (adjusted R² of the squared "
        f"distances: {shares}); chosen for that, they prove nothing."
    )


def _few_classes(values: list[str | None]) -> np.ndarray:
    """Classes, the rare ones together where there are more of them than colours."""
    common = Counter(value for value in values if value is not None).most_common()
    rare = {name for name, _ in common[MOST_CLASSES - 1 :]} if len(common) > MOST_CLASSES else set()
    return np.array([f"{len(rare)} others" if value in rare else value for value in values], dtype=object)
