"""Checkpoints: whole or not there, and nothing in them that could run."""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from aam.config import DataContract
from aam.model.sequence_encoder import SequenceEncoder
from aam.model.sequence_predictor import SequencePredictor
from aam.training import checkpoint
from aam.training.checkpoint import ModelSpec, TrainingState
from aam.training.optimizer import make_optimizer, update
from aam.training.targets import Target, TargetTransform, UnifracTarget
from tensors import PREDICTOR, SIZES, make_batch, random_sequences

FILES = {"model.safetensors", "config.json", "training_state.pt"}
STAGE_1 = ModelSpec(
    encoder=SIZES,
    contract=DataContract(max_bp=40, rarefy_depth=100, token_limit=7, token_choice="random", seed=5),
    unifrac=(
        UnifracTarget(metric="unweighted", mean=0.7, variance=0.01),
        UnifracTarget(metric="faith_pd", mean=1 / 3, variance=4.0),
    ),
)
STAGE_2 = dataclasses.replace(
    STAGE_1,
    predictor=dataclasses.replace(PREDICTOR, outputs=2),
    target=Target(column="site", classes=("gut", "007"), loss="cross_entropy", class_weights=(0.5, 1.5)),
    freeze_base=True,
)
NUMBER = dataclasses.replace(
    STAGE_1,
    predictor=dataclasses.replace(PREDICTOR, count_head=False),
    unifrac=(),
    target=Target(column="age", transform=TargetTransform.fit("zscore", np.array([1.0, 1 / 3, 9.0]))),
)
SPECS = {"stage 1": STAGE_1, "classes": STAGE_2, "number": NUMBER}
STATE = TrainingState(
    epoch=2, update=14, best_loss=0.5, best_epoch=1, bad_epochs=1, skipped=3, skipped_in_a_row=2,
    history=[{"epoch": 1, "val/total_loss": 0.5}, {"epoch": 2, "val/total_loss": 0.75, "lr": 1e-4}],
)  # fmt: skip
BATCH = make_batch(random_sequences(4), [[(0, 5), (1, 90), (2, 1)], [(1, 7), (3, 7)]])


def trained(spec: ModelSpec = STAGE_1, seed: int = 0):
    """A model and an optimizer that has a state."""
    torch.manual_seed(seed)
    model = spec.build()
    optimizer = make_optimizer(model, 0.01)
    output = model(BATCH)
    (output.memberships if spec.predictor is None else output.target).square().sum().backward()
    update(optimizer, torch.tensor(True), lr=0.01, clip_norm=1.0)
    return model, optimizer


def write(path: Path, spec: ModelSpec = STAGE_1, *, seed: int = 0, **changed) -> torch.nn.Module:
    model, optimizer = trained(spec, seed)
    rng = [{"cpu": torch.get_rng_state()}, {"cpu": torch.get_rng_state().flip(0)}]
    settings = {"state": STATE, "optimizer_state": optimizer.state_dict(), "rng_states": rng, **changed}
    checkpoint.save(path, model, spec, **settings)
    return model


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("kind", SPECS)
def test_round_trip(tmp_path, kind):
    model = write(tmp_path / "deep" / "best", SPECS[kind])
    loaded = checkpoint.load(tmp_path / "deep" / "best")
    assert loaded.spec == SPECS[kind]
    assert type(loaded.model) is (SequenceEncoder if kind == "stage 1" else SequencePredictor)
    assert not loaded.model.training
    assert loaded.metrics == STATE.history[-1]
    assert_same_weights(loaded.model, model)
    found, expected = loaded.model(BATCH), model.eval()(BATCH)
    if kind == "stage 1":
        assert torch.equal(found.memberships, expected.memberships)
    else:
        assert torch.equal(found.target, expected.target)


def test_training_state_round_trip(tmp_path):
    model, optimizer = trained()
    torch.manual_seed(11)
    rng = [{"cpu": torch.get_rng_state()}, {"cpu": torch.get_rng_state().flip(0)}]
    checkpoint.save(tmp_path / "last", model, STAGE_1, STATE, optimizer.state_dict(), rng)
    state, optimizer_state, rng_states = checkpoint.load_training_state(tmp_path / "last")
    assert state == STATE
    assert [torch.equal(a["cpu"], b["cpu"]) for a, b in zip(rng_states, rng, strict=True)] == [True, True]
    expected = optimizer.state_dict()
    assert optimizer_state["param_groups"] == expected["param_groups"]
    assert optimizer_state["state"].keys() == expected["state"].keys()
    for key, entry in expected["state"].items():
        assert all(torch.equal(optimizer_state["state"][key][name], value) for name, value in entry.items())


def test_a_state_before_the_first_epoch(tmp_path):
    write(tmp_path / "last", state=TrainingState())
    assert checkpoint.load_training_state(tmp_path / "last")[0] == TrainingState()
    assert checkpoint.load(tmp_path / "last").metrics == {}


def test_no_file_needs_pickle(tmp_path):
    write(tmp_path / "best", STAGE_2)
    assert {path.name for path in (tmp_path / "best").iterdir()} == FILES
    assert load_file(tmp_path / "best" / "model.safetensors").keys() == STAGE_2.build().state_dict().keys()
    described = json.loads((tmp_path / "best" / "config.json").read_text())
    assert described["kind"] == "SequencePredictor"
    assert described["spec"]["target"]["classes"] == ["gut", "007"]
    assert described["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    # Tensors and plain values only: torch refuses anything that would be called.
    saved = torch.load(tmp_path / "best" / "training_state.pt", weights_only=True)
    assert saved.keys() == {"loop", "optimizer", "rng"}
    with zipfile.ZipFile(tmp_path / "best" / "training_state.pt") as archive:
        (pickled,) = [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
    assert b"aam" not in pickled
    assert b"numpy" not in pickled


def test_it_replaces_the_one_that_is_there(tmp_path):
    write(tmp_path / "last", seed=1)
    (tmp_path / "last" / "left over").touch()
    model = write(tmp_path / "last", seed=2)
    assert_same_weights(checkpoint.load(tmp_path / "last").model, model)
    assert {path.name for path in (tmp_path / "last").iterdir()} == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_a_write_that_fails_leaves_the_old_one(tmp_path):
    model = write(tmp_path / "last", seed=1)
    with pytest.raises(AttributeError, match="local object"):  # after weights and config, in the last file
        write(tmp_path / "last", seed=2, optimizer_state={"bad": lambda: None})
    assert_same_weights(checkpoint.load(tmp_path / "last").model, model)
    assert checkpoint.load_training_state(tmp_path / "last")[0] == STATE
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def in_a_process_that_is_lost(action) -> None:
    """Run in a copy of this process, which ends on the spot where the action calls os._exit."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_a_process_lost_in_the_middle_of_a_write(tmp_path):
    model = write(tmp_path / "last", seed=1)

    def half(scratch: Path) -> None:
        (scratch / "model.safetensors").write_bytes(b"half")
        os._exit(9)

    in_a_process_that_is_lost(lambda: checkpoint.replace_directory(tmp_path / "last", half))
    assert_same_weights(checkpoint.load(tmp_path / "last").model, model)
    assert len(list(tmp_path.iterdir())) == 2  # with what the lost process left
    model = write(tmp_path / "last", seed=2)
    assert_same_weights(checkpoint.load(tmp_path / "last").model, model)
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_a_process_lost_between_the_two_renames_and_a_next_write_that_fails(tmp_path):
    model = write(tmp_path / "last", seed=1)

    def lose_it(scratch: Path) -> None:
        (tmp_path / "last").rename(tmp_path / ".last.old")  # as replace_directory does after the write
        os._exit(9)

    in_a_process_that_is_lost(lambda: checkpoint.replace_directory(tmp_path / "last", lose_it))
    assert not (tmp_path / "last").exists()
    with pytest.raises(AttributeError):
        write(tmp_path / "last", seed=2, optimizer_state={"bad": lambda: None})
    assert_same_weights(checkpoint.load(tmp_path / "last").model, model)


def change_weights(path: Path, change) -> None:
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors")


def rename_all(weights: dict) -> None:
    for key in list(weights):
        weights[f"_orig_mod.{key}"] = weights.pop(key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("clades.raw_length"), "1 weights do not fit the model: missing clades.raw_length"),
        (lambda w: w.update(extra=torch.ones(2)), "1 weights do not fit the model: unknown extra"),
        (
            lambda w: w.update({"clades.raw_length": torch.ones(1)}),
            r"clades.raw_length has shape \(1,\), not \(12,\)",
        ),
        (rename_all, "weights do not fit the model: missing"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, change, message):
    write(tmp_path / "best")
    change_weights(tmp_path / "best", change)
    with pytest.raises(ValueError, match=message) as caught:
        checkpoint.load(tmp_path / "best")
    assert str(tmp_path / "best") in str(caught.value)


def test_weights_that_do_not_fit_change_nothing(tmp_path):
    model, other = trained(seed=1)[0], trained(seed=2)[0]
    weights = other.state_dict()
    del weights["clades.log_pd_scale"]
    with pytest.raises(ValueError, match=r"missing clades.log_pd_scale"):
        checkpoint.load_weights(model, weights, source=tmp_path)
    assert_same_weights(model, trained(seed=1)[0])


def test_not_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"nothing: not a checkpoint .*model.safetensors and config.json"):
        checkpoint.load(tmp_path / "nothing")
    write(tmp_path / "best")
    assert checkpoint.is_checkpoint(tmp_path / "best")
    (tmp_path / "best" / "model.safetensors").unlink()
    assert not checkpoint.is_checkpoint(tmp_path / "best")
    with pytest.raises(ValueError, match="not a checkpoint"):
        checkpoint.load(tmp_path / "best")


@pytest.mark.parametrize("described", [{"format_version": 1}, {"format_version": 99}, {"model_type": "bert"}])
def test_another_format(tmp_path, described):
    """1 is that of the encoders before soft clades, whose specs and weights no model here has."""
    write(tmp_path / "best")
    (tmp_path / "best" / "config.json").write_text(json.dumps(described))
    with pytest.raises(
        ValueError, match=r"checkpoint of format (1|99|None), and this version .* reads format 2;"
    ) as caught:
        checkpoint.load(tmp_path / "best")
    assert "\n" not in str(caught.value)
    assert "train it anew" in str(caught.value)


def test_what_is_settled_before_training_is_kept(tmp_path):
    """Buffers: of the k-mers, of the known ASVs and of the features."""
    model, optimizer = trained(NUMBER)
    kmers, features = model.base.asv_encoder.kmers, model.features
    kmers.standardise(BATCH.tokens)
    with torch.no_grad():
        features.know(BATCH.tokens, model.base(BATCH).memberships)
        features.standardise(features(BATCH, model.base(BATCH)))
    checkpoint.save(tmp_path / "best", model, NUMBER, STATE, optimizer.state_dict(), [])
    loaded = checkpoint.load(tmp_path / "best").model
    kept = dict(loaded.named_buffers())
    names = {"base.asv_encoder.kmers.mean", "base.asv_encoder.kmers.scale"}
    names |= {f"features.{name}" for name in ("tokens", "anchors", "mean", "scale")}
    assert kept.keys() == names
    new = dict(NUMBER.build().named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(kept[name], buffer), name
        assert not torch.equal(new[name], buffer), name
