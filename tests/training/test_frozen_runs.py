"""Runs on a frozen base: with what it says kept, one worker or two, they are what they are without."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from aam.config import TargetConfig
from aam.data.batches import EpochBatches
from aam.data.dataset import PreparedDataset
from aam.plan import RunPlan, make_plan
from aam.predict import predict_samples
from aam.task import build_task
from aam.training import checkpoint, collectives
from aam.training.base_cache import BaseCache
from aam.training.loop import fit
from runs import CPU, DEEP, data_config, pretrain_plan, train_config

DRAWS = {
    "anew": {},
    "fixed": {"fixed_rarefaction": True},
    "all reads": {"rarefy_depth": 0},
}
"""How the reads of a sample are drawn; but for the first, each time the same, and its features are kept too."""
HEADS = {
    "features alone": TargetConfig(target="gradient"),
    "asvs and counts": TargetConfig(target="gradient", count_weight=0.1, head_layers=1),
}


@pytest.fixture(scope="module")
def base(synthetic_folder, tmp_path_factory) -> Path:
    """Checkpoint of a new encoder."""
    folder = tmp_path_factory.mktemp("base")
    plan = pretrain_plan(synthetic_folder, folder, model=DEEP, epochs=1)
    fit(build_task(plan, CPU, report=lambda metrics, write: write(folder / "base")))
    return folder / "base"


def run(folder: Path, base: Path, out: Path, *, draws: str, heads: str, cache_dir: Path, **settings) -> None:
    """Stage 2 on a frozen base, with dropout; leaves its history and checkpoints of all epochs."""
    die_after, resume_from = settings.pop("die_after", None), settings.pop("resume_from", None)
    data = data_config(folder, cache_dir=cache_dir, **DRAWS[draws])
    settings = {"epochs": 3, **settings}
    config = train_config(
        folder, out, model=DEEP, target=HEADS[heads], pretrained=base, freeze_base=True, data=data, **settings
    )

    def report(metrics, write) -> None:
        if write is not None:
            write(out / f"epoch_{metrics['epoch']}")
        if metrics["epoch"] == die_after:
            raise InterruptedError

    plan = make_plan(config, (base, checkpoint.load(base).spec))
    with contextlib.suppress(InterruptedError):
        state = fit(build_task(plan, CPU, report=report), resume_from=resume_from)
        if collectives.rank() == 0:
            (out / "history.json").write_text(json.dumps(state.history))


def history(out: Path) -> list[dict[str, float]]:
    rows = json.loads((out / "history.json").read_text())
    return [{tag: value for tag, value in row.items() if not tag.startswith("throughput")} for row in rows]


def run_with_keywords(arguments: tuple, keywords: dict) -> None:
    run(*arguments, **keywords)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("draws", DRAWS)
def test_losses_are_those_of_a_base_that_is_asked_each_time(
    two_workers, synthetic_folder, base, tmp_path, draws, heads, workers
):
    here = {"cache_dir": tmp_path / "cache", "draws": draws, "heads": heads}
    start = run_with_keywords if workers == 1 else lambda *arguments: two_workers(run_with_keywords, *arguments)
    for name, cached in (("asked", False), ("first", True), ("second", True)):
        start((synthetic_folder, base, tmp_path / name), {**here, "base_cache": cached})
        assert (tmp_path / "cache" / "vectors").exists() == cached
    asked, first, second = (history(tmp_path / name) for name in ("asked", "first", "second"))
    assert first == second, "what is found is not what was computed"
    assert ("val/count_loss" in first[0]) == (heads == "asvs and counts")
    for one, other in zip(asked, first, strict=True):
        assert one.keys() == other.keys()
        for tag in (tag for tag in one if tag.endswith("loss")):
            assert other[tag] == pytest.approx(one[tag], rel=1e-5), tag


@pytest.mark.parametrize("draws", DRAWS)
def test_the_base_is_not_asked_for_features_that_are_kept(synthetic_folder, base, tmp_path, draws):
    data = data_config(synthetic_folder, cache_dir=tmp_path / "cache", **DRAWS[draws])
    config = train_config(
        synthetic_folder, tmp_path, model=DEEP, pretrained=base, freeze_base=True, data=data, epochs=3
    )
    plan = make_plan(config, (base, checkpoint.load(base).spec))
    task, asked = build_task(plan, CPU), []
    task.model.base.register_forward_hook(lambda module, inputs, output: asked.append(len(inputs[0].sample_ids)))
    fit(task)
    train, val = len(plan.split.train), len(plan.split.val)
    assert sum(asked) == (val + 3 * train if draws == "anew" else val + train)


def fill(plan: RunPlan, folders: list[Path], out: Path, chunk_size: int) -> None:
    """As one of two workers that find the dataset in these folders; leaves how many ASVs it has encoded."""
    rank = collectives.rank()
    plan = dataclasses.replace(plan, dataset=PreparedDataset(folders[rank]))
    task, encoded = build_task(plan, CPU), []
    task.model.base.asv_encoder.register_forward_hook(lambda module, inputs, output: encoded.append(len(inputs[0])))
    cache = BaseCache(task.model, plan.dataset, None, chunk_size=chunk_size)
    part = EpochBatches(task.train, 1)
    cache.fill([part])
    assert len(cache.vectors.missing(part.possible_asvs())) == 0
    (out / f"{rank}.json").write_text(json.dumps(encoded))


@pytest.mark.parametrize("nodes", [1, 2])
def test_two_workers_share_the_work_on_one_node_or_on_two(two_workers, synthetic_folder, base, tmp_path, nodes):
    # Without a cache on disk of its own, a task leaves all ASVs to the one that is tested here.
    config = train_config(synthetic_folder, tmp_path, model=DEEP, pretrained=base, freeze_base=True, base_cache=False)
    plan = make_plan(config, (base, checkpoint.load(base).spec))
    folders = [tmp_path / f"node{i % nodes}" / plan.dataset.folder.name for i in range(2)]
    for folder in set(folders):
        shutil.copytree(plan.dataset.folder, folder)
    two_workers(fill, plan, folders, tmp_path, 8)
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    everything = len(EpochBatches(build_task(plan, CPU).train, 1).possible_asvs())
    assert sum(one) + sum(two) == everything, "each once in all"
    assert abs(len(one) - len(two)) <= 1, "not a chunk each in turn"
    two_workers(fill, plan, folders, tmp_path, 8)
    assert [(tmp_path / f"{rank}.json").read_text() for rank in (0, 1)] == ["[]", "[]"]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("draws", ["anew", "fixed"])
def test_a_resumed_run_is_uninterrupted_bit_for_bit(synthetic_folder, base, tmp_path, draws, heads):
    here = {"cache_dir": tmp_path / "cache", "draws": draws, "heads": heads, "epochs": 4}
    run(synthetic_folder, base, tmp_path / "straight", **here)
    run(synthetic_folder, base, tmp_path / "resumed", die_after=2, **here)
    run(synthetic_folder, base, tmp_path / "resumed", resume_from=tmp_path / "resumed" / "epoch_2", **here)
    assert history(tmp_path / "straight") == history(tmp_path / "resumed")
    one, two = (checkpoint.load(tmp_path / name / "epoch_4").model for name in ("straight", "resumed"))
    for (name, weight), (_, other) in zip(one.state_dict().items(), two.state_dict().items(), strict=True):
        assert torch.equal(weight, other), name


@pytest.mark.parametrize("heads", HEADS)
def test_predictions_are_those_without_it(synthetic_folder, base, tmp_path, heads):
    run(synthetic_folder, base, tmp_path / "run", epochs=1, cache_dir=tmp_path / "cache", draws="anew", heads=heads)
    loaded = checkpoint.load(tmp_path / "run" / "epoch_1")
    config = train_config(synthetic_folder, tmp_path, data=data_config(synthetic_folder, cache_dir=tmp_path / "cache"))
    plan = make_plan(config)
    ids = plan.split.val
    asked = []
    loaded.model.base.asv_encoder.register_forward_hook(lambda module, inputs, output: asked.append(module))
    found = predict_samples(loaded, plan.dataset, ids, batch_size=3, device=CPU)
    assert asked == [], "the run has encoded all ASVs"
    expected = predict_samples(loaded, plan.dataset, ids, batch_size=5, device=CPU, base_cache=False)
    assert asked != []
    for one, other in ((found.target, expected.target), (found.presence, expected.presence)):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
