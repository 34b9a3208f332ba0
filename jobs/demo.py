"""The whole way on the built-in synthetic dataset: stage 1, stage 2, predictions for samples kept back."""

import csv
import logging
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a checkout, installed or not

import biom
import numpy as np
import ray

from aam.data import synthetic
from aam.distributed.cluster import RAY_ENVIRONMENT
from aam.training.metrics import regression_metrics

SIZES = ["--embedding-dim", "64", "--attention-layers", "2", "--batch-size", "16"]
STAGE_1 = ["--epochs", "12", "--lr", "1e-3", *SIZES]
STAGE_2 = ["--epochs", "30", "--lr", "1e-3", "--attention-layers", "1", "--batch-size", "16"]


def main() -> None:
    """Run the demo in ./demo, which an earlier one is removed from."""
    started = time.monotonic()
    folder = ROOT / "demo"
    shutil.rmtree(folder, ignore_errors=True)
    data = synthetic.ensure(folder / "data", synthetic.SyntheticConfig())
    hold_back(data, folder)
    os.environ.update(RAY_ENVIRONMENT)
    ray.init(address="local", logging_level=logging.WARNING, log_to_driver=False)
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address  # one Ray for both stages
    sources = ["--table", f"{data}/table.biom", "--metadata", f"{data}/metadata.tsv"]
    split = ["--group-column", "subject", "--test-ids", f"{folder}/test_ids.txt"]
    tree = ["--tree", f"{data}/tree.nwk"]
    stage_1, stage_2, predictions = folder / "stage1", folder / "stage2", folder / "predictions.tsv"
    outputs = [
        run("pretrain.py", *sources, *tree, *split, *STAGE_1, "--output-dir", stage_1),
        run("train.py", *sources, *split, "--target", "gradient", "--pretrained", stage_1, "--freeze-base",
            *STAGE_2, "--output-dir", stage_2),
        run("predict.py", "--checkpoint", stage_2, "--table", f"{folder}/new_samples.biom", "--output", predictions),
    ]  # fmt: skip
    ray.shutdown()
    summaries = [text[text.index("stage ") :] for text in outputs[:2]]
    print("\n" + "=" * 80 + f"\nDemo done in {time.monotonic() - started:.0f} s, on SYNTHETIC data.\n")
    print("\n".join(line for text in summaries for line in text.splitlines() if "  next " not in line))
    print(score(predictions, data / "metadata.tsv"))
    print(f"  predictions  {predictions}\n")
    print("Watch the curves:   .venv/bin/tensorboard --logdir demo")
    print("Your own data next: .venv/bin/python jobs/pretrain.py --help")


def hold_back(data: Path, folder: Path) -> None:
    """Keep a fifth of the subjects out of both stages, as a table of new samples."""
    table = biom.load_table(str(data / "table.biom"))
    subjects = sorted({str(i).split(".")[0] for i in table.ids()})
    new = set(subjects[::5])
    ids = [str(i) for i in table.ids() if str(i).split(".")[0] in new]
    (folder / "test_ids.txt").write_text("\n".join(ids) + "\n")
    with biom.util.biom_open(str(folder / "new_samples.biom"), "w") as file:
        table.filter(ids, inplace=False).to_hdf5(file, "AAM demo")


def run(script: str, *arguments: str | Path) -> str:
    """Run a job as a user would, showing the command and what it says; returns that."""
    command = [sys.executable, str(ROOT / "jobs" / script), *map(str, arguments)]
    shown = shlex.join(str(a).replace(f"{ROOT}/", "") for a in ["python", *command[1:]])
    print(f"\n$ {shown}", flush=True)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    if process.wait() != 0:
        sys.exit(f"error: jobs/{script} failed with exit code {process.returncode}")
    return "".join(lines)


def score(predictions: Path, metadata: Path) -> str:
    """Error on the samples that were kept back, beside that of always saying their mean."""
    truth = read_column(metadata, "gradient")
    pairs = [(float(truth[s]), float(v)) for s, v in read_column(predictions, "prediction").items() if s in truth]
    true, predicted = np.array(pairs).T
    found = regression_metrics(true, predicted)
    constant = np.abs(true - true.mean()).mean()
    return (
        f"new samples: {len(pairs)} of subjects that neither stage saw\n"
        f"  test         mae {found['mae']:.4g} (always saying the mean: {constant:.4g})  r2 {found['r2']:.4g}"
    )


def read_column(path: Path, column: str) -> dict[str, str]:
    """Cells of a table by sample id, those without a value left out."""
    with path.open(newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        assert rows.fieldnames is not None
        return {row[rows.fieldnames[0]]: row[column] for row in rows if row[column] not in ("", synthetic.MISSING)}


if __name__ == "__main__":
    main()
