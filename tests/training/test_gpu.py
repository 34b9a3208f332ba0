"""The loop on a GPU: the same numbers as on the CPU, and no waiting for the device between updates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aam.config import TargetConfig
from aam.data.batches import EpochBatches
from aam.model.clades import unweighted_unifrac, weighted_unifrac
from aam.plan import RunPlan, make_plan
from aam.task import build_task
from aam.training.loop import fit
from aam.training.optimizer import make_optimizer, update
from aam.training.step import step
from runs import ALL_METRICS, CPU, DEEP, STILL, TINY, data_config, pretrain_plan, train_config
from tensors import without_dropout

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda", 0)


def losses(state):
    return [row[f"{part}/total_loss"] for row in state.history for part in ("train", "val")]


def losses_on(device: torch.device, plan: RunPlan) -> list[float]:
    task = build_task(plan, device)
    without_dropout(task.model)  # whose random numbers differ
    return losses(fit(task))


@pytest.mark.parametrize("model", [STILL, TINY])
def test_stage_1_on_a_gpu_is_stage_1_on_the_cpu(synthetic_folder, tmp_path, model):
    plan = pretrain_plan(synthetic_folder, tmp_path, model=model, loss=ALL_METRICS, precision="fp32", epochs=3)
    assert losses_on(GPU, plan) == pytest.approx(losses_on(CPU, plan), rel=1e-3)


@pytest.mark.parametrize("head_layers", [0, 1])
def test_stage_2_on_a_gpu_is_stage_2_on_the_cpu(synthetic_folder, tmp_path, head_layers):
    target = TargetConfig(target="gradient", head_layers=head_layers)
    plan = make_plan(train_config(synthetic_folder, tmp_path, model=STILL, target=target, precision="fp32", epochs=3))
    assert losses_on(GPU, plan) == pytest.approx(losses_on(CPU, plan), rel=1e-3)


@pytest.mark.parametrize("metric", ["unweighted", "weighted"])
def test_a_large_batch_needs_no_tensor_of_all_pairs_by_all_clades(metric):
    """Such a one has 8 GiB here; the distances and their gradients are those of a CPU."""
    samples, clades = 2048, 512
    draw = torch.Generator().manual_seed(0)
    x, lengths = torch.rand(samples, clades, generator=draw), torch.rand(clades, generator=draw)
    function = unweighted_unifrac if metric == "unweighted" else weighted_unifrac
    here = [tensor.to(GPU).requires_grad_() for tensor in (x, lengths)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = function(here[0], here[0], here[1])
    gradients = torch.autograd.grad(found.square().mean(), here)
    assert torch.cuda.max_memory_allocated() - before < 2**30
    rows = slice(0, 64)
    torch.testing.assert_close(found[rows].cpu(), function(x[rows], x, lengths), rtol=0, atol=1e-5)
    few = [tensor.requires_grad_() for tensor in (x[:200].clone(), lengths)]
    expected = torch.autograd.grad(function(few[0], few[0], few[1]).square().mean(), few)
    again = [tensor.detach().to(GPU).requires_grad_() for tensor in few]
    same = torch.autograd.grad(function(again[0], again[0], again[1]).square().mean(), again)
    for one, other in zip(same, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-7)
    assert all(gradient.isfinite().all() for gradient in gradients)


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


def plans(folder: Path, out: Path) -> dict[str, RunPlan]:
    attention = TargetConfig(target="gradient", head_layers=1)
    quantiles = TargetConfig(target="gradient", target_loss="quantile")
    balanced = TargetConfig(target="site", classifier=True, class_weights="balanced")
    return {
        "k-mers": pretrain_plan(folder, out, model=TINY, loss=ALL_METRICS),
        "nucleotides": pretrain_plan(folder, out, model=DEEP, loss=ALL_METRICS),
        "target": make_plan(train_config(folder, out, model=TINY)),
        "target with attention": make_plan(train_config(folder, out, model=DEEP, target=attention)),
        "quantiles": make_plan(train_config(folder, out, target=quantiles)),
        "balanced classes": make_plan(train_config(folder, out, target=balanced)),
    }


@pytest.mark.parametrize(
    "kind", ["k-mers", "nucleotides", "target", "target with attention", "quantiles", "balanced classes"]
)
def test_a_step_never_waits_for_the_device(synthetic_folder, tmp_path, kind):
    """Forward, backward and update, under a mode in which any wait is an error."""
    plan = plans(synthetic_folder, tmp_path)[kind]
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
