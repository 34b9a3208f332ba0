"""The naive step is the function that ours is, and the benchmark runs."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aam.model.sequence_encoder import SequenceEncoder
from aam.training.losses import LossWeights
from aam.training.step import Objective, step
from aam.training.targets import UnifracTarget
from benchmarks.naive import NaiveEncoder, naive_step
from benchmarks.train_step import count_operations
from tensors import SIZES, make_batch, random_sequences

ROOT = Path(__file__).resolve().parents[2]


def gradients(model: torch.nn.Module, losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    sum(losses.values(), torch.zeros(())).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("kmer", "asv_layers", "metrics"),
    [
        (3, 0, ("unweighted",)),
        (3, 0, ("unweighted", "weighted", "faith_pd")),
        (3, 2, ("unweighted", "weighted", "faith_pd")),
        (0, 2, ("weighted",)),
    ],
)
def test_naive_losses_and_gradients_are_ours(kmer, asv_layers, metrics):
    sequences = random_sequences(6, shortest=14, longest=30)
    samples = [[(0, 5), (1, 90), (2, 1)], [(1, 7), (3, 7), (4, 60), (5, 1)], [(2, 4)]]
    distances = torch.rand(3, 3, generator=torch.Generator().manual_seed(1))
    truth = {"unweighted": distances, "weighted": distances / 2, "faith_pd": distances[0] * 9}
    truth = {metric: truth[metric] for metric in metrics}
    batch = make_batch(sequences, samples, masked=3 if asv_layers else 0, **truth)
    objective = Objective(
        weights=LossWeights(base=1.0, nuc=float(asv_layers > 0)),
        unifrac=tuple(UnifracTarget(metric=metric, mean=0.5, variance=0.02) for metric in metrics),
    )
    torch.manual_seed(0)
    ours = SequenceEncoder(replace(SIZES, kmer=kmer, asv_layers=asv_layers))
    naive = NaiveEncoder(copy.deepcopy(ours), slots=300)
    losses, _ = step(ours, batch, objective)
    own = {name: term.share for name, term in losses.present().items()}
    theirs = naive_step(naive, batch, objective)
    assert own.keys() == theirs.keys() == ({"base", "nuc"} if asv_layers else {"base"})
    for name in own:
        torch.testing.assert_close(theirs[name], own[name], rtol=1e-5, atol=1e-6)
    expected, actual = gradients(ours, own), gradients(naive, theirs)
    assert len(actual) == len(expected)
    renamed = {
        "nucleotides.layers.": "asv_encoder.nucleotides.transformer.blocks.",
        "encoder.": "",
        "self_attn.in_proj_": "attention.qkv.",
        "self_attn.out_proj": "attention.out",
        "linear1": "mlp.0",
        "linear2": "mlp.2",
        "norm1": "attention_norm",
        "norm2": "mlp_norm",
    }
    for name, gradient in actual.items():
        for theirs_name, our_name in renamed.items():
            start = theirs_name.endswith(".") and not name.startswith(theirs_name)
            name = name if start else name.replace(theirs_name, our_name, 1)
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


def test_operations_are_those_of_the_products():
    """By hand: 2 ASVs of 3 and 4 tokens, one k-mer MLP of 4 * 2, clades 2 -> 4 -> 5, 2 samples, 2 metrics of pairs."""
    batch = make_batch(["AC", "ACG"], [[(0, 1)], [(1, 1)]])
    sizes = replace(SIZES, kmer=1, embedding_dim=2, clades=5, asv_layers=1)
    assert count_operations(batch, sizes, ("unweighted", "weighted", "faith_pd")) == {
        "kmer_mlp": 2 * 2 * (2 * 4 * 2),
        "clade_mlp": 3 * 2 * 2 * (2 * 4 + 4 * 5),
        "pairs": 2 * 9 * 2 * 2 * 5,
        "nucleotides": 3 * (24 * 4 * (3 + 4) + 4 * 2 * (9 + 16)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("asv_layers", [0, 1])
def test_the_benchmark_runs(synthetic_folder, tmp_path, asv_layers):
    command = [sys.executable, "benchmarks/train_step.py", "--data", str(synthetic_folder), "--batch-sizes", "3"]
    small = ["--rounds", "1", "--embedding-dim", "16", "--clades", "8", "--threads", "1", "--product", "512"]
    kinds = ["--asv-layers", str(asv_layers), "--unifrac-metric", "unweighted", "weighted", "--precisions", "fp32"]
    written = ["--json", tmp_path / "r.json"]
    subprocess.run([*command, *small, *kinds, *written], cwd=ROOT, check=True, capture_output=True)
    (results,) = json.loads((tmp_path / "r.json").read_text()).values()
    assert set(results) == {"3"}
    for of_batch in results.values():
        assert of_batch["ratio"] == of_batch["fp32"]["ratio"] > 0
        assert of_batch["fp32"]["loss_difference"] < 1e-4
        assert of_batch["fp32"]["mfu"] > 0
        assert (of_batch["fp32"]["gflop_nucleotides"] > 0) == (asv_layers > 0)
        assert of_batch["fp32"]["deduplication"] >= 1
