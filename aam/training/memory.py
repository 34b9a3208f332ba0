"""GPU memory: what to set, what to hand back, and what to say when there was not enough."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from aam.config import LoopConfig

EXPANDABLE_SEGMENTS = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
"""Environment of a worker with --use-expandable-segments; it must be there before CUDA starts."""


class OutOfMemoryError(RuntimeError):
    """The GPU's memory was not enough; the message says what to lower."""


def clear_cache(config: LoopConfig, moment: str) -> None:
    """Hand cached memory back after a `batch` or an `epoch`, where the settings say so."""
    wanted = config.clear_cache == moment or (config.clear_cache == "batch" and moment == "epoch")
    if wanted and torch.cuda.is_available():
        torch.cuda.empty_cache()


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
    except torch.OutOfMemoryError as error:
        used = ""
        if torch.cuda.is_available():
            gib = 2**30
            total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
            used = f" ({torch.cuda.max_memory_reserved() / gib:.1f} of {total / gib:.1f} GiB reserved)"
        chunk = config.asv_chunk_size
        share = config.batch_size // workers
        accumulation = config.gradient_accumulation_steps
        raise OutOfMemoryError(
            f"GPU out of memory{used} with {share} samples a worker of up to {token_limit} ASVs each. "
            "Lower, the most effective first: "
            f"--token-limit (now {token_limit}); "
            f"--batch-size (now {config.batch_size} over {workers} workers); "
            f"--asv-chunk-size (now {'all ASVs at once' if chunk is None else chunk}; try {(chunk or 512) // 2}); "
            f"--gradient-accumulation-steps (now {accumulation}; {accumulation * 2} with half the batch size "
            "keeps the samples of an update); "
            f"--use-expandable-segments (now {'on' if config.use_expandable_segments else 'off'}). "
            f"CUDA said: {str(error).splitlines()[0] if str(error) else 'nothing'}"
        ) from None
