"""Memory: what to set, what to hand back, and what to say when there was not enough."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from aam.config import LoopConfig

EXPANDABLE_SEGMENTS = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
"""Environment of a worker with --use-expandable-segments; it must be there before CUDA starts."""


KEEP_FREED_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**62),
    "MALLOC_TOP_PAD_": str(2**26),
}
"""Environment of a worker on a CPU, of whose threads Ray chooses one to train in; see `keep_freed_memory`."""


class OutOfMemoryError(RuntimeError):
    """The GPU's memory was not enough; the message says what to lower."""


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed for the next allocation, in this process, from now on.

    Otherwise each step takes its activations anew from the system, which clears every page of them: a third of a
    step on a CPU. In the main thread only: other threads have arenas of small heaps already; for them there is
    KEEP_FREED_MEMORY, before the process starts.

    Returns
    -------
    bool
        False where the C library is not glibc, and nothing was changed.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # mallopt(3)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    settings = {mmap_max: 0, trim_threshold: -1, top_pad: 2**26}  # -1: never
    return all(mallopt(option, value) == 1 for option, value in settings.items())


def clear_cache(config: LoopConfig, moment: str) -> None:
    """Hand cached memory back after a `batch` or an `epoch`, where the settings say so; on CPUs after each epoch."""
    wanted = config.clear_cache == moment or config.clear_cache == "batch"
    if torch.cuda.is_available():
        if wanted:
            torch.cuda.empty_cache()
    elif moment == "epoch":
        hand_back_freed_memory()


def hand_back_freed_memory() -> None:
    """Give the system back what `keep_freed_memory` has kept.

    Steps of many sizes leave gaps that fit none of the next: without this a process grows for hours.
    """
    with suppress(AttributeError, OSError, TypeError):  # not glibc, which then has kept nothing
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def out_of_memory_advice(config: LoopConfig, *, token_limit: int, workers: int) -> Iterator[None]:
    """Turn CUDA's out-of-memory error into one message with the sizes at hand and the settings to lower.

    Parameters
    ----------
    config : LoopConfig
        Settings in force.
    token_limit : int
        ASVs of a sample, at most.
    workers : int
        Training processes.

    Raises
    ------
    OutOfMemoryError
        In place of torch's.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        raise OutOfMemoryError(_advice(config, token_limit, workers, error)) from None


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Also where it is not torch's allocator that found no memory, but the driver or cuBLAS."""
    named = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(name in str(error) for name in named)


def _advice(config: LoopConfig, token_limit: int, workers: int, error: RuntimeError) -> str:
    used = ""
    if torch.cuda.is_available():
        gib = 2**30
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        used = f" ({torch.cuda.max_memory_reserved() / gib:.1f} of {total / gib:.1f} GiB reserved)"
    share = -(-config.batch_size // workers)
    chunk, accumulation = config.asv_chunk_size, config.gradient_accumulation_steps
    smaller_chunk = 256 if chunk is None else max(1, chunk // 2)
    said = str(error).splitlines()
    return (
        f"GPU out of memory{used} with {share} samples a worker of up to {token_limit} ASVs each. "
        "What to change, the most effective first: "
        f"--token-limit (now {token_limit}; lower); "
        f"--batch-size (now {config.batch_size} over {workers} workers; lower); "
        f"--asv-chunk-size (now {'all ASVs at once' if chunk is None else chunk}; try {smaller_chunk}); "
        f"--gradient-checkpointing (now {'on' if config.gradient_checkpointing else 'off'}); "
        f"--gradient-accumulation-steps (now {accumulation}; {accumulation * 2} with half the batch size "
        "keeps the samples of an update); "
        f"--use-expandable-segments (now {'on' if config.use_expandable_segments else 'off'}). "
        f"CUDA said: {said[0] if said else 'nothing'}"
    )
