"""Predict the target of samples, or their UniFrac, with a trained model, alone or with many workers; report on it."""

import contextlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, installed or not

from aam.cli import main
from aam.config import PredictConfig


def run(config: PredictConfig) -> None:
    """Predict and say where the predictions are; score them where a report is asked for."""
    # Here and not above: it takes seconds, which --help should not.
    from aam.data.files import is_special

    # What is written to a pipe must not lie between words.
    with contextlib.redirect_stdout(sys.stderr) if any(map(is_special, config.outputs)) else contextlib.nullcontext():
        _run(config)


def _run(config: PredictConfig) -> None:
    from aam.data.files import replacing
    from aam.distributed.checkpoints import find_best, run_record
    from aam.predict import check_outputs, predict, write_result
    from aam.report import Stage, check_truth, make_report
    from aam.training import checkpoint

    path, record = find_best(config.checkpoint), run_record(config.checkpoint)
    if config.report is not None and record is None:
        raise ValueError(f"{config.checkpoint}: no run.json there, which --report is made of; give the run folder")
    check_outputs(config, record)
    loaded = checkpoint.load(path)
    if config.report is not None and record is not None and loaded.spec.target is not None:
        check_truth(config, record, loaded.spec.target)
    executor = None
    if config.ray.workers[1] > 1:
        from aam.distributed.prediction import ray_executor

        executor = ray_executor(config.ray)
    result = predict(config, loaded, record, executor)
    print(write_result(config, result))
    if config.report is None or record is None or result.predictions is None:
        return
    origin, base = None, record["config"]["pretrained"]
    if base is not None and (base_record := run_record(base)) is not None:
        used = Path(record["pretrained"])
        origin = Stage.read(used if used.exists() else find_best(base), base_record)
    text = make_report(config, result.predictions, Stage.read(path, record), origin)
    with replacing(config.report) as scratch:
        scratch.write_text(text)
    print(f"report: {config.report}\n\n{text}")


if __name__ == "__main__":
    main(PredictConfig, run)
