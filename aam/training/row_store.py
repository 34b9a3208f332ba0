"""Rows of numbers in a file that all processes of a node fill and map, and that may be lost at any time."""

from __future__ import annotations

import errno
import os
import shutil
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np


class RowStore:
    """Rows of float32 numbers, each there or not yet.

    A second file holds a checksum for each row that is there, written after it. What a killed process, a
    full disk, a lost page or a file cut short left behind does not match its checksum, and is not there. Rows are
    written through the file, never through the map, where a full disk would end the process without a word.

    Parameters
    ----------
    path : Path or None
        File of the rows; that of the checksums is beside it. None: in the memory of this process.
    rows : int
        How many. Those that are never written take no space on disk.
    width : int
        Numbers of a row.

    Raises
    ------
    OSError
        Where the files cannot be written.
    """

    def __init__(self, path: Path | None, rows: int, width: int) -> None:
        self.path = path
        self.known = np.zeros(rows, dtype=bool)
        """Rows that this process has seen to be there."""
        shape = (rows, width)
        self.rows: np.ndarray = np.zeros(shape if path is None else 0, np.float32)
        self._sums: np.ndarray | None = None
        if path is not None:
            # Kept open: what is written goes where this process reads, also where the files are deleted meanwhile.
            self._file, self.rows = _mapped(path, np.float32, shape)
            self._sums_file, self._sums = _mapped(path.with_suffix(".sums"), np.int64, self.known.shape)

    def missing(self, items: np.ndarray) -> np.ndarray:
        """Positions in `items`, numbers of rows, of those that are not there."""
        unseen = np.flatnonzero(~self.known[items])
        if self._sums is not None:
            for item in items[unseen]:
                if self._sums[item] and self._sums[item] == _checksum(self.rows[item]):
                    self.known[item] = True
        return unseen[~self.known[items[unseen]]]

    def write(self, items: np.ndarray, rows: np.ndarray) -> None:
        """Put rows [n, width] there.

        Raises
        ------
        OSError
            Where there is no space, say. What was there stays.
        """
        if self.path is None:
            self.rows[items] = rows
        else:
            disk = shutil.disk_usage(self.path.parent)
            rows = np.ascontiguousarray(rows, dtype=np.float32)
            if is_full(disk.free - rows.nbytes, disk.total):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            for item, row in zip(items, rows, strict=True):
                _write(self._file.fileno(), row, int(item) * row.nbytes)
                _write(self._sums_file.fileno(), np.array(_checksum(row)), int(item) * 8)
        self.known[items] = True

    def to_memory(self) -> None:
        """Leave the disk; what this process has seen there goes with it."""
        rows = np.zeros(self.rows.shape, np.float32)
        rows[self.known] = self.rows[self.known]
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


def _checksum(row: np.ndarray) -> int:
    """Never 0, which stands for nothing there."""
    return zlib.crc32(np.ascontiguousarray(row).data) + 1
