"""The prepared dataset: what is kept of the sources, and that it is written once."""

import hashlib
import json
import multiprocessing
import pickle
import shutil
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from prepared_files import TREE, folders, prepared, reads
from source_files import A, B, a_table, write_hdf5

from aam.config import DataConfig
from aam.data.dataset import FORMAT_VERSION, PreparedDataset
from aam.data.prepare import prepare
from aam.data.sources import read_table
from aam.data.tokens import encode
from aam.data.tree import parse_newick, root_paths

# What is kept


def test_the_arrays_equal_the_sources(synthetic_folder):
    config = DataConfig(
        table=synthetic_folder / "table.biom",
        tree=synthetic_folder / "tree.nwk",
        metadata=synthetic_folder / "metadata.tsv",
    )
    dataset = prepare(config, max_bp=150, use_tree=True)
    table = read_table(synthetic_folder / "table.biom")
    assert dataset.sample_ids == table.sample_ids
    assert dataset.sequences == table.sequences
    tokens, lengths = encode(table.sequences)
    np.testing.assert_array_equal(dataset.tokens, tokens)
    np.testing.assert_array_equal(dataset.lengths, lengths)
    for row in range(len(table.sample_ids)):
        asvs, counts = dataset.sample(row)
        cells = table.counts[[row]]
        np.testing.assert_array_equal(asvs, cells.indices)
        np.testing.assert_array_equal(counts, cells.data)
        assert (np.diff(asvs) > 0).all()
    np.testing.assert_array_equal(dataset.depths, table.counts.sum(axis=1))
    tree = parse_newick((synthetic_folder / "tree.nwk").read_text(), table.sequences, source="tree")
    offsets, nodes = root_paths(tree)
    np.testing.assert_array_equal(dataset.paths.offsets, offsets)
    np.testing.assert_array_equal(dataset.paths.nodes, nodes)
    np.testing.assert_array_equal(dataset.paths.length, tree.length)
    as_text = pd.read_csv(synthetic_folder / "metadata.tsv", sep="\t", dtype=str, index_col=0)
    as_text = as_text.loc[dataset.sample_ids].astype(object).replace("not collected", None)
    assert dataset.metadata.columns.tolist() == as_text.columns.tolist()
    for column in as_text:
        assert dataset.metadata[column].tolist() == as_text[column].tolist()


def test_the_arrays_are_mapped_not_copied(tmp_path):
    dataset = prepared(tmp_path)
    for array in (dataset.tokens, dataset.lengths, *dataset.sample(0), dataset.paths.nodes):
        assert not array.flags.owndata
        assert not array.flags.writeable


def test_another_process_is_sent_the_folder_only(synthetic_folder):
    config = DataConfig(table=synthetic_folder / "table.biom", tree=synthetic_folder / "tree.nwk")
    dataset = prepare(config, max_bp=150, use_tree=True)
    read = (dataset.tokens, dataset.paths, dataset.depths, dataset.sequences)  # all kept in the object
    assert len(read[3]) == 200
    sent = pickle.dumps(dataset)
    assert len(sent) < 500
    np.testing.assert_array_equal(pickle.loads(sent).tokens, read[0])


def test_ids_that_look_like_numbers_survive(tmp_path):
    ids = ["007", "10317.000001230", "1e5"]
    metadata = "sample_id\tsubject\n007\t01\n10317.000001230\t1.10\n1e5\tnan\n"
    dataset = prepared(tmp_path, a_table(samples=ids), metadata=metadata)
    assert dataset.sample_ids == ids
    assert dataset.row == {"007": 0, "10317.000001230": 1, "1e5": 2}
    assert dataset.metadata.index.tolist() == ids
    assert dataset.metadata["subject"].tolist() == ["01", "1.10", None]


def test_explicit_zeros_are_no_reads(tmp_path):
    path = write_hdf5(tmp_path / "table.biom", a_table())
    with h5py.File(path, "r+") as file:
        for axis in ("sample", "observation"):
            file[f"{axis}/matrix/data"][0] = 0  # sample s1 and ASV A held this one read of theirs
    dataset = prepare(DataConfig(table=path, cache_dir=tmp_path / "cache"), max_bp=150, use_tree=False)
    found = reads(dataset)
    assert all(count > 0 for sample in found.values() for count in sample.values())
    assert found == {"s2": {B: 5}, "s3": {A: 2, B: 7}}
    assert dataset.manifest["dropped_samples"] == {"s1": "no reads"}


def test_without_metadata_and_tree(tmp_path):
    dataset = prepared(tmp_path, tree=None)
    assert dataset.metadata is None
    assert dataset.paths is None
    assert reads(dataset) == {"s1": {A: 1}, "s2": {B: 5}, "s3": {A: 2, B: 7}}


def test_metadata_may_have_any_column_names_and_empty_columns(tmp_path):
    metadata = "#SampleID\tid\tsample_id\tempty\ns2\tx\t1\t\ns1\ty\t2\t\nother\tz\t3\t\n"
    dataset = prepared(tmp_path, metadata=metadata)
    assert dataset.metadata.to_dict("index") == {
        "s1": {"id": "y", "sample_id": "2", "empty": None},
        "s2": {"id": "x", "sample_id": "1", "empty": None},
    }
    assert "metadata: 1 of its samples are not in the table: ignored" in dataset.manifest["notes"]


def test_the_manifest_says_what_it_was_made_of(tmp_path):
    dataset = prepared(tmp_path)
    manifest = dataset.manifest
    assert manifest["format_version"] == FORMAT_VERSION
    assert (manifest["samples"], manifest["asvs"], manifest["reads"]) == (3, 2, 15)
    table = tmp_path / "table.biom"
    assert manifest["sources"]["table"] == str(table)
    assert manifest["sha256"]["table"] == hashlib.sha256(table.read_bytes()).hexdigest()
    assert set(manifest["sha256"]) == {"table", "tree"}


# Written once, found again


def test_the_same_contents_are_found_again_under_other_names(tmp_path):
    first = prepared(tmp_path, metadata="id\tx\ns1\t1\n")
    stamp = (first.folder / "samples.arrow").stat().st_mtime_ns
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("table.biom", "tree.txt", "metadata.txt"):
        shutil.copy(tmp_path / name, elsewhere / f"my {name}")
    config = DataConfig(
        table=elsewhere / "my table.biom",
        tree=elsewhere / "my tree.txt",
        metadata=elsewhere / "my metadata.txt",
        cache_dir=tmp_path / "cache",
    )
    again = prepare(config, max_bp=150, use_tree=True)
    assert again.folder == first.folder
    assert (again.folder / "samples.arrow").stat().st_mtime_ns == stamp
    assert folders(tmp_path / "cache") == [first.folder]


@pytest.mark.parametrize("changed", ["table", "tree", "metadata"])
def test_a_changed_byte_is_another_dataset(tmp_path, changed):
    metadata = "id\tx\ns1\t1\n"
    first = prepared(tmp_path, metadata=metadata)
    other = {
        "table": {"table": a_table(counts=((1, 0, 2), (0, 5, 8)))},
        "tree": {"tree": TREE.replace(":4", ":5")},
        "metadata": {"metadata": metadata.replace("\t1", "\t2")},
    }[changed]
    second = prepared(tmp_path, **{"metadata": metadata, **other})
    assert second.folder != first.folder
    assert len(folders(tmp_path / "cache")) == 2
    assert reads(first)["s3"] == {A: 2, B: 7}  # the first is as it was
    assert reads(second)["s3"] == {A: 2, B: 8 if changed == "table" else 7}


def test_the_tree_belongs_to_it_only_where_it_is_used(tmp_path):
    files = {"table": write_hdf5(tmp_path / "table.biom", a_table()), "tree": tmp_path / "tree.nwk"}
    files["tree"].write_text(TREE)
    config = DataConfig(**files, cache_dir=tmp_path / "cache")
    with_tree, without = (prepare(config, max_bp=150, use_tree=use) for use in (True, False))
    assert with_tree.folder != without.folder
    assert with_tree.paths is not None
    assert without.paths is None


def prepare_at_once(folder: Path, config: DataConfig, barrier, results) -> None:
    barrier.wait(timeout=60)
    dataset = prepare(config, max_bp=150, use_tree=True)
    results.put((str(dataset.folder), len(dataset.tokens), dataset.depths.sum().item()))


def test_two_processes_at_once_make_one_dataset(synthetic_folder, tmp_path):
    config = DataConfig(
        table=synthetic_folder / "table.biom",
        tree=synthetic_folder / "tree.nwk",
        cache_dir=tmp_path / "cache",
    )
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=prepare_at_once, args=(tmp_path, config, barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert found[0] == found[1]
    assert folders(tmp_path / "cache") == [Path(found[0][0])]


def test_a_faster_process_is_not_overwritten(tmp_path, monkeypatch):
    """The loser of the race, step by step: the dataset appears between the look and the rename."""
    first = prepared(tmp_path)
    hidden = tmp_path / "hidden"
    first.folder.rename(hidden)
    rename = Path.rename

    def rename_late(self, target):
        if not Path(target).exists():
            rename(hidden, target)  # the other process gets there first
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_late)
    second = prepared(tmp_path)
    assert second.folder == first.folder
    assert folders(tmp_path / "cache") == [first.folder]
    assert reads(second) == {"s1": {A: 1}, "s2": {B: 5}, "s3": {A: 2, B: 7}}


def test_a_failure_leaves_nothing_behind(tmp_path):
    first = prepared(tmp_path)
    (first.folder / "manifest.json").unlink()  # a damaged folder stands in the way
    with pytest.raises(OSError, match=first.folder.name):
        prepared(tmp_path)
    assert folders(tmp_path / "cache") == [first.folder]


def test_others_may_read_it(tmp_path):
    assert prepared(tmp_path).folder.stat().st_mode & 0o777 == 0o755


def test_another_format_version_explains_itself(tmp_path):
    dataset = prepared(tmp_path)
    path = dataset.folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))
    with pytest.raises(ValueError, match=f"of format 99, this version reads {FORMAT_VERSION}; delete") as caught:
        _ = PreparedDataset(dataset.folder).manifest
    assert str(dataset.folder) in str(caught.value)
