"""UniFrac and Faith's PD against scikit-bio, on random trees and on a gut data set."""

import io
import os
import random
from pathlib import Path

import biom
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import squareform
from skbio import TreeNode
from skbio.diversity import alpha_diversity, beta_diversity

from aam.data.tree import parse_newick, root_paths
from aam.data.unifrac import RootPaths, faith_pd, incidence, unweighted_unifrac, weighted_unifrac


def load_paths(text, tips):
    tree = parse_newick(text, tips, source="test.nwk")
    return RootPaths(*root_paths(tree), tree.length)


def split_rows(counts):
    asvs = [np.flatnonzero(row) for row in counts]
    return asvs, [row[present] for row, present in zip(counts, asvs, strict=True)]


def random_newick(rng, n_tips, root_length):
    """Draw a tree with multifurcations, single-child nodes and zero-length branches."""

    def length():
        return rng.choice(["0", "0.0", "1e-9", f"{rng.random():.17g}", f"{rng.expovariate(0.2):.6g}"])

    parts = [f"t{i}:{length()}" for i in range(n_tips)]
    while len(parts) > 2:
        rng.shuffle(parts)
        n_children = rng.choice([1, 2, 2, 2, 3, 5])
        parts[:n_children] = [f"({','.join(parts[:n_children])}){rng.choice(['', '0.9'])}:{length()}"]
    return f"({','.join(parts)}){root_length};"


@st.composite
def trees_and_counts(draw):
    rng = random.Random(draw(st.integers(0, 2**32)))
    n_tips = draw(st.integers(1, 40))
    text = random_newick(rng, n_tips, draw(st.sampled_from(["", ":0", ":0.7", "base:3"])))
    tips = rng.sample([f"t{i}" for i in range(n_tips)], draw(st.integers(1, n_tips)))  # the others are extra
    n_samples = draw(st.integers(1, 8))
    counts = np.zeros((n_samples, len(tips)), dtype=int)
    for row in counts:
        for tip in rng.sample(range(len(tips)), rng.choice([1, rng.randint(1, len(tips))])):
            row[tip] = rng.choice([1, 1, 3, 500])
    return text, tips, counts


def oracle(metric, counts, tips, text, **options):
    tree = TreeNode.read(io.StringIO(text))
    return beta_diversity(metric, counts, taxa=tips, tree=tree, validate=False, **options).data


@settings(max_examples=150)
@given(trees_and_counts(), st.randoms(use_true_random=False))
def test_unweighted_and_faith_agree_with_scikit_bio(case, rng):
    text, tips, counts = case
    asvs, _ = split_rows(counts)
    paths = load_paths(text, tips)
    distance = unweighted_unifrac(asvs, paths)
    np.testing.assert_allclose(distance, oracle("unweighted_unifrac", counts, tips, text), atol=1e-9, rtol=0)
    assert (distance.diagonal() == 0).all()
    np.testing.assert_array_equal(distance, distance.T)
    assert distance.min() >= 0
    assert distance.max() <= 1
    tree = TreeNode.read(io.StringIO(text))
    pd = alpha_diversity("faith_pd", counts, taxa=tips, tree=tree, validate=False)
    np.testing.assert_allclose(faith_pd(asvs, paths), pd, atol=1e-9, rtol=1e-12)
    # A rank's rows are the same rows, to the last bit.
    first = rng.randrange(len(asvs))
    np.testing.assert_array_equal(unweighted_unifrac(asvs, paths, slice(first, None)), distance[first:])
    some = np.array([first, 0])
    np.testing.assert_array_equal(unweighted_unifrac(asvs, paths, some), distance[some])


@settings(max_examples=150)
@given(trees_and_counts(), st.randoms(use_true_random=False))
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # scikit-bio's 0/0
def test_weighted_agrees_with_scikit_bio(case, rng):
    text, tips, counts = case
    asvs, present_counts = split_rows(counts)
    paths = load_paths(text, tips)
    distance = weighted_unifrac(asvs, present_counts, paths)
    expected = oracle("weighted_unifrac", counts, tips, text, normalized=True)
    # The one difference: 0/0, all reads at the root, is NaN there and 0 here.
    np.testing.assert_allclose(distance, np.nan_to_num(expected, nan=0.0), atol=1e-9, rtol=0)
    assert (distance.diagonal() == 0).all()
    np.testing.assert_array_equal(distance, distance.T)
    first = rng.randrange(len(asvs))
    for rows in (slice(first, None), np.array([first, 0])):
        np.testing.assert_array_equal(weighted_unifrac(asvs, present_counts, paths, rows), distance[rows])


def test_incidence_holds_each_edge_once():
    paths = load_paths("((a:1,b:2):3,(c:4,d:5):6);", list("abcd"))
    batch = incidence([np.array([0, 1]), np.array([1])], paths)
    assert batch.length.tolist() == [0, 3, 1, 2]  # root, (a, b), a, b; nothing of c and d
    assert batch.edges.toarray().tolist() == [[1, 1, 1, 1], [1, 1, 0, 1]]


def test_known_values():
    paths = load_paths("((a:1,b:2):1,c:3);", list("abc"))
    asvs = [np.array([0]), np.array([1, 2]), np.array([1])]
    expected = np.array([[0, 6 / 7, 3 / 4], [6 / 7, 0, 1 / 2], [3 / 4, 1 / 2, 0]])
    np.testing.assert_allclose(unweighted_unifrac(asvs, paths), expected, atol=1e-15)
    assert faith_pd(asvs, paths).tolist() == [2, 6, 3]
    counts = [np.array([4]), np.array([1, 1]), np.array([7])]
    expected = np.array([[0, 4 / 5, 3 / 5], [4 / 5, 0, 1 / 2], [3 / 5, 1 / 2, 0]])
    np.testing.assert_allclose(weighted_unifrac(asvs, counts, paths), expected, atol=1e-15)
    shares = [count / count.sum() / 10 for count in counts]
    np.testing.assert_allclose(weighted_unifrac(asvs, shares, paths), expected, atol=1e-15)


def test_no_length_at_all_is_no_distance():
    paths = load_paths("((a:0,b:0):0,c:0);", list("abc"))
    asvs = [np.array([0]), np.array([1, 2])]
    counts = [np.array([2]), np.array([1, 1])]
    assert unweighted_unifrac(asvs, paths).tolist() == [[0, 0], [0, 0]]
    assert weighted_unifrac(asvs, counts, paths).tolist() == [[0, 0], [0, 0]]
    assert faith_pd(asvs, paths).tolist() == [0, 0]


def test_sample_without_asvs_is_as_in_scikit_bio():
    text = "((a:1,b:2):1,c:3);"
    counts = np.array([[0, 0, 0], [1, 0, 2], [0, 0, 0]])
    asvs, present_counts = split_rows(counts)
    paths = load_paths(text, list("abc"))
    expected = oracle("unweighted_unifrac", counts, list("abc"), text)
    np.testing.assert_array_equal(unweighted_unifrac(asvs, paths), expected)
    assert expected[0].tolist() == [0, 1, 0]
    np.testing.assert_allclose(weighted_unifrac(asvs, present_counts, paths), expected, atol=1e-15)


def test_asv_outside_the_tree_is_our_own_fault():
    paths = load_paths("((a:1,b:2):1,c:3);", ["a", "gone"])
    with pytest.raises(AssertionError, match="outside the tree"):
        unweighted_unifrac([np.array([0]), np.array([0, 1])], paths)


def test_read_only_memory_maps(tmp_path):
    paths = load_paths("((a:1,b:2):1,c:3);", list("abc"))
    for name in ("offsets", "nodes", "length"):
        np.save(tmp_path / f"{name}.npy", getattr(paths, name))
    mapped = RootPaths(*(np.load(tmp_path / f"{n}.npy", mmap_mode="r") for n in ("offsets", "nodes", "length")))
    asvs = [np.array([0, 1], dtype=np.int32), np.array([2], dtype=np.int32)]
    np.testing.assert_array_equal(unweighted_unifrac(asvs, mapped), unweighted_unifrac(asvs, paths))
    np.testing.assert_array_equal(faith_pd(asvs, mapped), [4, 3])


def test_gut_data_as_scikit_bio_scored_it():
    if "AAM_TEST_DATA" not in os.environ:
        pytest.skip("AAM_TEST_DATA, the folder of the reference data sets, is not set")
    folder = Path(os.environ["AAM_TEST_DATA"]) / "ibd"
    table = biom.load_table(str(folder / "rarefied1000_seed0.biom"))
    matrix = table.matrix_data.T.tocsr()
    matrix.eliminate_zeros()  # biom leaves explicit zeros after subsampling
    reference = np.load(folder / "unweighted_unifrac_rarefied1000_seed0.npz")
    row_of = {sample: i for i, sample in enumerate(table.ids())}
    rows = [row_of[sample] for sample in reference["sample_ids"]]
    asvs = [matrix.indices[matrix.indptr[i] : matrix.indptr[i + 1]] for i in rows]

    newick = (folder / "tree.nwk").read_text()
    tree = parse_newick(newick, list(table.ids("observation")), source="tree.nwk")
    assert (tree.tip >= 0).all()
    paths = RootPaths(*root_paths(tree), tree.length)
    distance = unweighted_unifrac(asvs, paths)
    np.testing.assert_allclose(distance, squareform(reference["condensed"]), atol=1e-9, rtol=0)
    np.testing.assert_allclose(faith_pd(asvs, paths), reference["faith_pd"], atol=1e-9, rtol=0)
