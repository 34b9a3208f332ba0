"""The losses against plain loops and scikit-learn."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from aam.training.losses import (
    Losses,
    LossTerm,
    LossWeights,
    count_loss,
    mean_term,
    nucleotide_loss,
    target_loss,
    unifrac_loss,
)
from aam.training.targets import Target
from tensors import make_batch, random_sequences

SEQUENCES = random_sequences(6)
SAMPLES = [[(0, 5), (1, 90), (2, 1)], [(1, 7), (3, 7)], [(4, 3), (5, 11), (0, 2)]]


def draw(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch_of(**fields):
    return make_batch(SEQUENCES, SAMPLES, **fields)


def test_unifrac_loss_is_the_mean_over_pairs_of_different_samples():
    truth, predicted = draw(3, 3, seed=1), draw(3, 3, seed=2)
    pairs = [(predicted[i, j] - truth[i, j]) ** 2 for i in range(3) for j in range(3) if i != j]
    term = unifrac_loss(predicted, truth, batch_of(), variance=0.25)
    assert term.count == 6
    torch.testing.assert_close(term.share, torch.stack(pairs).mean() / 0.25)


def test_loss_of_faith_pd_is_the_mean_over_samples():
    truth, predicted = draw(3, seed=1), draw(3, seed=2)
    term = unifrac_loss(predicted, truth, batch_of(rank_sizes=[3, 5]), variance=4.0)
    assert term.count == 8  # of all workers
    expected = sk.mean_squared_error(truth, predicted) * 3 / 8 / 4.0
    assert term.share.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shape", [(5, 5), (5,)])
def test_unifrac_loss_of_two_workers_adds_up_to_that_of_one(shape):
    truth, predicted = draw(*shape, seed=1), draw(*shape, seed=2)
    sizes, shares = [2, 3], []
    for rows in (slice(0, 2), slice(2, 5)):
        batch = batch_of(global_rows=rows, rank_sizes=sizes)
        shares.append(unifrac_loss(predicted[rows], truth[rows], batch, variance=2.0).share)
    whole = unifrac_loss(predicted, truth, batch_of(rank_sizes=[5]), variance=2.0)
    assert whole.count == (20 if len(shape) == 2 else 5)
    torch.testing.assert_close(sum(shares), whole.share)


def test_unifrac_loss_leaves_the_diagonal_alone():
    predicted = draw(3, 3).requires_grad_()
    unifrac_loss(predicted, torch.zeros(3, 3), batch_of(), variance=1.0).share.backward()
    assert predicted.grad.diagonal().count_nonzero() == 0
    assert predicted.grad.count_nonzero() == 6


def test_the_loss_of_several_metrics_is_their_mean():
    """Whatever they are counted by: pairs, or samples."""
    terms = [LossTerm(torch.tensor(6.0), 12), LossTerm(torch.tensor(10.0), 4), LossTerm(torch.tensor(3.0), 12)]
    mean = mean_term(terms)
    assert mean.count == 12
    assert mean.share.item() == pytest.approx((6 / 12 + 10 / 4 + 3 / 12) / 3)
    alone = mean_term(terms[1:2])
    assert (alone.sum.item(), alone.count) == (10.0, 4)


def test_the_metrics_stand_beside_and_not_in_the_total():
    beside = {"unweighted": term_of(6.0), "faith_pd": term_of(2.0)}
    losses = Losses(base=term_of(4.0), metrics=beside)
    assert losses.present() == {"base": losses.base}
    LossWeights(base=2.0).check(losses)
    assert LossWeights(base=2.0).total(losses).item() == pytest.approx(2 * 4 / 2)


def test_nucleotide_loss_counts_scored_positions_only():
    batch = batch_of(masked=2)
    scored = torch.tensor([[True, False], [True, True], [False, False], [True, True], [True, True], [True, True]])
    batch = dataclasses.replace(batch, masked_scored=scored, masked_total=20)
    logits = draw(6, 2, 8)
    total = 0.0
    for u, k in scored.nonzero().tolist():
        letter = batch.tokens[u, batch.masked_position[u, k]].item()
        total -= logits[u, k].log_softmax(dim=0)[letter].item()
    term = nucleotide_loss(logits, batch)
    assert term.count == 20  # of all workers
    assert term.sum.item() == pytest.approx(total, rel=1e-5)


def test_nucleotide_loss_is_float32_for_bf16_logits():
    batch, logits = batch_of(masked=2), draw(6, 2, 8).bfloat16()
    term = nucleotide_loss(logits, batch)
    assert term.sum.dtype == torch.float32
    assert torch.equal(term.sum, nucleotide_loss(logits.float(), batch).sum)


def test_count_loss_is_huber_over_masked_slots():
    batch = batch_of(count_masked=[(0, 1), (1, 3), (2, 0)])
    predicted = batch.log_abundance.clone()
    predicted[0, 1] += 0.5  # within 1: half the square
    predicted[1, 1] -= 3.0  # beyond: |error| - 1/2
    predicted[0, 0] += 100.0  # was not masked
    term = count_loss(predicted, batch)
    assert term.count == 3
    assert term.sum.item() == pytest.approx(0.125 + 2.5, rel=1e-5)


def number_target(**settings) -> Target:
    return Target(column="c", **settings)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (number_target(loss="mse"), lambda t, p: sk.mean_squared_error(t, p)),
        (number_target(loss="mae"), lambda t, p: sk.mean_absolute_error(t, p)),
        (
            number_target(loss="quantile", quantiles=(0.9,)),
            lambda t, p: sk.mean_pinball_loss(t, p, alpha=0.9),
        ),
        (
            number_target(loss="huber"),
            lambda t, p: np.mean([e**2 / 2 if e < 1 else e - 0.5 for e in np.abs(t - p)]),
        ),
    ],
)
def test_target_loss_of_a_number(target, expected):
    truth, predicted = draw(40, seed=1) * 2, draw(40, 1, seed=2) * 2
    term = target_loss(predicted[:, None], batch_of(target=truth, rank_sizes=[40]), target)
    assert term.count == 40
    assert term.share.item() == pytest.approx(
        expected(truth.double().numpy(), predicted[:, 0].double().numpy()), rel=1e-5
    )


def test_target_loss_of_quantiles_is_their_mean_pinball_loss():
    truth, predicted, quantiles = draw(40, seed=1), draw(40, 3, seed=2), (0.05, 0.5, 0.95)
    target = number_target(loss="quantile", quantiles=quantiles)
    term = target_loss(predicted[:, None], batch_of(target=truth, rank_sizes=[40]), target)
    of_each = [sk.mean_pinball_loss(truth, predicted[:, i], alpha=q) for i, q in enumerate(quantiles)]
    assert term.share.item() == pytest.approx(np.mean(of_each), rel=1e-5)


def test_target_loss_of_classes():
    truth, scores = torch.arange(30) % 3, draw(30, 3)
    target = number_target(classes=("a", "b", "c"), loss="cross_entropy")
    term = target_loss(scores[:, None], batch_of(target=truth, rank_sizes=[30]), target)
    expected = sk.log_loss(truth.numpy(), scores.double().softmax(dim=1).numpy())
    assert term.share.item() == pytest.approx(expected, rel=1e-5)


def test_target_loss_of_weighted_classes():
    truth, scores = torch.tensor([0, 0, 0, 1]), draw(4, 2)
    target = number_target(classes=("a", "b"), loss="cross_entropy", class_weights=(2 / 3, 2.0))
    term = target_loss(scores[:, None], batch_of(target=truth, rank_sizes=[4]), target)
    surprise = -scores.log_softmax(dim=1)[torch.arange(4), truth]
    assert term.share.item() == pytest.approx(((2 / 3) * surprise[:3].sum() + 2 * surprise[3]).item() / 4, rel=1e-5)


@pytest.mark.parametrize(
    ("target", "outputs"),
    [
        (number_target(loss="huber"), 1),
        (number_target(loss="quantile", quantiles=(0.1, 0.5, 0.9)), 3),
        (number_target(classes=("a", "b", "c"), loss="cross_entropy", class_weights=(1.0, 2.0, 3.0)), 3),
    ],
)
def test_the_loss_of_several_heads_is_the_mean_of_theirs(target, outputs):
    heads = draw(30, 4, outputs) * 2
    truth = torch.arange(30) % 3 if target.classes else draw(30, seed=1)
    batch = batch_of(target=truth, rank_sizes=[30, 10])
    term = target_loss(heads, batch, target)
    of_each = [target_loss(heads[:, i : i + 1], batch, target).sum.item() for i in range(4)]
    assert term.sum.item() == pytest.approx(np.mean(of_each), rel=1e-5)
    assert term.count == 40
    assert np.ptp(of_each) > 0.1
    of_the_mean = target_loss(heads.mean(dim=1, keepdim=True), batch, target).sum.item()
    assert of_the_mean < 0.9 * term.sum.item()  # the mean of the heads does better than they do


def test_a_share_is_divided_by_the_samples_of_all_workers():
    target = number_target(loss="mae")
    term = target_loss(torch.ones(3, 1, 1), batch_of(target=torch.zeros(3), rank_sizes=[3, 5]), target)
    assert term.share.item() == pytest.approx(3 / 8)


def term_of(value: float) -> LossTerm:
    return LossTerm(torch.tensor(value), 2)


def test_total_is_the_weighted_sum_of_what_there_is():
    losses = Losses(target=term_of(6.0), nuc=term_of(1.0))
    assert list(losses.present()) == ["target", "nuc"]
    assert LossWeights(target=2.0, nuc=0.5).total(losses).item() == pytest.approx(2 * 3 + 0.5 * 0.5)


@pytest.mark.parametrize("weights", [LossWeights(base=1.0, nuc=1.0), LossWeights(), LossWeights(nuc=1.0)])
def test_a_weight_without_its_loss_or_a_loss_without_a_weight_is_found(weights):
    with pytest.raises(AssertionError, match="weights"):
        weights.check(Losses(base=term_of(1.0)))


def test_weights_that_fit_pass():
    losses = Losses(base=term_of(4.0))
    weights = LossWeights(base=0.5)
    weights.check(losses)
    assert weights.total(losses).item() == 1.0
