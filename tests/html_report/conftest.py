"""Run folders to report on, trained here, and a reader of pages."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path

import biom
import h5py
import pytest

from aam.config import TargetConfig
from aam.html_report.write import write_report
from runs import data_config, fit_here, pretrain_config, train_config

SCRIPT = "<script>alert(1)</script>"
COLUMN = 'site "><img src=x onerror=alert(2)> $x$'
CLASSES = {"soil": "true", "gut": "</style><script>alert(3)</script>", "skin": "_a & $1_$2"}


class Page(HTMLParser):
    """What a page has in it.

    Parameters
    ----------
    path : Path
        Its file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.open, self.by_section, self.section = [], {}, None
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in ("meta", "link"):
            self.open.append(tag)
        if tag == "section":
            self.section = dict(attributes)["id"]
            self.by_section[self.section] = []

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"<{tag}> is closed in the wrong place"
        if tag == "section":
            self.section = None

    def handle_data(self, data):
        self.texts.append(data)
        if self.section is not None:
            self.by_section[self.section].append(data)

    def values(self, attribute: str) -> list[str]:
        return [value for name, value in self.attributes if name == attribute]

    def text(self, section: str) -> str:
        return " ".join(" ".join(self.by_section[section]).split())


def train(config) -> dict:
    """Train, and leave what a job leaves; returns the run.json."""
    config.output_dir.mkdir(parents=True)
    record = json.loads(json.dumps(fit_here(config).describe(config)))
    (config.output_dir / "run.json").write_text(json.dumps(record))
    return record


@pytest.fixture(scope="session")
def stage_1(synthetic_folder, tmp_path_factory) -> Path:
    config = pretrain_config(synthetic_folder, tmp_path_factory.mktemp("html") / "stage1", batch_size=16)
    loss = replace(config.loss, unifrac_metric=("unweighted", "weighted", "faith_pd"))
    config = replace(config, loss=loss)
    train(config)
    return write_report(config.output_dir).parent


@pytest.fixture(scope="session")
def stage_2(synthetic_folder, stage_1) -> Path:
    """On the frozen stage 1, with test samples; its own dataset has no tree."""
    data = data_config(synthetic_folder, test_fraction=0.2, tree=None)
    folder = stage_1.with_name("stage2")
    target = TargetConfig(target="gradient", target_loss="quantile")  # outputs beside the prediction
    config = train_config(synthetic_folder, folder, data=data, target=target, pretrained=stage_1, freeze_base=True)
    train(config)
    return write_report(folder, json.loads((stage_1 / "run.json").read_text())).parent


@pytest.fixture(scope="session")
def hostile(synthetic_folder, tmp_path_factory) -> Path:
    """Classes, trained from scratch; ids, column and classes are such as would break a page that let them."""
    source = tmp_path_factory.mktemp("hostile")
    table = biom.load_table(str(synthetic_folder / "table.biom"))
    table.update_ids({name: SCRIPT + name for name in table.ids()}, axis="sample")
    with h5py.File(source / "table.biom", "w") as file:
        table.to_hdf5(file, "test", creation_date=datetime(2020, 1, 1))
    with (synthetic_folder / "metadata.tsv").open(newline="") as file:
        header, *rows = csv.reader(file, delimiter="\t")
    site = header.index("site")
    header[site] = COLUMN
    rows = [[SCRIPT + name, *cells] for name, *cells in rows]
    for row in rows:
        row[site] = CLASSES[row[site]]
    rows[0][site] = ""
    with (source / "metadata.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([header, *rows])
    data = data_config(source, tree=None, group_column=None, val_fraction=0.4)
    config = train_config(
        source, source / "run", data=data, target=TargetConfig(target=COLUMN, classifier=True), batch_size=16
    )
    train(config)
    return write_report(config.output_dir).parent
