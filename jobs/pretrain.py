"""Stage 1: pre-train a SequenceEncoder on UniFrac distances and masked nucleotides."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, installed or not

from aam.cli import main
from aam.config import PretrainConfig


def pretrain(config: PretrainConfig) -> None:
    """Run stage 1."""
    # Here and not above: it takes seconds, which --help should not.
    from aam.distributed.run import run
    from aam.distributed.summary import summarise, train_command

    print(summarise("stage 1", run(config), train_command(config)))


if __name__ == "__main__":
    main(PretrainConfig, pretrain)
