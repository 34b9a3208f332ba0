"""Rows in a file: there or not, whatever was killed, cut short or written by others."""

from __future__ import annotations

import numpy as np
import pytest

from aam.training.row_store import RowStore, is_full

ALL = np.arange(3)
ROWS = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)


def assert_there(store: RowStore, items) -> None:
    np.testing.assert_array_equal(store.rows[items], ROWS[items])


@pytest.mark.parametrize("name", [None, "x.rows"])
def test_rows_are_there_once_they_are_written(tmp_path, name):
    store = RowStore(name and tmp_path / name, 3, 4)
    assert store.missing(ALL).tolist() == [0, 1, 2]
    store.write(ALL[1:2], ROWS[1:2])
    assert store.missing(ALL[::-1]).tolist() == [0, 2]
    store.write(ALL, ROWS)
    assert len(store.missing(ALL)) == 0
    assert_there(store, ALL)


def test_another_process_finds_them_and_what_it_adds(tmp_path):
    one, two = (RowStore(tmp_path / "x.rows", 3, 4) for _ in range(2))
    one.write(ALL[:1], ROWS[:1])
    two.write(ALL[1:], ROWS[1:])
    two.write(ALL, ROWS)  # the same once more
    for store in (one, two, RowStore(tmp_path / "x.rows", 3, 4)):
        assert len(store.missing(ALL)) == 0
        assert_there(store, ALL)


@pytest.mark.parametrize("bytes_left", [0, 8, 16, 47])
def test_a_file_cut_short_is_filled_anew(tmp_path, bytes_left):
    path = tmp_path / "x.rows"
    RowStore(path, 3, 4).write(ALL, ROWS)
    with path.open("r+b") as file:
        file.truncate(bytes_left)
    store = RowStore(path, 3, 4)
    kept = [item for item in ALL if (item + 1) * 16 <= bytes_left]
    missing = store.missing(ALL)
    assert sorted({*missing.tolist(), *kept}) == [0, 1, 2]
    assert not set(kept).intersection(missing.tolist())
    assert_there(store, kept)
    store.write(ALL, ROWS)
    assert_there(RowStore(path, 3, 4), ALL)
    assert path.stat().st_size == 3 * 16


def test_what_a_killed_writer_left_is_not_there(tmp_path):
    path = tmp_path / "x.rows"
    RowStore(path, 3, 4).write(ALL, ROWS)
    whole, sums = path.read_bytes(), (tmp_path / "x.sums").read_bytes()
    (tmp_path / "x.sums").write_bytes(sums[:8] + bytes(8) + sums[16:])  # row 1, killed before its sum
    path.write_bytes(whole[:32] + bytes(16))  # a page of row 2 that the machine's end lost
    store = RowStore(path, 3, 4)
    assert store.missing(ALL).tolist() == [1, 2]
    assert_there(store, [0])


def test_the_last_of_a_disk_is_left_to_others():
    gib = 2**30
    assert not is_full(2 * gib, 1000 * gib)
    assert is_full(gib - 1, 1000 * gib)
    assert not is_full(10, 100)
    assert is_full(4, 100)
    assert is_full(-1, 10)


def test_leaving_the_disk_takes_along_what_is_known(tmp_path):
    RowStore(tmp_path / "x.rows", 3, 4).write(ALL, ROWS)
    store = RowStore(tmp_path / "x.rows", 3, 4)
    assert len(store.missing(ALL[:2])) == 0
    store.to_memory()
    (tmp_path / "x.rows").unlink()
    assert store.missing(ALL).tolist() == [2]
    assert_there(store, ALL[:2])
    store.write(ALL, ROWS)
    assert_there(store, ALL)
    assert not (tmp_path / "x.rows").exists()
