"""Sweep over settings of stage 1 or stage 2."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, installed or not

from aam.cli import parse, parse_known, reporting_faults
from aam.config import PretrainConfig, SweepConfig, TrainConfig


def tune() -> None:
    """Run a sweep: its own flags, and those of the stage for what the trials share."""
    sweep, others = parse_known(SweepConfig)
    config = parse(PretrainConfig if sweep.stage == "pretrain" else TrainConfig, others)
    # Here and not above: it takes seconds, which --help should not.
    from aam.distributed.sweep import run_sweep

    print(run_sweep(sweep, config))


if __name__ == "__main__":
    reporting_faults(tune)
