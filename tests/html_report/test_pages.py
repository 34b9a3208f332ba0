"""The HTML report of a run: complete, true to its files, and harmless."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess

import pytest

from aam.distributed.run import report
from aam.html_report.ordination import unifrac
from aam.html_report.run_files import Run
from aam.html_report.scores import predictions
from aam.html_report.write import write_report
from html_report.conftest import CLASSES, COLUMN, SCRIPT, Page
from runs import TINY, train_config

STAGE_1 = ["about", "training", "unifrac", "asvs", "settings"]
STAGE_2 = ["about", "training", "predictions", "unifrac", "baselines", "asvs", "settings"]


@pytest.fixture(scope="session")
def pages(stage_1, stage_2, hostile) -> dict[str, Page]:
    folders = {"stage 1": stage_1, "stage 2": stage_2, "classes": hostile}
    return {name: Page(folder / "report.html") for name, folder in folders.items()}


def metrics(folder) -> dict[str, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return rows[int(rows[-1]["best_epoch"]) - 1]


def test_a_page_has_all_parts_and_needs_nothing_else(pages):
    for name, page in pages.items():
        assert list(page.by_section) == (STAGE_1 if name == "stage 1" else STAGE_2)
        assert page.open == []
        assert "could not be made" not in page.source
        targets = page.values("href") + page.values("src") + page.values("xlink:href")
        assert {"#about", "data:,"} <= set(targets)
        ids = page.values("id")
        assert len(ids) == len(set(ids))
        for target in targets:
            assert target.startswith("data:") or (target.startswith("#") and target[1:] in ids)
        assert all(url.startswith("#") for url in re.findall(r"url\(([^)]*)", page.source))
        assert not {"script", "img", "iframe", "object", "form"} & {*page.tags}
        assert not [key for key, _ in page.attributes if key.startswith("on")]
        assert page.tags.count("figure") == page.tags.count("figcaption") == page.tags.count("svg") > 3
        assert page.values("role").count("img") == page.tags.count("svg")
        assert len(page.source) < 1e6


def test_the_figures_are_those_of_the_files(pages, stage_1, stage_2, hostile):
    for name, folder in {"stage 1": stage_1, "stage 2": stage_2, "classes": hostile}.items():
        best, page = metrics(folder), pages[name]
        record = json.loads((folder / "run.json").read_text())
        for tag, value in best.items():
            if tag.startswith(("train/", "val/")):
                assert f"{value:.4g}" in page.text("training"), tag
        about = page.text("about")
        assert f"best epoch {best['epoch']:g} of 2" in about
        for part, shown in (("train", "samples to train on"), ("val", "to validate"), ("test", "held out (test)")):
            assert f"{shown} {len(record['split'][part])} " in about
        assert all(note in about for note in record["notes"])
        assert str(record["config"]["loop"]["lr"]) in page.text("settings")
        assert "python jobs/" in page.text("settings")
    assert f"R² (validation) {metrics(stage_2)['val/r2']:.4g}" in pages["stage 2"].text("about")
    # The first tiles are of the validation samples, and as the training said.
    assert f"R² {metrics(stage_2)['val/r2']:.4g} " in pages["stage 2"].text("predictions").split("Test:")[0]
    assert f"AUROC {metrics(hostile)['val/auroc']:.4g}" in pages["classes"].text("predictions")


def test_test_samples_are_apart_and_scored_as_jobs_predict_scores_them(run_here, pages, stage_2, tmp_path):
    out = tmp_path / "p.tsv"
    flags = ["--checkpoint", stage_2, "--part", "test", "--output", out, "--report", tmp_path / "r.md"]
    done = run_here("predict.py", *flags)
    assert done.returncode == 0, done.stderr
    [error] = re.findall(r"\| mean absolute error \| (\S+) \|", (tmp_path / "r.md").read_text())
    samples = len(out.read_text().splitlines()) - 1
    assert f"Test: {samples} held-out samples mean absolute error {error} " in pages["stage 2"].text("predictions")
    table = pages["stage 2"].text("baselines").split(f"test, {samples} samples")[1]
    assert f"this model {error} " in table
    constant = re.search(r"mean absolute error \| \S+ \| (\S+) \|", (tmp_path / "r.md").read_text())
    assert constant is not None
    assert f"always the mean of the training samples {constant[1]} " in table
    assert "random forest" in table


def test_a_frozen_encoder_is_shown_with_the_tree_of_stage_1(pages):
    text = pages["stage 2"].text("unifrac")
    assert "the tree is the one that stage 1 was given" in text
    assert "coloured by gradient" in text
    for metric in ("Unweighted UniFrac: all ", "Weighted UniFrac: all ", "Faith's PD"):
        assert metric in text
    assert text.count("Mantel's r ") == text.count("Mantel's correlation of the true") == 2
    assert "Predicted weighted UniFrac, coloured by gradient" in text
    assert "the columns that go along best with the true distances" in pages["stage 1"].text("unifrac")
    assert "knows no UniFrac" in pages["classes"].text("unifrac")


def test_samples_of_another_table_are_not_taken_for_those_of_the_same_name(stage_1, stage_2):
    base = json.loads((stage_1 / "run.json").read_text())
    base["dataset"]["sha256"]["table"] = "0" * 64
    assert "Stage 1 was trained on another table" in unifrac(Run.read(stage_2, base))


def test_what_is_too_little_to_show_is_said(stage_1, stage_2, tmp_path):
    few = tmp_path / "few"
    shutil.copytree(stage_2, few)
    record = json.loads((few / "run.json").read_text())
    record["split"] |= {"val": record["split"]["val"][:3], "test": record["split"]["test"][:1]}
    (few / "run.json").write_text(json.dumps(record))
    run = Run.read(few, json.loads((stage_1 / "run.json").read_text()))
    assert "3 validation samples: too few for a figure" in unifrac(run)
    assert "Test: 1 held-out samples" in predictions(run)
    record["split"]["val"] = ["nobody"]
    (few / "run.json").write_text(json.dumps(record))
    assert "0 validation samples: too few" in unifrac(Run.read(few, run.base_record))


def test_intervals_are_drawn_with_the_share_of_samples_in_them(pages, stage_2):
    text = pages["stage 2"].text("predictions")
    said = "Bars reach from quantile 0.05 to 0.95: they should hold 90% of the true values, and hold "
    assert f"{said}{metrics(stage_2)['val/interval_coverage']:.0%}." in text
    assert text.count(said) == 2, "validation and test"
    assert "Bars reach" not in pages["classes"].text("predictions")


def test_names_that_are_html_stay_text(pages, hostile):
    page = pages["classes"]
    assert SCRIPT in page.text("about"), "a sample that was dropped"
    assert COLUMN in page.text("about")
    for name in CLASSES.values():
        assert name in page.text("predictions")
    assert SCRIPT not in page.source
    assert "<img" not in page.source
    # A class may be named as a column of the table of predictions is.
    with (hostile / "validation_predictions.tsv").open(newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))
    assert rows[0].count("true") == 2
    right = sum(row[1] == row[2] for row in rows[1:]) / len(rows[1:])
    assert f"accuracy {right:.4g} " in page.text("predictions")


def test_what_cannot_be_made_is_said_and_the_rest_is_there(stage_1, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(stage_1, folder)
    record = json.loads((folder / "run.json").read_text())
    record["dataset"]["folder"] = str(tmp_path / "gone")
    (folder / "run.json").write_text(json.dumps(record))
    page = Page(write_report(folder))
    for section in ("unifrac", "asvs"):
        assert "could not be made: ValueError" in page.text(section)
        assert "the prepared dataset is not there any more" in page.text(section)
    assert page.text("about") == Page(stage_1 / "report.html").text("about").replace(str(stage_1), str(folder))
    assert capsys.readouterr().out.count("could not be made") == 2


def test_a_run_is_not_lost_with_its_report(synthetic_folder, stage_2, tmp_path, capsys):
    config = train_config(synthetic_folder, tmp_path / "run", model=TINY)
    shutil.copytree(stage_2, config.output_dir)
    (config.output_dir / "report.html").unlink()
    (config.output_dir / "report.html").mkdir()
    report(config, str(config.output_dir))
    [line] = [line for line in capsys.readouterr().out.splitlines() if "report.html" in line]
    assert line.startswith("note: no report.html, the run is done all the same: IsADirectoryError")


def test_a_browser_shows_a_page_without_asking_for_more_or_scrolling_aside(pages, tmp_path):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    measure = (
        "<script>document.title = JSON.stringify([innerWidth, document.documentElement.scrollWidth, "
        "performance.getEntriesByType('resource').length, document.querySelectorAll('svg').length])</script></body>"
    )
    path = tmp_path / "page.html"
    path.write_text(pages["classes"].source.replace("</body>", measure), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    where = [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=360,800", "--dump-dom", path.as_uri()]
    shown = subprocess.run([chromium, *flags, *where], capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r"<title>(\[.*?\])</title>", shown)
    assert found is not None, shown[:500]
    width, needed, requests, pictures = json.loads(found[1])
    assert needed <= width <= 500
    assert requests == 0
    assert pictures == pages["classes"].tags.count("svg")
