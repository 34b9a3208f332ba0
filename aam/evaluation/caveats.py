"""What is to be known beside scores: what models knew of the test samples, and what they were trained on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aam.evaluation.outcome import Outcome


def caveats(outcomes: Sequence[Outcome], group_column: str | None) -> list[str]:
    """Say what the models, or the baselines too, knew of the test samples.

    Parameters
    ----------
    outcomes : sequence of Outcome
        Of all splits and seeds.
    group_column : str, optional
        Column whose values are the groups.
    """
    tested = {(o.repeat, s) for o in outcomes for s in o.found.sample_ids}
    seen = {(o.repeat, s) for o in outcomes if o.base_record is not None for part in ("train", "val")
            for s in set(o.base_record["split"][part]).intersection(o.found.sample_ids)}  # fmt: skip
    lines = []
    if seen:
        lines.append(
            f"TRANSDUCTIVE: stage 1 was trained, without labels, on {len(seen)} of the {len(tested)} test samples, or "
            "chose its best epoch by them; no baseline has met them: new samples may be predicted less well"
        )
    untold = sum(o.base_record is None and o.record["config"]["pretrained"] is not None for o in outcomes)
    if untold:
        lines.append(f"what stage 1 was trained on cannot be told: no run.json ({untold} runs)")
    if group_column is not None:
        shared = {(o.repeat, s) for o in outcomes for s in _of_training_groups(o, group_column)}
        if shared:
            lines.append(
                f"{len(shared)} of the {len(tested)} test samples are of groups ({group_column}) that have training or "
                "validation samples too: samples of new groups may be predicted less well"
            )
    return lines


def _of_training_groups(outcome: Outcome, group_column: str) -> list[str]:
    """Test samples whose group has training or validation samples."""
    split, test = outcome.record["split"], outcome.found.sample_ids
    train = [*split["train"], *split["val"]]
    of = outcome.groups(group_column, [*train, *test])
    trained = {of[sample] for sample in train}
    return [sample for sample in test if of[sample] in trained]


def what_was_done(outcomes: Sequence[Outcome], folds: int | None, repeats: int) -> str:
    """Sizes of the split, of folds those of the first; and what the members of ensembles count."""
    split = outcomes[0].record["split"]
    sizes = f"{len(split['train'])} samples to train on, {len(split['val'])} to choose the best epoch by"
    if folds is not None:
        again = f", drawn {repeats} times" if repeats > 1 else ""
        sizes = (
            f"{folds} folds{again}: each sample is predicted by models that were trained without it; in the first, "
            f"{sizes}"
        )
    weights = [outcome.member_weights for outcome in outcomes if outcome.member_weights]
    if not weights:
        return sizes
    shares = (f"{name.replace('_', ' ')} {np.mean([w[name] for w in weights]):.2f}" for name in weights[0])
    return (
        f"{sizes}; the model is an ensemble, weighed there by {outcomes[0].weighed_by} samples that its members were "
        f"fitted without, on average: {', '.join(shares)}"
    )


def what_is_unknown(outcomes: Sequence[Outcome]) -> list[str]:
    """What of the test samples is new to the models; of folds, to that of the first."""
    where = "" if len({outcome.fold for outcome in outcomes}) == 1 else "first fold: "
    return [f"{where}{note}" for note in outcomes[0].unknown]
