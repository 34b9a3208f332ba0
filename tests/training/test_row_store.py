"""Rows in a file: there or not, whatever was killed, cut short or written by others."""

from __future__ import annotations

import numpy as np
import pytest

from aam.training.row_store import RowStore, is_full

STARTS = np.array([0, 3, 4, 9])
"""Three items of at most 3, 1 and 5 rows."""
ALL = np.arange(3)
SIZES = np.array([2, 1, 5])


def rows_of(item: int, size: int) -> np.ndarray:
    return np.random.default_rng(item).normal(size=(size, 4)).astype(np.float32)


def write_all(store: RowStore) -> None:
    store.write(ALL, [rows_of(item, size) for item, size in zip(ALL, SIZES, strict=True)])


def assert_there(store: RowStore, items) -> None:
    for item in items:
        start = STARTS[item]
        np.testing.assert_array_equal(store.rows[start : start + SIZES[item]], rows_of(item, SIZES[item]))


@pytest.mark.parametrize("name", [None, "x.rows"])
def test_items_are_there_once_they_are_written(tmp_path, name):
    store = RowStore(name and tmp_path / name, STARTS, 4)
    assert store.missing(ALL, SIZES).tolist() == [0, 1, 2]
    store.write(ALL[1:2], [rows_of(1, 1)])
    assert store.missing(ALL[::-1], SIZES[::-1]).tolist() == [0, 2]
    write_all(store)
    assert len(store.missing(ALL, SIZES)) == 0
    assert_there(store, ALL)


def test_another_process_finds_them_and_what_it_adds(tmp_path):
    one, two = (RowStore(tmp_path / "x.rows", STARTS, 4) for _ in range(2))
    one.write(ALL[:1], [rows_of(0, 2)])
    two.write(ALL[1:], [rows_of(1, 1), rows_of(2, 5)])
    write_all(two)  # the same once more
    for store in (one, two, RowStore(tmp_path / "x.rows", STARTS, 4)):
        assert len(store.missing(ALL, SIZES)) == 0
        assert_there(store, ALL)


def test_an_item_of_another_size_is_not_there(tmp_path):
    write_all(RowStore(tmp_path / "x.rows", STARTS, 4))
    assert RowStore(tmp_path / "x.rows", STARTS, 4).missing(ALL, np.array([3, 1, 4])).tolist() == [0, 2]


@pytest.mark.parametrize("bytes_left", [0, 16, 70, 143])
def test_a_file_cut_short_is_filled_anew(tmp_path, bytes_left):
    path = tmp_path / "x.rows"
    write_all(RowStore(path, STARTS, 4))
    with path.open("r+b") as file:
        file.truncate(bytes_left)
    store = RowStore(path, STARTS, 4)
    kept = [item for item in ALL if (STARTS[item] + SIZES[item]) * 16 <= bytes_left]
    missing = store.missing(ALL, SIZES)
    assert sorted({*missing.tolist(), *kept}) == [0, 1, 2]
    assert not set(kept).intersection(missing.tolist())
    assert_there(store, kept)
    write_all(store)
    assert_there(RowStore(path, STARTS, 4), ALL)
    assert path.stat().st_size == 9 * 16


def test_what_a_killed_writer_left_is_not_there(tmp_path):
    path = tmp_path / "x.rows"
    write_all(RowStore(path, STARTS, 4))
    whole, sums = path.read_bytes(), (tmp_path / "x.sums").read_bytes()
    (tmp_path / "x.sums").write_bytes(sums[:8] + bytes(8) + sums[16:])  # rows of item 1, killed before its sum
    path.write_bytes(whole[: 16 * 6] + bytes(16) + whole[16 * 7 :])  # a page of item 2 that the machine's end lost
    store = RowStore(path, STARTS, 4)
    assert store.missing(ALL, SIZES).tolist() == [1, 2]
    assert_there(store, [0])


def test_the_last_of_a_disk_is_left_to_others():
    gib = 2**30
    assert not is_full(2 * gib, 1000 * gib)
    assert is_full(gib - 1, 1000 * gib)
    assert not is_full(10, 100)
    assert is_full(4, 100)
    assert is_full(-1, 10)


def test_leaving_the_disk_takes_along_what_is_known(tmp_path):
    write_all(RowStore(tmp_path / "x.rows", STARTS, 4))
    store = RowStore(tmp_path / "x.rows", STARTS, 4)
    assert len(store.missing(ALL[:2], SIZES[:2])) == 0
    store.to_memory()
    (tmp_path / "x.rows").unlink()
    assert store.missing(ALL, SIZES).tolist() == [2]
    assert_there(store, ALL[:2])
    write_all(store)
    assert_there(store, ALL)
    assert not (tmp_path / "x.rows").exists()
