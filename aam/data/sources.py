"""Read what a user brings: BIOM tables, newick trees and FASTA sequences, plain or inside QIIME 2 artifacts.

Everything read is checked here, so that the code above may trust it: ids are text, counts are whole numbers,
sequences are DNA.
"""

import hashlib
import io
import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import biom
import h5py
import numpy as np
from biom.exception import BiomException
from scipy import sparse

from aam.data.files import SHOWN, Kind, file_kind, kind_of, read_member, read_text, short, some

# Both cases spelled out: re.IGNORECASE would let in letters beyond ASCII, such as the Kelvin sign for K.
_NOT_DNA = re.compile("[^ACGTURYSWKMBDHVNacgturyswkmbdhvn]")
_MD5 = re.compile("[0-9a-fA-F]{32}")
_LARGEST_COUNT = 2**53  # biom holds counts as float64: whole numbers are exact up to here
# What h5py and biom raise on a file that is cut short or holds something else.
_DAMAGED = (OSError, RuntimeError, LookupError, TypeError, ValueError, AttributeError, BiomException)


@dataclass(frozen=True, kw_only=True)
class AmpliconTable:
    """Counts of ASVs in samples, checked and without empty rows or columns."""

    sample_ids: list[str]
    """Ids in the order of the file, always text."""
    sequences: list[str]
    """DNA of each ASV, upper case, U written as T; sorted ascending, distinct."""
    feature_ids: list[str]
    """The table's own name of each ASV (of the first, where several have one sequence): trees may use it."""
    counts: sparse.csr_array
    """int64 [samples, ASVs], no explicit zeros."""
    dropped_samples: dict[str, str]
    """Samples of the file that are not here, and why."""
    notes: tuple[str, ...]
    """What a user should be told: what was dropped or merged, and why."""


def read_table(path: Path, sequences: Path | None = None) -> AmpliconTable:
    """Read a BIOM table (v2.1 HDF5, v1 JSON) or a FeatureTable[Frequency] artifact.

    Parameters
    ----------
    path
        The table. Its feature ids are the sequences, unless `sequences` is given.
    sequences
        FASTA or FeatureData[Sequence] artifact with the sequence of each feature id. An id that looks like an
        md5 is checked against its sequence.
    """
    table = _read_biom(path)
    features = [str(name) for name in table.ids(axis="observation")]
    samples = [str(name) for name in table.ids(axis="sample")]
    counts = sparse.csr_array(table.matrix_data).T.tocsr()  # biom keeps features x samples
    counts.sum_duplicates()
    counts.eliminate_zeros()  # biom keeps explicit zeros after `subsample`
    if counts.nnz == 0:
        raise ValueError(f"{path}: empty table: {len(samples)} samples, {len(features)} features, no reads")
    counts = _whole_counts(counts, samples, features, path)

    kept_columns = np.flatnonzero(np.bincount(counts.indices, minlength=len(features)))
    kept_rows = np.flatnonzero(np.diff(counts.indptr))
    notes = _dropped_note(features, kept_columns, "feature is all zero", "features are all zero")
    notes += _dropped_note(samples, kept_rows, "sample has no reads", "samples have no reads")
    features = [features[i] for i in kept_columns]
    read_from = set(kept_rows.tolist())
    dropped = {name: "no reads" for i, name in enumerate(samples) if i not in read_from}
    samples = [samples[i] for i in kept_rows]
    counts = counts[kept_rows][:, kept_columns]

    dna = _sequences_of(features, path, sequences)
    distinct, first, column = np.unique(np.array(dna, dtype=object), return_index=True, return_inverse=True)
    if len(distinct) < len(dna):
        notes.append(_merge_note(features, dna, len(dna) - len(distinct)))
    rows = np.repeat(np.arange(len(samples)), np.diff(counts.indptr))
    shape = (len(samples), len(distinct))
    merged = sparse.csr_array((counts.data, (rows, column[counts.indices])), shape=shape)  # sums equal cells, sorts
    return AmpliconTable(
        sample_ids=samples,
        sequences=distinct.tolist(),
        feature_ids=[features[i] for i in first],
        counts=merged,
        dropped_samples=dropped,
        notes=tuple(notes),
    )


def read_newick(path: Path) -> str:
    """Read the text of a newick file, or of the tree in a Phylogeny artifact."""
    expected = "a newick tree, or a QIIME 2 artifact (.qza) of type Phylogeny[Rooted]"
    text = read_text(path, Kind.NEWICK, expected, "tree.nwk", ("Phylogeny[Rooted]", "Phylogeny[Unrooted]"))
    if not text.rstrip().endswith(";"):
        raise ValueError(f"{path}: the newick tree does not end with ';': it is cut short, copy it again")
    return text


def read_sequences(path: Path) -> dict[str, str]:
    """Read id -> sequence, as written, from FASTA or a FeatureData[Sequence] artifact."""
    expected = "FASTA, or a QIIME 2 artifact (.qza) of type FeatureData[Sequence]"
    text = read_text(path, Kind.FASTA, expected, "dna-sequences.fasta", ("FeatureData[Sequence]",))
    sequences: dict[str, str] = {}
    for record in re.split(r"^>", text, flags=re.MULTILINE)[1:]:
        header, _, body = record.partition("\n")
        name = (header.split() or [""])[0]
        if not name or name in sequences:
            fault = f"id {name!r} occurs twice" if name else f"record {len(sequences) + 1} has no id"
            raise ValueError(f"{path}: {fault}: each sequence needs an id of its own")
        sequences[name] = "".join(body.split())
        if not sequences[name]:
            raise ValueError(f"{path}: {name!r} has no sequence: the file is damaged or cut short")
    return sequences


def content_hash(path: Path) -> str:
    """Return the sha256 of a file's bytes, as hex."""
    file_kind(path, "a file")
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_biom(path: Path) -> biom.Table:
    types = ("FeatureTable[Frequency]",)
    expected = f"a BIOM table (v2.1 HDF5 or v1 JSON), or a QIIME 2 artifact (.qza) of type {types[0]}"
    kind = file_kind(path, expected)
    if kind == Kind.ZIP:
        content = read_member(path, "feature-table.biom", types)
        kind, stream = kind_of(content[:4096]), io.BytesIO(content)
    else:
        stream = open(path, "rb")  # noqa: SIM115 (closed below, as is the artifact's member)
    with stream:
        if kind not in (Kind.HDF5, Kind.JSON):
            hint = " (biom convert -i TABLE.tsv -o TABLE.biom --to-hdf5)" if kind == Kind.TABBED else ""
            raise ValueError(f"{path}: expected {expected}, found {kind}{hint}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about biom's own metadata, which is not used
                return _parse_biom(stream, kind)
        except _DAMAGED as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(f"{path}: expected {expected}, found {kind} that cannot be read ({reason})") from error


def _parse_biom(stream: BinaryIO, kind: Kind) -> biom.Table:
    if kind == Kind.HDF5:
        with h5py.File(stream, "r") as file:
            return biom.Table.from_hdf5(file)
    content = json.load(stream)
    names = [entry["id"] for axis in ("rows", "columns") for entry in content[axis]]
    numbers = [name for name in names if not isinstance(name, str)]
    if numbers:  # as a number 10317.10 is already 10317.1: the id is lost before it gets here
        raise ValueError(f"ids must be text, found {some(numbers)}: put them in quotes")
    return biom.Table.from_json(content)


def _whole_counts(counts: sparse.csr_array, samples: list[str], features: list[str], path: Path) -> sparse.csr_array:
    values = counts.data
    good = (values >= 0) & (values <= _LARGEST_COUNT) & (values == np.floor(values))  # all false for nan
    if not good.all():
        first = int(np.argmin(good))
        row = int(np.searchsorted(counts.indptr, first, side="right")) - 1
        raise ValueError(
            f"{path}: sample {samples[row]!r}, feature {short(features[counts.indices[first]])!r}: "
            f"{values[first]:g} is no count (a non-negative whole number), nor are {int((~good).sum()) - 1} "
            "other cells; are these relative abundances? give raw counts"
        )
    return sparse.csr_array(counts, dtype=np.int64)


def _sequences_of(features: list[str], path: Path, sequences: Path | None) -> list[str]:
    """Return the DNA of each feature id, upper case and with T for U."""
    if sequences is None:
        _check_ids_are_dna(features, path)
        found = features
    else:
        known = read_sequences(sequences)
        missing = [name for name in features if name not in known]
        if missing:
            all_dna = not any(_NOT_DNA.search(name) for name in missing)
            way_out = "give the table's own rep-seqs"
            if all_dna:
                way_out = "the ids are sequences already, leave out --sequences"
            raise ValueError(
                f"{sequences}: lacks {len(missing)} of the {len(features)} feature ids of {path}: "
                f"{some(missing)}; {way_out}"
            )
        found = [known[name] for name in features]
        _check_md5(features, found, sequences)
    for name, sequence in zip(features, found, strict=True):
        wrong = _NOT_DNA.search(sequence)
        if wrong:
            raise ValueError(
                f"{sequences or path}: ASV {short(name)!r} has {wrong.group()!r} at position "
                f"{wrong.start() + 1} of its sequence: correct or remove it, only A C G T U and the IUPAC "
                "codes R Y S W K M B D H V N are allowed"
            )
    return [sequence.upper().replace("U", "T") for sequence in found]


def _check_ids_are_dna(features: list[str], path: Path) -> None:
    # A sequence with a gap or a slip is mostly DNA letters, a hash or a name is not: the advice differs.
    def is_name(text: str) -> bool:
        return not text or len(_NOT_DNA.findall(text)) > len(text) / 5

    names = [name for name in features if is_name(name)]
    if names:
        raise ValueError(
            f"{path}: {len(names)} of {len(features)} feature ids are not DNA: {some(names)}; "
            "pass --sequences rep-seqs.fasta (or .qza) with their sequences"
        )


def _check_md5(features: list[str], found: list[str], source: Path) -> None:
    for name, sequence in zip(features, found, strict=True):
        if not _MD5.fullmatch(name):
            continue
        spellings = (sequence, sequence.upper())
        digests = [hashlib.md5(s.encode(), usedforsecurity=False).hexdigest() for s in spellings]
        if name.lower() not in digests:
            raise ValueError(
                f"{source}: the sequence of {name!r} ({short(sequence)}) has md5 {digests[0]}: "
                "the sequences are not those of the table, give its own rep-seqs"
            )


def _dropped_note(names: list[str], kept: np.ndarray, one: str, many: str) -> list[str]:
    dropped = [names[i] for i in np.setdiff1d(np.arange(len(names)), kept)]
    return [f"{len(dropped)} {one if len(dropped) == 1 else many}: dropped ({some(dropped)})"] if dropped else []


def _merge_note(features: list[str], dna: list[str], surplus: int) -> str:
    first: dict[str, str] = {}
    pairs = []
    for name, sequence in zip(features, dna, strict=True):
        if first.setdefault(sequence, name) != name:
            pairs.append(f"{short(name)} = {short(first[sequence])}")
    shown = "; ".join(pairs[:SHOWN]) + ("; ..." if len(pairs) > SHOWN else "")
    noun = "feature has" if surplus == 1 else "features have"
    return f"{surplus} {noun} the same sequence as another: counts summed ({shown})"
