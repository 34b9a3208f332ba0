"""Write small tables, artifacts and sequences for the tests of the readers."""

import hashlib
import zipfile
from datetime import datetime
from pathlib import Path

import biom
import h5py
import numpy as np
import pytest

A, B, C = "ACGTACGTACGTACGTACGT", "CCGTACGTACGTACGTACGA", "GGGTACGTACGTACGTACGC"
UUID = "0f3b1c9e-6c0e-4b0e-9c39-2f3a5b6c7d8e"


def md5(sequence: str) -> str:
    return hashlib.md5(sequence.encode()).hexdigest()


def a_table(features=(A, B), samples=("s1", "s2", "s3"), counts=((1, 0, 2), (0, 5, 7))) -> biom.Table:
    """`counts` is features x samples, as biom has it."""
    return biom.Table(np.array(counts, dtype=float), list(features), list(samples))


def write_hdf5(path: Path, table: biom.Table) -> Path:
    with h5py.File(path, "w") as file:
        # A fixed date: the same table gives the same bytes.
        table.to_hdf5(file, "test", creation_date=datetime(2020, 1, 1))
    return path


def write_json(path: Path, table: biom.Table) -> Path:
    path.write_text(table.to_json("test"))
    return path


def write_qza(path: Path, member: str, content: bytes, semantic_type: str | None) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{UUID}/VERSION", "QIIME 2\narchive: 5\nframework: 2024.5.0\n")
        if semantic_type:
            text = f"uuid: {UUID}\ntype: {semantic_type}\nformat: SomeDirectoryFormat\n"
            archive.writestr(f"{UUID}/metadata.yaml", text)
        # Provenance repeats the names, with other content, further down.
        archive.writestr(f"{UUID}/provenance/artifacts/{UUID}/metadata.yaml", "type: Wrong[Type]\n")
        archive.writestr(f"{UUID}/provenance/artifacts/data/{member}", b"wrong")
        archive.writestr(f"{UUID}/data/{member}", content)
    return path


def write_fasta(path: Path, sequences: dict[str, str]) -> Path:
    path.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in sequences.items()))
    return path


def fault(read, *arguments) -> str:
    """Return the text of the ValueError that reading raises: always one line."""
    with pytest.raises(ValueError) as caught:
        read(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert str(arguments[0]) in message or str(arguments[-1]) in message
    return message
