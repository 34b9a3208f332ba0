"""What the target head reads of a sample: against loops over its ASVs, and what must not change it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from aam.batch import Batch
from aam.data import tokens
from aam.model.sample_features import LEAST_DEVIATION, LEAST_SHARE, MOST_APART, SHARPNESS, SampleFeatures, sequence_hash
from aam.model.sequence_encoder import SequenceEncoder
from tensors import SIZES, make_batch, random_sequences

SEQUENCES = random_sequences(9)
SAMPLES = [[(0, 50), (3, 30), (8, 20)], [(2, 7)], [(1, 900), (2, 99), (5, 1)], [(6, 4), (7, 4)]]
KNOWN = [5, 2, 8, 0]
LONGEST = 25


def encoder() -> SequenceEncoder:
    torch.manual_seed(1)
    return SequenceEncoder(SIZES).eval()


def encoded(asvs: list[int]) -> torch.Tensor:
    return torch.from_numpy(tokens.encode([SEQUENCES[asv] for asv in asvs])[0])


@torch.no_grad()
def memberships_of(asvs: list[int]) -> torch.Tensor:
    base = encoder()
    return base.clades(base.asv_encoder(encoded(asvs))[0])


def features_of(batch: Batch, *, known: int = len(KNOWN)) -> torch.Tensor:
    """Before they are standardised; with `known` beyond that of `KNOWN`, a vocabulary that is not full."""
    features = SampleFeatures(SIZES.clades, known, LONGEST)
    if known:
        features.know(encoded(KNOWN), memberships_of(KNOWN))
    with torch.no_grad():
        return features(batch, encoder()(batch))


def log_shares_in_loops() -> np.ndarray:
    """The formula, in float64, from the sequences."""
    of_asv, of_known = (memberships_of(asvs).double().numpy() for asvs in (list(range(9)), KNOWN))
    rows = []
    for sample in SAMPLES:
        own, near = np.zeros(len(KNOWN)), np.zeros(len(KNOWN))
        for asv, reads in sample:
            share = reads / sum(reads for _, reads in sample)
            for k, known in enumerate(KNOWN):
                own[k] += share * (SEQUENCES[asv] == SEQUENCES[known])
            cosines = [m @ of_asv[asv] / math.sqrt(m @ m) / math.sqrt(of_asv[asv] @ of_asv[asv]) for m in of_known]
            nearness = np.exp(SHARPNESS * np.array(cosines))
            near += share * nearness / nearness.sum()
        rows.append(np.log10(1 + np.concatenate([own, near]) / LEAST_SHARE))
    return np.array(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_formula(dtype):
    expected, batch = log_shares_in_loops(), make_batch(SEQUENCES, SAMPLES)
    found = features_of(batch)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    features = SampleFeatures(SIZES.clades, len(KNOWN), LONGEST)
    features.know(encoded(KNOWN), memberships_of(KNOWN))
    base = encoder()(batch)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype == torch.bfloat16):
        assert torch.equal(features(batch, base), found), "float32 under autocast too"
    assert (expected[:, : len(KNOWN)] == 0).any()
    assert (expected[:, len(KNOWN) :] > 0).all()  # an ASV that nobody knows counts for its group


@pytest.mark.parametrize(
    "variant", [{"extra_slots": 4}, {"extra_tokens": 9}, {"repeated": True}, {"samples": [s[::-1] for s in SAMPLES]}]
)
@pytest.mark.parametrize("known", [0, len(KNOWN)])
def test_what_does_not_matter(variant, known):
    expected = features_of(make_batch(SEQUENCES, SAMPLES), known=known)
    found = features_of(make_batch(SEQUENCES, **{"samples": SAMPLES, **variant}), known=known)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("known", [0, len(KNOWN)])
def test_features_of_a_sample_do_not_depend_on_its_batch(known):
    together = features_of(make_batch(SEQUENCES, SAMPLES), known=known)
    for b, sample in enumerate(SAMPLES):
        for others in ([], [[(4, 1), (0, 9)]], SAMPLES[::-1]):
            found = features_of(make_batch(SEQUENCES, [sample, *others]), known=known)
            torch.testing.assert_close(found[0], together[b], rtol=0, atol=1e-5)


def test_without_known_asvs_it_reads_the_clades():
    batch = make_batch(SEQUENCES, SAMPLES)
    profiles, found = encoder()(batch).profiles, features_of(batch, known=0)
    assert found.shape == (len(SAMPLES), 2 * SIZES.clades)
    torch.testing.assert_close(found[:, : SIZES.clades], torch.log10(1 + profiles.share / LEAST_SHARE))
    assert torch.equal(found[:, SIZES.clades :], profiles.presence)


def test_a_known_asv_is_met_by_its_sequence_and_nothing_like_it():
    known = SEQUENCES[KNOWN[0]]
    changed = "A" if known[-1] != "A" else "C"
    near = [known, known[:-1], known + "A", known[:-1] + changed, known[1:] + known[0], known[:-1] + "N"]
    features = SampleFeatures(SIZES.clades, len(KNOWN), LONGEST)
    features.know(encoded(KNOWN), memberships_of(KNOWN))
    batch = make_batch(near, [[(asv, 3)] for asv in range(len(near))])
    with torch.no_grad():
        found = features(batch, encoder()(batch))[:, : len(KNOWN)]
    expected = torch.zeros(len(near), len(KNOWN))
    expected[0, 0] = math.log10(1 + 1 / LEAST_SHARE)
    torch.testing.assert_close(found, expected)


def test_fewer_known_asvs_than_there_is_room_for():
    batch = make_batch(SEQUENCES, SAMPLES)
    found, full = features_of(batch, known=len(KNOWN) + 3), features_of(batch)
    assert found.shape[1] == 2 * (len(KNOWN) + 3)
    own, near = found.chunk(2, dim=1)
    torch.testing.assert_close(own[:, : len(KNOWN)], full[:, : len(KNOWN)])
    assert own[:, len(KNOWN) :].count_nonzero() == 0
    torch.testing.assert_close(near[:, : len(KNOWN)], full[:, len(KNOWN) :], rtol=0, atol=1e-3)
    assert near[:, len(KNOWN) :].max() < 1e-3  # places without an ASV take nothing


def test_known_asvs_that_are_replaced_leave_nothing_behind():
    features = SampleFeatures(SIZES.clades, len(KNOWN), LONGEST)
    features.know(encoded(KNOWN), memberships_of(KNOWN))
    features.know(encoded([3]), memberships_of([3]))
    fresh = SampleFeatures(SIZES.clades, len(KNOWN), LONGEST)
    fresh.know(encoded([3]), memberships_of([3]))
    for name, buffer in fresh.named_buffers():
        assert torch.equal(buffer, dict(features.named_buffers())[name]), name


def test_hashes_do_not_depend_on_padding_and_tell_sequences_apart():
    sequences = random_sequences(3000, seed=5, shortest=1, longest=150)
    sequences += [s[:-1] for s in sequences if len(s) > 1] + [s[::-1] for s in sequences]
    sequences = sorted(set(sequences))
    plain = torch.from_numpy(tokens.encode(sequences)[0])
    found = sequence_hash(plain)
    assert len(found.unique()) == len(sequences) > 6000
    padded = torch.nn.functional.pad(plain, (0, 37), value=tokens.PAD)
    assert torch.equal(sequence_hash(padded), found)
    for row in (0, len(sequences) // 2, -1):
        alone = torch.from_numpy(tokens.encode([sequences[row]])[0])
        assert sequence_hash(alone).item() == found[row].item()
    assert found.count_nonzero() == len(found)  # 0 is that of a place without a known ASV


def test_features_are_standardised_within_bounds():
    torch.manual_seed(0)
    of_training = torch.randn(50, 8) * torch.tensor([3.0, 1, 0, 1, 2, 5, 0.5, 1e-5]) + 7
    of_training[:, 3] = torch.tensor([4.0] + 49 * [0.0])  # of one sample
    features = SampleFeatures(4, 0, 1)
    features.standardise(of_training)
    found = features.standardised(of_training)
    assert found.abs().max() == found[0, 3] == MOST_APART
    # What hardly varies, and what does not at all, is not blown up to be as large as the others.
    assert found[:, [2, 7]].abs().max() < 0.01
    deviation = of_training.std(dim=0, correction=0)
    plain = (of_training - of_training.mean(dim=0)) / (deviation + LEAST_DEVIATION * deviation[deviation > 0].mean())
    assert 100 < (plain.abs() < MOST_APART).sum() < plain.numel()
    torch.testing.assert_close(found, plain.clamp(-MOST_APART, MOST_APART), rtol=0, atol=1e-3)


def test_features_that_are_all_constant_are_finite():
    features = SampleFeatures(4, 0, 1)
    features.standardise(torch.full((5, 8), 3.0))
    assert torch.equal(features.standardised(torch.full((2, 8), 3.0)), torch.zeros(2, 8))
