"""Time to a validation R2: what is read off the epochs, and a short run by the preset."""

from __future__ import annotations

import json
import shutil

import pytest

from benchmarks.time_to_quality import Settings, main, make_config, summarize
from plans import write_ids
from runs import pretrain_plan


def epoch(number: int, r2: float) -> dict[str, float]:
    return {"epoch": number, "updates": 10 * number, "seconds": 2.0 * number, "validation_s": 0.5 * number, "r2": r2}


def test_r2_is_reached_at_the_end_of_an_epoch_and_may_be_lost_again():
    result = summarize([epoch(1, 0.4), epoch(2, 0.91), epoch(3, 0.89), epoch(4, 0.95), epoch(5, 0.94)], 0.9)
    assert (result["seconds_to_r2"], result["validation_s_to_r2"], result["updates_to_r2"]) == (4.0, 1.0, 20)
    assert result["best"] == epoch(4, 0.95)
    assert (result["seconds"], result["validation_s"], result["updates"]) == (10.0, 2.5, 50)
    assert result["updates_per_s"] == pytest.approx(50 / 7.5)
    missed = summarize([epoch(1, 0.4)], 0.9)
    assert (missed["seconds_to_r2"], missed["updates_to_r2"]) == (None, None)


@pytest.fixture
def data(synthetic_folder, tmp_path):
    """The synthetic dataset with the lists of ids of a split."""
    folder = tmp_path / "data"
    shutil.copytree(synthetic_folder, folder)
    split = pretrain_plan(synthetic_folder, tmp_path / "run").split
    write_ids(folder / "train.txt", split.train)
    write_ids(folder / "val.txt", split.val)
    return folder


def test_settings_are_the_presets_below_what_is_given(data):
    config = make_config(Settings(data=data, kmer=0, asv_layers=2, flags="--lr 0.01 --nuc-weight 0"))
    assert (config.model.kmer, config.model.asv_layers) == (0, 2)
    assert (config.loop.lr, config.loss.nuc_weight) == (0.01, 0.0)
    assert (config.loop.batch_size, config.loop.max_updates) == (32, 500)  # of the preset
    assert config.data.val_ids == data / "val.txt"


def test_a_short_run(data, tmp_path):
    more = "--embedding-dim 16 --clades 16 --attention-heads 2 --batch-size 8 --rarefy-depth 200"
    main(Settings(data=data, asv_layers=1, max_updates=5, r2=-100.0, flags=more, json=tmp_path / "q.json", threads=1))
    result = json.loads((tmp_path / "q.json").read_text())
    assert [row["updates"] for row in result["epochs"]] == [4, 5]
    assert 0 < result["validation_s"] < result["seconds"]
    assert result["seconds_to_r2"] == result["epochs"][0]["seconds"]
    assert result["architecture"]["asv_layers"] == 1
