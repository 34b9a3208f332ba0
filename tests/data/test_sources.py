"""Tables, trees and sequences from files as users have them, good and bad."""

import json
import os
import warnings
from pathlib import Path

import biom
import h5py
import numpy as np
import pytest
from scipy import sparse
from source_files import A, B, C, a_table, fault, md5, write_fasta, write_hdf5, write_json, write_qza

from aam.data.sources import read_newick, read_table

DATA = os.environ.get("AAM_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="AAM_TEST_DATA names no folder with the public datasets")


@pytest.mark.parametrize("write", [write_hdf5, write_json])
def test_both_biom_versions_read_the_same(tmp_path, write):
    read = read_table(write(tmp_path / "no_suffix", a_table()))
    assert read.sample_ids == ["s1", "s2", "s3"]
    assert read.sequences == [A, B]
    assert isinstance(read.counts, sparse.csr_array)
    assert read.counts.dtype == np.int64
    assert read.counts.toarray().tolist() == [[1, 0], [0, 5], [2, 7]]
    assert read.notes == ()


@pytest.mark.parametrize("semantic_type", ["FeatureTable[Frequency]", None])
@pytest.mark.parametrize("write", [write_hdf5, write_json])
def test_artifact_reads_the_same_as_its_table(tmp_path, write, semantic_type):
    content = write(tmp_path / "table", a_table()).read_bytes()
    read = read_table(write_qza(tmp_path / "table.qza", "feature-table.biom", content, semantic_type))
    assert read.sequences == [A, B]
    assert read.counts.toarray().tolist() == [[1, 0], [0, 5], [2, 7]]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["table", "table.qza"]


def test_dense_json_and_byte_order_mark(tmp_path):
    content = json.loads(a_table().to_json("test"))
    content.update(matrix_type="dense", data=[[1, 0, 2], [0, 5, 7]])
    path = tmp_path / "table.biom"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(content).encode())
    assert read_table(path).counts.toarray().tolist() == [[1, 0], [0, 5], [2, 7]]


def test_columns_are_sorted_by_sequence_and_rows_keep_their_order(tmp_path):
    path = write_hdf5(tmp_path / "t", a_table((C, A), ("z", "a"), ((1, 2), (3, 4))))
    read = read_table(path)
    assert read.sequences == [A, C]
    assert read.sample_ids == ["z", "a"]
    assert read.counts.toarray().tolist() == [[3, 1], [4, 2]]
    assert read.counts.has_sorted_indices


@pytest.mark.parametrize("write", [write_hdf5, write_json])
def test_numeric_looking_ids_survive(tmp_path, write):
    ids = ("007", "10317.000001234", "1e5")
    assert read_table(write(tmp_path / "t", a_table(samples=ids))).sample_ids == list(ids)


def test_json_ids_written_as_numbers_are_refused(tmp_path):
    content = json.loads(a_table().to_json("test"))
    content["columns"][1]["id"] = 10317.10
    path = tmp_path / "t"
    path.write_text(json.dumps(content))
    message = fault(read_table, path)
    assert "10317.1" in message
    assert "quotes" in message


def test_explicit_zeros_are_no_observations(tmp_path):
    table = a_table(counts=((1, 4, 2), (3, 5, 7)))
    path = write_hdf5(tmp_path / "t", table)
    with h5py.File(path, "r+") as file:
        for axis in ("sample", "observation"):
            data = file[f"{axis}/matrix/data"]
            data[:] = [0 if value == 4 else value for value in data[:]]
    with h5py.File(path) as file:
        assert 0 in file["sample/matrix/data"][:]
    read = read_table(path)
    assert read.counts.nnz == 5
    assert (read.counts.data > 0).all()
    assert read.counts.toarray()[1].tolist() == [0, 5]


def test_empty_rows_and_columns_are_dropped_and_named(tmp_path):
    counts = ((1, 0, 0), (0, 0, 0), (2, 0, 0))
    read = read_table(write_hdf5(tmp_path / "t", a_table((A, B, C), ("s1", "s2", "s3"), counts)))
    assert read.sequences == [A, C]
    assert read.sample_ids == ["s1"]
    assert read.notes == (
        f"1 feature is all zero: dropped ({B})",
        "2 samples have no reads: dropped (s2, s3)",
    )


def test_many_dropped_names_are_cut_but_counted(tmp_path):
    samples = [f"s{i}" for i in range(9)]
    counts = (tuple([3] + [0] * 8),)
    (note,) = read_table(write_hdf5(tmp_path / "t", a_table((A,), samples, counts))).notes
    assert note == "8 samples have no reads: dropped (s1, s2, s3, s4, s5, ... (3 more))"


def test_lower_case_and_rna_are_written_as_upper_case_dna(tmp_path):
    read = read_table(write_hdf5(tmp_path / "t", a_table(("acgu" * 5, "RYSWKMBDHVN" * 2))))
    assert read.sequences == ["ACGT" * 5, "RYSWKMBDHVN" * 2]
    assert read.notes == ()


def test_equal_sequences_are_summed_and_said(tmp_path):
    features = (A, B, A.lower(), A.replace("T", "U"))
    counts = ((1, 0), (0, 9), (2, 5), (4, 0))
    read = read_table(write_hdf5(tmp_path / "t", a_table(features, ("s1", "s2"), counts)))
    assert read.sequences == [A, B]
    assert read.counts.toarray().tolist() == [[7, 0], [5, 9]]
    assert read.counts.nnz == 3
    (note,) = read.notes
    assert note.startswith("2 features have the same sequence as another: counts summed")
    assert A.lower() in note


@pytest.mark.parametrize("bad", [0.25, -3.0, float("nan"), float("inf"), 1e300])
def test_a_cell_that_is_no_count_is_named(tmp_path, bad):
    message = fault(read_table, write_hdf5(tmp_path / "t", a_table(counts=((1, 0, 2), (0, bad, 7)))))
    assert "'s2'" in message
    assert B in message
    assert "raw counts" in message


@pytest.mark.parametrize("letter", ["-", ".", "X", "J", " ", "1", "\u212a"])
def test_a_letter_that_is_not_dna_is_named_with_its_position(tmp_path, letter):
    long = "ACGT" * 15 + letter + "ACGT"
    message = fault(read_table, write_hdf5(tmp_path / "t", a_table((A, long))))
    assert f"{letter!r} at position 61" in message
    assert "(65 letters)" in message
    assert long not in message


@pytest.mark.parametrize("write", [write_hdf5, write_json])
@pytest.mark.parametrize(
    ("features", "samples", "shape"), [((), ("s1",), (0, 1)), ((A,), (), (1, 0)), ((A,), ("s1",), (1, 1))]
)
def test_an_empty_table_is_an_error(tmp_path, write, features, samples, shape):
    table = biom.Table(np.zeros(shape), list(features), list(samples))
    path = write(tmp_path / "t", table)
    assert str(path) in fault(read_table, path)
    assert "empty" in fault(read_table, path)


def test_duplicate_sample_ids_are_refused(tmp_path):
    content = json.loads(a_table().to_json("test"))
    content["columns"][1]["id"] = "s1"
    path = tmp_path / "t"
    path.write_text(json.dumps(content))
    assert "uplicate" in fault(read_table, path)


def test_biom_does_not_warn(tmp_path):
    path = write_hdf5(tmp_path / "t", a_table())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_table(path).counts.nnz == 4


# Feature ids that are not sequences.


def test_md5_ids_with_their_sequences(tmp_path):
    path = write_hdf5(tmp_path / "t", a_table((md5(B), md5(A))))
    fasta = write_fasta(tmp_path / "rep-seqs", {md5(A): A, md5(B): B, "unused": C})
    read = read_table(path, fasta)
    assert read.sequences == [A, B]
    assert read.counts.toarray().tolist() == [[0, 1], [5, 0], [7, 2]]


def test_md5_of_the_upper_case_sequence_is_accepted(tmp_path):
    path = write_hdf5(tmp_path / "t", a_table((md5(A), md5(B).upper())))
    fasta = write_fasta(tmp_path / "f", {md5(A): A.lower(), md5(B).upper(): B})
    assert read_table(path, fasta).sequences == [A, B]


def test_md5_of_another_sequence_is_refused(tmp_path):
    path = write_hdf5(tmp_path / "t", a_table((md5(A), md5(B))))
    message = fault(read_table, path, write_fasta(tmp_path / "f", {md5(A): A, md5(B): C}))
    assert md5(B) in message
    assert md5(A) not in message


def test_plain_names_are_not_checked_by_md5(tmp_path):
    path = write_hdf5(tmp_path / "t", a_table(("ASV_2", "007")))
    assert read_table(path, write_fasta(tmp_path / "f", {"ASV_2": A, "007": B})).sequences == [A, B]


def test_names_without_sequences_tell_the_flag(tmp_path):
    message = fault(read_table, write_hdf5(tmp_path / "t", a_table((md5(A), md5(B)))))
    assert "2 of 2 feature ids are not DNA" in message
    assert md5(A) in message
    assert "--sequences rep-seqs.fasta" in message


def test_ids_that_the_sequences_lack_are_counted_and_named(tmp_path):
    path = write_hdf5(tmp_path / "t", a_table(("x1", "x2")))
    message = fault(read_table, path, write_fasta(tmp_path / "f", {"x1": A}))
    assert "lacks 1 of the 2 feature ids" in message
    assert "x2" in message
    assert "x1" not in message


def test_sequences_given_where_the_ids_are_sequences(tmp_path):
    fasta = write_fasta(tmp_path / "f", {md5(A): A, md5(B): B})
    message = fault(read_table, write_hdf5(tmp_path / "t", a_table()), fasta)
    assert "leave out --sequences" in message


def test_a_gap_in_the_sequences_names_the_id(tmp_path):
    path = write_hdf5(tmp_path / "t", a_table(("x1", "x2")))
    message = fault(read_table, path, write_fasta(tmp_path / "f", {"x1": A, "x2": "ACG-T"}))
    assert "'x2' has '-' at position 4" in message


# Public datasets.


@needs_data
@pytest.mark.parametrize(
    ("name", "samples", "asvs", "length"),
    [
        ("ibd", 470, 9970, 100),
        ("ecam", 741, 3308, 150),
        ("pmi", 1731, 10004, 150),
        ("moving-pictures", 34, 757, 120),
    ],
)
def test_public_tables(name, samples, asvs, length):
    folder = Path(str(DATA)) / name
    read = read_table(folder / "table.biom")
    assert read.counts.shape == (samples, asvs)
    assert (len(set(read.sample_ids)), len(set(read.sequences))) == (samples, asvs)
    assert read.sequences == sorted(read.sequences)
    assert {len(sequence) for sequence in read.sequences} == {length}
    assert read.counts.sum() == biom.load_table(str(folder / "table.biom")).sum()
    assert read.notes == ()
    text = read_newick(folder / "tree.nwk")
    assert text.count(",") >= asvs / 2
    assert all(sequence in text for sequence in read.sequences[:20])


@needs_data
def test_public_table_as_artifact_with_hashed_ids(tmp_path):
    source = Path(str(DATA)) / "moving-pictures" / "table.biom"
    plain = read_table(source)
    hashed = biom.load_table(str(source))
    hashed.update_ids({s: md5(s) for s in plain.sequences}, axis="observation")
    content = write_hdf5(tmp_path / "hashed.biom", hashed).read_bytes()
    table = write_qza(tmp_path / "table.qza", "feature-table.biom", content, "FeatureTable[Frequency]")
    fasta = write_fasta(tmp_path / "rep-seqs.fasta", {md5(s): s for s in plain.sequences})
    artifact = write_qza(tmp_path / "rep-seqs.qza", "dna-sequences.fasta", fasta.read_bytes(), "FeatureData[Sequence]")
    for sequences in (fasta, artifact):
        read = read_table(table, sequences)
        assert read.sample_ids == plain.sample_ids
        assert read.sequences == plain.sequences
        assert (read.counts != plain.counts).nnz == 0
    assert "757 of 757 feature ids are not DNA" in fault(read_table, table)
