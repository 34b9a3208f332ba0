"""Vectors of ASVs under a frozen encoder: each is computed once, and is what it would be anew."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from runs import pretrain_plan
from tensors import PREDICTOR, SIZES

from aam.data.batches import BatchPlan, EpochBatches
from aam.model.sequence_encoder import SequenceEncoder
from aam.model.sequence_predictor import SequencePredictor
from aam.training.asv_cache import ASVCache

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def batches(synthetic_folder, tmp_path_factory) -> EpochBatches:
    plan = pretrain_plan(synthetic_folder, tmp_path_factory.mktemp("run"))
    ids = [*plan.split.train, *plan.split.val]
    return EpochBatches(
        BatchPlan(dataset=plan.dataset, sample_ids=ids, contract=plan.spec.contract, batch_size=8), epoch=1
    )


@pytest.fixture
def predictor() -> SequencePredictor:
    torch.manual_seed(0)
    base = SequenceEncoder(dataclasses.replace(SIZES, max_bp=150, dropout=0.5))
    return SequencePredictor(base, PREDICTOR, freeze_base=True)


def test_each_asv_is_encoded_once(batches, predictor):
    dataset = batches.plan.dataset
    cache, encoded = ASVCache(predictor, dataset, None), []
    hook = lambda module, inputs, output: encoded.append(len(inputs[0]))  # noqa: E731
    predictor.base.asv_encoder.register_forward_hook(hook)
    seen = set()
    for _ in range(2):
        for index in range(len(batches)):
            batch = batches[index]
            cache.vectors(batch.asvs, batch)
            seen |= set(batch.asvs.tolist())
    assert sum(encoded) == len(seen)
    assert len(encoded) <= len(batches)  # none at all in the second round
    assert set(np.flatnonzero(cache.known)) == seen


@pytest.mark.parametrize("chunk_size", [7, 1024])
def test_outputs_are_those_without_it(batches, predictor, chunk_size):
    predictor.train()  # the base stays in evaluation mode: its dropout of 0.5 would show
    predictor.target_encoder.eval()
    cache = ASVCache(predictor, batches.plan.dataset, None, chunk_size)
    for index in range(len(batches)):
        batch = batches[index]
        vectors = cache.vectors(batch.asvs, batch)
        assert not vectors.requires_grad
        found, expected = predictor(batch, asv_vectors=vectors), predictor(batch)
        torch.testing.assert_close(found.target, expected.target, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.base.embedding, expected.base.embedding, rtol=0, atol=1e-5)


def test_vectors_under_autocast_are_as_the_encoder_gives_them(batches, predictor):
    cache, batch = ASVCache(predictor, batches.plan.dataset, torch.bfloat16), batches[0]
    found = cache.vectors(batch.asvs, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        expected, _ = predictor.base.asv_encoder(batch.tokens, padded=batch.asvs_padded)
    assert torch.equal(found, expected.float())
    assert not torch.equal(found, cache.store.bfloat16().float()[batch.asvs])  # kept whole, not rounded
