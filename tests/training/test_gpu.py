"""The loop on a GPU: the same numbers as on the CPU, and no waiting for the device between updates."""

from __future__ import annotations

import pytest
import torch

from aam.data.batches import EpochBatches
from aam.plan import make_plan
from aam.task import build_task
from aam.training.loop import fit
from aam.training.optimizer import make_optimizer, update
from aam.training.step import step
from runs import CPU, STILL, TINY, data_config, pretrain_plan, train_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda", 0)


def losses(state):
    return [row[f"{part}/total_loss"] for row in state.history for part in ("train", "val")]


def test_stage_1_on_a_gpu_is_stage_1_on_the_cpu(synthetic_folder, tmp_path):
    plan = pretrain_plan(synthetic_folder, tmp_path, model=STILL, precision="fp32", epochs=3)
    assert losses(fit(build_task(plan, GPU))) == pytest.approx(losses(fit(build_task(plan, CPU))), rel=1e-3)


def test_stage_2_on_a_gpu_is_stage_2_on_the_cpu(synthetic_folder, tmp_path):
    plan = make_plan(train_config(synthetic_folder, tmp_path, model=STILL, precision="fp32", epochs=3))
    assert losses(fit(build_task(plan, GPU))) == pytest.approx(losses(fit(build_task(plan, CPU))), rel=1e-3)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 1e-2)])
def test_what_a_frozen_base_says_is_kept(synthetic_folder, tmp_path, precision, tolerance, fixed):
    found = []
    for cached in (False, True, True):
        data = data_config(synthetic_folder, fixed_rarefaction=fixed, cache_dir=tmp_path / "cache")
        config = train_config(
            synthetic_folder, tmp_path, model=STILL, pretrained=tmp_path, freeze_base=True, data=data,
            precision=precision, epochs=3, base_cache=cached,
        )  # fmt: skip
        found.append(losses(fit(build_task(make_plan(config), GPU))))
        assert (tmp_path / "cache" / "vectors").exists() == cached
    assert found[1] == pytest.approx(found[0], rel=tolerance)
    assert found[2] == pytest.approx(found[1], rel=tolerance)


@pytest.mark.parametrize(
    "options",
    [{}, {"asv_chunk_size": 16}, {"gradient_checkpointing": True}, {"loader_workers": 1}, {"clear_cache": "batch"}],
)
def test_bf16_is_near_fp32(synthetic_folder, tmp_path, options):
    plans = [
        pretrain_plan(synthetic_folder, tmp_path, model=STILL, precision=precision, epochs=2, **more)
        for precision, more in (("fp32", {}), ("auto", options))
    ]
    full, half = (losses(fit(build_task(plan, GPU))) for plan in plans)
    assert half != full, "auto is not bf16 on a GPU"
    assert half == pytest.approx(full, rel=0.05)


def test_a_step_never_waits_for_the_device(synthetic_folder, tmp_path):
    """Forward, backward and update, under a mode in which any wait is an error."""
    plan = pretrain_plan(synthetic_folder, tmp_path, model=TINY)
    task = build_task(plan, GPU)
    optimizer = make_optimizer(task.model, 0.01)
    batches = [batch.to(GPU) for batch in EpochBatches(task.train, 1)]
    task.model.train()

    def one(batch) -> None:
        losses, _ = step(task.model, batch, task.objective, autocast=torch.bfloat16)
        total = task.objective.weights.total(losses)
        total.backward()
        update(optimizer, total.detach().isfinite(), lr=1e-3, clip_norm=1.0)

    one(batches[0])  # libraries set themselves up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[1:]:
            one(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
