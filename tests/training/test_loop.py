"""The loop on one process: epochs, updates, early stop, resume, logs."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.parallel import DistributedDataParallel

from aam.config import Precision, PretrainLossConfig, TargetConfig
from aam.data.batches import EpochBatches
from aam.model.layers import Transformer
from aam.plan import make_plan
from aam.task import build_task
from aam.training import checkpoint, loop
from aam.training.loop import NonFiniteError, fit
from aam.training.step import autocast_of, step
from runs import ALL_METRICS, CPU, DEEP, STILL, TINY, data_config, pretrain_config, pretrain_plan, train_config
from tensors import without_dropout


class InterruptedRunError(Exception):
    """Stands for a lost worker."""


class Keeper:
    """Keeps each epoch's checkpoint and, if told so, ends the run after one."""

    def __init__(self, folder: Path, die_after: int | None = None) -> None:
        self.folder, self.die_after, self.metrics = folder, die_after, []

    def __call__(self, metrics, write) -> None:
        self.metrics.append(metrics)
        write(self.folder / f"epoch_{metrics['epoch']}")
        if metrics["epoch"] == self.die_after:
            raise InterruptedRunError


def without_speed(history):
    return [{k: v for k, v in row.items() if not k.startswith("throughput")} for row in history]


def assert_same_tensors(one, other) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same_tensors(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same_tensors(a, b)
    else:
        assert one == other


@pytest.mark.parametrize(
    ("stage", "length"),
    [
        ("pretrain", {"epochs": 4}),
        ("pretrain", {"epochs": 4, "model": DEEP, "loss": ALL_METRICS}),
        ("train", {"epochs": 4}),
        ("train", {"epochs": 4, "model": DEEP, "target": TargetConfig(target="gradient", head_layers=1)}),
        ("pretrain", {"epochs": 9, "max_updates": 14}),
    ],
    ids=["pretrain", "pretrain on all", "train", "train with attention", "most updates"],
)
def test_resumed_is_uninterrupted_bit_for_bit(synthetic_folder, tmp_path, stage, length):
    def plan():
        config = pretrain_config if stage == "pretrain" else train_config
        return make_plan(config(synthetic_folder, tmp_path, **length))

    straight = Keeper(tmp_path / "straight")
    fit(build_task(plan(), CPU, report=straight, folder=tmp_path / "log_straight"))
    resumed = Keeper(tmp_path / "resumed", die_after=2)
    with pytest.raises(InterruptedRunError):
        fit(build_task(plan(), CPU, report=resumed, folder=tmp_path / "log_resumed"))
    torch.rand(7)  # whatever the process did in between
    resumed.die_after = None
    state = fit(
        build_task(plan(), CPU, report=resumed, folder=tmp_path / "log_resumed"),
        resume_from=tmp_path / "resumed" / "epoch_2",
    )
    assert state.epoch == 4
    one, other = (checkpoint.load(tmp_path / run / "epoch_4") for run in ("straight", "resumed"))
    assert_same_tensors(one.model.state_dict(), other.model.state_dict())
    states = [checkpoint.load_training_state(tmp_path / run / "epoch_4") for run in ("straight", "resumed")]
    assert_same_tensors(states[0][1], states[1][1])
    assert_same_tensors(states[0][2], states[1][2])
    assert without_speed(states[0][0].history) == without_speed(states[1][0].history)
    lines = (tmp_path / "log_resumed" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3, 4]


def test_resume_refuses_another_model(synthetic_folder, tmp_path):
    plan = pretrain_plan(synthetic_folder, tmp_path, epochs=1)
    fit(build_task(plan, CPU, report=Keeper(tmp_path)))
    other = make_plan(pretrain_config(synthetic_folder, tmp_path, seed=5, epochs=1))
    with pytest.raises(ValueError, match="other settings"):
        fit(build_task(other, CPU), resume_from=tmp_path / "epoch_1")


def test_losses_decrease_and_the_best_is_the_best(synthetic_folder, tmp_path):
    keeper = Keeper(tmp_path)
    plan = pretrain_plan(synthetic_folder, tmp_path, model=DEEP, epochs=6, lr=3e-3)
    state = fit(build_task(plan, CPU, report=keeper))
    first, last = state.history[0], state.history[-1]
    for tag in ("train/total_loss", "train/nuc_loss", "train/base_loss", "val/nuc_loss"):
        assert last[tag] < first[tag]
    losses = [row["val/total_loss"] for row in state.history]
    assert state.best_loss == min(losses)
    assert state.best_epoch == losses.index(min(losses)) + 1
    for row in state.history:
        parts = row["val/base_loss"] * plan.weights.base + row["val/nuc_loss"] * plan.weights.nuc
        assert row["val/total_loss"] == pytest.approx(parts)


METRIC_TAGS = {"unweighted": "unifrac", "weighted": "weighted_unifrac", "faith_pd": "faith_pd"}


@pytest.mark.parametrize(
    "metrics", [("unweighted",), ("weighted",), ("faith_pd",), ("faith_pd", "unweighted"), tuple(METRIC_TAGS)], ids=str
)
def test_each_metric_is_learned_and_scored_under_its_own_name(synthetic_folder, tmp_path, metrics):
    loss = PretrainLossConfig(unifrac_metric=metrics)
    plan = pretrain_plan(synthetic_folder, tmp_path, loss=loss, epochs=8, lr=1e-3, warmup_steps=0)
    assert tuple(learned.metric for learned in plan.spec.unifrac) == metrics
    state = fit(build_task(plan, CPU))
    first, last = state.history[0], state.history[-1]
    tags = [METRIC_TAGS[metric] for metric in metrics]
    for part in ("train", "val"):
        scores = {f"{part}/{tag}_{score}" for tag in tags for score in ("r2", "mae", "std_ratio")}
        beside = {f"{part}/{tag}_loss" for tag in tags} if len(tags) > 1 else set()
        losses = {f"{part}/total_loss", f"{part}/base_loss"}
        assert {tag for tag in last if tag.startswith(f"{part}/")} == scores | beside | losses
        if beside:
            assert last[f"{part}/base_loss"] == pytest.approx(sum(last[tag] for tag in beside) / len(beside), rel=1e-5)
        assert last[f"{part}/total_loss"] == pytest.approx(last[f"{part}/base_loss"])
    assert last["val/base_loss"] < 0.8 * first["val/base_loss"]
    for tag in tags:
        assert last[f"val/{tag}_r2"] > first[f"val/{tag}_r2"]


def test_made_up_samples_train_and_are_never_validated(synthetic_folder, tmp_path, monkeypatch):
    seen = {True: [], False: []}
    real_step = loop.step

    def watched_step(model, batch, *arguments, **settings):
        seen[model.training].append(batch.sample_ids)
        return real_step(model, batch, *arguments, **settings)

    monkeypatch.setattr(loop, "step", watched_step)
    plan = pretrain_plan(synthetic_folder, tmp_path, loss=PretrainLossConfig(made_up_fraction=1.0), epochs=1)
    fit(build_task(plan, CPU))
    for ids in seen[True]:
        assert sum(sample.startswith("made-up") for sample in ids) == len(ids) / 2
    assert [sample for ids in seen[False] for sample in ids] == plan.split.val


def test_a_loss_that_does_not_exist_is_absent(synthetic_folder, tmp_path):
    target = TargetConfig(target="gradient", count_weight=0.0)
    plan = make_plan(train_config(synthetic_folder, tmp_path, target=target, epochs=1))
    row = fit(build_task(plan, CPU)).history[0]
    assert {k for k in row if k.endswith("_loss")} == {
        "train/total_loss", "train/target_loss", "val/total_loss", "val/target_loss",
    }  # fmt: skip
    assert row["val/total_loss"] == pytest.approx(row["val/target_loss"])


def test_stops_when_patience_runs_out_and_logs_the_last_epoch(synthetic_folder, tmp_path):
    # A learning rate that wrecks the model: after the first epochs nothing gets better.
    plan = pretrain_plan(synthetic_folder, tmp_path, epochs=30, lr=0.3, patience=3, warmup_steps=0)
    keeper = Keeper(tmp_path)
    state = fit(build_task(plan, CPU, report=keeper, folder=tmp_path / "log"))
    losses = [row["val/total_loss"] for row in state.history]
    assert state.epoch < 30, "never stopped: the test's learning rate is too tame"
    assert state.epoch == state.best_epoch + 3
    assert min(losses) == losses[state.best_epoch - 1]
    lines = (tmp_path / "log" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == state.epoch == len(keeper.metrics)
    events = EventAccumulator(str(tmp_path / "log" / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("val/total_loss")] == list(range(1, state.epoch + 1))
    # Patience is part of the state: a run that had run out of it does not go on.
    again = fit(build_task(plan, CPU, report=keeper), resume_from=tmp_path / f"epoch_{state.epoch}")
    assert again.epoch == state.epoch


def test_event_file_holds_scalars_histograms_and_pictures(synthetic_folder, tmp_path):
    plan = make_plan(train_config(synthetic_folder, tmp_path, model=DEEP, epochs=2, histogram_every=2))
    fit(build_task(plan, CPU, folder=tmp_path))
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"histograms": 0}).Reload()
    tags = events.Tags()
    assert {"train/total_loss", "val/mae", "val/r2", "lr", "throughput(samples/s)"} <= set(tags["scalars"])
    assert "weights/target_heads.0.1.weight" in tags["histograms"]
    gradients = [tag for tag in tags["histograms"] if tag.startswith("gradients/")]
    assert "gradients/base.asv_encoder.nucleotides.token.weight" in gradients
    spread = events.Histograms("gradients/target_heads.0.1.weight")[-1].histogram_value
    assert spread.max > spread.min, "gradients were cleared before they were written"
    assert {"val/target", "val/counts"} <= set(tags["images"])
    assert (tmp_path / "figures" / "target.png").stat().st_size > 1000


def test_bar_says_epoch_step_loss_and_lr(synthetic_folder, tmp_path, monkeypatch):
    task = build_task(pretrain_plan(synthetic_folder, tmp_path, epochs=2), CPU)
    text = io.StringIO()
    monkeypatch.setattr(text, "isatty", lambda: True)
    fit(type(task)(**{**vars(task), "bar_file": text}))
    shown = text.getvalue()
    assert "Epoch 1/2" in shown
    assert "Epoch 2/2" in shown
    assert "Step 4/4, Loss " in shown
    assert ", LR " in shown
    assert "Loss 0.0000" not in shown


def test_accumulated_gradients_are_means_over_the_steps_of_their_group(synthetic_folder, tmp_path, monkeypatch):
    # Four batches in groups of 3 and 1, at a learning rate that leaves the weights where they are.
    settings = {"epochs": 1, "gradient_accumulation_steps": 3, "lr": 1e-30, "weight_decay": 0.0}
    plan = pretrain_plan(synthetic_folder, tmp_path, model=STILL, **settings)
    task = build_task(plan, CPU)
    batches = EpochBatches(task.train, 1)
    assert len(batches) == 4
    of_batch = []
    for index in range(4):
        losses, _ = step(task.model, batches[index], task.objective)
        task.objective.weights.total(losses).backward()
        of_batch.append({k: p.grad for k, p in task.model.named_parameters() if p.grad is not None})
        task.model.zero_grad(set_to_none=True)
    seen = []
    real_update = loop.update

    def watched_update(*arguments, **settings):
        seen.append({k: p.grad.clone() for k, p in task.model.named_parameters() if p.grad is not None})
        return real_update(*arguments, **settings)

    monkeypatch.setattr(loop, "update", watched_update)
    assert fit(task).update == len(seen) == 2
    assert seen[0].keys() == of_batch[0].keys() == dict(task.model.named_parameters()).keys() - {"clades.log_pd_scale"}
    for name in seen[0]:
        mean = torch.stack([grads[name] for grads in of_batch[:3]]).mean(dim=0)
        torch.testing.assert_close(seen[0][name], mean, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(seen[1][name], of_batch[3][name], rtol=1e-4, atol=1e-6)


def test_schedule_of_a_run_counts_updates_not_steps(synthetic_folder, tmp_path):
    plan = pretrain_plan(synthetic_folder, tmp_path, epochs=3, gradient_accumulation_steps=4, warmup_steps=0)
    state = fit(build_task(plan, CPU))
    assert state.update == 3
    assert state.history[0]["lr"] == pytest.approx(1e-3)
    assert state.history[-1]["lr"] == pytest.approx(0.0)


@pytest.mark.parametrize("accumulated", [1, 3])
def test_most_updates_end_a_run_in_the_middle_of_an_epoch(synthetic_folder, tmp_path, capsys, accumulated):
    plan = pretrain_plan(
        synthetic_folder, tmp_path, epochs=9, max_updates=5, gradient_accumulation_steps=accumulated, batch_size=4
    )
    an_epoch = -(-len(EpochBatches(build_task(plan, CPU).train, 1)) // accumulated)
    assert 5 % an_epoch != 0, "or no epoch would be cut short"
    state = fit(build_task(plan, CPU))
    assert state.update == 5
    assert state.epoch == plan.epochs == -(-5 // an_epoch)
    assert f"--max-updates 5: ends in epoch {plan.epochs}, not after 9" in plan.notes
    assert f"epoch {plan.epochs}/{plan.epochs}" in capsys.readouterr().out
    assert state.history[-1]["lr"] == pytest.approx(0.0), "the schedule ends with the run"


def test_a_bound_that_is_not_reached_changes_nothing(synthetic_folder, tmp_path):
    histories = [
        fit(build_task(pretrain_plan(synthetic_folder, tmp_path, epochs=2, max_updates=most), CPU)).history
        for most in (None, 1000)
    ]
    assert without_speed(histories[0]) == without_speed(histories[1])


def test_non_finite_updates_are_skipped_counted_and_end_the_run(synthetic_folder, tmp_path, capsys):
    plan = pretrain_plan(synthetic_folder, tmp_path, model=DEEP, epochs=3, max_skipped_updates=3, warmup_steps=0)
    task = build_task(plan, CPU)
    with torch.no_grad():
        task.model.asv_encoder.nucleotides.position.weight[3, 0] = math.inf
    before = {k: v.clone() for k, v in task.model.state_dict().items()}
    with pytest.raises(NonFiniteError, match=r"updates in a row .* samples \d+"):
        fit(task)
    assert_same_tensors(before, task.model.state_dict())
    assert "update skipped" in capsys.readouterr().out


def test_frozen_base_is_untouched_and_the_heads_learn(synthetic_folder, tmp_path):
    keeper = Keeper(tmp_path / "base")
    fit(build_task(pretrain_plan(synthetic_folder, tmp_path, epochs=1), CPU, report=keeper))
    path = tmp_path / "base" / "epoch_1"
    config = train_config(synthetic_folder, tmp_path, pretrained=path, freeze_base=True, epochs=2)
    plan = make_plan(config, (path, checkpoint.load(path).spec))
    task = build_task(plan, CPU)
    before = {k: v.clone() for k, v in task.model.state_dict().items()}
    fit(task)
    after = task.model.state_dict()
    assert_same_tensors(
        {k: v for k, v in before.items() if k.startswith("base.")},
        {k: v for k, v in after.items() if k.startswith("base.")},
    )
    assert_same_tensors(checkpoint.load(path).model.state_dict(), task.model.base.state_dict())
    assert not torch.equal(before["target_heads.0.1.weight"], after["target_heads.0.1.weight"])


def test_chunks_give_the_same_losses(synthetic_folder, tmp_path):
    def history(**settings):
        plan = pretrain_plan(synthetic_folder, tmp_path, model=STILL, epochs=2, **settings)
        return fit(build_task(plan, CPU)).history

    whole, chunked = history(), history(asv_chunk_size=17)
    for one, other in zip(whole, chunked, strict=True):
        assert one["train/total_loss"] == pytest.approx(other["train/total_loss"], abs=1e-5)
        assert one["val/total_loss"] == pytest.approx(other["val/total_loss"], abs=1e-5)


@pytest.mark.parametrize("settings", [{"loader_workers": 1}, {"gradient_checkpointing": True}])
def test_how_a_run_goes_changes_nothing_in_what_comes_out(synthetic_folder, tmp_path, settings):
    histories = []
    for changed in ({}, settings):
        plan = pretrain_plan(synthetic_folder, tmp_path, model=DEEP, epochs=1, **changed)
        task = build_task(plan, CPU)
        stacks = [module for module in task.model.modules() if isinstance(module, Transformer)]
        assert stacks
        assert all(stack.recompute == changed.get("gradient_checkpointing", False) for stack in stacks)
        histories.append(without_speed(fit(task).history))
    assert histories[0] == histories[1]


@pytest.mark.parametrize("clear_cache", ["batch", "epoch", "never"])
def test_clearing_the_cache_runs_without_a_gpu(synthetic_folder, tmp_path, clear_cache):
    plan = pretrain_plan(synthetic_folder, tmp_path, epochs=1, clear_cache=clear_cache)
    assert fit(build_task(plan, CPU)).epoch == 1


@pytest.mark.parametrize(
    "changed",
    [
        {"target_loss": "mse", "target_transform": "none"},
        {"target_loss": "mae", "target_transform": "minmax"},
        {"target_loss": "quantile", "quantiles": (0.9, 0.1, 0.5), "target_transform": "log1p-zscore"},
        {"base_weight": 0.5},
        {"head_layers": 2},
        {"known_asvs": 0},
        {"target_heads": 1},
        {"target": "site", "classifier": True, "class_weights": "balanced"},
        {"target": "site", "classifier": True, "count_weight": 0.0},
    ],
    ids=str,
)
def test_every_target_setting_trains(synthetic_folder, tmp_path, changed):
    target = TargetConfig(**{"target": "gradient", **changed})
    config = train_config(synthetic_folder, tmp_path, target=target, epochs=1)
    row = fit(build_task(make_plan(config), CPU)).history[0]
    assert all(math.isfinite(value) for value in row.values())
    assert ("val/macro_f1" in row) == target.classifier
    assert ("val/mae" in row) != target.classifier
    assert ("val/unifrac_r2" in row) == (target.base_weight > 0)
    assert ("val/count_r2" in row) == (config.count_weight > 0)


@pytest.mark.parametrize("choice", ["abundance", "random", "first"])
def test_every_token_choice_trains(synthetic_folder, tmp_path, choice):
    config = pretrain_config(synthetic_folder, tmp_path, epochs=1, precision="bf16", histogram_every=0)
    config = dataclasses.replace(config, data=data_config(synthetic_folder, token_choice=choice, rarefy_depth=0))
    row = fit(build_task(make_plan(config), CPU)).history[0]
    assert all(math.isfinite(value) for value in row.values())


@pytest.mark.parametrize("has_instructions", [True, False])
def test_only_fastest_takes_bf16_on_cpus_and_only_where_they_have_it(monkeypatch, has_instructions):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_instructions)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    found = {p: [autocast_of(p, device) for device in ("cuda", "cpu")] for p in get_args(Precision)}
    bf16 = torch.bfloat16
    assert found == {
        "auto": [bf16, None],
        "fastest": [bf16, bf16 if has_instructions else None],
        "fp32": [None, None],
        "bf16": [bf16, bf16],
    }


UNIFRAC_LOSSES = [
    PretrainLossConfig(unifrac_metric=("unweighted",)),
    PretrainLossConfig(unifrac_metric=("weighted",)),
    PretrainLossConfig(unifrac_metric=("faith_pd",)),
    ALL_METRICS,
]
NUCLEOTIDE_LOSSES = [PretrainLossConfig(base_weight=0.0), PretrainLossConfig(nuc_weight=0.0)]
TARGETS = [
    TargetConfig(target="gradient"),
    TargetConfig(target="gradient", count_weight=0.0),
    TargetConfig(target="gradient", base_weight=0.5, head_layers=1),
    TargetConfig(target="gradient", known_asvs=0),
]


@pytest.mark.parametrize(
    ("model", "loss"),
    [(TINY, loss) for loss in UNIFRAC_LOSSES + TARGETS] + [(DEEP, loss) for loss in NUCLEOTIDE_LOSSES + TARGETS],
)
def test_what_is_trained_is_what_the_losses_reach(synthetic_folder, tmp_path, model, loss):
    """DDP would wait for a gradient that does not come."""
    if isinstance(loss, TargetConfig):
        plan = make_plan(train_config(synthetic_folder, tmp_path, model=model, target=loss))
    else:
        plan = pretrain_plan(synthetic_folder, tmp_path, model=model, loss=loss)
    task = build_task(plan, CPU)
    losses, _ = step(task.model, EpochBatches(task.train, 1)[0], task.objective)
    task.objective.weights.check(losses)
    task.objective.weights.total(losses).backward()
    named = dict(task.model.named_parameters())
    assert {k for k, p in named.items() if p.grad is not None} == {k for k, p in named.items() if p.requires_grad}
    learned = {metric.metric for metric in task.objective.unifrac}
    base = task.model.base if isinstance(loss, TargetConfig) else task.model
    assert base.clades.raw_length.requires_grad == bool(learned)
    assert base.clades.log_pd_scale.requires_grad == ("faith_pd" in learned)


@pytest.mark.parametrize("wrap", ["compiled", "ddp"])
def test_a_wrapped_model_is_stepped_like_the_bare_one(synthetic_folder, tmp_path, wrap):
    target = TargetConfig(target="site", classifier=True)
    task = build_task(make_plan(train_config(synthetic_folder, tmp_path, target=target, model=STILL)), CPU)
    without_dropout(task.model)
    batch = EpochBatches(task.train, 1)[0]
    bare, _ = step(task.model, batch, task.objective)
    if wrap == "compiled":
        wrapped, _ = step(torch.compile(task.model, backend="eager"), batch, task.objective)
    else:
        store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
        dist.init_process_group("gloo", rank=0, world_size=1, store=store)
        try:
            wrapped, _ = step(DistributedDataParallel(task.model), batch, task.objective)
        finally:
            dist.destroy_process_group()
    assert bare.present().keys() == wrapped.present().keys() == {"target", "count"}
    for name, term in bare.present().items():
        assert term.sum.item() == pytest.approx(wrapped.present()[name].sum.item(), rel=1e-5)


def test_a_run_that_stops_early_is_the_beginning_of_the_whole_run(synthetic_folder, tmp_path):
    plan, keeper = pretrain_plan(synthetic_folder, tmp_path / "run", epochs=3), Keeper(tmp_path / "saved")
    whole = fit(build_task(plan, CPU, report=keeper))
    task = build_task(plan, CPU)
    beginning = fit(task, until=2)
    assert (beginning.epoch, whole.epoch) == (2, 3)
    assert without_speed(beginning.history) == without_speed(whole.history[:2])
    assert_same_tensors(task.model.state_dict(), checkpoint.load(tmp_path / "saved" / "epoch_2").model.state_dict())
