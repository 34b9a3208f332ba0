"""The learning rate as a pure function of the update."""

from __future__ import annotations

import math
from dataclasses import dataclass

from aam.config import LoopConfig
from aam.data.batches import count_batches

DEFAULT_WARMUP = 10_000


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up, then a cosine to 0 at the last update, and 0 after it.

    Parameters
    ----------
    peak : float
        Highest learning rate.
    warmup : int
        W, updates of warm-up.
    total : int
        T, updates of the run.
    """

    peak: float
    warmup: int
    total: int

    def lr(self, update: int) -> float:
        """Learning rate of an update, counted from 0."""
        if update >= self.total:
            return 0.0
        if update < self.warmup:
            return self.peak * (update + 1) / self.warmup
        span = max(1, self.total - 1 - self.warmup)
        progress = min(1.0, (update - self.warmup) / span)
        return self.peak * 0.5 * (1 + math.cos(math.pi * progress))


def run_length(config: LoopConfig, samples: int) -> tuple[int, int]:
    """Epochs of a run, the last of which `--max-updates` may cut short, and its updates; if its patience lasts.

    Parameters
    ----------
    config : LoopConfig
        Settings.
    samples : int
        Training samples.
    """
    an_epoch = -(-count_batches(samples, config.batch_size) // config.gradient_accumulation_steps)
    updates = config.epochs * an_epoch
    if config.max_updates is not None:
        updates = min(updates, config.max_updates)
    return -(-updates // an_epoch), updates


def make_schedule(peak: float, warmup: int | None, total: int) -> tuple[Schedule, str | None]:
    """Schedule of a run, and a warning where the warm-up asked for is more than a tenth of it.

    Parameters
    ----------
    peak : float
        Highest learning rate.
    warmup : int or None
        Updates of warm-up; None: 10,000, at most a tenth of the run.
    total : int
        Updates of the run, accumulation counted in.
    """
    if warmup is None:
        return Schedule(peak=peak, warmup=min(DEFAULT_WARMUP, total // 10), total=total), None
    warning = None
    if warmup > total / 10:
        warning = f"WARNING: --warmup-steps {warmup} is {warmup / total:.0%} of the {total} updates of this run"
        if warmup > total:
            highest = peak * total / warmup
            warning += f": the learning rate reaches {highest:.3g} at the end, never --lr {peak:.3g}"
    return Schedule(peak=peak, warmup=warmup, total=total), warning
