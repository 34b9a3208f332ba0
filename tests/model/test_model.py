"""The encoder and the predictor: what must not matter to them, what must, and what they never see."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from aam.data import tokens
from aam.model import asv_encoder
from aam.model.asv_encoder import kmer_frequencies
from aam.model.clades import unweighted_unifrac, weighted_unifrac
from aam.model.layers import Transformer
from aam.model.sequence_encoder import SequenceEncoder
from aam.model.sequence_predictor import SequencePredictor
from tensors import PREDICTOR, SIZES, make_batch, random_sequences, without_dropout

SEQUENCES = random_sequences(9)
SAMPLES = [
    [(0, 5), (1, 90), (2, 1), (5, 30)],
    [(1, 7), (3, 7), (4, 60)],
    [(0, 40), (2, 3), (6, 11), (7, 2), (8, 100)],
    [(4, 13)],
]
MASKED_COUNTS = [(0, 1), (1, 4), (2, 6), (2, 8), (3, 4)]
KINDS = ["encoder", "predictor"]


def make_model(kind: str, **changed) -> nn.Module:
    torch.manual_seed(3)
    base = SequenceEncoder(dataclasses.replace(SIZES, **changed))
    return base if kind == "encoder" else with_features(SequencePredictor(base, PREDICTOR))


@torch.no_grad()
def with_features(model: SequencePredictor) -> SequencePredictor:
    """Let it know four of the ASVs, and the spread of its features; its heads drop nothing."""
    batch = batch_of(masked=0)
    memberships = model.base.eval()(batch).memberships
    known = [1, 4, 0, 7]
    model.features.know(batch.tokens[known], memberships[known])
    model.features.standardise(model.features(batch, model.base(batch)))
    if not model.freeze_base:
        model.base.train()
    without_dropout(model.target_heads)
    return model


def batch_of(samples=SAMPLES, **settings):
    settings = {"masked": 3, "count_masked": MASKED_COUNTS, **settings}
    return make_batch(SEQUENCES, samples, **settings)


def facts(model, batch, **arguments) -> dict[str, torch.Tensor]:
    """All outputs, what belongs to an ASV in the order of (sample, ASV) wherever its slot is."""
    output = model(batch, **arguments)
    base = output.base if isinstance(model, SequencePredictor) else output
    place = [
        (b, s)
        for b, row in enumerate(batch.slot_mask)
        for s in sorted(row.nonzero().flatten().tolist(), key=lambda s, b=b: batch.asvs[batch.slot[b, s]])
    ]
    b, s = torch.tensor(place).T
    presence, share = base.profiles.presence, base.profiles.share
    found = {
        "presence": presence,
        "share": share,
        "unweighted": unweighted_unifrac(presence, presence, base.lengths),
        "weighted": weighted_unifrac(share, share, base.lengths),
        "faith_pd": base.faith_pd,
        "vectors": base.vectors[batch.slot[b, s]],
        "memberships": base.memberships[batch.slot[b, s]],
    }
    if base.nucleotide_logits is not None:
        found["nucleotides"] = base.nucleotide_logits[batch.slot[b, s]]
    if isinstance(model, SequencePredictor):
        found["features"] = model.features(batch, base)
        found["heads"], found["target"] = output.heads, output.target
        if output.log_abundance is not None:
            found["counts"] = output.log_abundance[b, s]
    return found


def assert_close(found, expected, tolerance=1e-5) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=tolerance, msg=name)


def loss_of(found) -> torch.Tensor:
    """A number that depends on every output."""
    torch.manual_seed(5)
    return sum((value * torch.randn(value.shape)).sum() for value in found.values())


VARIANTS = {
    "asvs in another order": {"samples": [sample[::-1] for sample in SAMPLES]},
    "more slots": {"extra_slots": 4},
    "more padding tokens": {"extra_tokens": 9},
    "each occurrence by itself": {"repeated": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_does_not_matter(kind, variant):
    model = make_model(kind)
    expected, found = facts(model, batch_of()), facts(model, batch_of(**VARIANTS[variant]))
    assert {"nucleotides", "memberships"} <= expected.keys()
    assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_size", [1, 4, 9, 100])
def test_chunks_change_neither_outputs_nor_gradients(kind, chunk_size):
    model, batch = make_model(kind), batch_of()
    expected = facts(model, batch)
    loss_of(expected).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    found = facts(model, batch, chunk_size=chunk_size)
    loss_of(found).backward()
    assert_close(found, expected)
    for name, parameter in model.named_parameters():
        scale = gradients[name].abs().max().clamp(min=1)
        torch.testing.assert_close(parameter.grad / scale, gradients[name] / scale, rtol=0, atol=1e-5)
    with torch.no_grad():
        assert_close(facts(model, batch, chunk_size=chunk_size), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_vectors_in_the_place_of_the_asv_encoder(kind):
    model, batch = make_model(kind), batch_of(masked=0)
    base = model.base if kind == "predictor" else model
    vectors, _ = base.asv_encoder(batch.tokens)
    assert_close(facts(model, batch, cached_vectors=vectors), facts(model, batch))
    other = facts(model, batch, cached_vectors=vectors.flip(0))
    assert (other["presence"] - facts(model, batch)["presence"]).abs().max() > 1e-3


def test_cached_features_in_the_place_of_the_base():
    torch.manual_seed(3)
    sizes = dataclasses.replace(PREDICTOR, attention_layers=0, count_head=False)
    model = with_features(SequencePredictor(SequenceEncoder(SIZES), sizes, freeze_base=True))
    batch = batch_of(masked=0, count_masked=())
    expected = facts(model, batch)
    output = model(batch, cached_features=expected["features"])
    assert output.base is None
    torch.testing.assert_close(output.heads, expected["heads"])
    other = model(batch, cached_features=expected["features"].flip(0))
    assert (other.target - expected["target"]).abs().max() > 1e-3


def test_heads_that_read_asvs_refuse_cached_features():
    model, batch = make_model("predictor"), batch_of()
    with pytest.raises(AssertionError, match="read the ASVs too"):
        model(batch, cached_features=torch.zeros(4, model.features.width))


def test_the_target_is_the_mean_of_the_heads():
    output = make_model("predictor")(batch_of())
    assert output.heads.shape == (4, PREDICTOR.heads, 1)
    torch.testing.assert_close(output.target, output.heads.sum(dim=1) / PREDICTOR.heads)
    assert output.heads.std(dim=1).min() > 1e-3  # they differ from the start


def test_asvs_of_one_length_need_no_mask():
    encoder = make_model("encoder").asv_encoder
    encoded = torch.from_numpy(tokens.encode([s[:12] for s in SEQUENCES])[0])
    torch.testing.assert_close(encoder(encoded, padded=False)[0], encoder(encoded, padded=True)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_does_not_depend_on_the_others(kind):
    model = make_model(kind)
    together, alone = facts(model, batch_of()), facts(model, batch_of([SAMPLES[0]]))
    names = ["presence", "share", "faith_pd", *(["features", "heads", "target"] if kind == "predictor" else [])]
    for name in names:
        torch.testing.assert_close(alone[name][0], together[name][0], rtol=0, atol=1e-5, msg=name)


def test_the_clades_of_an_asv_depend_on_its_sequence_alone():
    model = make_model("encoder").eval()
    together = model(batch_of(masked=0, extra_tokens=5))
    for asv in range(9):
        for samples in ([[(asv, 3)]], [[(asv, 1), ((asv + 1) % 9, 8)], [((asv + 4) % 9, 1)]]):
            batch = batch_of(samples, masked=0, count_masked=())
            found = model(batch).memberships[batch.asvs.tolist().index(asv)]
            torch.testing.assert_close(found, together.memberships[asv], rtol=0, atol=1e-6)
    assert torch.cdist(together.memberships, together.memberships).fill_diagonal_(1).min() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_abundance_matters_where_it_should(kind):
    model = make_model(kind)
    other = [[(0, 90), (1, 5), (2, 30), (5, 1)], *SAMPLES[1:]]  # the same ASVs with other reads
    before, after = facts(model, batch_of()), facts(model, batch_of(other))
    changed = {name: (before[name] - after[name])[0].abs().max().item() for name in ("share", "weighted")}
    if kind == "predictor":
        changed |= {name: (before[name] - after[name])[0].abs().max().item() for name in ("features", "target")}
    assert min(changed.values()) > 1e-3, changed
    for name in ("memberships", "presence", "unweighted", "faith_pd"):
        assert torch.equal(before[name], after[name])


def test_the_count_head_never_sees_what_it_fills_in():
    model, batch = make_model("predictor"), batch_of()
    moved = batch.log_abundance - 2.0 * batch.count_masked
    other = dataclasses.replace(batch, log_abundance=moved)
    before, after = facts(model, batch), facts(model, other)
    assert torch.equal(before["counts"], after["counts"])
    assert (before["target"] - after["target"]).abs().max() > 1e-3


def test_without_masked_counts_there_are_none():
    output = make_model("predictor")(batch_of(count_masked=()))
    assert output.log_abundance is None
    assert output.target.shape == (4, 1)


def test_the_nucleotide_head_never_sees_what_it_fills_in():
    encoder = make_model("encoder").asv_encoder
    batch = batch_of(masked=4)
    position = batch.masked_position
    hidden = batch.tokens.scatter(1, position, tokens.N)  # other letters behind the masks
    logits = encoder(batch.tokens, masked_position_UK=position)[1]
    assert torch.equal(logits, encoder(hidden, masked_position_UK=position)[1])
    rows = torch.arange(len(position))
    left = torch.stack([torch.tensor([p for p in range(1, 13) if p not in row]) for row in position.tolist()])
    seen = batch.tokens.clone()
    seen[rows, left[:, 0]] = tokens.N
    assert (logits - encoder(seen, masked_position_UK=position)[1]).abs().amax(dim=(1, 2)).min() > 1e-4


def test_masks_change_the_nucleotide_states():
    encoder, batch = make_model("encoder").asv_encoder, batch_of(masked=3)
    masked = encoder(batch.tokens, masked_position_UK=batch.masked_position)
    assert masked[1].shape == (9, 3, tokens.VOCABULARY_SIZE)
    elsewhere = encoder(batch.tokens, masked_position_UK=batch.masked_position.flip(0))
    assert (masked[1] - elsewhere[1]).abs().max() > 1e-3
    plain, logits = encoder(batch.tokens)
    assert logits is None
    assert (masked[0] - plain).abs().max() > 1e-3


def test_kmer_features_read_the_whole_sequence():
    encoder, batch = make_model("encoder").asv_encoder, batch_of(masked=3)
    nn.init.zeros_(encoder.nucleotides.norm.weight)  # leaves the k-mer part of the vectors, the bias being 0
    masked, _ = encoder(batch.tokens, masked_position_UK=batch.masked_position)
    plain, _ = encoder(batch.tokens)
    assert torch.equal(masked, plain)
    assert plain.abs().amax(dim=1).min() > 1e-3


def test_kmer_frequencies_are_centred_and_scaled_by_the_asvs_to_train_on():
    encoder = make_model("encoder").asv_encoder.kmers
    encoded = torch.from_numpy(tokens.encode(SEQUENCES)[0])
    assert (encoder.mean == 0).all()
    assert encoder.scale == 1
    encoder.standardise(encoded)
    found = (kmer_frequencies(encoded, encoder.k) - encoder.mean) * encoder.scale
    torch.testing.assert_close(found.mean(dim=0), torch.zeros(4**encoder.k), rtol=0, atol=1e-5)
    assert found.square().sum(dim=1).mean().sqrt().item() == pytest.approx(asv_encoder.LENGTH, rel=1e-5)
    alike = torch.from_numpy(tokens.encode(SEQUENCES[:1] * 3)[0])
    encoder = make_model("encoder").asv_encoder.kmers
    encoder.standardise(alike)
    assert encoder.scale == 1
    assert encoder(alike).isfinite().all()


def test_a_new_nucleotide_stack_adds_little_to_the_kmers():
    encoder, encoded = make_model("encoder").asv_encoder, torch.from_numpy(tokens.encode(SEQUENCES)[0])
    encoder.kmers.standardise(encoded)
    of_kmers, (together, _) = encoder.kmers(encoded), encoder(encoded)
    of_stack = together - of_kmers
    assert 0 < of_stack.std(dim=0).mean() < 0.2 * of_kmers.std(dim=0).mean()
    # Where there is nothing to drown, it has its full size.
    alone, _ = make_model("encoder", kmer=0).asv_encoder(encoded)
    assert alone.std(dim=1, correction=0).mean().item() == pytest.approx(1, abs=0.01)


def test_without_kmers():
    model = make_model("encoder", kmer=0)
    assert not [name for name in model.state_dict() if "kmer" in name]
    assert model(batch_of()).memberships.isfinite().all()


def test_without_a_nucleotide_stack():
    model, batch = make_model("encoder", asv_layers=0), batch_of(masked=0)
    assert not [name for name, _ in model.named_parameters() if "nucleotides" in name]
    output = model(batch)
    assert output.nucleotide_logits is None
    for variant in VARIANTS.values():
        assert_close(facts(model, batch_of(masked=0, **variant)), facts(model, batch))
    assert_close(facts(model, batch, chunk_size=4), facts(model, batch))
    longer = random_sequences(4, shortest=60, longest=90)  # than max_bp, of which k-mers know nothing
    assert model(make_batch(longer, [[(0, 1), (3, 2)], [(2, 5)]])).memberships.isfinite().all()


def test_layers_of_a_stack_start_different():
    stacks = [m for m in make_model("predictor").modules() if isinstance(m, Transformer)]
    assert len(stacks) == 3  # nucleotides, target, counts
    for stack in stacks:
        assert len(stack.blocks) == 2
        for one, other in itertools.combinations(stack.blocks, 2):
            pairs = zip(one.named_parameters(), other.named_parameters(), strict=True)
            matrices = [(a, b) for (_, a), (_, b) in pairs if a.dim() == 2]
            assert len(matrices) == 4
            assert all((a - b).abs().max() > 1e-3 for a, b in matrices)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_used(kind):
    """DDP would wait for one that is not."""
    model = make_model(kind)
    loss_of(facts(model, batch_of())).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def frozen_predictor() -> tuple[SequencePredictor, SequenceEncoder]:
    """Predictor with a frozen base that has much dropout, and a copy of that base in evaluation mode."""
    base = make_model("encoder", dropout=0.5)
    return with_features(SequencePredictor(base, PREDICTOR, freeze_base=True)), copy.deepcopy(base).eval()


def test_a_frozen_base_stays_as_it_is():
    model, base = frozen_predictor()
    for _ in range(2):
        model.train()
        assert model.training
        assert model.target_encoder.blocks[0].training
        assert not any(module.training for module in model.base.modules())
    batch = batch_of(masked=0)
    output, expected = model(batch), base(batch)
    for name in ("vectors", "memberships", "lengths", "faith_pd"):
        assert torch.equal(getattr(output.base, name), getattr(expected, name)), name
    assert torch.equal(output.base.profiles.presence, expected.profiles.presence)
    (output.target.square().sum() + output.log_abundance.square().sum()).backward()
    assert [name for name, p in model.base.named_parameters() if p.requires_grad or p.grad is not None] == []
    heads = [(name, p) for name, p in model.named_parameters() if not name.startswith("base.")]
    assert [name for name, p in heads if p.grad is None] == []
    assert len(heads) > 20


def test_a_base_that_is_not_frozen_trains():
    model = with_features(SequencePredictor(make_model("encoder", dropout=0.5), PREDICTOR))
    assert all(module.training for module in model.modules())
    batch = batch_of(masked=0)
    assert not torch.equal(model(batch).base.memberships, model(batch).base.memberships)  # dropout
    model(batch).target.sum().backward()
    assert model.base.asv_encoder.nucleotides.token.weight.grad.abs().max() > 0
    model.eval()
    assert torch.equal(model(batch).base.memberships, model(batch).base.memberships)


def test_codes_of_the_nucleotides():
    here = (asv_encoder.PAD, asv_encoder.START, asv_encoder.MASK, asv_encoder.VOCABULARY_SIZE)
    assert here == (tokens.PAD, tokens.START, tokens.MASK, tokens.VOCABULARY_SIZE)
    assert (tokens.A, tokens.C, tokens.G, tokens.T) == (1, 2, 3, 4)  # what kmer_frequencies counts


@given(
    sequences=st.lists(st.text("ACGTN", min_size=1, max_size=30), min_size=1, max_size=5),
    k=st.integers(1, 4),
)
def test_kmer_frequencies(sequences, k):
    encoded = torch.from_numpy(tokens.encode(sequences)[0]).long()
    found = kmer_frequencies(encoded, k)
    names = ["".join(letters) for letters in itertools.product("ACGT", repeat=k)]
    assert found.shape == (len(sequences), len(names))
    for row, sequence in zip(found, sequences, strict=True):
        kmers = [sequence[i : i + k] for i in range(len(sequence) - k + 1)]
        counts = Counter(kmer for kmer in kmers if "N" not in kmer)
        total = max(1, counts.total())
        expected = torch.tensor([counts[name] / total**0.5 for name in names])
        torch.testing.assert_close(row, expected)


def test_kmers_longer_than_the_sequences():
    encoded = torch.from_numpy(tokens.encode(["ACG", "AC"])[0]).long()
    found = kmer_frequencies(encoded, 6)
    assert found.shape == (2, 4**6)
    assert found.count_nonzero() == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_bf16(kind, chunk_size):
    model, batch = make_model(kind), batch_of()
    expected = facts(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = facts(model, batch, chunk_size=chunk_size)
    assert {found[name].dtype for name in ("memberships", "presence", "share", "unweighted")} == {torch.float32}
    torch.testing.assert_close(found["memberships"], expected["memberships"], rtol=0, atol=0.02)
    assert_close({k: v.float() for k, v in found.items()}, expected, tolerance=0.15)
    assert not torch.equal(found["memberships"], expected["memberships"])  # it did run in bf16
    loss_of({k: v.float() for k, v in found.items()}).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_k_mers_that_a_batch_hides_are_read_of_no_asv():
    model = SequenceEncoder(dataclasses.replace(SIZES, asv_layers=0)).eval()
    batch, kmers = batch_of(masked=0, count_masked=()), 4**SIZES.kmer
    everything = model(batch).memberships
    kept = torch.ones(kmers, dtype=torch.bool)
    torch.testing.assert_close(model(dataclasses.replace(batch, kmers_kept=kept)).memberships, everything)
    frequencies = kmer_frequencies(batch.tokens, SIZES.kmer)
    kept[frequencies[0] > 0] = False  # all that the first ASV has
    hidden = dataclasses.replace(batch, kmers_kept=kept)
    first = model.asv_encoder.kmers
    with torch.no_grad():
        first.mean.zero_()
        alike = first.mlp(torch.zeros(1, kmers))
    torch.testing.assert_close(model(hidden).vectors[:1], alike)
    in_chunks = model(hidden, chunk_size=2)
    torch.testing.assert_close(in_chunks.memberships, model(hidden).memberships)
