"""What of the sources is dropped and said, and what is refused."""

import pytest
from prepared_files import prepared, reads, root_length
from source_files import A, B, C, a_table, md5, write_fasta, write_hdf5, write_qza

from aam.config import DataConfig
from aam.data.prepare import prepare

# The tree lacks some


def test_asvs_that_the_tree_lacks_are_counted_named_and_dropped(tmp_path):
    table = a_table(features=(A, B, C), counts=((90, 0, 50), (0, 5, 5), (0, 0, 2)))
    dataset = prepared(tmp_path, table, tree=f"({A}:1,{B}:2);")
    assert dataset.sequences == sorted([A, B])
    assert reads(dataset) == {"s1": {A: 90}, "s2": {B: 5}, "s3": {A: 50, B: 5}}
    [note] = dataset.manifest["notes"]
    assert "lacks 1 of 3 ASVs" in note
    assert "1.3% of the reads" in note
    assert C in note
    assert len(dataset.paths.offsets) == 3


def test_samples_left_empty_are_dropped_and_named(tmp_path):
    table = a_table(features=(A, C), counts=((99, 0, 99), (0, 1, 1)))
    dataset = prepared(tmp_path, table, tree=f"({A}:1,{B}:2);", metadata="id\tx\ns2\t1\ns3\t2\n")
    assert dataset.sample_ids == ["s1", "s3"]
    assert any("samples without an ASV in the tree: 1 dropped (s2)" in n for n in dataset.manifest["notes"])
    assert dataset.manifest["dropped_samples"] == {"s2": "no ASV in the tree"}
    assert dataset.metadata.index.tolist() == ["s3"]


def test_too_many_that_the_tree_lacks_are_an_error(tmp_path):
    table = a_table(features=(A, C), counts=((9, 1, 9), (3, 0, 3)))  # C has 6 of 25 reads, 24 %
    tree = f"({A}:1,'{B}':2);"
    with pytest.raises(ValueError) as caught:
        prepared(tmp_path, table, tree=tree)
    message = str(caught.value)
    assert "\n" not in message
    for words in (
        "tree.txt",
        "table.biom",
        "1 of 2 ASVs",
        "24.0% of the reads",
        C,
        A,
        "--max-missing-from-tree",
    ):
        assert words in message
    assert not (tmp_path / "cache").exists()
    assert prepared(tmp_path, table, tree=tree, max_missing_from_tree=0.24).sequences == [A]


def test_a_tree_of_other_names_is_an_error_whatever_is_allowed(tmp_path):
    with pytest.raises(ValueError, match="lacks 2 of 2 ASVs") as caught:
        prepared(tmp_path, tree="(('Otu 1':1,Otu2:2):3,Otu3:4);", max_missing_from_tree=1.0)
    assert "the tree Otu 1" in str(caught.value)


def test_the_tips_may_bear_the_table_s_ids(tmp_path):
    """As in QIIME 2: hashes name the ASVs in the table, in rep-seqs and in the tree."""
    ids = [md5(s) for s in (C, A, B)]
    counts = ((1, 0, 2), (0, 5, 7), (4, 4, 0))
    sequences = write_fasta(tmp_path / "rep-seqs.fasta", {md5(s): s for s in (A, B, C)})
    hashed = f"(({ids[1]}:1,{ids[2]}:2):3,{ids[0]}:4);"
    dataset = prepared(tmp_path, a_table(ids, counts=counts), tree=hashed, sequences=sequences)
    assert reads(dataset) == {"s1": {B: 4, C: 1}, "s2": {A: 5, B: 4}, "s3": {A: 7, C: 2}}
    assert {s: root_length(dataset, s) for s in (A, B, C)} == {A: 4, B: 5, C: 4}
    named = prepared(tmp_path, a_table(ids, counts=counts), sequences=sequences)
    assert {s: root_length(named, s) for s in (A, B, C)} == {A: 4, B: 5, C: 4}


def test_everything_out_of_artifacts(tmp_path):
    table = write_hdf5(tmp_path / "t", a_table([md5(A), md5(B)])).read_bytes()
    fasta = f">{md5(A)}\n{A}\n>{md5(B)}\n{B}\n".encode()
    tree = f"({md5(A)}:1,{md5(B)}:2);\n".encode()
    config = DataConfig(
        table=write_qza(tmp_path / "table.qza", "feature-table.biom", table, "FeatureTable[Frequency]"),
        sequences=write_qza(tmp_path / "s.qza", "dna-sequences.fasta", fasta, "FeatureData[Sequence]"),
        tree=write_qza(tmp_path / "tree.qza", "tree.nwk", tree, "Phylogeny[Rooted]"),
        cache_dir=tmp_path / "cache",
    )
    dataset = prepare(config, max_bp=150, use_tree=True)
    assert reads(dataset) == {"s1": {A: 1}, "s2": {B: 5}, "s3": {A: 2, B: 7}}
    assert [root_length(dataset, s) for s in (A, B)] == [1, 2]


def test_distances_do_not_depend_on_what_was_dropped(tmp_path):
    table = a_table(features=(A, B, C), counts=((90, 0, 50), (0, 5, 5), (0, 0, 2)))
    with_it = prepared(tmp_path, table)
    without = prepared(tmp_path, table, tree=f"(({A}:1,{B}:2):3,CCCC:4);")
    for sequence in (A, B):
        assert root_length(with_it, sequence) == root_length(without, sequence)


# What cannot be used


def test_sequences_longer_than_the_model_reads_are_an_error(tmp_path):
    files = {"table": write_hdf5(tmp_path / "table.biom", a_table((A, B + "ACGTA")))}
    config = DataConfig(**files, cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"table.biom: its longest sequence, .* has 25 nt, more than 20") as caught:
        prepare(config, max_bp=20, use_tree=False)
    assert "--max-bp 25" in str(caught.value)
    assert prepare(config, max_bp=25, use_tree=False).tokens.shape == (2, 26)


def test_metadata_of_other_samples_is_an_error_that_shows_both_sides(tmp_path):
    metadata = "sample_id\tx\n1.s1\ta\n1.s2\tb\n"
    with pytest.raises(ValueError, match="no sample of the table is in it") as caught:
        prepared(tmp_path, metadata=metadata)
    message = str(caught.value)
    assert "metadata.txt" in message
    assert "the table has 's1', 's2', 's3', the metadata '1.s1', '1.s2'" in message
    assert not (tmp_path / "cache").exists()
