"""The prepared dataset: written once, then memory-mapped by every worker of a node.

A folder of four Arrow IPC files and a manifest:

- `asvs.arrow`     sequence, tokens, length, and the path to the root of the tree (nodes)
- `samples.arrow`  id, ASVs (ascending) and their reads
- `edges.arrow`    branch lengths by node; no rows without a tree
- `metadata.arrow` the metadata of the samples, text as it came; no columns without metadata
- `manifest.json`  format version, content hashes of the sources, what was dropped and why
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from aam.config import DataConfig
from aam.data import tokens
from aam.data.metadata import read_metadata
from aam.data.sources import AmpliconTable, content_hash, read_newick, read_table
from aam.data.split import name_some
from aam.data.tree import parse_newick, root_paths
from aam.data.unifrac import RootPaths

FORMAT_VERSION = 1


@dataclass(frozen=True)
class PreparedDataset:
    """A prepared dataset, its arrays mapped from disk on first use.

    Parameters
    ----------
    folder : Path
        Where `prepare` wrote it.
    """

    folder: Path

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Format version, sources, sizes and notes."""
        manifest = json.loads((self.folder / "manifest.json").read_text())
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
    def depths(self) -> np.ndarray:
        """int64 [samples]: reads of each sample."""
        offsets, _, reads = self._cells
        return np.add.reduceat(reads, offsets[:-1])

    @cached_property
    def metadata(self) -> pd.DataFrame | None:
        """Metadata of those samples of the table that have any, text or None; None without metadata."""
        frame = _read(self.folder / "metadata.arrow").to_pandas()
        return None if frame.columns.empty else frame.set_index("id")


def _read(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _chunk(column: pa.ChunkedArray) -> Any:
    return column.chunk(0)


def default_cache() -> Path:
    """The folder of prepared datasets: `$AAM_CACHE`, or `~/.cache/aam`."""
    return Path(os.environ.get("AAM_CACHE") or Path.home() / ".cache" / "aam")


def prepare(config: DataConfig, *, max_bp: int, use_tree: bool) -> PreparedDataset:
    """Read table, tree and metadata into a prepared dataset, or find the one made of the same contents.

    Parameters
    ----------
    config : DataConfig
        Paths of the sources and of the cache.
    max_bp : int
        Longest sequence allowed.
    use_tree : bool
        Whether the run needs the tree. Without it no ASV is dropped for want of a place in it.

    Returns
    -------
    PreparedDataset

    Raises
    ------
    ValueError
        For any source that cannot be used; one line that names the culprit and the way out.
    """
    assert config.table is not None
    sources = {
        "table": config.table,
        "sequences": config.sequences,
        "tree": config.tree if use_tree else None,
        "metadata": config.metadata,
    }
    hashes = {name: None if path is None else content_hash(path) for name, path in sources.items()}
    key_parts = {**hashes, "max_bp": max_bp, "missing": config.max_missing_from_tree, "version": FORMAT_VERSION}
    key = hashlib.sha256(json.dumps(key_parts, sort_keys=True).encode()).hexdigest()[:16]
    folder = (config.cache_dir or default_cache()) / f"dataset-{key}"
    if not (folder / "manifest.json").exists():
        table = read_table(config.table, config.sequences)
        too_long = [s for s in table.sequences if len(s) > max_bp]
        if too_long:
            longest = max(map(len, too_long))
            raise ValueError(
                f"{config.table}: {len(too_long)} of {len(table.sequences)} sequences are longer than "
                f"{max_bp} nt, the first: {too_long[0][:30]}... ({len(too_long[0])} nt); "
                f"pass --max-bp {longest} when pre-training, or trim the sequences"
            )
        _write(folder, table, config, use_tree, hashes)
    return PreparedDataset(folder)


def _write(
    folder: Path, table: AmpliconTable, config: DataConfig, use_tree: bool, hashes: dict[str, str | None]
) -> None:
    """Write to a temporary name and rename: another process sees the whole dataset or none."""
    notes = list(table.notes)
    edges = np.zeros(0)
    paths = (np.zeros(len(table.sequences) + 1, dtype=np.int64), np.zeros(0, dtype=np.int32))
    if use_tree:
        assert config.tree is not None
        table, tree, tree_notes = _place_in_tree(table, config)
        notes += tree_notes
        edges, paths = tree.length, root_paths(tree)
    metadata = pd.DataFrame()
    if config.metadata is not None:
        metadata, metadata_notes = _metadata_of(table, config.metadata)
        notes += metadata_notes
    encoded, lengths = tokens.encode(table.sequences)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    asvs = {
        "sequence": pa.array(table.sequences, type=pa.large_string()),
        "tokens": pa.FixedSizeListArray.from_arrays(pa.array(encoded.reshape(-1)), encoded.shape[1]),
        "length": pa.array(lengths),
        "path": pa.LargeListArray.from_arrays(pa.array(paths[0]), pa.array(paths[1])),
    }
    counts = table.counts
    offsets = pa.array(counts.indptr.astype(np.int64))
    samples = {
        "id": pa.array(table.sample_ids, type=pa.large_string()),
        "asvs": pa.LargeListArray.from_arrays(offsets, pa.array(counts.indices.astype(np.int32))),
        "reads": pa.LargeListArray.from_arrays(offsets, pa.array(counts.data.astype(np.int64))),
    }
    _write_table(scratch / "asvs.arrow", pa.table(asvs))
    _write_table(scratch / "samples.arrow", pa.table(samples))
    _write_table(scratch / "edges.arrow", pa.table({"length": pa.array(edges)}))
    _write_table(scratch / "metadata.arrow", pa.Table.from_pandas(metadata, preserve_index=False))
    manifest = {
        "format_version": FORMAT_VERSION,
        "sources": {k: str(getattr(config, k)) for k, v in hashes.items() if v is not None},
        "sha256": {k: v for k, v in hashes.items() if v is not None},
        "samples": len(table.sample_ids),
        "asvs": len(table.sequences),
        "reads": int(counts.data.sum()),
        "has_tree": use_tree,
        "notes": notes,
    }
    (scratch / "manifest.json").write_text(json.dumps(manifest, indent=1))
    try:
        scratch.rename(folder)
    except OSError:  # another process was faster with the same contents
        shutil.rmtree(scratch)


def _write_table(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        # One batch: a column of one chunk is one array on disk.
        writer.write_table(table.combine_chunks(), max_chunksize=max(1, table.num_rows))


def _place_in_tree(table: AmpliconTable, config: DataConfig):
    """Shear the tree to the table and drop the ASVs that it lacks, up to the share that is allowed."""
    assert config.tree is not None
    text = read_newick(config.tree)
    tree = parse_newick(text, table.sequences, source=str(config.tree))
    notes = [f"tree: {note}" for note in tree.notes]
    placed = np.flatnonzero(tree.tip >= 0)
    if len(placed) == len(table.sequences):
        return table, tree, notes
    lost = [table.sequences[i] for i in np.flatnonzero(tree.tip < 0)]
    reads = table.counts.sum()
    kept = table.counts[:, placed]
    lost_share = 1 - kept.sum() / reads
    culprit = (
        f"{config.tree}: the tree lacks {len(lost)} of {len(table.sequences)} ASVs of {config.table}, "
        f"{lost_share:.1%} of the reads (first: {lost[0][:40]})"
    )
    if lost_share > config.max_missing_from_tree:
        raise ValueError(
            f"{culprit}; tips must be named by the sequences (or allow more: --max-missing-from-tree)"
        )
    filled = np.diff(kept.indptr) > 0
    empty = [s for s, full in zip(table.sample_ids, filled, strict=True) if not full]
    notes.append(f"{culprit}: dropped")
    if empty:
        notes.append(f"{len(empty)} samples have no ASV left in the tree: dropped ({name_some(empty)})")
    table = AmpliconTable(
        sample_ids=[s for s, full in zip(table.sample_ids, filled, strict=True) if full],
        sequences=[table.sequences[i] for i in placed],
        counts=kept[np.flatnonzero(filled)],
        notes=table.notes,
    )
    return table, parse_newick(text, table.sequences, source=str(config.tree)), notes


def _metadata_of(table: AmpliconTable, path: Path) -> tuple[pd.DataFrame, list[str]]:
    """Metadata rows of the table's samples, with the id as a column."""
    frame, notes = read_metadata(path)
    shared = [s for s in table.sample_ids if s in frame.index]
    if not shared:
        raise ValueError(
            f"{path}: no sample of the table is in it; the table has {_look(table.sample_ids)}, "
            f"the metadata {_look(list(frame.index))}"
        )
    found = [f"metadata: {note}" for note in notes]
    if len(frame) > len(shared):
        found.append(f"metadata: {len(frame) - len(shared)} of its samples are not in the table: ignored")
    rows = frame.loc[shared].reset_index(names="id") if "id" not in frame.columns else None
    if rows is None:
        raise ValueError(f"{path}: a second column is named 'id' beside the sample ids; rename it")
    return rows, found


def _look(ids: Sequence[str]) -> str:
    return ", ".join(map(repr, ids[:3])) + (", ..." if len(ids) > 3 else "")
