"""Score a model on test samples beside simple baselines."""

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, installed or not

from aam.cli import main, with_values_attached
from aam.config import EvaluateConfig


def run(config: EvaluateConfig) -> None:
    """Evaluate, write the tables and show them."""
    # Here and not above: it takes seconds, which --help should not.
    from aam.distributed.evaluation import evaluate
    from aam.evaluation.results import to_json, to_markdown, to_table

    found = replace(evaluate(config), command=shlex.join(["python", "jobs/evaluate.py", *sys.argv[1:]]))
    folder = config.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    text = to_markdown(found)
    (folder / "evaluation.md").write_text(text)
    to_table(found).to_csv(folder / "evaluation.tsv", sep="\t", index=False)
    found.predictions.to_csv(folder / "predictions.tsv", sep="\t", index=False)
    if config.json is not None:
        config.json.parent.mkdir(parents=True, exist_ok=True)
        config.json.write_text(json.dumps(to_json(found), indent=1))
    print(f"\n{text}\nevaluation: {folder / 'evaluation.md'}, evaluation.tsv, predictions.tsv")


if __name__ == "__main__":
    sys.argv[1:] = with_values_attached(sys.argv[1:])
    main(EvaluateConfig, run)
