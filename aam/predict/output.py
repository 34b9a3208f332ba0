"""Files of predictions, in the forms that others read: q2-sample-classifier's tables, vectors as TSV or Parquet."""

from __future__ import annotations

import contextlib
import csv
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from aam.config import PredictConfig
from aam.predict.job import Found, Predictions


def write_found(config: PredictConfig, found: Found) -> str:
    """Write all that was asked for.

    Parameters
    ----------
    config : PredictConfig
        Where to.
    found : Found
        What to write.

    Returns
    -------
    str
        What was written, and what is to be known of it, in words.
    """
    lines = [f"note: {note}" for note in found.notes]
    if config.output is not None and found.predictions is not None:
        lines.append(write_predictions(found.predictions, config.output))
    if config.embeddings is not None and found.embeddings is not None:
        if config.output is None:
            lines += _write_skipped(found.skipped, len(found.sample_ids), config.embeddings)
        write_vectors(config.embeddings, "SampleID", found.sample_ids, found.embeddings)
        lines.append(f"{len(found.sample_ids)} sample embeddings ({found.distances}): {config.embeddings}")
    if config.asv_embeddings is not None and found.asvs is not None:
        sequences = found.dataset.sequences
        write_vectors(config.asv_embeddings, "sequence", sequences, found.asvs)
        lines.append(f"{len(sequences)} ASV embeddings: {config.asv_embeddings}")
    return "\n".join(lines)


def check_writable(config: PredictConfig) -> None:
    """Make the folders of all that is to be written, before what takes long.

    Raises
    ------
    ValueError
        Where one cannot be written to.
    """
    for path in filter(None, (config.output, config.report, config.embeddings, config.asv_embeddings)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path.parent):
                pass
        except OSError as error:
            raise ValueError(f"{path}: cannot be written: {error}") from None


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file beside a path, to write to; it takes the path's place once it is whole."""
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


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
    lines = []
    name = "class_probabilities.tsv"
    # Other predictions in the same folder must not be written over.
    beside = output.with_name(name if output.name == "predictions.tsv" else f"{output.stem}.{name}")
    if found.probabilities is None:
        lines += _without_stale(beside)
    else:
        _write(beside, ["SampleID", *found.target.classes], found.sample_ids, found.probabilities.tolist())
        lines.append(f"class probabilities: {beside}")
    others = np.empty((len(found.values), 0)) if found.beside is None else found.beside
    rows = [[value, *more] for value, more in zip(found.values, others.tolist(), strict=True)]
    _write(output, ["SampleID", "prediction", *found.target.beside], found.sample_ids, rows)
    lines += _write_skipped(found.skipped, len(found.values), output)
    return "\n".join([*lines, f"{len(found.values)} predictions of {found.target.column}: {output}"])


def _write_skipped(skipped: dict[str, str], done: int, output: Path) -> list[str]:
    beside = output.with_name(f"{output.stem}.skipped.tsv")
    if not skipped:
        return _without_stale(beside)
    _write(beside, ["SampleID", "reason"], list(skipped), [[reason] for reason in skipped.values()])
    total = len(skipped) + done
    return [f"{len(skipped)} of {total} samples could not be predicted, with the reasons: {beside}"]


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
    with _replacing(path) as part:
        if path.suffix == ".parquet":
            frame.to_parquet(part, index=False)
        else:
            frame.to_csv(part, sep="\t", index=False)


def _write(path: Path, header: list[str], sample_ids: list[str], rows: list[list]) -> None:
    with _replacing(path) as part, part.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(header)
        writer.writerows([sample, *row] for sample, row in zip(sample_ids, rows, strict=True))
