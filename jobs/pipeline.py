"""Both stages and a report on held-out samples, as Ray jobs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, installed or not

from aam.cli import main, with_values_attached
from aam.config import PipelineConfig


def run(config: PipelineConfig) -> None:
    """Run the pipeline."""
    # Here and not above: it takes seconds, which --help should not.
    from aam.distributed.pipeline import run_pipeline

    run_pipeline(config)


if __name__ == "__main__":
    sys.argv[1:] = with_values_attached(sys.argv[1:])
    main(PipelineConfig, run)
