"""What a run leaves behind, read by those who will read it."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from aam.model.sequence_encoder import SequenceEncoder
from aam.training.logs import ProgressBar, RunLog, format_loss, write_validation
from aam.training.metrics import EpochArrays, Scored
from aam.training.targets import Target, TargetTransform
from tensors import SIZES

SITE = Target(column="site", classes=("gut", "oral"), loss="cross_entropy")
AGE = Target(column="age", transform=TargetTransform(kind="zscore", shift=10.0, scale=2.0))
CLASSES = EpochArrays(
    target=np.array([[1.0, -1.0], [0.0, 2.0], [0.5, 0.0]], dtype=np.float32), target_true=np.array([0, 1, 1])
)
NUMBERS = EpochArrays(
    target=np.array([[0.5], [-1.0], [2.0]], dtype=np.float32),
    target_true=np.array([0.0, -1.0, 3.0], dtype=np.float32),
    unifrac={
        metric: Scored(
            predicted=np.array([0.5, 0.6, 0.7], dtype=np.float32), truth=np.array([0.4, 0.6, 0.9], dtype=np.float32)
        )
        for metric in ("unweighted", "weighted", "faith_pd")
    },
    count=np.array([-3.0, -1.0], dtype=np.float32),
    count_true=np.array([-2.0, -1.5], dtype=np.float32),
)
UNIFRAC = ("unifrac", "weighted_unifrac", "faith_pd")
IDS = ["007", "10317.000001234", "c"]


def row(epoch: int, loss: float) -> dict[str, float]:
    return {"epoch": epoch, "train/total_loss": loss, "val/total_loss": 2 * loss, "lr": 1e-4}


def events(folder) -> EventAccumulator:
    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()


def rows(folder) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scalars(folder, tag: str) -> list[tuple[int, float]]:
    return [(event.step, pytest.approx(event.value)) for event in events(folder).Scalars(tag)]


def test_scalars_and_metrics_have_the_same_tags(tmp_path):
    log = RunLog(tmp_path / "run", [])
    for epoch in (1, 2, 3):
        log.epoch(row(epoch, 1 / epoch))
    log.close()
    assert rows(tmp_path / "run") == [row(epoch, 1 / epoch) for epoch in (1, 2, 3)]
    assert set(events(tmp_path / "run").Tags()["scalars"]) == {"train/total_loss", "val/total_loss", "lr"}
    assert scalars(tmp_path / "run", "val/total_loss") == [(1, 2.0), (2, 1.0), (3, 2 / 3)]


def test_an_epoch_is_on_disk_before_the_end(tmp_path):
    log = RunLog(tmp_path, [])
    log.epoch(row(1, 0.5))
    try:
        assert rows(tmp_path) == [row(1, 0.5)]
        assert scalars(tmp_path, "lr") == [(1, 1e-4)]
    finally:
        log.close()


def age_events(folder: Path) -> None:
    """As if written a second ago: those of one second are read in the order of a number as text, 10 before 9."""
    for path in (folder / "tensorboard").glob("events*"):
        parts = path.name.split(".")
        path.rename(path.with_name(".".join([*parts[:3], f"{int(parts[3]) - 1:010d}", *parts[4:]])))


def test_a_resumed_run_redoes_what_came_after_its_checkpoint(tmp_path):
    log = RunLog(tmp_path, [])
    for epoch in (1, 2, 3):
        log.epoch(row(epoch, 1.0))
    log.close()
    age_events(tmp_path)
    log = RunLog(tmp_path, [row(1, 1.0), row(2, 1.0)])  # the third epoch's checkpoint was lost
    assert [r["epoch"] for r in rows(tmp_path)] == [1, 2]
    log.epoch(row(3, 7.0))
    log.close()
    assert rows(tmp_path) == [row(1, 1.0), row(2, 1.0), row(3, 7.0)]
    assert scalars(tmp_path, "train/total_loss") == [(1, 1.0), (2, 1.0), (3, 7.0)]


def test_a_run_that_starts_anew_in_its_folder(tmp_path):
    log = RunLog(tmp_path, [])
    log.epoch(row(1, 1.0))
    log.epoch(row(2, 1.0))
    log.close()
    age_events(tmp_path)
    log = RunLog(tmp_path, [])
    log.epoch(row(1, 7.0))
    log.close()
    assert rows(tmp_path) == [row(1, 7.0)]
    assert scalars(tmp_path, "train/total_loss") == [(1, 7.0)]


def test_histograms_of_weights_and_gradients(tmp_path):
    model = SequenceEncoder(SIZES)
    model.asv_encoder.requires_grad_(False)
    gradients = {
        "clades.raw_length": torch.arange(256.0),
        "clades.members.0.bias": torch.full((32,), math.nan),
        "clades.log_pd_scale": torch.tensor(2.0),
    }
    log = RunLog(tmp_path, [])
    log.histograms(model, gradients, epoch=10)
    log.close()
    found = events(tmp_path)
    tags = set(found.Tags()["histograms"])
    trained = {f"weights/{name}" for name, p in model.named_parameters() if p.requires_grad}
    assert tags == trained | {"gradients/clades.raw_length", "gradients/clades.log_pd_scale"}
    assert "weights/asv_encoder.nucleotides.token.weight" not in tags
    (event,) = found.Histograms("gradients/clades.raw_length")
    assert event.step == 10
    histogram = event.histogram_value
    assert (histogram.num, histogram.min, histogram.max) == (256, 0, 255)


@pytest.mark.parametrize(
    ("arrays", "target", "names"),
    [
        (NUMBERS, AGE, {*UNIFRAC, "target", "counts"}),
        (CLASSES, SITE, {"confusion_matrix"}),
        (NUMBERS, None, {*UNIFRAC, "counts"}),
    ],
)
def test_pictures(tmp_path, arrays, target, names):
    log = RunLog(tmp_path, [])
    log.best(arrays, IDS, target, epoch=4)
    log.close()
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {f"{name}.png" for name in names}
    for path in (tmp_path / "figures").iterdir():
        picture = matplotlib.image.imread(path)
        assert picture.shape[:2] == (500, 500)
        assert len(np.unique(picture)) > 10  # something is drawn
    found = events(tmp_path)
    assert set(found.Tags()["images"]) == {f"val/{name}" for name in names}
    for name in names:
        (event,) = found.Images(f"val/{name}")
        assert event.step == 4
        shown = matplotlib.image.imread(io.BytesIO(event.encoded_image_string))
        kept = matplotlib.image.imread(tmp_path / "figures" / f"{name}.png")
        assert (shown == kept[..., :3]).all()
    assert (tmp_path / "validation_predictions.tsv").exists() == (target is not None)


def test_pictures_of_many_points(tmp_path):
    many = np.linspace(0, 1, 50_001, dtype=np.float32)
    log = RunLog(tmp_path, [])
    log.best(EpochArrays(unifrac={"unweighted": Scored(predicted=many, truth=many)}), [], None, epoch=1)
    log.close()
    assert (tmp_path / "figures" / "unifrac.png").stat().st_size > 1000


def test_a_run_goes_on_without_pictures(tmp_path, capsys):
    (tmp_path / "figures").write_text("in the place of the folder")
    log = RunLog(tmp_path, [])
    log.best(NUMBERS, IDS, AGE, epoch=4)
    log.close()
    assert "note: pictures of epoch 4 could not be made: FileExistsError: " in capsys.readouterr().out
    assert (tmp_path / "validation_predictions.tsv").exists()


def test_validation_predictions_of_a_number(tmp_path):
    write_validation(tmp_path / "v.tsv", IDS, NUMBERS, AGE)
    assert (tmp_path / "v.tsv").read_text().splitlines() == [
        "SampleID\ttrue\tprediction",
        "007\t10.0\t11.0",
        "10317.000001234\t8.0\t8.0",
        "c\t16.0\t14.0",
    ]


def test_validation_predictions_of_classes(tmp_path):
    write_validation(tmp_path / "v.tsv", IDS, CLASSES, SITE)
    table = [line.split("\t") for line in (tmp_path / "v.tsv").read_text().splitlines()]
    assert table[0] == ["SampleID", "true", "prediction", "gut", "oral"]
    assert [line[:3] for line in table[1:]] == [
        ["007", "gut", "gut"],
        ["10317.000001234", "oral", "oral"],
        ["c", "oral", "gut"],
    ]
    chances = np.array([line[3:] for line in table[1:]], dtype=float)
    np.testing.assert_allclose(chances.sum(axis=1), 1)
    np.testing.assert_allclose(chances[:, 1], 1 / (1 + np.exp([2.0, -2.0, 0.5])))


def test_workers_but_the_first_write_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = RunLog(None, [row(1, 1.0)])
    log.epoch(row(2, 1.0))
    log.histograms(SequenceEncoder(SIZES), {}, epoch=2)
    log.best(NUMBERS, IDS, AGE, epoch=2)
    log.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.23456, "1.2346"),
        (12345.6, "12345.6000"),
        (1e-4, "0.0001"),
        (9.9e-5, "9.90e-05"),
        (1.5e-7, "1.50e-07"),
        (-0.25, "-0.2500"),
        (math.nan, "nan"),
    ],
)
def test_format_loss(value, text):
    assert format_loss(value) == text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar():
    stream = Terminal()
    bar = ProgressBar(5, 100, 500, shown=True, file=stream)
    for step in range(1, 43):
        bar.advance(step, 3.2e-5 if bar.due(step) else None, 2.5e-4)
    bar.close()
    last = stream.getvalue().split("\r")[-1]
    assert last.startswith("Epoch 5/100")
    assert "42/500" in last
    assert "Step 42/500, Loss 3.20e-05, LR 2.50e-04" in last  # the loss was last looked at in step 40


def test_the_bar_looks_at_the_loss_at_both_ends_and_now_and_then():
    bar = ProgressBar(1, 1, 50, shown=False)
    assert [step for step in range(1, 51) if bar.due(step)] == [1, 20, 40, 50]


def test_a_bar_without_a_loss_yet():
    stream = Terminal()
    bar = ProgressBar(1, 1, 3, shown=True, file=stream)
    bar.advance(1, None, 1e-3)
    bar.close()
    assert "Step 1/3, LR 1.00e-03" in stream.getvalue()


def test_a_short_epoch_leaves_no_bar_in_a_log_file():
    stream = io.StringIO()
    bar = ProgressBar(1, 1, 5000, shown=True, file=stream)
    for step in range(1, 5001):
        bar.advance(step, 1.0, 1e-3)
    bar.close()
    assert stream.getvalue() == ""


def test_a_long_epoch_leaves_a_few_lines_in_a_log_file():
    stream = io.StringIO()
    bar = ProgressBar(1, 1, 5000, shown=True, file=stream)
    bar.bar.start_t -= 60  # as if it had begun a minute ago
    bar.bar.last_print_t -= 60
    for step in range(1, 5001):
        bar.advance(step, 1.0, 1e-3)
    bar.close()
    assert 1 <= stream.getvalue().count("Epoch 1/1") < 10


def test_the_bar_of_other_workers_is_silent():
    stream = io.StringIO()
    bar = ProgressBar(1, 1, 2, shown=False, file=stream)
    bar.advance(1, 1.0, 1e-3)
    bar.close()
    assert stream.getvalue() == ""
