"""Score a model on test samples beside baselines, or the UniFrac of a stage 1 run beside exact UniFrac."""

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, installed or not

from aam.cli import main, with_values_attached
from aam.config import EvaluateConfig


def run(config: EvaluateConfig) -> None:
    """Evaluate, write the tables and show them."""
    # Here and not above: it takes seconds, which --help should not.
    from aam.distributed.evaluation import evaluate, finished_stage_1
    from aam.evaluation import distances, results

    command, folder = shlex.join(["python", "jobs/evaluate.py", *sys.argv[1:]]), config.output_dir
    of_stage_1 = finished_stage_1(config)
    if of_stage_1 is not None:
        of_stage_1 = replace(of_stage_1, command=command)
        _write(config, distances.to_markdown(of_stage_1), distances.to_json(of_stage_1), "evaluation.md")
        return
    result = replace(evaluate(config), command=command)
    folder.mkdir(parents=True, exist_ok=True)
    results.to_table(result).to_csv(folder / "evaluation.tsv", sep="\t", index=False)
    result.predictions.to_csv(folder / "predictions.tsv", sep="\t", index=False)
    files = "evaluation.md, evaluation.tsv, predictions.tsv"
    _write(config, results.to_markdown(result), results.to_json(result), files)


def _write(config: EvaluateConfig, text: str, scores: dict[str, Any], files: str) -> None:
    config.output_dir.mkdir(parents=True, exist_ok=True)
    (config.output_dir / "evaluation.md").write_text(text)
    if config.json is not None:
        config.json.parent.mkdir(parents=True, exist_ok=True)
        config.json.write_text(json.dumps(scores, indent=1))
    print(f"\n{text}\nevaluation: {config.output_dir / files}")


if __name__ == "__main__":
    sys.argv[1:] = with_values_attached(sys.argv[1:])
    main(EvaluateConfig, run)
