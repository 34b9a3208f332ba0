"""Stage 2: train a SequencePredictor for a column of the metadata."""

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, installed or not

from aam.cli import main
from aam.config import TrainConfig


def train(config: TrainConfig) -> None:
    """Run stage 2."""
    # Here and not above: it takes seconds, which --help should not.
    from aam.distributed.run import run
    from aam.distributed.summary import summarise

    result = run(config)
    run_folder = shlex.quote(str(config.output_dir))
    following = f"python jobs/predict.py --checkpoint {run_folder} --table T.biom --output predictions.tsv"
    print(summarise("stage 2", result, following))


if __name__ == "__main__":
    main(TrainConfig, train)
