"""Which ASVs the model looks at, and what its answer is without them.

Shape letters: B samples, S ASV slots, R rows (a sample without one ASV), C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aam.html_report.encoding import Encoded, attention, collect, outputs
from aam.html_report.page import Html, element, facts, figure, join, paragraph
from aam.html_report.pictures import effects
from aam.html_report.run_files import Run
from aam.model.sequence_predictor import SequencePredictor
from aam.training.base_cache import encoder_of
from aam.training.metrics import class_probabilities

TOP = 25
"""ASVs that are taken away in turn."""
ROWS_OF_EACH = 20
"""Samples from which each of them is taken away, at most."""
SHOWN_IN_PICTURE = 15


@dataclass(frozen=True, kw_only=True)
class Importance:
    """What an ASV means to the model."""

    sequence: str
    prevalence: float
    """Share of the samples that have it."""
    abundance: float
    """Mean relative abundance, where it is."""
    attention: float
    """Mean weight over all samples, 0 where it is not."""
    even: float
    """The weight in relation to an even share, the mean of the samples that have it."""
    tried: int
    """Samples from which it was taken away."""
    effect: float
    """Mean of what its presence adds to the prediction (in units of the target, or to the probability of a class);
    in stage 1, how far the sample moves without it, in predicted UniFrac."""
    agreement: float
    """Share of the tried samples in which the effect has the sign of the mean."""
    towards: str
    """The class whose probability it changes most; empty for numbers and stage 1."""


def find_important(run: Run, encoded: Encoded) -> list[Importance]:
    """The ASVs with the largest attention over all samples, and what the model says without each."""
    model = run.best.model
    pool = model.target_summary.pool if isinstance(model, SequencePredictor) else model.summary.pool
    weight_BS = attention(model, pool, encoded)
    mask_BS = encoded.batch.slot_mask.cpu().numpy()
    slot_BS = encoded.batch.slot.cpu().numpy()
    share_BS = np.where(mask_BS, np.exp(encoded.batch.log_abundance.cpu().numpy()), 0.0)
    richness_B = mask_BS.sum(axis=1)
    total_U = np.bincount(slot_BS[mask_BS], weights=weight_BS[mask_BS], minlength=len(encoded.batch.asvs))
    top = np.argsort(-total_U, kind="stable")[:TOP]
    places = [np.nonzero((slot_BS == asv) & mask_BS) for asv in top]
    effects_of = _without_each(run, encoded, [_to_try(place, richness_B) for place in places])
    found = []
    for asv, (rows, slots), change_RC in zip(top, places, effects_of, strict=True):
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
                attention=float(total_U[asv] / encoded.size),
                even=float((weight_BS[rows, slots] * richness_B[rows]).mean()),
                tried=len(change_RC),
                effect=float(mean_C[column]),
                agreement=float(same_sign.mean()),
                towards=classes[column] if classes else "",
            )
        )
    return sorted(found, key=lambda asv: -abs(asv.effect))


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
        encoder = encoder_of(model)
        whole = collect(outputs(model, encoded), lambda out: out.embedding)
        without = collect(outputs(model, encoded, rows, slots), lambda out: out.embedding)
        scale = float(encoder.distance_log_scale.detach().exp())
        moved = scale * np.linalg.norm(whole[rows] - without, axis=1)
        return np.split(moved[:, None], ends)
    whole = collect(outputs(model, encoded), lambda out: out.target)
    without = collect(outputs(model, encoded, rows, slots), lambda out: out.target)
    if target.classes:
        change = class_probabilities(whole)[rows] - class_probabilities(without)
    else:
        change = (target.decode(whole)[rows] - target.decode(without))[:, [target.point]]
    return np.split(change, ends)


def importance(run: Run) -> Html:
    """The ASVs that matter to the model, with their sequences."""
    if run.target is None and run.record["config"]["loss"]["base_weight"] == 0:
        return paragraph("No loss of this run reached the summary of a sample (--base-weight 0).")
    encoded = run.encoded
    found = find_important(run, encoded)
    unit = _unit(run)
    chart = found[:SHOWN_IN_PICTURE]
    picture = effects([f"ASV {i}" for i in range(1, len(chart) + 1)], np.array([asv.effect for asv in chart]), unit)
    whose = "the target's head" if run.target else "the sample's summary"
    return join(
        [
            *_of_network(run),
            paragraph(
                f"Of {encoded.size} validation samples, the {len(found)} ASVs with the most attention in the pooling "
                f"of {whose}, in the order of their effect. Two measures, of different things:"
            ),
            element(
                "ul",
                element(
                    "li",
                    element("strong", "Attention"),
                    f" is the weight with which {whose} averages the ASVs of a sample, the mean of its heads and of "
                    "all samples. It tells where the model looks, not what it makes of it; of what else is read of a "
                    "sample (sums and abundance-weighted means over its ASVs, and for a target the shares of groups of "
                    "ASVs) it says nothing.",
                ),
                element(
                    "li",
                    element("strong", "Effect"),
                    f" is {_effect(run)}. An ASV is taken out of at most {ROWS_OF_EACH} of the samples that have it; "
                    "the abundances of the others then add up to 1 again.",
                ),
            ),
            paragraph(
                "Neither is causal: an ASV that goes along with others, or with the study's design, can matter to the "
                "model without doing anything to its host or site; one with a double can matter and show no effect.",
            ),
            figure(picture, f"Effect of the first {len(chart)} ASVs, by the numbers of the list: {unit}."),
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
        f"ensemble{of_folds}: what the others, and its trees and its linear model, look at is not in it."
    )
    return [element("p", text, class_="warning")]


def _effect(run: Run) -> str:
    if run.target is None:
        return "how far a sample moves without the ASV (occlusion), in the UniFrac that the model predicts"
    of = (
        "the probability of the class that changes most" if run.target.classes else f"the predicted {run.target.column}"
    )
    return f"the change of {of} when the ASV is there, compared with the same sample without it (occlusion)"


def _unit(run: Run) -> str:
    if run.target is None:
        return "predicted UniFrac to the sample without the ASV"
    what = "probability of the class that changes most" if run.target.classes else f"predicted {run.target.column}"
    return f"change of the {what}"


def _item(run: Run, number: int, asv: Importance) -> Html:
    measures = [
        ("effect", _shown_effect(run, asv)),
        ("attention, mean of all samples", f"{asv.attention:.2%}"),
        ("attention, times an even share", f"{asv.even:.2g}"),
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
