"""Rows of numbers in a file that all processes of a node fill and map, and that may be lost at any time."""

from __future__ import annotations

import errno
import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np


class RowStore:
    """Items of float32 rows, each there or not yet.

    A second file holds a checksum for each item that is there, written after its rows. What a killed process, a
    full disk, a lost page or a file cut short left behind does not match its checksum, and is not there. Rows are
    written through the file, never through the map, where a full disk would end the process without a word.

    Parameters
    ----------
    path : Path or None
        File of the rows; that of the checksums is beside it. None: in the memory of this process.
    starts : ndarray of int64 [items + 1]
        Row where each item starts, and the number of rows: room for the largest that an item can be. Rows that are
        never written take no space on disk.
    width : int
        Numbers of a row.

    Raises
    ------
    OSError
        Where the files cannot be written.
    """

    def __init__(self, path: Path | None, starts: np.ndarray, width: int) -> None:
        self.path, self.starts = path, starts
        self.known = np.zeros(len(starts) - 1, dtype=bool)
        """Items that this process has seen to be there."""
        shape = (int(starts[-1]), width)
        self.rows: np.ndarray = np.zeros(shape if path is None else 0, np.float32)
        self._sums: np.ndarray | None = None
        if path is not None:
            # Kept open: what is written goes where this process reads, also where the files are deleted meanwhile.
            self._file, self.rows = _mapped(path, np.float32, shape)
            self._sums_file, self._sums = _mapped(path.with_suffix(".sums"), np.int64, self.known.shape)

    def missing(self, items: np.ndarray, sizes: np.ndarray | None = None) -> np.ndarray:
        """Positions in `items` of those that are not there.

        Parameters
        ----------
        items : ndarray of int
            Numbers of items.
        sizes : ndarray of int, optional
            Rows of each; 1 by default.
        """
        unseen = np.flatnonzero(~self.known[items])
        if self._sums is not None:
            for position in unseen:
                item, size = items[position], 1 if sizes is None else sizes[position]
                start = self.starts[item]
                if self._sums[item] and self._sums[item] == _checksum(self.rows[start : start + size]):
                    self.known[item] = True
        return unseen[~self.known[items[unseen]]]

    def write(self, items: np.ndarray, rows: Sequence[np.ndarray]) -> None:
        """Put the rows [n, width] of items there.

        Raises
        ------
        OSError
            Where there is no space, say. What was there stays.
        """
        if self.path is None:
            for item, of_item in zip(items, rows, strict=True):
                self.rows[self.starts[item] : self.starts[item] + len(of_item)] = of_item
        else:
            disk = shutil.disk_usage(self.path.parent)
            if is_full(disk.free - sum(of_item.nbytes for of_item in rows), disk.total):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            for item, of_item in zip(items, rows, strict=True):
                of_item = np.ascontiguousarray(of_item, dtype=np.float32)
                offset = int(self.starts[item]) * of_item.itemsize * of_item.shape[-1]
                _write(self._file.fileno(), of_item, offset)
                _write(self._sums_file.fileno(), np.array(_checksum(of_item)), int(item) * 8)
        self.known[items] = True

    def to_memory(self) -> None:
        """Leave the disk; what this process has seen there goes with it."""
        rows = np.zeros(self.rows.shape, np.float32)
        for item in np.flatnonzero(self.known):
            place = slice(self.starts[item], self.starts[item + 1])
            rows[place] = self.rows[place]
        self.path, self.rows, self._sums = None, rows, None


def is_full(free: int, total: int) -> bool:
    """Whether the bytes that are left of a disk are for those who need them more: checkpoints, Ray."""
    return free < min(2**30, total // 20)


def _mapped(path: Path, dtype: type, shape: tuple[int, ...]) -> tuple[BinaryIO, np.ndarray]:
    """A file to write to and its map, made or made longer where it is too short; others may have it mapped already."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    path.open("ab").close()
    file = path.open("r+b")
    if file.seek(0, os.SEEK_END) < size:
        file.truncate(size)
    return file, np.asarray(np.memmap(file, dtype=dtype, mode="r", shape=shape))


def _write(file: int, values: np.ndarray, offset: int) -> None:
    if os.pwrite(file, values.tobytes(), offset) != values.nbytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _checksum(rows: np.ndarray) -> int:
    """Never 0, which stands for nothing there."""
    return zlib.crc32(np.ascontiguousarray(rows).data) + 1
