"""The arithmetic of benchmarks/scaling.py, and its command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.many_workers import summarize_workers
from benchmarks.on_paper import Cluster, estimate, gradient_bytes, profile_bytes
from benchmarks.ray_overhead import summarize_ray
from benchmarks.scaling import parse_options

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "scaling.py"
CLUSTER = Cluster(link_gbit=8, nvlink_gbit=80, gpus_per_node=8, latency_us=0)
"""A megabyte takes a millisecond between nodes, a tenth within."""


def of(world: int, **changed):
    settings = {
        "width": 128, "parameters": 2_500_000, "samples": 32, "clades": 128, "metrics": 1, "step_ms": 20.0,
        "host_ms": 0.0, "loaders": 0,
    }  # fmt: skip
    return estimate(CLUSTER, world=world, **{**settings, **changed})


def test_a_single_worker_sends_nothing_and_waits_for_nothing():
    alone = of(1)
    assert (alone.gradient_mb, alone.profile_mb, alone.gradient_ms, alone.profile_ms) == (0, 0, 0, 0)
    assert alone.serial == alone.overlapped == alone.with_host == alone.with_loaders == 1


def test_bytes_are_those_of_rings():
    # By hand: two workers of one number each send a half there, and a half back.
    assert gradient_bytes(1, 2) == 4
    assert gradient_bytes(1000, 4) == 2 * 3 / 4 * 4000
    # Three workers, 2 samples of 5 clades each: the rows of the two others, then all 6 rows all-reduced.
    assert profile_bytes(2, 5, 1, 3) == 2 * 2 * 5 * 4 + 2 * (2 / 3) * 6 * 5 * 4
    assert profile_bytes(2, 5, 2, 3) == 2 * profile_bytes(2, 5, 1, 3)
    assert of(64, metrics=0).profile_ms == 0  # Faith's PD alone


def test_links_within_a_node_are_its_own():
    assert CLUSTER.milliseconds(1e6, 1, 8) == pytest.approx(0.1)
    assert CLUSTER.milliseconds(1e6, 1, 9) == pytest.approx(1.0)
    assert Cluster(link_gbit=8, nvlink_gbit=80, gpus_per_node=8, latency_us=500).milliseconds(
        1e6, 2, 16
    ) == pytest.approx(2.0)


def test_overlap_hides_what_the_backward_pass_is_long_enough_for():
    # 10 MB twice, by 63/64: 19.7 ms in 2 buckets; 13.3 ms of backward pass; profiles 1 MB there, 2 MB back.
    many = of(64)
    assert many.gradient_ms == pytest.approx(19.6875)
    assert many.serial == pytest.approx(20 / (20 + many.gradient_ms + many.profile_ms))
    assert many.overlapped == pytest.approx(20 / (20 + many.gradient_ms / 2 + many.profile_ms))
    slow = of(64, parameters=25_000_000)
    assert slow.overlapped == pytest.approx(20 / (20 + slow.gradient_ms - 40 / 3 + slow.profile_ms))
    assert many.serial < many.overlapped < 1


def test_batches_are_waited_for_unless_processes_build_enough_of_them():
    assert of(1, host_ms=20.0).with_host == pytest.approx(0.5)
    assert of(1, host_ms=80.0, loaders=4).with_loaders == pytest.approx(1.0)
    assert of(1, host_ms=80.0, loaders=2).with_loaders == pytest.approx(0.5)


def test_ratios_are_of_neighbours_in_time():
    times = {
        "one worker": [2.0, 4.0, 2.0],
        "two workers": [1.25, 2.5, 1.25],
        "two, no all-reduce": [1.0, 2.0, 1.0],
        "two apart": [2.0, 4.0, 2.5],
    }
    found = summarize_workers(times, samples=10)
    assert found["samples_per_s"]["one worker"] == 5
    assert found["samples_per_s"]["two apart"] == 8
    assert found["speedup"] == pytest.approx(1.6)
    assert found["ceiling"] == pytest.approx(2.0)
    assert found["all_reduce_share"] == pytest.approx(0.2)


def test_rays_share_is_what_it_adds_to_a_run_that_saves():
    found = summarize_ray({"bare": [10.0], "ray": [10.4]}, {"bare": [8.0], "ray": [8.1]}, [0.5])
    assert found["overhead"] == pytest.approx(0.04)
    assert found["bare_unsaved_s"] == pytest.approx(9.5)
    assert found["training_overhead_s"] == pytest.approx(0.1)


def test_flags():
    options = parse_options(["--parts", "paper", "--gpu-step-ms", "256=30", "--data", "somewhere"])
    assert (options.parts, options.gpu_step_ms, options.data) == (["paper"], [(256, 30.0)], Path("somewhere"))
    assert (parse_options([]).rounds, parse_options([]).asv_layers) == (5, 0)
    assert parse_options(["--unifrac-metric", "weighted", "faith_pd"]).unifrac_metric == ["weighted", "faith_pd"]
    with pytest.raises(SystemExit):
        parse_options(["--samples", "9"])


def test_it_starts_as_a_script():
    done = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, timeout=60, check=True)
    assert "--ray-rounds" in done.stdout
