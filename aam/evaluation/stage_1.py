"""A stage 1 run and samples that did not train it: predicted UniFrac beside exact UniFrac, with a tree.

The samples are the run's own test samples, or those of another table (zero-shot), of another study say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from aam.config import DataConfig, EvaluateConfig
from aam.data.batches import BatchPlan, exact_unifrac
from aam.data.dataset import PreparedDataset
from aam.data.draw import FIXED_DRAW, generator
from aam.data.files import some
from aam.data.metadata import read_metadata, text_column
from aam.data.prepare import prepare
from aam.data.sources import content_hash
from aam.data.split import read_ids
from aam.evaluation.distances import FEWEST, DistanceEvaluation, score_groups
from aam.predict import predict_samples, source_of
from aam.predict.distances import distance_matrix
from aam.predict.job import longest_read
from aam.predict.table import what_is_new
from aam.training.base_cache import encoder_of
from aam.training.checkpoint import Checkpoint
from aam.training.step import autocast_of

MOST_SAMPLES = 2000
"""Samples whose pairs are scored; of more, so many are drawn."""


@dataclass(frozen=True, kw_only=True)
class _Scored:
    """Samples that are scored."""

    dataset: PreparedDataset
    sample_ids: list[str]
    what: str
    """Which, in words."""
    is_own: bool
    """Whether the table is that of the run."""
    notes: list[str]


def evaluate_stage_1(config: EvaluateConfig, loaded: Checkpoint, record: dict[str, Any]) -> DistanceEvaluation:
    """Score the UniFrac metrics that a stage 1 run learned.

    Parameters
    ----------
    config : EvaluateConfig
        Which samples, the tree, and the column of the studies.
    loaded : Checkpoint
        Of stage 1.
    record : dict
        `run.json` of its run.

    Raises
    ------
    ValueError
        For a run that learned none, and for samples, a tree or a column that there are not.
    """
    if not loaded.spec.unifrac:
        raise ValueError(
            f"{config.checkpoint}: stage 1 was trained without UniFrac (--base-weight 0): no distances to score"
        )
    scored = _choose(config, loaded, record)
    groups, trained, about_groups = _groups(config, record, scored)
    outputs = predict_samples(
        loaded,
        scored.dataset,
        scored.sample_ids,
        base_cache=config.loop.base_cache,
        autocast=autocast_of(record["config"]["loop"]["precision"], "cuda" if torch.cuda.is_available() else "cpu"),
    )
    lengths = encoder_of(loaded.model).clades.lengths.detach().cpu().numpy()
    plan = BatchPlan(dataset=scored.dataset, sample_ids=scored.sample_ids, contract=loaded.spec.contract, batch_size=1)
    draws = [plan.draw(sample, FIXED_DRAW) for sample in scored.sample_ids]
    rows = []
    for learned in loaded.spec.unifrac:
        metric = learned.metric
        truth = exact_unifrac(metric, draws, scored.dataset.paths)
        if metric == "faith_pd":
            predicted = outputs.faith_pd.astype(np.float64)
        else:
            predicted = distance_matrix(outputs, lengths, metric)
        rows += score_groups(metric, truth, predicted, groups, trained)
    return DistanceEvaluation(
        samples=scored.what,
        rows=rows,
        column=config.study_column,
        caveats=_caveats(scored, record),
        notes=[
            *scored.notes,
            *about_groups,
            *_about_scores(loaded),
            *what_is_new(scored.dataset, scored.sample_ids, record),
        ],
    )


def _choose(config: EvaluateConfig, loaded: Checkpoint, record: dict[str, Any]) -> _Scored:
    """Prepare the table with its tree, and choose the samples."""
    data = _sources(config, record)
    assert data.table is not None
    sources = {"table": data.table, "sequences": data.sequences}
    hashes = {name: content_hash(path) for name, path in sources.items() if path is not None}
    is_own = all(record["dataset"]["sha256"].get(name) == hashes.get(name) for name in sources)
    if not is_own and config.data.tree is None:
        raise ValueError(f"--table {data.table}: is not that of the run; give its --tree, for exact UniFrac")
    dataset = prepare(data, max_bp=longest_read(loaded), use_tree=True)
    wanted = _wanted(config, dataset, record, is_own=is_own)
    depth = loaded.spec.contract.rarefy_depth
    deep = {s for s, reads in zip(dataset.sample_ids, dataset.depths, strict=True) if reads >= depth}
    ids, lost = [s for s in wanted if s in deep], [s for s in wanted if s not in deep]
    if len(ids) < FEWEST:
        raise ValueError(
            f"{data.table}: {len(ids)} of {len(wanted)} samples can be scored, needed: {FEWEST}; the others are not in "
            f"the table, or have fewer than {depth} reads of ASVs in the tree"
        )
    notes = [note for note in dataset.manifest["notes"] if not note.startswith("metadata: ")]
    if lost:
        notes.append(f"not scored: {len(lost)} without {depth} reads of ASVs in the tree ({some(lost)})")
    kind = "test samples" if is_own else f"samples of {data.table.name} (zero-shot)"
    what = f"{len(ids)} {kind}"
    if len(ids) > MOST_SAMPLES:
        drawn = generator(loaded.spec.contract.seed, "evaluation").choice(len(ids), MOST_SAMPLES, replace=False)
        what = f"{MOST_SAMPLES} {kind}, drawn, of {len(ids)}"
        ids = [ids[i] for i in sorted(drawn.tolist())]
    return _Scored(dataset=dataset, sample_ids=ids, what=what, is_own=is_own, notes=notes)


def _sources(config: EvaluateConfig, record: dict[str, Any]) -> DataConfig:
    """What was given; without a table, or with that of the run, the rest is the run's."""
    given, missing = config.data, config.data.max_missing_from_tree
    own = {name: source_of(record, name) for name in ("table", "tree", "metadata", "sequences")}
    if given.table is not None:
        is_own = content_hash(given.table) == record["dataset"]["sha256"]["table"]
        own = {**own, "table": given.table} if is_own else dict.fromkeys(own)
    if given.tree is None:  # what the run allowed of its own tree
        missing = max(missing, record["config"]["data"]["max_missing_from_tree"])
    return DataConfig(
        table=given.table or own["table"],
        tree=given.tree or own["tree"],
        metadata=given.metadata or own["metadata"],
        sequences=given.sequences or own["sequences"],
        cache_dir=given.cache_dir,
        max_missing_from_tree=missing,
    )


def _wanted(config: EvaluateConfig, dataset: PreparedDataset, record: dict[str, Any], *, is_own: bool) -> list[str]:
    """Those of --test-ids, the test samples of the run, or all of another table."""
    listed = None if config.data.test_ids is None else read_ids(config.data.test_ids)
    if not is_own:
        return dataset.sample_ids if listed is None else listed
    seen = {*record["split"]["train"], *record["split"]["val"]}.intersection(listed or ())
    if seen:
        raise ValueError(
            f"{config.data.test_ids}: {config.checkpoint} was trained with {len(seen)} of its samples: "
            f"{some(sorted(seen))}"
        )
    wanted = record["split"]["test"] if listed is None else listed
    if not wanted:
        raise ValueError(
            f"{config.checkpoint}: the run has no test samples; give --test-ids, or another --table with its --tree"
        )
    return wanted


def _groups(
    config: EvaluateConfig, record: dict[str, Any], scored: _Scored
) -> tuple[list[str | None] | None, set[str] | None, list[str]]:
    """Group of each sample, groups that trained the model (None: not known), and notes on them."""
    column = config.study_column
    if column is None:
        return None, None, []
    frame = scored.dataset.metadata
    source = config.data.metadata or source_of(record, "metadata")
    if frame is None or source is None:
        raise ValueError(f"--study-column {column}: no metadata of these samples; give --metadata")
    value = {str(s): None if v is None else str(v) for s, v in text_column(frame, column, source=source).items()}
    groups = [value.get(sample) for sample in scored.sample_ids]
    counts = {name: groups.count(name) for name in sorted({*groups} - {None}, key=str)}
    small = [f"{name} ({count})" for name, count in counts.items() if count < FEWEST]
    notes = [f"{column}: fewer than {FEWEST} samples, not scored by themselves: {some(small)}"] if small else []
    if without := groups.count(None):
        notes.append(f"{column}: {without} samples have no value")
    trained = _trained_groups(column, record, value if scored.is_own else None)
    if trained is None:
        notes.append(f"which values of {column} trained the model is not known: its metadata has no such column")
    return groups, trained, notes


def _trained_groups(column: str, record: dict[str, Any], value: dict[str, str | None] | None) -> set[str] | None:
    """Values of the column that training and validation samples have; None where that cannot be read."""
    if value is None:
        source = source_of(record, "metadata")
        if source is None or not source.is_file():
            return None
        frame = read_metadata(source)[0]
        if column not in frame.columns:
            return None
        value = {str(sample): of for sample, of in text_column(frame, column, source=source).items()}
    seen = {value.get(sample) for part in ("train", "val") for sample in record["split"][part]}
    return {name for name in seen if name is not None}


def _caveats(scored: _Scored, record: dict[str, Any]) -> list[str]:
    seen = {*record["split"]["train"], *record["split"]["val"]}.intersection(scored.sample_ids)
    if not seen:
        return []
    return [
        f"NOT ALL UNSEEN: {len(seen)} of {len(scored.sample_ids)} samples have ids of samples that the run trained on, "
        "or chose its best epoch by"
    ]


def _about_scores(loaded: Checkpoint) -> list[str]:
    contract = loaded.spec.contract
    reads = f"{contract.rarefy_depth} reads" if contract.rarefy_depth else "all reads"
    return [
        f"exact values, from the tree, are of what the model reads of a sample: {reads}, at most "
        f"{contract.token_limit} ASVs",
        "distances are scored over all pairs of samples, each once; Mantel's r is Pearson's over these",
    ]
