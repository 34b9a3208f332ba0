"""What the report computes, against slower or other ways to the same."""

from __future__ import annotations

import dataclasses
import json
import re
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
from skbio import DistanceMatrix
from skbio.stats.distance import permanova

from aam.batch import Batch
from aam.data.batches import BatchPlan, build_batch
from aam.data.draw import FIXED_DRAW
from aam.html_report.columns import choose_columns
from aam.html_report.encoding import affordable, collect, outputs
from aam.html_report.importance import find_important
from aam.html_report.ordination import distances
from aam.html_report.pictures import ordination
from aam.html_report.run_files import Run, draw
from aam.model.clades import Tips, unweighted_unifrac
from aam.model.sequence_encoder import SequenceEncoder
from aam.training.figures import shorten
from aam.training.losses import LossWeights
from aam.training.step import Objective, step


@pytest.fixture(scope="module")
def first(stage_1) -> Run:
    return Run.read(stage_1)


@pytest.fixture(scope="module")
def second(stage_2, stage_1) -> Run:
    return Run.read(stage_2, json.loads((stage_1 / "run.json").read_text()))


def by_hand(run: Run, sample: str, without: int | None) -> Batch:
    """A sample whose draw never had an ASV, given by its place in the draw; every ASV in a slot of its own."""
    plan = BatchPlan(dataset=run.dataset, sample_ids=[sample], contract=run.best.spec.contract, batch_size=2)
    asvs, reads = plan.draw(sample, FIXED_DRAW)
    if without is not None:
        asvs, reads = np.delete(asvs, without), np.delete(reads, without)
    whole = build_batch(plan, np.array([0]), epoch=FIXED_DRAW, index=0)
    lengths = run.dataset.lengths[asvs]
    return dataclasses.replace(
        whole,
        tokens=torch.from_numpy(run.dataset.tokens[asvs, : lengths.max()]),
        asvs=torch.from_numpy(asvs.astype(np.int64)),
        slot=torch.arange(len(asvs))[None],
        slot_mask=torch.ones(1, len(asvs), dtype=torch.bool),
        log_abundance=torch.from_numpy(np.log(reads / reads.sum()).astype(np.float32))[None],
        asvs_padded=bool((lengths != lengths.max()).any()),
    )


@torch.no_grad()
def test_without_an_asv_a_sample_is_as_if_it_never_had_it(second):
    encoded = second.encoded
    rows, slots = np.array([0, 3, 3]), np.array([1, 0, 4])
    fast = collect(outputs(second.best.model, encoded, rows, slots), lambda out: out.target)
    slow = [
        second.best.model(by_hand(second, encoded.batch.sample_ids[row], slot)).target.numpy()
        for row, slot in zip(rows, slots, strict=True)
    ]
    np.testing.assert_allclose(fast, np.concatenate(slow), rtol=1e-4, atol=1e-5)
    whole = collect(outputs(second.best.model, encoded), lambda out: out.target)
    assert (np.abs(fast - whole[rows]) > 1e-4).any(), "it makes no difference"


@torch.no_grad()
def test_the_effect_of_an_asv_is_the_mean_change_in_own_units(second):
    encoded, target = second.encoded, second.target
    assert target is not None
    found = find_important(second, encoded)[0]
    assert target.quantiles[1] == 0.5, "the prediction, between the ends of an interval"
    changes = []
    for sample in encoded.batch.sample_ids:
        whole = by_hand(second, sample, None)
        names = [second.dataset.sequences[int(asv)] for asv in whole.asvs]
        if found.sequence in names:
            less = by_hand(second, sample, names.index(found.sequence))
            with_it, without = (second.best.model(batch).target.numpy() for batch in (whole, less))
            changes.append((target.decode(with_it) - target.decode(without))[0, 1])
    assert found.tried == len(changes)
    assert found.prevalence == len(changes) / encoded.size
    assert found.effect == pytest.approx(np.mean(changes), rel=1e-3, abs=1e-4)
    assert found.agreement == np.mean(np.sign(changes) == np.sign(np.mean(changes)))


@torch.no_grad()
def test_distances_are_those_that_a_step_learns(first):
    spec, ids, encoder = first.best.spec, first.split("val"), first.best.model
    assert isinstance(encoder, SequenceEncoder)
    assert first.encoded.batch.sample_ids == ids
    assert first.dataset.paths is not None
    metrics = tuple(learned.metric for learned in spec.unifrac)
    plan = BatchPlan(
        dataset=first.dataset, sample_ids=ids, contract=spec.contract, batch_size=len(ids), unifrac=metrics
    )
    batch = build_batch(plan, np.arange(len(ids)), epoch=FIXED_DRAW, index=0)
    _, predictions = step(encoder, batch, Objective(weights=LossWeights(base=1), unifrac=spec.unifrac))
    apart = ~np.eye(len(ids), dtype=bool)
    assert metrics == ("unweighted", "weighted", "faith_pd")
    for metric in ("unweighted", "weighted"):
        truth, predicted = distances(encoder, first.encoded, first.dataset.paths, metric)
        np.testing.assert_allclose(truth, getattr(batch, metric).numpy(), atol=1e-6)
        np.testing.assert_allclose(predicted[apart], predictions.unifrac[metric].numpy()[apart], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_effect_of_an_asv_in_stage_1_is_how_far_a_sample_moves(first):
    encoder = first.best.model
    assert isinstance(encoder, SequenceEncoder)
    found = find_important(first, first.encoded)[0]
    moved = []
    for sample in first.encoded.batch.sample_ids:
        whole = by_hand(first, sample, None)
        names = [first.dataset.sequences[int(asv)] for asv in whole.asvs]
        if found.sequence in names:
            less = by_hand(first, sample, names.index(found.sequence))
            outputs = [encoder(batch) for batch in (whole, less)]
            tips = [output.profiles.tips for output in outputs]
            common = Tips(*tips, tips[1][None])
            presences = [output.profiles.presence for output in outputs]
            moved.append(float(unweighted_unifrac(*presences, encoder.clades.lengths, common)))
    assert found.tried == len(moved)
    assert found.effect == pytest.approx(np.mean(moved), rel=1e-3, abs=1e-5)


def test_columns_are_chosen_by_what_they_explain():
    rng = np.random.default_rng(0)
    n = 60
    group, number = rng.integers(3, size=n), rng.normal(size=n)
    points = np.stack([2 * group, 3 * number, rng.normal(size=n)], axis=1)
    matrix = np.linalg.norm(points[:, None] - points[None], axis=-1)
    frame = pd.DataFrame(
        {
            "group": [f"g{g}" for g in group],
            "the same": [f"other {g}" for g in group],
            "number": [f"{x:.4f}" for x in number],
            "number, nearly": [f"{x:.2f}" for x in number + 0.01],
            "noise": [str(x) for x in rng.integers(2, size=n)],
            "id": [f"s{i}" for i in range(n)],
            "constant": ["a"] * n,
            "mostly missing": ["a", "b"] * 10 + [None] * (n - 20),
        }
    ).astype(object)
    frame.loc[3, ["group", "the same"]] = None
    found = choose_columns(frame, matrix)
    assert [*found][:2] == ["number", "group"] or [*found][:2] == ["group", "number"]
    assert not {"the same", "number, nearly", "id", "constant", "mostly missing"} & {*found}
    share, values = found["group"]
    assert values[3] is None
    kept = np.arange(n) != 3
    f = permanova(DistanceMatrix(matrix[np.ix_(kept, kept)]), list(values[kept]), permutations=0)["test statistic"]
    between, within = 2 * f, n - 1 - 3
    assert share == pytest.approx(1 - (within / (between + within)) * (n - 2) / within)


def test_a_legend_has_all_classes_and_leaves_room_for_the_points():
    taxa = [f"k__Bacteria; p__Firmicutes; c__{name}" for name in ("Bacilli", "Clostridia")]
    names = ["_a", "$1_$2", "b\x0bc", *taxa, *(f"class number {n}" for n in range(7))]
    values = np.array([*names, None] * 3, dtype=object)
    picture = ordination(np.random.default_rng(0).normal(size=(len(values), 2)), np.array([0.5, 0.1]), values, "of\x00")
    svg = ElementTree.fromstring(picture)
    shown = ["".join(text.itertext()) for text in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert sorted(shown[shown.index("no value") + 1 :]) == sorted(shorten(n).replace("\x0b", "\ufffd") for n in names)
    assert len({shorten(name) for name in taxa}) == 2
    assert max(map(len, shown)) <= 24
    width, height = map(float, svg.attrib["viewBox"].split()[2:])
    [ground] = [g for g in svg.iter("{http://www.w3.org/2000/svg}g") if g.get("id", "").endswith("patch_2")]
    x = [float(value) for value in re.findall(r"[ML] (\S+) ", ground[0].attrib["d"])]
    assert max(x) - min(x) > width / 2
    assert height > width


def test_a_draw_is_always_the_same_and_in_order():
    ids = [f"s{i:03d}" for i in range(100)]
    assert draw(ids, 100) == ids
    drawn = draw(ids, 10)
    assert drawn == sorted(set(drawn)) == draw(ids, 10)
    assert len(drawn) == 10


def test_what_is_encoded_is_bounded(first):
    contract, ids = first.best.spec.contract, first.split("train")
    assert affordable(first.dataset, contract, ids) == ids
    few = affordable(first.dataset, contract, ids, most_samples=5)
    assert len(few) == 5
    assert few == sorted(few, key=ids.index)
    plan = BatchPlan(dataset=first.dataset, sample_ids=ids, contract=contract, batch_size=2)
    of_few = affordable(first.dataset, contract, ids, most_asvs=100)
    assert 1 < len(of_few) < len(ids)
    assert len(np.unique(np.concatenate([plan.draw(s, FIXED_DRAW)[0] for s in of_few]))) <= 100
    assert len(affordable(first.dataset, contract, ids, most_asvs=1)) == 1
