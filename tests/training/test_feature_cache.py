"""Features of samples that are kept: those that would be computed, whichever batch they came from."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from aam.data.batches import BatchPlan, EpochBatches
from aam.data.draw import FIXED_DRAW
from aam.model.sequence_encoder import SequenceEncoder
from aam.model.sequence_predictor import SequencePredictor
from aam.training import feature_cache
from aam.training.base_cache import BaseCache
from aam.training.feature_cache import FeatureCache
from runs import pretrain_plan
from tensors import PREDICTOR, SIZES, without_dropout

FEATURES_ALONE = dataclasses.replace(PREDICTOR, attention_layers=0, count_head=False, longest_known=151)


@pytest.fixture(scope="module")
def plan(synthetic_folder, tmp_path_factory) -> BatchPlan:
    run = pretrain_plan(synthetic_folder, tmp_path_factory.mktemp("run"))
    ids = [*run.split.train, *run.split.val]
    return BatchPlan(dataset=run.dataset, sample_ids=ids, contract=run.spec.contract, batch_size=8)


def made(plan: BatchPlan, *, freeze_base: bool = True, **sizes) -> SequencePredictor:
    torch.manual_seed(0)
    base = SequenceEncoder(dataclasses.replace(SIZES, max_bp=150, dropout=0.5))
    model = SequencePredictor(base, dataclasses.replace(FEATURES_ALONE, **sizes), freeze_base=freeze_base)
    known = torch.from_numpy(plan.dataset.tokens[[0, 1, 2, 3]])
    with torch.no_grad():
        if model.features.known:
            model.features.know(known, base.eval().clades(base.asv_encoder(known)[0]))
    return without_dropout(model)


def cache_of(model: SequencePredictor, plan: BatchPlan, autocast: torch.dtype | None = None) -> FeatureCache:
    return FeatureCache(model, plan.dataset, BaseCache(model, plan.dataset, autocast, on_disk=False))


@pytest.mark.parametrize("known", [5, 0])
@pytest.mark.parametrize("draws", ["fixed rarefaction", "all reads"])
def test_features_and_outputs_are_those_computed_anew(plan, draws, known):
    if draws == "fixed rarefaction":
        plan = dataclasses.replace(plan, fixed_rarefaction=True)
    else:
        plan = dataclasses.replace(plan, contract=dataclasses.replace(plan.contract, rarefy_depth=0))
    model = made(plan, known_asvs=known)
    cache = cache_of(model, plan)
    asked = []
    model.base.register_forward_hook(lambda module, inputs, output: asked.append(inputs[0].sample_ids))
    for epoch in (1, 2, FIXED_DRAW):  # shuffled, shuffled anew, in order: other batches each time
        batches = EpochBatches(plan, epoch)
        assert batches.has_fixed_draws
        for index in range(len(batches)):
            cached = cache.features_of(batches[index])
            before, batch = len(asked), batches[index]
            with torch.no_grad():
                expected = model.features(batch, model.base(batch))
                del asked[before:]
                torch.testing.assert_close(cached, expected, rtol=0, atol=1e-4)
                found = model(batch, cached_features=cached).target
                torch.testing.assert_close(found, model(batch).target, rtol=0, atol=1e-4)
                del asked[before:]
    assert sorted(sample for ids in asked for sample in ids) == sorted(plan.sample_ids)  # each once, in epoch 1
    assert cache.known.sum() == len(plan.sample_ids)


def test_under_autocast_they_are_as_the_model_has_them(plan):
    plan = dataclasses.replace(plan, fixed_rarefaction=True)
    model, batch = made(plan), EpochBatches(plan, 1)[0]
    found = cache_of(model, plan, torch.bfloat16).features_of(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        expected = model.features(batch, model.base(batch))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)
    assert not torch.equal(found, cache_of(model, plan).features_of(batch))


def test_epochs_that_draw_anew_have_no_fixed_draws(plan):
    assert not EpochBatches(plan, 1).has_fixed_draws
    assert EpochBatches(plan, FIXED_DRAW).has_fixed_draws


def test_only_what_heads_on_a_frozen_base_read_alone_is_kept(plan, monkeypatch):
    assert FeatureCache.fits(made(plan), plan.dataset)
    for sizes in ({"attention_layers": 1}, {"count_head": True}, {"freeze_base": False}):
        assert not FeatureCache.fits(made(plan, **sizes), plan.dataset), sizes
    size = 4 * len(plan.dataset.sample_ids) * made(plan).features.width
    for most, fits in ((size, True), (size - 1, False)):
        monkeypatch.setattr(feature_cache, "MOST_BYTES", most)
        assert FeatureCache.fits(made(plan), plan.dataset) == fits
