"""The prepared dataset: written once by `aam.data.prepare`, then memory-mapped by every worker of a node.

A folder of four Arrow IPC files and a manifest:

- `asvs.arrow`     sequence, tokens, length, and the path to the root of the tree (nodes)
- `samples.arrow`  id, ASVs (ascending) and their reads
- `edges.arrow`    branch lengths by node; no rows without a tree
- `metadata.arrow` the metadata of the samples, ids first, text as it came; no columns without metadata
- `manifest.json`  format version, content hashes of the sources, what was dropped and why
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from aam.data.unifrac import RootPaths

FORMAT_VERSION = 2
"""Part of the key: raise it when the files change, or when the same sources come to give other contents."""
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class PreparedDataset:
    """A prepared dataset, its arrays mapped from disk on first use.

    Parameters
    ----------
    folder : Path
        Where `prepare` wrote it.
    """

    folder: Path

    def __reduce__(self) -> tuple[type[PreparedDataset], tuple[Path]]:
        """Send the folder to another process, never what has been read from it."""
        return PreparedDataset, (self.folder,)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Format version, sources, sizes and notes."""
        manifest = json.loads((self.folder / MANIFEST).read_text())
        if manifest["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"{self.folder}: prepared dataset of format {manifest['format_version']}, this version reads "
                f"{FORMAT_VERSION}; delete the folder and it is prepared anew"
            )
        return manifest

    @cached_property
    def sample_ids(self) -> list[str]:
        """Ids of all samples, in the order of the table."""
        return _read(self.folder / "samples.arrow")["id"].to_pylist()

    @cached_property
    def row(self) -> dict[str, int]:
        """Row of each sample id."""
        return {sample: i for i, sample in enumerate(self.sample_ids)}

    @cached_property
    def tokens(self) -> np.ndarray:
        """uint8 [ASVs, L]."""
        column = _chunk(_read(self.folder / "asvs.arrow")["tokens"])
        return column.flatten().to_numpy().reshape(len(column), -1)

    @cached_property
    def lengths(self) -> np.ndarray:
        """uint16 [ASVs]: tokens of each with its START."""
        return _chunk(_read(self.folder / "asvs.arrow")["length"]).to_numpy()

    @cached_property
    def sequences(self) -> list[str]:
        """The sequence of each ASV."""
        return _read(self.folder / "asvs.arrow")["sequence"].to_pylist()

    @cached_property
    def paths(self) -> RootPaths | None:
        """Root path of each ASV and the branch lengths; None without a tree."""
        if not self.manifest["has_tree"]:
            return None
        path = _chunk(_read(self.folder / "asvs.arrow")["path"])
        length = _chunk(_read(self.folder / "edges.arrow")["length"]).to_numpy()
        return RootPaths(path.offsets.to_numpy(), path.values.to_numpy(), length)

    @cached_property
    def _cells(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        table = _read(self.folder / "samples.arrow")
        asvs, reads = _chunk(table["asvs"]), _chunk(table["reads"])
        return asvs.offsets.to_numpy(), asvs.values.to_numpy(), reads.values.to_numpy()

    def sample(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """ASVs of a sample, ascending, and their reads."""
        offsets, asvs, reads = self._cells
        cells = slice(offsets[row], offsets[row + 1])
        return asvs[cells], reads[cells]

    @cached_property
    def richness(self) -> np.ndarray:
        """int64 [samples]: ASVs of each sample."""
        return np.diff(self._cells[0])

    @cached_property
    def depths(self) -> np.ndarray:
        """int64 [samples]: reads of each sample."""
        offsets, _, reads = self._cells
        return np.add.reduceat(reads, offsets[:-1])

    @cached_property
    def metadata(self) -> pd.DataFrame | None:
        """Metadata of those samples of the table that have any, text or None; None without metadata."""
        frame = _read(self.folder / "metadata.arrow").to_pandas()
        if frame.columns.empty:
            return None
        frame = frame.astype(object).where(frame.notna(), None)
        return frame.set_index(frame.columns[0]).rename_axis("sample_id")


def _read(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _chunk(column: pa.ChunkedArray) -> Any:
    return column.chunk(0)
