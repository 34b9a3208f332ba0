"""Scores of a stage 1 run's UniFrac, on unseen samples and studies, against scikit-bio's UniFrac of the same reads."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from skbio import DistanceMatrix, TreeNode
from skbio.diversity import alpha_diversity, beta_diversity
from skbio.stats.distance import mantel
from sklearn.metrics import r2_score

from aam.config import DataConfig, EvaluateConfig, Location
from aam.data import synthetic
from aam.data.batches import BatchPlan
from aam.data.draw import FIXED_DRAW
from aam.data.prepare import prepare
from aam.evaluation import stage_1
from aam.evaluation.distances import FEWEST, score_groups, score_matrices
from aam.evaluation.stage_1 import evaluate_stage_1
from aam.training import checkpoint
from plans import write_ids
from runs import TINY, data_config, fit_here, pretrain_config, train_config

METRICS = ("unweighted", "weighted", "faith_pd")


@pytest.fixture(scope="module")
def run(synthetic_folder, tmp_path_factory):
    """Folder of a stage 1 run that learned all metrics and has test samples, and its plan."""
    folder = tmp_path_factory.mktemp("stage1") / "run"
    config = pretrain_config(synthetic_folder, folder, epochs=4)
    config = replace(
        config,
        loss=replace(config.loss, unifrac_metric=METRICS),
        data=data_config(synthetic_folder, test_fraction=0.4, val_fraction=0.3),
    )
    plan = fit_here(config)
    (folder / "run.json").write_text(json.dumps(plan.describe(config)))
    return folder, plan


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Another study: other samples, ASVs and tree."""
    config = synthetic.SyntheticConfig(samples=30, subjects=6, asvs=150, seed=7)
    return synthetic.ensure(tmp_path_factory.mktemp("elsewhere") / "data", config)


def exact(plan, ids: list[str], tree_file) -> dict[str, np.ndarray]:
    """UniFrac and Faith's PD by scikit-bio, of the reads in the fixed draw."""
    of = BatchPlan(dataset=plan.dataset, sample_ids=ids, contract=plan.spec.contract, batch_size=2)
    counts = np.zeros((len(ids), len(plan.dataset.sequences)), dtype=int)
    for row, sample in enumerate(ids):
        asvs, reads = of.draw(sample, FIXED_DRAW)
        counts[row, asvs] = reads
    given = {"tree": TreeNode.read(str(tree_file)), "taxa": plan.dataset.sequences}
    return {
        "unweighted": beta_diversity("unweighted_unifrac", counts, ids, **given).data,
        "weighted": beta_diversity("weighted_unifrac", counts, ids, normalized=True, **given).data,
        "faith_pd": np.asarray(alpha_diversity("faith_pd", counts, ids, **given)),
    }


def predicted(run_here, folder, tmp_path, *flags) -> dict[str, np.ndarray]:
    """What jobs/predict.py writes."""
    found = {}
    for metric in ("unweighted", "weighted"):
        path = tmp_path / f"{metric}.tsv"
        more = ["--distances", path, "--distance-metric", metric, "--faith-pd", tmp_path / "pd.tsv"]
        done = run_here("predict.py", "--checkpoint", folder, *flags, *more)
        assert done.returncode == 0, done.stderr
        found[metric] = DistanceMatrix.read(str(path)).data
    frame = pd.read_csv(tmp_path / "pd.tsv", sep="\t", dtype={0: str}).set_index("sample-id")
    return found | {"faith_pd": frame["faith_pd"].to_numpy()}


def test_test_samples_are_scored_by_scikit_bios_unifrac(run_here, run, synthetic_folder, tmp_path):
    folder, plan = run
    flags = ["--output-dir", tmp_path / "e", "--json", tmp_path / "s.json", "--study-column", "subject"]
    done = run_here("evaluate.py", "--checkpoint", folder, *flags)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "s.json").read_text())
    ids = plan.split.test
    truth, said = (
        exact(plan, ids, synthetic_folder / "tree.nwk"),
        predicted(run_here, folder, tmp_path, "--part", "test"),
    )
    pair = np.triu_indices(len(ids), k=1)
    for metric in METRICS:
        scores = found["metrics"][metric]
        x, y = (of if of.ndim == 1 else of[pair] for of in (truth[metric], said[metric]))
        assert scores["samples"] == len(ids)
        assert scores["r2"] == pytest.approx(r2_score(x, y), abs=2e-4)
        assert scores["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-4)
        if metric != "faith_pd":
            matrices = (DistanceMatrix(of) for of in (truth[metric], said[metric]))
            assert scores["mantel"] == pytest.approx(mantel(*matrices, permutations=0)[0], abs=1e-4)
    assert "mantel" not in found["metrics"]["faith_pd"]
    # Of a group, the pairs inside it; those of groups that are held out are unseen.
    subject = plan.dataset.metadata.loc[ids, "subject"]
    sizes = subject.value_counts()
    groups = found["metrics"]["unweighted"]["groups"]
    assert set(groups) == set(sizes.index[sizes >= FEWEST])
    name = next(iter(groups))
    rows = np.ix_(*[np.flatnonzero(subject == name)] * 2)
    inside = np.triu_indices(int(sizes[name]), k=1)
    of_group = r2_score(truth["unweighted"][rows][inside], said["unweighted"][rows][inside])
    assert groups[name]["r2"] == pytest.approx(of_group, abs=1e-3)
    assert {group["unseen"] for group in groups.values()} == {True}, "whole subjects are held out"
    text = (tmp_path / "e" / "evaluation.md").read_text()
    assert text.startswith(f"# UniFrac without a tree: {len(ids)} test samples\n")
    assert text in done.stdout
    assert f"| unweighted UniFrac | {len(ids)} | {found['metrics']['unweighted']['r2']:.4g} | " in text
    assert f"| unweighted UniFrac | {name} | unseen | {sizes[name]} | " in text
    assert found["caveats"] == []
    assert found["command"].startswith(f"python jobs/evaluate.py --checkpoint {folder} --output-dir")


def test_another_table_is_scored_with_its_own_tree(run_here, run, elsewhere, tmp_path):
    folder, plan = run
    files = ["--table", elsewhere / "table.biom", "--tree", elsewhere / "tree.nwk"]
    flags = ["--checkpoint", folder, "--output-dir", tmp_path / "e", "--json", tmp_path / "s.json"]
    done = run_here("evaluate.py", *flags, *files)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["samples"].endswith("samples of table.biom (zero-shot)")
    assert any("(100.00% of the reads) are in no training sample" in note for note in found["notes"])
    other = plan_elsewhere(elsewhere, plan)
    ids = [s for s, reads in zip(other.dataset.sample_ids, other.dataset.depths, strict=True) if reads >= 200]
    truth = exact(other, ids, elsewhere / "tree.nwk")
    said = predicted(run_here, folder, tmp_path, "--table", elsewhere / "table.biom")
    pair = np.triu_indices(len(ids), k=1)
    for metric in ("unweighted", "weighted"):
        scores = found["metrics"][metric]
        assert scores["samples"] == len(ids)
        expected = np.corrcoef(truth[metric][pair], said[metric][pair])[0, 1]
        assert scores["mantel"] == pytest.approx(expected, abs=1e-4)
    # A value that training samples have is told from one that none has.
    frame = pd.read_csv(elsewhere / "metadata.tsv", sep="\t", dtype=str, index_col=0)
    known = plan.dataset.metadata.loc[plan.split.train[0], "subject"]
    frame["subject"] = [known if i % 2 else "a new | study" for i in range(len(frame))]
    frame.to_csv(tmp_path / "metadata.tsv", sep="\t")
    done = run_here("evaluate.py", *flags, *files, "--metadata", tmp_path / "metadata.tsv", "--study-column", "subject")
    assert done.returncode == 0, done.stderr
    groups = json.loads((tmp_path / "s.json").read_text())["metrics"]["weighted"]["groups"]
    assert {name: group["unseen"] for name, group in groups.items()} == {known: False, "a new | study": True}
    assert r"| weighted UniFrac | a new \| study | unseen | " in done.stdout
    done = run_here("evaluate.py", *flags, *files, "--metadata", tmp_path / "metadata.tsv", "--study-column", "sex")
    assert done.returncode == 1
    assert "no column 'sex'" in done.stderr


def plan_elsewhere(folder, plan):
    """A plan with the contract of the run, on another dataset."""
    dataset = prepare(DataConfig(table=folder / "table.biom", tree=folder / "tree.nwk"), max_bp=None, use_tree=True)
    return replace(plan, dataset=dataset)


def test_of_many_samples_some_are_drawn_and_that_is_said(run, monkeypatch):
    folder, plan = run
    monkeypatch.setattr(stage_1, "MOST_SAMPLES", 6)
    record = json.loads((folder / "run.json").read_text())
    found = evaluate_stage_1(EvaluateConfig(checkpoint=Location(str(folder))), checkpoint.load(folder / "best"), record)
    assert found.samples == f"6 test samples, drawn, of {len(plan.split.test)}"
    assert [(row.metric, row.samples) for row in found.rows] == [(metric, 6) for metric in METRICS]


def test_what_cannot_be_scored_is_refused(run_here, run, synthetic_folder, elsewhere, tmp_path):
    folder, plan = run
    seen = write_ids(tmp_path / "seen.txt", [*plan.split.test, plan.split.train[0]])
    other = ["--table", elsewhere / "table.biom"]
    second = train_config(synthetic_folder, tmp_path / "2", data=data_config(synthetic_folder, test_fraction=0.3))
    second.output_dir.mkdir()
    (second.output_dir / "run.json").write_text(json.dumps(fit_here(second).describe(second)))
    flags = ["--output-dir", tmp_path / "e", "--checkpoint"]
    for more, message in (
        ([folder, "--test-ids", seen], f"was trained with 1 of its samples: {plan.split.train[0]}"),
        ([folder, *other], "is not that of the run; give its --tree, for exact UniFrac"),
        ([folder, "--target", "site"], "is a run of stage 1, which predicts no target; leave --target out"),
        ([folder, "--study-column", "sbject"], "no column 'sbject': did you mean 'subject'?"),
        (
            [folder, *other, "--tree", elsewhere / "tree.nwk", "--study-column", "subject"],
            "--study-column subject: no metadata of these samples; give --metadata",
        ),
        ([second.output_dir, "--study-column", "subject"], "--study-column scores the UniFrac of a stage 1 run"),
    ):
        done = run_here("evaluate.py", *flags, *more)
        assert done.returncode == 1, more
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert not (tmp_path / "e").exists()
    with pytest.raises(ValueError, match="--study-column scores the UniFrac of a stage 1 run: give it by --checkpoint"):
        EvaluateConfig(study_column="subject")
    record = plan.describe(pretrain_config(synthetic_folder, folder, model=TINY))
    record["split"]["test"] = []
    with pytest.raises(ValueError, match="the run has no test samples; give --test-ids, or another --table"):
        evaluate_stage_1(
            EvaluateConfig(checkpoint=Location("x")), checkpoint.load(folder / "best"), json.loads(json.dumps(record))
        )


def test_groups_that_are_too_small_are_left_out_and_scores_are_of_pairs_inside():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(14, 3))
    truth = np.linalg.norm(points[:, None] - points, axis=-1)
    noise = rng.normal(0, 0.3, truth.shape)
    guess = np.abs(truth + (noise + noise.T)) * (1 - np.eye(14))
    groups = [*["a"] * 6, *["b"] * 5, *["c"] * 2, None]
    found = score_groups("unweighted", truth, guess, groups, {"a"})
    assert [(row.group, row.samples, row.unseen) for row in found] == [("", 14, None), ("a", 6, False), ("b", 5, True)]
    assert found[2].scores == score_matrices(truth[6:11, 6:11], guess[6:11, 6:11])
    assert found[2].scores["mantel"] == pytest.approx(found[2].scores["pearson"])
    of_values = score_groups("faith_pd", truth[0], guess[0], groups)
    assert [(row.group, row.unseen) for row in of_values] == [("", None), ("a", None), ("b", None)]
    assert "mantel" not in score_matrices(np.zeros((5, 5)), np.zeros((5, 5)))
