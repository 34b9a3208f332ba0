"""What is optimised, and what an update leaves alone."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from aam.model.sequence_encoder import SequenceEncoder
from aam.model.sequence_predictor import SequencePredictor
from aam.training.optimizer import make_optimizer, update
from tensors import PREDICTOR, SIZES, make_batch, random_sequences, without_dropout

TRUE, FALSE = torch.tensor(True), torch.tensor(False)
BATCH = make_batch(random_sequences(4), [[(0, 5), (1, 90), (2, 1)], [(1, 7), (3, 7)]], count_masked=[(0, 1)])


def make_predictor(*, freeze_base: bool = False) -> SequencePredictor:
    torch.manual_seed(0)
    return without_dropout(SequencePredictor(SequenceEncoder(SIZES), PREDICTOR, freeze_base=freeze_base))


def backward(model: SequencePredictor, factor: float = 1.0) -> None:
    output = model(BATCH)
    ((output.target.square().sum() + output.log_abundance.square().sum()) * factor).backward()


def groups_of(optimizer) -> tuple[set[int], set[int]]:
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] > 0 for p in g["params"]}
    plain = {id(p) for g in optimizer.param_groups if g["weight_decay"] == 0 for p in g["params"]}
    return decayed, plain


def snapshot(model, optimizer) -> list[torch.Tensor]:
    """Weights and optimizer state, copied."""
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    return [t.detach().clone() for t in (*model.parameters(), *state)]


def assert_same(found, expected) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_weight_decay_on_the_matrices_of_linear_layers_only():
    model = make_predictor()
    decayed, plain = groups_of(make_optimizer(model, 0.01))
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    others = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.LayerNorm)}
    biases = {id(p) for name, p in model.named_parameters() if name.endswith("bias")}
    assert decayed == matrices
    assert others | biases <= plain
    assert decayed | plain == {id(p) for p in model.parameters()}
    assert not decayed & plain


def test_frozen_parameters_are_not_in_it_and_do_not_move():
    model = make_predictor(freeze_base=True)
    optimizer = make_optimizer(model, 0.01)
    inside = set.union(*groups_of(optimizer))
    assert not inside & {id(p) for p in model.base.parameters()}
    assert inside == {id(p) for name, p in model.named_parameters() if not name.startswith("base.")}
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        backward(model)
        assert update(optimizer, TRUE, lr=0.01, clip_norm=1.0) == 0
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert not [name for name in changed if name.startswith("base.")]


def test_an_update_is_a_step_of_adamw():
    model, reference = make_predictor(), make_predictor()
    optimizer, plain = make_optimizer(model, 0.1), torch.optim.AdamW(reference.parameters(), lr=0.0)
    matrices = [m.weight for m in reference.modules() if isinstance(m, nn.Linear)]
    for lr in (0.01, 0.02, 0.005):
        backward(model)
        backward(reference)
        skipped = update(optimizer, TRUE, lr=lr, clip_norm=1e9)
        assert skipped.item() == 0
        with torch.no_grad():
            for weight in matrices:
                if weight.grad is not None:
                    weight.mul_(1 - lr * 0.1)
        for group in plain.param_groups:
            group["lr"], group["weight_decay"] = lr, 0.0
        plain.step()
        plain.zero_grad()
        assert {group["lr"] for group in optimizer.param_groups} == {lr}
        assert all(p.grad is None for p in model.parameters())
    # Adam divides by the size of a gradient: where that is rounding, so is the outcome. Compare the outputs.
    torch.testing.assert_close(model(BATCH).target, reference(BATCH).target, rtol=0, atol=1e-3)
    for name in ("target_heads.0.1.weight", "target_heads.0.1.bias"):
        pair = (m.get_parameter(name) for m in (model, reference))
        torch.testing.assert_close(*pair, rtol=0, atol=1e-4)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("bad", ["loss", math.nan, math.inf, -math.inf])
def test_what_is_not_finite_never_reaches_weights_or_state(bad, warm):
    model = make_predictor()
    optimizer = make_optimizer(model, 0.01)
    for _ in range(2 * warm):
        backward(model)
        update(optimizer, TRUE, lr=0.01, clip_norm=1.0)
    weights = [p.detach().clone() for p in model.parameters()]
    before = snapshot(model, optimizer)
    backward(model)
    if bad != "loss":
        model.target_heads[0][1].weight.grad[0, 0] = bad  # one number of thousands
    skipped = update(optimizer, FALSE if bad == "loss" else TRUE, lr=0.01, clip_norm=1.0)
    assert skipped.item() == 1
    assert_same(list(model.parameters()), weights)
    if warm:
        assert_same(snapshot(model, optimizer), before)
    assert all(p.grad is None for p in model.parameters())


def test_a_skipped_update_changes_nothing_about_the_next():
    models = [make_predictor(), make_predictor()]
    optimizers = [make_optimizer(model, 0.01) for model in models]
    for number, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
        if number == 1:
            backward(model, math.nan)
            assert update(optimizer, TRUE, lr=0.5, clip_norm=1.0) == 1
        for _ in range(2):
            backward(model)
            assert update(optimizer, TRUE, lr=0.01, clip_norm=1.0) == 0
    assert_same(snapshot(models[1], optimizers[1]), snapshot(models[0], optimizers[0]))


@pytest.mark.parametrize(("clip_norm", "length"), [(0.5, 0.5), (100.0, 5.0)])
def test_gradients_are_clipped_by_the_norm_of_all(clip_norm, length):
    weights = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD(weights, fused=True)  # a step of lr times the gradient shows what it was
    weights[0].grad, weights[1].grad = torch.tensor([3.0]), torch.tensor([-4.0])
    update(optimizer, TRUE, lr=0.1, clip_norm=clip_norm)
    step = torch.cat([w.detach() for w in weights])
    torch.testing.assert_close(step, torch.tensor([-0.3, 0.4]) * length / 5, rtol=1e-5, atol=0)
