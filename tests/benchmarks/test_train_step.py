"""The naive step is the function that ours is, and the benchmark runs."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aam.model.sequence_encoder import SequenceEncoder
from aam.training.losses import LossWeights
from aam.training.step import Objective, step
from benchmarks.naive import NaiveEncoder, naive_step
from tensors import SIZES, make_batch, random_sequences

ROOT = Path(__file__).resolve().parents[2]
OBJECTIVE = Objective(weights=LossWeights(base=1.0, nuc=1.0), distance_variance=0.02)


def gradients(model: torch.nn.Module, losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    sum(losses.values(), torch.zeros(())).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_naive_losses_and_gradients_are_ours():
    sequences = random_sequences(6, shortest=14, longest=30)
    samples = [[(0, 5), (1, 90), (2, 1)], [(1, 7), (3, 7), (4, 60), (5, 1)], [(2, 4)]]
    unifrac = torch.rand(3, 3, generator=torch.Generator().manual_seed(1))
    batch = make_batch(sequences, samples, masked=3, unifrac=(unifrac + unifrac.T) / 2)
    torch.manual_seed(0)
    ours = SequenceEncoder(SIZES)
    naive = NaiveEncoder(copy.deepcopy(ours), slots=300)
    found, _ = step(ours, batch, OBJECTIVE)
    own = {name: term.share for name, term in found.present().items()}
    theirs = naive_step(naive, batch, OBJECTIVE)
    for name in ("base", "nuc"):
        torch.testing.assert_close(theirs[name], own[name], rtol=1e-5, atol=1e-6)
    expected, actual = gradients(ours, own), gradients(naive, theirs)
    assert len(actual) == len(expected)
    renamed = {
        "nucleotides.layers.": "asv_encoder.transformer.blocks.",
        "nucleotides.norm.": "asv_encoder.transformer.norm.",
        "asvs.layers.": "transformer.blocks.",
        "asvs.norm.": "transformer.norm.",
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


@pytest.mark.slow
def test_the_benchmark_runs(synthetic_folder, tmp_path):
    command = [sys.executable, "benchmarks/train_step.py", "--data", str(synthetic_folder), "--batch-sizes", "3"]
    small = ["--rounds", "1", "--embedding-dim", "16", "--layers", "1", "--threads", "1", "--product", "512"]
    written = ["--precisions", "fp32", "--json", tmp_path / "r.json"]
    subprocess.run([*command, *small, *written], cwd=ROOT, check=True, capture_output=True)
    (found,) = json.loads((tmp_path / "r.json").read_text()).values()
    assert set(found) == {"3"}
    for of_batch in found.values():
        assert of_batch["ratio"] == of_batch["fp32"]["ratio"] > 0
        assert of_batch["fp32"]["loss_difference"] < 1e-4
        assert of_batch["fp32"]["mfu"] > 0
        assert of_batch["fp32"]["deduplication"] >= 1
