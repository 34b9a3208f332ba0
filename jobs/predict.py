"""Predict the target of new samples with a trained stage 2 model."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, installed or not

from aam.cli import main
from aam.config import PredictConfig


def run(config: PredictConfig) -> None:
    """Predict and say where the predictions are."""
    # Here and not above: it takes seconds, which --help should not.
    from aam.distributed.checkpoints import find_best
    from aam.predict import predict

    print(predict(config, find_best(config.checkpoint)))


if __name__ == "__main__":
    main(PredictConfig, run)
