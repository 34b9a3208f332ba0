"""What is said when the GPU's memory was not enough."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aam.config import LoopConfig
from aam.training.memory import (
    EXPANDABLE_SEGMENTS,
    KEEP_FREED_MEMORY,
    OutOfMemoryError,
    clear_cache,
    out_of_memory_advice,
)

FLAGS = [
    "--token-limit",
    "--batch-size",
    "--asv-chunk-size",
    "--gradient-checkpointing",
    "--gradient-accumulation-steps",
    "--use-expandable-segments",
]
GENUINE = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has ... free.")


def advice_for(error: Exception, config: LoopConfig, workers: int = 2) -> str:
    with (
        pytest.raises(OutOfMemoryError) as caught,
        out_of_memory_advice(config, token_limit=1024, workers=workers),
    ):
        raise error
    return str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        GENUINE,
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ..."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.OutOfMemoryError(""),
    ],
)
def test_the_settings_to_change_in_the_order_of_their_effect(error):
    text = advice_for(error, LoopConfig(batch_size=8))
    places = [text.index(flag) for flag in FLAGS]
    assert places == sorted(places)
    assert "\n" not in text


def test_the_sizes_at_hand():
    config = LoopConfig(batch_size=9, asv_chunk_size=300, gradient_accumulation_steps=3)
    text = advice_for(GENUINE, config)
    for part in (
        "5 samples a worker of up to 1024 ASVs",  # the larger share of 9 over 2
        "--token-limit (now 1024",
        "--batch-size (now 9 over 2 workers",
        "--asv-chunk-size (now 300; try 150)",
        "--gradient-accumulation-steps (now 3; 6 with half the batch size",
        "--use-expandable-segments (now off)",
        "CUDA said: CUDA out of memory. Tried to allocate 20.00 GiB.",
    ):
        assert part in text
    text = advice_for(GENUINE, LoopConfig(use_expandable_segments=True))
    assert "--asv-chunk-size (now all ASVs at once; try 256)" in text
    assert "--use-expandable-segments (now on)" in text
    assert "--asv-chunk-size (now 1; try 1)" in advice_for(GENUINE, LoopConfig(asv_chunk_size=1))


@pytest.mark.parametrize(
    "error", [RuntimeError("shape mismatch"), ValueError("CUDA error: out of memory"), KeyboardInterrupt()]
)
def test_other_errors_pass_as_they_are(error):
    with (
        pytest.raises(type(error)) as caught,
        out_of_memory_advice(LoopConfig(), token_limit=1024, workers=1),
    ):
        raise error
    assert caught.value is error


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_more_than_the_gpu_has():
    with (
        pytest.raises(OutOfMemoryError, match="GiB reserved"),
        out_of_memory_advice(LoopConfig(), token_limit=1024, workers=1),
    ):
        torch.empty(2**50, dtype=torch.uint8, device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("setting", "moment", "cleared"),
    [
        ("never", "epoch", False),
        ("epoch", "batch", False),
        ("epoch", "epoch", True),
        ("batch", "batch", True),
        ("batch", "epoch", True),
    ],
)
def test_cached_memory_is_handed_back_when_it_was_asked_for(setting, moment, cleared):
    torch.cuda.empty_cache()
    block = torch.empty(2**26, dtype=torch.uint8, device="cuda")
    del block
    reserved = torch.cuda.memory_reserved()
    clear_cache(LoopConfig(clear_cache=setting), moment)
    assert (torch.cuda.memory_reserved() < reserved) == cleared


def test_the_environment_of_expandable_segments_is_one_that_torch_reads():
    ((name, value),) = EXPANDABLE_SEGMENTS.items()
    assert value == "expandable_segments:True"
    libraries = list((Path(torch.__file__).parent / "lib").glob("*c10.*"))
    assert any(name.encode() in library.read_bytes() for library in libraries)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_freed_memory_can_be_handed_back():
    script = """
import psutil, torch
from aam.training.memory import hand_back_freed_memory, keep_freed_memory
assert keep_freed_memory()
size = lambda: psutil.Process().memory_info().rss
before = size()
kept = [torch.ones(2**22) for _ in range(16)]
last = torch.ones(2**10)  # above the gap
del kept
full = size()
hand_back_freed_memory()
print(full - before, size() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    full, left = map(int, done.stdout.split())
    assert full > 2**27, "kept, until asked"
    assert left < 2**25


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_freed_memory_is_used_again():
    """Steps after the first few get their memory without a page fault for each page of it."""
    script = """
import ctypes, resource, sys, threading, torch
sbrk = ctypes.CDLL(None).sbrk
sbrk.argtypes, sbrk.restype = [ctypes.c_ssize_t], ctypes.c_ssize_t
from aam.training.memory import keep_freed_memory
if sys.argv[1] == "in main":
    assert keep_freed_memory()

def train():
    faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(16):  # until all that is taken in turn has been touched
        torch.ones(2**25)
    before = faults()
    for _ in range(4):
        torch.ones(2**25)
    again = (faults() - before) * resource.getpagesize() / 2**27
    before = sbrk(0)
    torch.empty(2**32, dtype=torch.uint8)  # more than a step frees at once
    print(again, sbrk(0) - before)

thread = threading.Thread(target=train)
if sys.argv[1] == "in main":
    train()
else:
    thread.start(), thread.join()
"""
    shares, grown = {}, {}
    for wanted, variables in (("in main", {}), ("in a thread", KEEP_FREED_MEMORY), ("leave", {})):
        run = [sys.executable, "-c", script, wanted]
        environment = {**os.environ, **variables}
        done = subprocess.run(run, check=True, capture_output=True, text=True, env=environment)
        shares[wanted], grown[wanted] = map(float, done.stdout.split())
    for kept in ("in main", "in a thread"):
        assert shares[kept] < 0.5
        assert grown[kept] > 2**31
    assert shares["leave"] > 1
    assert grown["leave"] < 2**31
