"""Both stages and a report on held-out samples, as Ray jobs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, installed or not

from aam.cli import main
from aam.config import PipelineConfig

FLAGS_OF_STAGES = ("--pretrain-flags", "--train-flags")


def run(config: PipelineConfig) -> None:
    """Run the pipeline."""
    # Here and not above: it takes seconds, which --help should not.
    from aam.distributed.pipeline import run_pipeline

    run_pipeline(config)


def with_values_attached(arguments: list[str]) -> list[str]:
    """Write `--train-flags "--lr 1e-3"` with an equals sign; the parser would take the value for a flag."""
    attached: list[str] = []
    for argument in arguments:
        if attached and attached[-1] in FLAGS_OF_STAGES:
            attached[-1] += f"={argument}"
        else:
            attached.append(argument)
    return attached


if __name__ == "__main__":
    sys.argv[1:] = with_values_attached(sys.argv[1:])
    main(PipelineConfig, run)
