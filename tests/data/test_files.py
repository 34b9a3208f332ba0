"""Files of the wrong kind, artifacts, trees and FASTA."""

import gzip
import os
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from source_files import UUID, a_table, fault, write_hdf5, write_json, write_qza

from aam.data.files import replacing
from aam.data.sources import content_hash, read_newick, read_sequences, read_table


def other_files(folder: Path) -> dict[str, Path]:
    """One file of every kind that people hand over by mistake, by the words that must name it."""
    good = write_hdf5(folder / "good.biom", a_table()).read_bytes()
    contents = {
        "a newick tree": b"(a:1,(b:1,c:2):1);\n",
        "FASTA text": b">a\nACGT\n",
        "tab-separated text": b"# Constructed from biom file\n#OTU ID\ts1\nACGT\t3\n",
        "JSON text": b'{"rows": [], "what": 1}',
        "an empty file": b"",
        "NEXUS": b"#NEXUS\nbegin trees;\n",
        "HTML": b"<!DOCTYPE html><html></html>",
        "a gzip file": gzip.compress(good),
        "UTF-16": "tree".encode("utf-16"),
        "binary file": b"\x00\x01\x02\x03",
        "plain text": b"hello world\n",
        "an HDF5 file": good,
        "damaged zip": write_qza(folder / "q", "tree.nwk", b"(a,b);" * 99, "Phylogeny[Rooted]").read_bytes()[:300],
    }
    paths = {}
    for number, (words, content) in enumerate(contents.items()):
        paths[words] = folder / f"{number}.biom"
        paths[words].write_bytes(content)
    paths["a directory"] = folder
    paths["No such file"] = folder / "absent"
    return paths


@pytest.mark.parametrize(
    ("read", "right"),
    [(read_table, "an HDF5 file"), (read_newick, "a newick tree"), (read_sequences, "FASTA text")],
)
def test_a_file_of_another_kind_is_named(tmp_path, read, right):
    for words, path in other_files(tmp_path).items():
        if words == right:
            assert read(path)
            continue
        message = fault(read, path)
        assert words in message
        assert "zip" in words or "expected" in message


@pytest.mark.parametrize(
    "found",
    ["FeatureTable[RelativeFrequency]", "Phylogeny[Rooted]", "FeatureData[Sequence]", "Visualization"],
)
def test_an_artifact_of_another_type_is_named(tmp_path, found):
    content = write_hdf5(tmp_path / "t", a_table()).read_bytes()
    message = fault(read_table, write_qza(tmp_path / "x.qza", "feature-table.biom", content, found))
    assert f"found {found}" in message
    assert "FeatureTable[Frequency]" in message


def test_zip_archives_that_are_no_artifacts(tmp_path):
    path = tmp_path / "book.xlsx"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
    assert ".xlsx" in fault(read_table, path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("folder/table.biom", "x")
    assert "folder/table.biom" in fault(read_table, path)
    with zipfile.ZipFile(path, "w"):
        pass
    assert "nothing in it" in fault(read_table, path)


def test_an_artifact_with_another_content_is_named(tmp_path):
    path = write_qza(tmp_path / "x.qza", "feature-table.biom", b"(a,b);", "FeatureTable[Frequency]")
    assert "found a newick tree" in fault(read_table, path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("write", [write_hdf5, write_json])
def test_a_truncated_table_is_an_error(tmp_path, write, share):
    content = write(tmp_path / "whole", a_table()).read_bytes()
    path = tmp_path / "cut"
    path.write_bytes(content[: int(len(content) * share)])
    assert "cannot be read" in fault(read_table, path)


def test_an_hdf5_file_without_a_table_is_an_error(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["matrix"] = np.ones(3)
    assert "cannot be read" in fault(read_table, tmp_path / "x.h5")


def test_a_damaged_member_is_an_error(tmp_path):
    tree = ("(" + ",".join(f"tip{i}:0.{i}" for i in range(500)) + ");").encode()
    path = write_qza(tmp_path / "x.qza", "tree.nwk", tree, "Phylogeny[Rooted]")
    content = bytearray(path.read_bytes())
    middle = content.index(f"{UUID}/data/tree.nwk".encode()) + 500
    content[middle : middle + 40] = bytes(40)
    path.write_bytes(content)
    assert "damaged" in fault(read_newick, path)


# Trees, sequences, hashes.


@pytest.mark.parametrize("text", ["(a:1,b:2);", "\n (a,(b,c)x:1e-3,'d e');\n", "[&R] (a,b);"])
def test_newick_text_is_returned_as_it_is(tmp_path, text):
    plain = tmp_path / "tree.txt"
    plain.write_text(text)
    assert read_newick(plain) == text
    plain.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_newick(plain) == text
    for kind in ("Phylogeny[Rooted]", "Phylogeny[Unrooted]"):
        assert read_newick(write_qza(tmp_path / "t.qza", "tree.nwk", text.encode(), kind)) == text


def test_a_tree_that_is_cut_short_is_an_error(tmp_path):
    path = tmp_path / "tree.nwk"
    path.write_text("((a:1,b:2):1,(c:1,")
    assert "cut short" in fault(read_newick, path)


def test_a_tree_that_is_not_utf8_is_an_error(tmp_path):
    path = tmp_path / "tree.nwk"
    path.write_bytes(b"(a,\xff\xfe);")
    assert "UTF-8" in fault(read_newick, path)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_fasta_with_wrapped_lines_descriptions_and_empty_lines(tmp_path, end):
    lines = [">007 some words", "ACGT", "acgu", "", ">10317.000001234", "GG  ", ""]
    content = end.join(lines).encode()
    (tmp_path / "f").write_bytes(content)
    expected = {"007": "ACGTacgu", "10317.000001234": "GG"}
    assert read_sequences(tmp_path / "f") == expected
    path = write_qza(tmp_path / "f.qza", "dna-sequences.fasta", content, "FeatureData[Sequence]")
    assert read_sequences(path) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (">a\nAC\n>a\nGT\n", "'a' occurs twice"),
        (">a\nAC\n>\nGT\n", "no id"),
        (">a\nAC\n>b\n", "'b' has no sequence"),
    ],
)
def test_faulty_fasta(tmp_path, text, words):
    (tmp_path / "f").write_text(text)
    assert words in fault(read_sequences, tmp_path / "f")


def test_content_hash_is_that_of_the_bytes(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"abc")
    assert content_hash(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert "a directory" in fault(content_hash, tmp_path)


def test_a_file_is_replaced_once_it_is_whole_and_what_it_was_stays_so(tmp_path):
    path, link, pipe = tmp_path / "a.tsv", tmp_path / "link.tsv", tmp_path / "pipe"
    path.write_text("old")
    path.chmod(0o640)
    link.symlink_to(path)
    with replacing(link) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert link.is_symlink()
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o640

    def half() -> None:
        with replacing(path) as part:
            part.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        half()
    assert path.read_text() == "new"
    os.mkfifo(pipe)
    with replacing(pipe) as part:
        assert part == pipe
    assert {*tmp_path.iterdir()} == {path, link, pipe}
    reader, writer = os.pipe()  # as /dev/stdout may be: its link leads to no file
    with replacing(Path(f"/dev/fd/{writer}")) as part:
        part.write_text("said")
    os.close(writer)
    with open(reader) as file:
        assert file.read() == "said"
    with replacing(tmp_path / "new" / "folder" / "b.tsv") as part:
        part.write_text("new")
    assert (tmp_path / "new" / "folder" / "b.tsv").read_text() == "new"
