"""What a frozen base says: computed once, and what it would be anew; whatever was there before, or was lost."""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import shutil
from pathlib import Path

import numpy as np
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
    return BaseCache(predictor or new_predictor(), plan.dataset, plan.contract, None, **settings)


def counted(predictor: SequencePredictor) -> dict[str, int]:
    """Counts what the base is asked for from now on: rows of its two stacks."""
    asked = {"asvs": 0, "samples": 0}

    def count(name: str):
        def hook(module, inputs, output) -> None:
            asked[name] += len(inputs[0])

        return hook

    predictor.base.asv_encoder.register_forward_hook(count("asvs"))
    predictor.base.transformer.register_forward_hook(count("samples"))
    return asked


def visit(cache: BaseCache, plan: BatchPlan, epoch: int) -> set[int]:
    """All batches of an epoch; their ASVs."""
    batches, seen = EpochBatches(plan, epoch), set()
    for index in range(len(batches)):
        cache.known(batches[index], fixed_draws=batches.has_fixed_draws)
        seen |= set(batches[index].asvs.tolist())
    return seen


def test_each_asv_and_each_fixed_sample_is_encoded_once_by_all_runs(plan, capsys):
    predictor = new_predictor()
    asked = counted(predictor)
    cache = cache_of(plan, predictor)
    cache.fill([EpochBatches(plan, FIXED_DRAW)])
    assert asked == {"asvs": asked["asvs"], "samples": 0}
    seen = visit(cache, plan, FIXED_DRAW) | visit(cache, plan, FIXED_DRAW)
    assert asked == {"asvs": len(seen), "samples": len(plan.sample_ids)}
    assert f"base: {len(seen)} ASVs encoded, 0 were there already, in {cache.folder}" in capsys.readouterr().out
    of_another_run = new_predictor()
    asked = counted(of_another_run)
    cache = cache_of(plan, of_another_run)
    cache.fill([EpochBatches(plan, FIXED_DRAW)])
    visit(cache, plan, FIXED_DRAW)
    assert asked == {"asvs": 0, "samples": 0}
    assert f"base: 0 ASVs encoded, {len(seen)} were there already" in capsys.readouterr().out
    # Epochs that draw anew show more ASVs, all encoded beforehand; what is drawn anew is kept of none of the samples.
    cache.fill([EpochBatches(plan, 1)])
    encoded = asked["asvs"]
    assert encoded > 0
    assert len(visit(cache, plan, 1) | visit(cache, plan, 2)) > len(seen)
    assert asked == {"asvs": encoded, "samples": 0}


@pytest.mark.parametrize("chunk_size", [7, None])
@pytest.mark.parametrize("epoch", [FIXED_DRAW, 1])
def test_outputs_are_those_without_it(plan, epoch, chunk_size):
    predictor = new_predictor()
    predictor.train()  # the base stays in evaluation mode: its dropout of 0.5 would show
    for head in (predictor.target_encoder, predictor.count_encoder):
        head.eval()
    batches = EpochBatches(plan, epoch)
    for _ in range(2):  # as it is computed, as it is found
        cache = cache_of(plan, predictor, chunk_size=chunk_size)
        for index in reversed(range(len(batches))):
            batch = batches[index]
            known = cache.known(batch, fixed_draws=batches.has_fixed_draws)
            assert (known.samples is None) == (epoch != FIXED_DRAW)
            found, expected = predictor(batch, known=known), predictor(batch)
            torch.testing.assert_close(found.target, expected.target, rtol=0, atol=1e-5)
            torch.testing.assert_close(found.base.embedding, expected.base.embedding, rtol=0, atol=1e-5)
            counts = [output.log_abundance[batch.slot_mask] for output in (found, expected)]
            torch.testing.assert_close(*counts, rtol=0, atol=1e-5)


def test_a_sample_is_kept_bit_for_bit_the_same_from_any_batch(plan):
    one, two = (dataclasses.replace(plan, batch_size=size) for size in (3, 40))
    kept = []
    for of_size in (one, two):
        cache = cache_of(of_size)
        visit(cache, of_size, FIXED_DRAW)
        kept.append(np.array(cache.samples.rows))
        for file in cache.folder.glob("samples-*"):
            file.unlink()
    np.testing.assert_array_equal(*kept)


def test_vectors_under_autocast_are_as_the_encoder_gives_them(plan):
    predictor, batch = new_predictor(), EpochBatches(plan, 1)[0]
    found = BaseCache(predictor, plan.dataset, plan.contract, torch.bfloat16).known(batch, fixed_draws=False).asvs
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
        changed.summary.out.bias[0] += 1e-6
    keys.append(cache_key(changed, dataset, None))
    assert len(set(keys)) == len(keys)
    assert cache_key(new_predictor(dropout=0.1).base, dataset, None) == keys[0]  # none where nothing trains
    assert cache_key(new_predictor().base, PreparedDataset(Path("elsewhere") / dataset.folder.name), None) == keys[0]


def test_samples_of_another_draw_are_other_samples(plan):
    first = cache_of(plan)
    visit(first, plan, FIXED_DRAW)
    for change in ({"rarefy_depth": 100}, {"token_limit": 12}, {"token_choice": "first"}, {"seed": 5}):
        other = dataclasses.replace(plan, contract=dataclasses.replace(plan.contract, **change))
        cache = cache_of(other)
        assert cache.folder == first.folder
        items = np.array([plan.dataset.row[sample_id] for sample_id in plan.sample_ids])
        assert len(cache.samples.missing(items)) == len(items), change


def test_what_is_lost_or_half_written_is_computed_anew(plan):
    predictor, batch = new_predictor(), EpochBatches(plan, FIXED_DRAW)[0]
    expected = cache_of(plan, predictor).known(batch, fixed_draws=True)
    folder = cache_of(plan, predictor).folder
    for rows in folder.glob("*.rows"):
        sums = rows.with_suffix(".sums")
        whole, flags = rows.read_bytes(), sums.read_bytes()
        rows.write_bytes(whole[: len(whole) // 2])  # cut short
        sums.write_bytes(flags[:64] + bytes(64) + flags[128:])  # some were not marked yet
    asked = counted(predictor)
    found = cache_of(plan, predictor).known(batch, fixed_draws=True)
    assert 0 < asked["asvs"] < len(batch.asvs)
    torch.testing.assert_close(found.asvs, expected.asvs, rtol=0, atol=1e-6)
    for one, other in zip(found.samples, expected.samples, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@contextlib.contextmanager
def files_of_at_most(size: int):
    """The nearest thing to a full disk that needs no disk of its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("kind", ["no folder", "full at once", "full later", "full with samples"])
def test_without_a_place_on_disk_it_goes_on_in_memory(plan, capsys, kind):
    predictor = new_predictor()
    asked = counted(predictor)
    if kind == "no folder":
        (plan.dataset.folder.parent / "vectors").write_text("a file in its place")
    with files_of_at_most(100 if kind == "full at once" else 2**40):
        cache = cache_of(plan, predictor)
    if kind == "full later":
        cache.known(EpochBatches(plan, FIXED_DRAW)[0], fixed_draws=False)
    with files_of_at_most(4000 if kind == "full later" else 2**40):
        cache.fill([EpochBatches(plan, FIXED_DRAW)])
    with files_of_at_most(4000 if kind == "full with samples" else 2**40):
        seen = visit(cache, plan, FIXED_DRAW)
    said = capsys.readouterr().out
    assert said.count("is kept in memory, not in") == 1
    assert asked["asvs"] == len(seen) if kind != "full later" else len(seen) <= asked["asvs"] < 2 * len(seen)
    batch = EpochBatches(plan, FIXED_DRAW)[1]
    known = cache.known(batch, fixed_draws=True)
    assert known.samples is None
    torch.testing.assert_close(predictor(batch, known=known).target, predictor(batch).target, rtol=0, atol=1e-5)
