"""What a frozen base says: computed once, and what it would be anew; whatever was there before, or was lost."""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import shutil
from pathlib import Path

import pytest
import torch

from aam.data.batches import BatchPlan, EpochBatches
from aam.data.dataset import PreparedDataset
from aam.data.draw import FIXED_DRAW
from aam.model.sequence_encoder import SequenceEncoder
from aam.model.sequence_predictor import SequencePredictor
from aam.training.base_cache import BaseCache, cache_key
from runs import pretrain_plan
from tensors import PREDICTOR, SIZES


def new_predictor(seed: int = 0, **sizes) -> SequencePredictor:
    torch.manual_seed(seed)
    base = SequenceEncoder(dataclasses.replace(SIZES, **{"max_bp": 150, "dropout": 0.5, **sizes}))
    return SequencePredictor(base, PREDICTOR, freeze_base=True)


@pytest.fixture
def plan(synthetic_folder, tmp_path) -> BatchPlan:
    """Of a dataset beside which nothing is kept yet."""
    run = pretrain_plan(synthetic_folder, tmp_path / "run")
    folder = tmp_path / "cache" / run.dataset.folder.name
    shutil.copytree(run.dataset.folder, folder)
    ids = [*run.split.train, *run.split.val]
    return BatchPlan(
        dataset=PreparedDataset(folder),
        sample_ids=ids,
        contract=run.spec.contract,
        batch_size=8,
        count_mask_fraction=0.2,
    )


def cache_of(plan: BatchPlan, predictor: SequencePredictor | None = None, **settings) -> BaseCache:
    return BaseCache(predictor or new_predictor(), plan.dataset, None, **settings)


def counted(predictor: SequencePredictor) -> list[int]:
    """Rows of each call of the ASV encoder from now on."""
    asked = []
    predictor.base.asv_encoder.register_forward_hook(lambda module, inputs, output: asked.append(len(inputs[0])))
    return asked


def visit(cache: BaseCache, plan: BatchPlan, epoch: int) -> set[int]:
    """All batches of an epoch; their ASVs."""
    batches, seen = EpochBatches(plan, epoch), set()
    for index in range(len(batches)):
        cache.vectors_of(batches[index])
        seen |= set(batches[index].asvs.tolist())
    return seen


def test_each_asv_is_encoded_once_by_all_runs(plan, capsys):
    predictor = new_predictor()
    asked = counted(predictor)
    cache = cache_of(plan, predictor)
    cache.fill([EpochBatches(plan, FIXED_DRAW)])
    encoded = sum(asked)
    seen = visit(cache, plan, FIXED_DRAW) | visit(cache, plan, FIXED_DRAW)
    assert sum(asked) == encoded == len(seen)
    assert f"base: {len(seen)} ASVs encoded, 0 were there already, in {cache.folder}" in capsys.readouterr().out
    of_another_run = new_predictor()
    asked = counted(of_another_run)
    cache = cache_of(plan, of_another_run)
    cache.fill([EpochBatches(plan, FIXED_DRAW)])
    visit(cache, plan, FIXED_DRAW)
    assert asked == []
    assert f"base: 0 ASVs encoded, {len(seen)} were there already" in capsys.readouterr().out
    # Epochs that draw anew show more ASVs, all encoded beforehand.
    cache.fill([EpochBatches(plan, 1)])
    encoded = sum(asked)
    assert encoded > 0
    assert len(visit(cache, plan, 1) | visit(cache, plan, 2)) > len(seen)
    assert sum(asked) == encoded


@pytest.mark.parametrize("chunk_size", [7, None])
@pytest.mark.parametrize("epoch", [FIXED_DRAW, 1])
def test_outputs_are_those_without_it(plan, epoch, chunk_size):
    predictor = new_predictor()
    predictor.train()  # the base stays in evaluation mode: its dropout of 0.5 would show
    for name, head in predictor.named_children():
        if name != "base":
            head.eval()
    batches = EpochBatches(plan, epoch)
    for _ in range(2):  # as it is computed, as it is found
        cache = cache_of(plan, predictor, chunk_size=chunk_size)
        for index in reversed(range(len(batches))):
            batch = batches[index]
            found, expected = predictor(batch, cached_vectors=cache.vectors_of(batch)), predictor(batch)
            torch.testing.assert_close(found.target, expected.target, rtol=0, atol=1e-5)
            torch.testing.assert_close(found.base.memberships, expected.base.memberships, rtol=0, atol=1e-5)
            counts = [output.log_abundance[batch.slot_mask] for output in (found, expected)]
            torch.testing.assert_close(*counts, rtol=0, atol=1e-5)


def test_vectors_under_autocast_are_as_the_encoder_gives_them(plan):
    predictor, batch = new_predictor(), EpochBatches(plan, 1)[0]
    found = BaseCache(predictor, plan.dataset, torch.bfloat16).vectors_of(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        expected, _ = predictor.base.asv_encoder(batch.tokens, padded=batch.asvs_padded)
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-2)
    assert not torch.equal(found, found.bfloat16().float())  # kept whole, not rounded


def test_the_key_is_of_weights_sizes_data_and_arithmetic(plan, synthetic_folder, tmp_path):
    base, dataset = new_predictor().base, plan.dataset
    keys = [cache_key(base, dataset, None), cache_key(base, dataset, torch.bfloat16)]
    keys.append(cache_key(new_predictor(seed=1).base, dataset, None))
    keys.append(cache_key(base, PreparedDataset(dataset.folder.with_name("dataset-other")), None))
    changed = new_predictor().base
    with torch.no_grad():
        changed.clades.raw_length[0] += 1e-6
    keys.append(cache_key(changed, dataset, None))
    assert len(set(keys)) == len(keys)
    assert cache_key(new_predictor(dropout=0.1).base, dataset, None) == keys[0]  # none where nothing trains
    assert cache_key(new_predictor().base, PreparedDataset(Path("elsewhere") / dataset.folder.name), None) == keys[0]


def test_what_is_lost_or_half_written_is_computed_anew(plan):
    predictor, batch = new_predictor(), EpochBatches(plan, FIXED_DRAW)[0]
    expected = cache_of(plan, predictor).vectors_of(batch)
    (rows,) = cache_of(plan, predictor).folder.glob("*.rows")
    sums = rows.with_suffix(".sums")
    whole, flags = rows.read_bytes(), sums.read_bytes()
    rows.write_bytes(whole[: len(whole) // 2])  # cut short
    sums.write_bytes(flags[:64] + bytes(64) + flags[128:])  # some were not marked yet
    asked = counted(predictor)
    found = cache_of(plan, predictor).vectors_of(batch)
    assert 0 < sum(asked) < len(batch.asvs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_cache_in_memory_touches_no_disk(plan, capsys):
    predictor = new_predictor()
    cache = cache_of(plan, predictor, on_disk=False)
    asked = counted(predictor)
    cache.fill([EpochBatches(plan, FIXED_DRAW)])
    visit(cache, plan, FIXED_DRAW)
    batch = EpochBatches(plan, FIXED_DRAW)[0]
    assert sum(asked) == len(EpochBatches(plan, FIXED_DRAW).possible_asvs())
    torch.testing.assert_close(
        cache.vectors_of(batch), predictor.base.asv_encoder(batch.tokens)[0].detach(), rtol=0, atol=1e-5
    )
    assert not (plan.dataset.folder.parent / "vectors").exists()
    assert capsys.readouterr().out == ""


@contextlib.contextmanager
def files_of_at_most(size: int):
    """The nearest thing to a full disk that needs no disk of its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("kind", ["no folder", "full at once", "full later", "full with other ASVs"])
def test_without_a_place_on_disk_it_goes_on_in_memory(plan, capsys, kind):
    predictor = new_predictor()
    asked = counted(predictor)
    if kind == "no folder":
        (plan.dataset.folder.parent / "vectors").write_text("a file in its place")
    with files_of_at_most(100 if kind == "full at once" else 2**40):
        cache = cache_of(plan, predictor)
    if kind == "full later":
        cache.vectors_of(EpochBatches(plan, FIXED_DRAW)[0])
    with files_of_at_most(4000 if kind == "full later" else 2**40):
        cache.fill([EpochBatches(plan, FIXED_DRAW)])
    with files_of_at_most(4000 if kind == "full with other ASVs" else 2**40):
        seen = visit(cache, plan, FIXED_DRAW) | visit(cache, plan, 1)
    said = capsys.readouterr().out
    assert said.count("ASV vectors are kept in memory, not in") == 1
    assert len(seen) <= sum(asked) < 2 * len(seen)
    batch = EpochBatches(plan, FIXED_DRAW)[1]
    predictor.eval()
    found = predictor(batch, cached_vectors=cache.vectors_of(batch))
    torch.testing.assert_close(found.target, predictor(batch).target, rtol=0, atol=1e-5)
