"""Files of predictions, in the forms that others read.

Tables as q2-sample-classifier writes them, distance matrices and metadata for QIIME 2, vectors as TSV or Parquet.
"""

from __future__ import annotations

import csv
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from aam.config import PredictConfig
from aam.data.files import is_special, replacing
from aam.predict.distances import distance_blocks, write_distances, write_faith_pd
from aam.predict.job import PredictionResult, Predictions
from aam.predict.table import sources
from aam.training.metrics import UNIFRAC_NAMES


def write_result(config: PredictConfig, result: PredictionResult) -> str:
    """Write all that was asked for.

    Parameters
    ----------
    config : PredictConfig
        Where to.
    result : PredictionResult
        What to write.

    Returns
    -------
    str
        What was written, and what is to be known of it, in words.
    """
    lines = [f"note: {note}" for note in result.notes]
    if config.output is not None and result.predictions is not None:
        lines.append(write_predictions(result.predictions, config.output))
    elif config.of_samples and result.skipped:
        lines.append(_write_skipped(result.skipped, len(result.sample_ids), config.of_samples[0]))
    lines += _write_profiles(config, result)
    if config.asv_embeddings is not None and result.asvs is not None:
        sequences = result.dataset.sequences
        write_vectors(config.asv_embeddings, "sequence", sequences, result.asvs)
        lines.append(f"{len(sequences)} ASV embeddings: {config.asv_embeddings}")
    return "\n".join(lines)


def _write_profiles(config: PredictConfig, result: PredictionResult) -> Iterator[str]:
    """Write what is made of the clades of samples, and say what."""
    ids, outputs = result.sample_ids, result.outputs
    if outputs is None:
        return
    if config.embeddings is not None:
        write_vectors(config.embeddings, "SampleID", ids, outputs.presence * result.lengths)
        what = "presences of clades times their lengths; for UniFrac: --distances"
        yield f"{len(ids)} sample embeddings ({what}): {config.embeddings}"
    if config.distances is not None:
        metric = config.distance_metric
        write_distances(config.distances, ids, distance_blocks(outputs, result.lengths, metric))
        samples = "1 sample, which has no pairs" if len(ids) == 1 else f"all pairs of {len(ids)} samples"
        yield f"{UNIFRAC_NAMES[metric]} of {samples}, without a tree: {config.distances}"
    if config.faith_pd is not None:
        write_faith_pd(config.faith_pd, ids, outputs.faith_pd)
        yield f"Faith's PD of {len(ids)} samples, predicted without a tree: {config.faith_pd}"


def check_outputs(config: PredictConfig, record: dict[str, Any] | None) -> None:
    """Make the folders of all that is to be written, and see that it can be, before what takes long.

    Parameters
    ----------
    config : PredictConfig
        Where to.
    record : dict, optional
        `run.json` of the run, whose table is read where no other is given.

    Raises
    ------
    ValueError
        Where something cannot be written, or is read from.
    """
    given = sources(config, record)
    read = {path.resolve() for path in (given.table, given.metadata, given.sequences) if path is not None}
    tables = next(iter(config.of_samples), None)
    beside = () if tables is None or is_special(tables) else (_probabilities_beside(tables), _skipped_beside(tables))
    for path in (*config.outputs, *beside):
        if path.resolve() in read:
            raise ValueError(f"{path}: is read from, and would be written over; give another name")
    taken = {path.resolve() for path in beside}
    for path in config.outputs:
        if path.resolve() in taken:
            raise ValueError(f"{path}: what belongs to {tables} goes there; give another name")
        try:
            if path.exists() and not os.access(path, os.W_OK):
                raise PermissionError("it must not be changed")
            if not is_special(path):
                folder = path.resolve().parent
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    pass
        except OSError as error:
            raise ValueError(f"{path}: cannot be written: {error}") from None


def write_predictions(found: Predictions, output: Path) -> str:
    """Write what q2-sample-classifier writes, and what was skipped; quantiles beside the prediction, where learned.

    Parameters
    ----------
    found : Predictions
        What to write.
    output : Path
        Table of the predictions; others are written beside it.

    Returns
    -------
    str
        What was written, in words.
    """
    lines, had_predictions = [], output.exists()
    beside = _probabilities_beside(output)
    if found.probabilities is not None and is_special(output):
        lines.append(f"class probabilities: not written, as nothing can lie beside {output}; give --output a file")
    elif found.probabilities is not None:
        _write(beside, ["SampleID", *found.target.classes], found.sample_ids, found.probabilities.tolist())
        lines.append(f"class probabilities: {beside}")
    nothing = np.empty((len(found.values), 0))
    others = [nothing if found.beside is None else found.beside]
    header = ["SampleID", "prediction", *found.target.beside]
    if found.deviation is not None:
        others.append(found.deviation[:, None])
        header.append("prediction_sd")
    rows = [[value, *more] for value, more in zip(found.values, np.hstack(others).tolist(), strict=True)]
    _write(output, header, found.sample_ids, rows)
    if found.skipped:
        lines.append(_write_skipped(found.skipped, len(found.values), output))
    if had_predictions and not is_special(output):
        lines += [] if found.skipped else _without_stale(_skipped_beside(output))
        lines += [] if found.probabilities is not None else _without_stale(beside)
    return "\n".join([*lines, f"{len(found.values)} predictions of {found.target.column}: {output}"])


def _probabilities_beside(output: Path) -> Path:
    name = "class_probabilities.tsv"
    # Other predictions in the same folder must not be written over.
    return output.with_name(name if output.name == "predictions.tsv" else f"{output.stem}.{name}")


def _skipped_beside(output: Path) -> Path:
    return output.with_name(f"{output.stem}.skipped.tsv")


def _write_skipped(skipped: dict[str, str], done: int, output: Path) -> str:
    counted = f"{len(skipped)} of {len(skipped) + done} samples could not be predicted"
    if is_special(output):
        return "\n".join([f"{counted}:", *(f"  {sample}: {reason}" for sample, reason in skipped.items())])
    beside = _skipped_beside(output)
    _write(beside, ["SampleID", "reason"], list(skipped), [[reason] for reason in skipped.values()])
    return f"{counted}, with the reasons: {beside}"


def _without_stale(path: Path) -> list[str]:
    """Remove what earlier predictions of the same name have left, and these do not have."""
    if not path.is_file():
        return []
    path.unlink()
    return [f"removed, of earlier predictions: {path}"]


def write_vectors(path: Path, index: str, names: Sequence[str], vectors: np.ndarray) -> None:
    """Write named vectors [n, D]: columns `index`, e0, e1, ...

    Parameters
    ----------
    path : Path
        Ends with .tsv or .parquet.
    index : str
        Header of the names.
    names : sequence of str
        One for each vector.
    vectors : ndarray of float32 [n, D]
    """
    frame = pd.DataFrame(vectors, columns=[f"e{d}" for d in range(vectors.shape[1])])
    frame.insert(0, index, np.asarray(names, dtype=object))
    with replacing(path) as part:
        if path.suffix == ".parquet":
            frame.to_parquet(part, index=False)
        else:
            frame.to_csv(part, sep="\t", index=False)


def _write(path: Path, header: list[str], sample_ids: list[str], rows: list[list]) -> None:
    with replacing(path) as part, part.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(header)
        writer.writerows([sample, *row] for sample, row in zip(sample_ids, rows, strict=True))
