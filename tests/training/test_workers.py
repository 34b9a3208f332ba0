"""Two processes are one: gradients, losses and resumed runs, over gloo."""

from __future__ import annotations

import contextlib
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from aam.config import TargetConfig
from aam.data.batches import build_batch
from aam.plan import make_plan
from aam.task import build_task
from aam.training import checkpoint, collectives
from aam.training.loop import fit
from aam.training.step import step
from runs import ALL_METRICS, CPU, DEEP, STILL, pretrain_config, train_config
from tensors import without_dropout


def gradients_of_share(config, out: Path) -> None:
    """Gradients of one batch, as the loop takes them, on as many processes as there are."""
    task = build_task(make_plan(config), CPU)
    without_dropout(task.model)
    rank, world = collectives.rank(), collectives.world_size()
    batch = build_batch(task.train, np.arange(8), epoch=1, index=0, rank=rank, world=world)
    module = DistributedDataParallel(task.model) if world > 1 else task.model
    losses, _ = step(module, batch, task.objective)
    (task.objective.weights.total(losses) * world).backward()
    assert len(losses.metrics) == (3 if task.objective.target is None else 0)
    if rank == 0:
        grads = {k: p.grad for k, p in task.model.named_parameters() if p.grad is not None}
        torch.save(grads, out)


def configs(folder, tmp_path):
    target = TargetConfig(target="gradient", base_weight=0.5, count_weight=0.3, head_layers=1)
    return {
        "pretrain": pretrain_config(folder, tmp_path, model=STILL, loss=ALL_METRICS),
        "train": train_config(folder, tmp_path, model=STILL, target=target),
    }


@pytest.mark.parametrize("stage", ["pretrain", "train"])
def test_gradients_of_two_processes_are_those_of_one(two_workers, synthetic_folder, tmp_path, stage):
    config = configs(synthetic_folder, tmp_path)[stage]
    gradients_of_share(config, tmp_path / "one.pt")
    two_workers(gradients_of_share, config, tmp_path / "two.pt")
    one, two = (torch.load(tmp_path / name) for name in ("one.pt", "two.pt"))
    assert one.keys() == two.keys()
    assert any(grad.abs().max() > 1e-3 for grad in one.values())
    # float32 sums in another order: 1e-5 of the largest gradient, in every element.
    largest = max(grad.abs().max().item() for grad in one.values())
    for name, grad in one.items():
        torch.testing.assert_close(two[name], grad, rtol=1e-5, atol=1e-5 * max(1.0, largest), msg=name)


def run(
    config, folder: Path, die_after: int | None = None, resume_from: Path | None = None, *, dropout: bool = False
) -> None:
    def report(metrics, write) -> None:
        if write is not None:
            write(folder / f"epoch_{metrics['epoch']}")
        if metrics["epoch"] == die_after:
            raise InterruptedError

    task = build_task(make_plan(config), CPU, report=report, folder=folder)
    if not dropout:
        without_dropout(task.model)
    with contextlib.suppress(InterruptedError):
        fit(task, resume_from=resume_from)


run_with_dropout = partial(run, dropout=True)


def read_history(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", ["pretrain", "train"])
def test_losses_and_metrics_of_two_workers_are_those_of_one(two_workers, synthetic_folder, tmp_path, stage):
    config = configs(synthetic_folder, tmp_path)[stage]
    run(config, tmp_path / "one")
    two_workers(run, config, tmp_path / "two")
    for one, two in zip(read_history(tmp_path / "one"), read_history(tmp_path / "two"), strict=True):
        assert one.keys() == two.keys()
        expected = {"val/unifrac_r2"}
        if stage == "pretrain":
            expected |= {"val/weighted_unifrac_r2", "val/faith_pd_r2", "train/faith_pd_loss", "val/nuc_loss"}
        assert expected <= one.keys()
        for tag in one.keys() - {"throughput(samples/s)"}:
            assert two[tag] == pytest.approx(one[tag], rel=2e-4, abs=2e-5), tag


def test_validation_predictions_of_two_workers_bear_the_right_ids(two_workers, synthetic_folder, tmp_path):
    config = configs(synthetic_folder, tmp_path)["train"]
    run(config, tmp_path / "one")
    two_workers(run, config, tmp_path / "two")
    tables = []
    for name in ("one", "two"):
        lines = (tmp_path / name / "validation_predictions.tsv").read_text().splitlines()[1:]
        tables.append({i: (float(t), float(p)) for i, t, p in (line.split("\t") for line in lines)})
    assert tables[0].keys() == tables[1].keys() == set(make_plan(config).split.val)
    for sample, values in tables[0].items():
        assert tables[1][sample] == pytest.approx(values, abs=1e-2)


def test_two_workers_resume_bit_for_bit(two_workers, synthetic_folder, tmp_path):
    # With dropout: each worker needs its own random state back.
    config = pretrain_config(synthetic_folder, tmp_path, model=DEEP, loss=ALL_METRICS, epochs=4)
    two_workers(run_with_dropout, config, tmp_path / "straight")
    two_workers(run_with_dropout, config, tmp_path / "resumed", 2)
    two_workers(run_with_dropout, config, tmp_path / "resumed", None, tmp_path / "resumed" / "epoch_2")
    one, two = (checkpoint.load(tmp_path / name / "epoch_4").model for name in ("straight", "resumed"))
    for (name, weight), (_, other) in zip(one.state_dict().items(), two.state_dict().items(), strict=True):
        assert torch.equal(weight, other), name
    histories = [read_history(tmp_path / name) for name in ("straight", "resumed")]
    for row in histories[0] + histories[1]:
        row.pop("throughput(samples/s)")
    assert histories[0] == histories[1]
