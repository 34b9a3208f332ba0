import io
from dataclasses import replace

import biom
import numpy as np
import pandas as pd
import pytest
import skbio
from scipy.stats import spearmanr
from skbio.diversity import beta_diversity

from aam.data.synthetic import MISSING, SITES, SyntheticConfig, ensure, generate, write

SMALL = SyntheticConfig(samples=40, subjects=10, asvs=200)
FILES = ("table.biom", "tree.nwk", "metadata.tsv", "README.md", "config.json")


@pytest.fixture(scope="module")
def small():
    return generate(SMALL)


@pytest.fixture(scope="module")
def usual():
    return generate(SyntheticConfig())


@pytest.fixture(scope="module")
def small_tree(small):
    return skbio.TreeNode.read(io.StringIO(small.newick), format="newick")


def hamming(sequences):
    letters = np.array([list(s.encode()) for s in sequences], dtype=np.uint8)
    return (letters[:, None] != letters[None]).sum(axis=2)


def rarefied(counts, depth):
    rng = np.random.default_rng(0)
    rows = [row for row in counts.toarray() if row.sum() >= depth]
    return np.array([rng.multivariate_hypergeometric(row, depth) for row in rows])


def test_same_settings_give_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        write(generate(SMALL), tmp_path / name)
    for file in FILES:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_another_seed_gives_other_data(small):
    other = generate(replace(SMALL, seed=1))
    assert not set(small.sequences) & set(other.sequences)
    assert small.newick != other.newick
    assert (small.counts != other.counts).nnz > 0


def test_table_tree_and_sequences_name_the_same_asvs(small, small_tree, tmp_path):
    write(small, tmp_path)
    table = biom.load_table(str(tmp_path / "table.biom"))
    assert len(set(small.sequences)) == SMALL.asvs
    assert {len(s) for s in small.sequences} == {SMALL.length}
    assert set("".join(small.sequences)) == set("ACGT")
    assert list(table.ids("observation")) == small.sequences
    assert list(table.ids("sample")) == small.sample_ids
    assert {tip.name for tip in small_tree.tips()} == set(small.sequences)
    np.testing.assert_array_equal(table.matrix_data.toarray().T, small.counts.toarray())


def test_counts_are_sparse_whole_numbers_without_empty_rows_or_columns(usual):
    counts = usual.counts
    assert counts.shape == (200, 1000)
    assert counts.dtype == np.int64
    assert counts.data.min() >= 1
    assert counts.sum(axis=0).min() >= 1
    assert 0.1 < counts.nnz / np.prod(counts.shape) < 0.25


def test_depth_and_richness_are_those_of_published_studies(usual):
    depth, richness = usual.counts.sum(axis=1), np.diff(usual.counts.indptr)
    assert np.median(depth) == pytest.approx(10_000, rel=0.01)
    assert 2 <= (depth < 1000).sum() <= 8
    low, median, high = np.quantile(richness, [0.05, 0.5, 0.95])
    assert 20 < low < 60
    assert 90 < median < 170
    assert 250 < high < 450


def test_even_a_small_study_has_a_shallow_sample(small):
    assert (small.counts.sum(axis=1) < 1000).any()


def test_unifrac_spreads_as_in_published_studies(small):
    drawn = rarefied(small.counts, 1000)
    tree = skbio.TreeNode.read(io.StringIO(small.newick), format="newick")
    distances = beta_diversity("unweighted_unifrac", drawn, taxa=small.sequences, tree=tree, validate=True)
    pairs = distances.condensed_form()
    assert 0.5 < pairs.mean() < 0.75
    assert 0.07 < pairs.std() < 0.16


def test_all_tips_are_below_the_root_with_positive_branches(small_tree):
    lengths = [node.length for node in small_tree.traverse(include_self=False)]
    assert all(length is not None and length >= 0 for length in lengths)
    heights = [tip.distance(small_tree) for tip in small_tree.tips()]
    assert min(heights) > 0.1
    assert max(heights) < 0.5


def test_sequences_carry_the_phylogeny(small, small_tree):
    distances = small_tree.cophenet()
    distances = distances.filter(small.sequences).data
    differences = hamming(small.sequences)
    upper = np.triu_indices(SMALL.asvs, 1)
    assert spearmanr(distances[upper], differences[upper]).statistic > 0.6
    nearest = np.where(np.eye(SMALL.asvs, dtype=bool), SMALL.length, differences).min(axis=1)
    assert 1 <= np.median(nearest) <= 6
    assert 0.2 < np.median(differences[upper]) / SMALL.length < 0.35


def test_some_sites_are_conserved_and_some_vary(usual):
    letters = np.array([list(s.encode()) for s in usual.sequences])
    commonest = [np.unique(column, return_counts=True)[1].max() / len(column) for column in letters.T]
    assert np.quantile(commonest, 0.9) > 0.9
    assert np.quantile(commonest, 0.1) < 0.7


def test_relatives_have_alike_niches(small, small_tree):
    distances = small_tree.cophenet().filter(small.sequences).data.copy()
    np.fill_diagonal(distances, np.inf)
    nearest = distances.argmin(axis=1)
    assert spearmanr(small.niche_optimum, small.niche_optimum[nearest]).statistic > 0.5
    assert small.niche_optimum.min() < 0.1
    assert small.niche_optimum.max() > 0.9


def test_communities_follow_the_gradient(usual):
    known = (usual.metadata["gradient"] != MISSING).to_numpy()
    measured = usual.metadata["gradient"][known].astype(float)
    shares = usual.counts / usual.counts.sum(axis=1)[:, None]
    mean_optimum = (shares @ usual.niche_optimum)[known]
    assert 0.7 < spearmanr(mean_optimum, measured).statistic < 0.97


def test_metadata_has_classes_subjects_and_missing_values(usual, tmp_path):
    write(usual, tmp_path)
    metadata = pd.read_csv(tmp_path / "metadata.tsv", sep="\t", dtype=str, keep_default_na=False)
    assert list(metadata) == ["sample-id", "subject", "visit", "gradient", "site", "plate"]
    assert list(metadata["sample-id"]) == usual.sample_ids
    assert metadata["sample-id"].is_unique
    assert metadata["sample-id"][0] == "0001.01"
    assert (metadata["gradient"] == MISSING).sum() == 6
    numbers = metadata["gradient"][metadata["gradient"] != MISSING].astype(float)
    assert numbers.between(0, 100).all()
    assert set(metadata["site"]) == set(SITES)
    assert metadata["site"].value_counts(normalize=True).min() > 0.2
    per_subject = metadata["subject"].value_counts()
    assert len(per_subject) == 40
    assert per_subject.nunique() > 3


def test_samples_of_one_subject_are_closer(usual):
    present = (usual.counts > 0).astype(float)
    shared = (present @ present.T).toarray()
    own = np.diag(shared)
    jaccard = shared / (own[:, None] + own - shared)
    subject = usual.metadata["subject"].to_numpy(dtype=object)
    same = (subject[:, None] == subject) & ~np.eye(len(subject), dtype=bool)
    assert jaccard[same].mean() > 1.1 * jaccard[subject[:, None] != subject].mean()


def test_no_missing_values_when_none_are_asked_for():
    assert (generate(replace(SMALL, missing_share=0.0)).metadata["gradient"] != MISSING).all()


def test_ensure_writes_once(tmp_path):
    folder = ensure(tmp_path / "new" / "study", SMALL)
    assert {path.name for path in folder.iterdir()} == set(FILES)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert ensure(folder, SMALL) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["study"], "no temporary folder is left"


def test_ensure_refuses_a_folder_that_holds_something_else(tmp_path):
    ensure(tmp_path / "study", SMALL)
    with pytest.raises(ValueError, match="other settings"):
        ensure(tmp_path / "study", replace(SMALL, seed=1))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="give another folder"):
        ensure(tmp_path / "mine", SMALL)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_readme_says_synthetic_seed_and_sizes(small, tmp_path):
    write(small, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("# SYNTHETIC")
    assert "`seed`: 0" in text
    assert "40 samples x 200 ASVs of 120 nt" in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 5, "subjects": 6}, "at least subjects"),
        ({"samples": 0}, "samples must be above 0"),
        ({"subjects": 0}, "subjects must be above 0"),
        ({"asvs": 3}, "asvs must be at least"),
        ({"length": 0}, "length must be at least"),
        ({"length": -5}, "length must be at least"),
        ({"median_depth": 0}, "median_depth must be above 0"),
        ({"median_richness": -1}, "median_richness must be above 0"),
        ({"root_to_tip": 0.0}, "root_to_tip must be above 0"),
        ({"missing_share": 1.0}, "missing_share must be in"),
        ({"seed": -1}, "seed must not be negative"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SyntheticConfig(**settings)


@pytest.mark.parametrize("seed", range(3))
def test_extreme_settings_still_give_a_study(seed):
    tiny = SyntheticConfig(samples=1, subjects=1, asvs=20, length=20, median_depth=1, seed=seed, root_to_tip=0.001)
    study = generate(tiny)
    assert len(set(study.sequences)) == 20
    assert study.counts.shape == (1, 20)
    assert study.counts.sum(axis=0).min() >= 1
