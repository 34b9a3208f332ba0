"""Predict the target of samples with a trained model, alone or with many workers, and report on it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, installed or not

from aam.cli import main
from aam.config import PredictConfig


def run(config: PredictConfig) -> None:
    """Predict and say where the predictions are; score them where a report is asked for."""
    # Here and not above: it takes seconds, which --help should not.
    from aam.data.files import replacing
    from aam.distributed.checkpoints import find_best, run_record
    from aam.predict import check_outputs, predict, write_found
    from aam.report import Stage, make_report
    from aam.training import checkpoint

    path, record = find_best(config.checkpoint), run_record(config.checkpoint)
    if config.report is not None and record is None:
        raise ValueError(f"{config.checkpoint}: no run.json there, which --report is made of; give the run folder")
    check_outputs(config, record)
    crew = None
    if config.ray.workers[1] > 1:
        from aam.distributed.prediction import ray_crew

        crew = ray_crew(config.ray)
    found = predict(config, checkpoint.load(path), record, crew)
    print(write_found(config, found))
    if config.report is None or record is None or found.predictions is None:
        return
    origin, base = None, record["config"]["pretrained"]
    if base is not None and (base_record := run_record(base)) is not None:
        used = Path(record["pretrained"])
        origin = Stage.read(used if used.exists() else find_best(base), base_record)
    text = make_report(config, found.predictions, Stage.read(path, record), origin)
    with replacing(config.report) as scratch:
        scratch.write_text(text)
    print(f"report: {config.report}\n\n{text}")


if __name__ == "__main__":
    main(PredictConfig, run)
