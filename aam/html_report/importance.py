"""Which ASVs change the output of the model most when they are taken away.

Shape letters: B samples, S ASV slots, R rows (a sample without one ASV), C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from aam.config import UnifracMetric
from aam.html_report.encoding import Encoded, collect, outputs
from aam.html_report.page import Html, element, facts, figure, join, paragraph
from aam.html_report.pictures import effects
from aam.html_report.run_files import Run
from aam.model.clades import DISTANCES, Tips
from aam.model.sequence_encoder import EncoderOutput, SequenceEncoder
from aam.training.base_cache import encoder_of
from aam.training.metrics import UNIFRAC_NAMES, class_probabilities

TRIED = 60
"""ASVs that are taken away in turn: those that most samples have."""
TOP = 25
"""ASVs that are shown."""
ROWS_OF_EACH = 20
"""Samples from which each of them is taken away, at most."""
SHOWN_IN_FIGURE = 15


@dataclass(frozen=True, kw_only=True)
class Importance:
    """What an ASV means to the model."""

    sequence: str
    prevalence: float
    """Share of the samples that have it."""
    abundance: float
    """Mean relative abundance, where it is."""
    tried: int
    """Samples from which it was taken away."""
    effect: float
    """Mean of what its presence adds to the prediction (in units of the target, or to the probability of a class); in
    stage 1, how far the sample moves without it, in predicted UniFrac, or what it adds to Faith's PD."""
    agreement: float
    """Share of the tried samples in which the effect has the sign of the mean."""
    towards: str
    """The class whose probability it changes most; empty for numbers and stage 1."""


def find_important(run: Run, encoded: Encoded) -> list[Importance]:
    """Of the ASVs that most samples have, those without which the output of the model changes most."""
    mask_BS = encoded.batch.slot_mask.cpu().numpy()
    slot_BS = encoded.batch.slot.cpu().numpy()
    share_BS = np.where(mask_BS, np.exp(encoded.batch.log_abundance.cpu().numpy()), 0.0)
    richness_B = mask_BS.sum(axis=1)
    samples_U = np.bincount(slot_BS[mask_BS], minlength=len(encoded.batch.asvs))
    tried = np.argsort(-samples_U, kind="stable")[:TRIED]
    places = [np.nonzero((slot_BS == asv) & mask_BS) for asv in tried]
    effects_of = _without_each(run, encoded, [_to_try(place, richness_B) for place in places])
    found = []
    for asv, (rows, slots), change_RC in zip(tried, places, effects_of, strict=True):
        if len(change_RC) == 0:  # no sample has any other
            continue
        mean_C = change_RC.mean(axis=0)
        column = int(np.abs(mean_C).argmax())
        same_sign = np.sign(change_RC[:, column]) == np.sign(mean_C[column])
        classes = run.target.classes if run.target else ()
        found.append(
            Importance(
                sequence=run.dataset.sequences[int(encoded.batch.asvs[asv])],
                prevalence=len(rows) / encoded.size,
                abundance=float(share_BS[rows, slots].mean()),
                tried=len(change_RC),
                effect=float(mean_C[column]),
                agreement=float(same_sign.mean()),
                towards=classes[column] if classes else "",
            )
        )
    return sorted(found, key=lambda asv: -abs(asv.effect))[:TOP]


def _to_try(place: tuple[np.ndarray, ...], richness_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and slots of an ASV, evenly picked from those that have others beside it."""
    rows, slots = place
    rows, slots = rows[richness_B[rows] > 1], slots[richness_B[rows] > 1]
    picked = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), ROWS_OF_EACH)).astype(int))
    return rows[picked], slots[picked]


def _without_each(run: Run, encoded: Encoded, tries: list[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """What each ASV adds to the answer [R, C], for each of the rows and slots from which it is taken away."""
    rows, slots = (np.concatenate(parts) for parts in zip(*tries, strict=True))
    ends = np.cumsum([len(picked) for picked, _ in tries])[:-1]
    model, target = run.best.model, run.target
    if target is None:
        return np.split(_moved(encoder_of(model), encoded, rows, slots, _metric(run))[:, None], ends)
    whole = collect(outputs(model, encoded), lambda out: out.target)
    without = collect(outputs(model, encoded, rows, slots), lambda out: out.target)
    if target.classes:
        change = class_probabilities(whole)[rows] - class_probabilities(without)
    else:
        change = (target.decode(whole)[rows] - target.decode(without))[:, [target.point]]
    return np.split(change, ends)


@torch.no_grad()
def _moved(
    encoder: SequenceEncoder, encoded: Encoded, rows: np.ndarray, slots: np.ndarray, metric: UnifracMetric
) -> np.ndarray:
    """How far samples move when they lose an ASV, in predicted UniFrac; of Faith's PD, what the ASV adds: [R]."""

    def read(output: EncoderOutput) -> torch.Tensor:
        return output.faith_pd if metric == "faith_pd" else output.profiles.of(metric)

    whole = torch.from_numpy(collect(outputs(encoder, encoded), read)[rows])
    without = torch.from_numpy(collect(outputs(encoder, encoded, rows, slots), read))
    if metric == "faith_pd":
        return (whole - without).numpy()
    common = without[:, -1]  # all tips but one
    if metric == "weighted":  # by the abundances that they had before that one was taken away
        common = common * -torch.expm1(encoded.batch.log_abundance.cpu()[rows, slots])
    lengths = encoder.clades.lengths.cpu()
    moved = [
        DISTANCES[metric](one[None, :-1], other[None, :-1], lengths, Tips(one[-1:], other[-1:], both.reshape(1, 1)))
        for one, other, both in zip(whole, without, common, strict=True)
    ]
    return torch.cat(moved).flatten().numpy()


def _metric(run: Run) -> UnifracMetric:
    """The metric of a stage 1 that its report tells effects in."""
    return run.best.spec.unifrac[0].metric


def importance(run: Run) -> Html:
    """The ASVs that matter to the model, with their sequences."""
    if run.target is None and not run.best.spec.unifrac:
        return paragraph("No loss of this run reached the clades of a sample (--base-weight 0).")
    encoded = run.encoded
    found = find_important(run, encoded)
    unit = _unit(run)
    chart = found[:SHOWN_IN_FIGURE]
    bars = effects([f"ASV {i}" for i in range(1, len(chart) + 1)], np.array([asv.effect for asv in chart]), unit)
    return join(
        [
            *_of_network(run),
            paragraph(
                f"Of the {TRIED} ASVs that most of {encoded.size} validation samples have, the {len(found)} with the "
                f"largest effect: {_effect(run)}. An ASV is taken out of at most {ROWS_OF_EACH} of the samples that "
                "have it; the abundances of the others then add up to 1 again."
            ),
            paragraph(
                "It is not causal: an ASV that goes along with others, or with the study's design, can matter to the "
                "model without doing anything to its host or site; one with a double can matter and show no effect.",
            ),
            figure(bars, f"Effect of the first {len(chart)} ASVs, by the numbers of the list: {unit}."),
            element("ol", *(_item(run, i, asv) for i, asv in enumerate(found, start=1)), class_="asvs"),
        ]
    )


def _of_network(run: Run) -> list[Html]:
    """What is said here of an ensemble."""
    if run.best.ensemble is None:
        return []
    ensemble = run.best.ensemble
    networks = 1 + len(ensemble.networks)
    of_folds = f", the mean of {networks} networks of which this is the run's own" if networks > 1 else ""
    text = (
        f"All of this is of the network, which counts {ensemble.weights.by_name['network']:.0%} in the "
        f"ensemble{of_folds}: what the others, and its trees, look at is not in it."
    )
    return [element("p", text, class_="warning")]


def _effect(run: Run) -> str:
    if run.target is None:
        if _metric(run) == "faith_pd":
            return "what the ASV adds to the predicted Faith's PD of a sample (occlusion)"
        return f"how far a sample moves without the ASV (occlusion), in predicted {UNIFRAC_NAMES[_metric(run)]}"
    of = (
        "the probability of the class that changes most" if run.target.classes else f"the predicted {run.target.column}"
    )
    return f"the change of {of} when the ASV is there, compared with the same sample without it (occlusion)"


def _unit(run: Run) -> str:
    if run.target is None:
        name = UNIFRAC_NAMES[_metric(run)]
        return f"change of {name}" if _metric(run) == "faith_pd" else f"{name} to the sample without the ASV"
    what = "probability of the class that changes most" if run.target.classes else f"predicted {run.target.column}"
    return f"change of the {what}"


def _item(run: Run, number: int, asv: Importance) -> Html:
    measures = [
        ("effect", _shown_effect(run, asv)),
        ("samples that have it", f"{asv.prevalence:.1%}"),
        ("mean abundance where it is", f"{asv.abundance:.2%}"),
    ]
    return element(
        "li",
        element("p", element("strong", f"ASV {number}")),
        element("code", asv.sequence, class_="sequence"),
        facts(measures),
    )


def _shown_effect(run: Run, asv: Importance) -> str:
    if run.target is None:
        return f"{asv.effect:.3g} ({asv.tried} samples)"
    same = f"same sign in {asv.agreement:.0%} of {asv.tried}"
    if run.target.classes:
        return f"{'more' if asv.effect > 0 else 'less'} {asv.towards}: {asv.effect:+.3f} ({same})"
    return f"{'raises' if asv.effect > 0 else 'lowers'} it: {asv.effect:+.3g} ({same})"
