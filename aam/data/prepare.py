"""From what a user brings to a prepared dataset: read, check, match, drop with a reason, write once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from aam.config import DataConfig
from aam.data import tokens
from aam.data.dataset import FORMAT_VERSION, MANIFEST, PreparedDataset
from aam.data.files import short, some
from aam.data.metadata import read_metadata
from aam.data.sources import AmpliconTable, content_hash, read_newick, read_table
from aam.data.tree import FlatTree, parse_newick, root_paths
from aam.data.unifrac import RootPaths


def default_cache() -> Path:
    """The folder of prepared datasets: `$AAM_CACHE`, or `~/.cache/aam`."""
    return Path(os.environ.get("AAM_CACHE") or Path.home() / ".cache" / "aam")


def prepare(config: DataConfig, *, max_bp: int | None, use_tree: bool) -> PreparedDataset:
    """Read table, tree and metadata into a prepared dataset, or find the one made of the same contents.

    Parameters
    ----------
    config : DataConfig
        Paths of the sources and of the cache.
    max_bp : int or None
        Longest sequence allowed; None allows any.
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
    hashes = {name: content_hash(path) for name, path in sources.items() if path is not None}
    settings = {"max_missing_from_tree": config.max_missing_from_tree, "version": FORMAT_VERSION}
    key = hashlib.sha256(json.dumps({**hashes, **settings}, sort_keys=True).encode()).hexdigest()[:16]
    folder = (config.cache_dir or default_cache()) / f"dataset-{key}"
    if not (folder / MANIFEST).exists():
        table = read_table(config.table, config.sequences)
        longest = max(table.sequences, key=len)
        notes, paths = list(table.notes), None
        if use_tree:
            table, paths, tree_notes = _place_in_tree(table, config)
            notes += tree_notes
        metadata = pd.DataFrame()
        if config.metadata is not None:
            metadata, metadata_notes = _metadata_of(table, config.metadata)
            notes += metadata_notes
        manifest = {
            "format_version": FORMAT_VERSION,
            "sources": {name: str(sources[name]) for name in hashes},
            "sha256": hashes,
            "samples": len(table.sample_ids),
            "asvs": len(table.sequences),
            "longest_sequence": longest,
            "reads": int(table.counts.sum()),
            "has_tree": use_tree,
            "dropped_samples": table.dropped_samples,
            "notes": notes,
        }
        _write(folder, table, paths, metadata, manifest)
    dataset = PreparedDataset(folder)
    longest = dataset.manifest["longest_sequence"]
    if max_bp is not None and len(longest) > max_bp:
        raise ValueError(
            f"{config.table}: its longest sequence, {short(longest)}, has {len(longest)} nt, more than {max_bp}; give "
            f"--max-bp {len(longest)} when pre-training, or trim the sequences"
        )
    return dataset


def _place_in_tree(table: AmpliconTable, config: DataConfig) -> tuple[AmpliconTable, RootPaths, tuple[str, ...]]:
    """Shear the tree to the table and drop the ASVs that it lacks, up to the share that is allowed."""
    assert config.tree is not None
    text = read_newick(config.tree)
    tree = _parse(text, table, config.tree)
    notes = [f"tree: {note}" for note in tree.notes]
    placed = np.flatnonzero(tree.tip >= 0)
    if len(placed) < len(table.sequences):
        lost = [table.feature_ids[i] for i in np.flatnonzero(tree.tip < 0)]
        kept = table.counts[:, placed]
        share = 1 - kept.sum() / table.counts.sum()
        culprit = (
            f"{config.tree}: the tree lacks {len(lost)} of {len(table.sequences)} ASVs of {config.table}, "
            f"{share:.1%} of the reads"
        )
        if share > config.max_missing_from_tree or not len(placed):
            raise ValueError(
                f"{culprit}: the table has {some(lost[:2])}, the tree {_first_tip(text)}; name the tips by "
                "the sequences or by the table's ids, or allow more by --max-missing-from-tree"
            )
        notes.append(f"{culprit}: dropped ({some(lost)})")
        is_filled = np.diff(kept.indptr) > 0
        empty = [s for s, filled in zip(table.sample_ids, is_filled, strict=True) if not filled]
        if empty:
            notes.append(f"samples without an ASV in the tree: {len(empty)} dropped ({some(empty)})")
        table = dataclasses.replace(
            table,
            sample_ids=[s for s, filled in zip(table.sample_ids, is_filled, strict=True) if filled],
            sequences=[table.sequences[i] for i in placed],
            feature_ids=[table.feature_ids[i] for i in placed],
            counts=kept[np.flatnonzero(is_filled)],
            dropped_samples=table.dropped_samples | dict.fromkeys(empty, "no ASV in the tree"),
        )
        tree = dataclasses.replace(tree, tip=tree.tip[placed])
    return table, RootPaths(*root_paths(tree), tree.length), tuple(notes)


def _parse(text: str, table: AmpliconTable, path: Path) -> FlatTree:
    """Shear the tree to the ASVs, whose tips bear their sequences, or the table's names (hashes) for them."""
    names = list(dict.fromkeys([*table.sequences, *table.feature_ids]))
    tree = parse_newick(text, names, source=str(path))
    node = dict(zip(names, tree.tip.tolist(), strict=True))
    both = zip(table.sequences, table.feature_ids, strict=True)
    tip = [node[sequence] if node[sequence] >= 0 else node[name] for sequence, name in both]
    return dataclasses.replace(tree, tip=np.array(tip, dtype=np.int32))


def _first_tip(newick: str) -> str:
    """Name of a tip, for a message."""
    found = re.search(r"[(,]\s*('[^']*'|[^'()\[\],:;\s]+)", newick)
    return short(found[1].strip("'")) if found else "no named tip"


def _metadata_of(table: AmpliconTable, path: Path) -> tuple[pd.DataFrame, list[str]]:
    """Metadata rows of the table's samples, the ids as first column, and notes."""
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
    # No column of a file is named "": `reset_index` cannot collide.
    return frame.loc[shared].reset_index(names=""), found


def _look(ids: list[str]) -> str:
    return ", ".join(map(repr, ids[:3])) + (", ..." if len(ids) > 3 else "")


def _write(folder: Path, table: AmpliconTable, paths: RootPaths | None, metadata: pd.DataFrame, manifest: dict) -> None:
    """Write to a temporary name and rename: another process sees the whole dataset or none."""
    encoded, lengths = tokens.encode(table.sequences)
    if paths is None:
        nowhere = np.zeros(len(table.sequences) + 1, dtype=np.int64)
        paths = RootPaths(nowhere, np.zeros(0, dtype=np.int32), np.zeros(0))
    asvs = {
        "sequence": pa.array(table.sequences, type=pa.large_string()),
        "tokens": pa.FixedSizeListArray.from_arrays(pa.array(encoded.reshape(-1)), encoded.shape[1]),
        "length": pa.array(lengths),
        "path": pa.LargeListArray.from_arrays(pa.array(paths.offsets), pa.array(paths.nodes)),
    }
    counts = table.counts
    offsets = pa.array(counts.indptr.astype(np.int64))
    samples = {
        "id": pa.array(table.sample_ids, type=pa.large_string()),
        "asvs": pa.LargeListArray.from_arrays(offsets, pa.array(counts.indices.astype(np.int32))),
        "reads": pa.LargeListArray.from_arrays(offsets, pa.array(counts.data.astype(np.int64))),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write_table(scratch / "asvs.arrow", pa.table(asvs))
        _write_table(scratch / "samples.arrow", pa.table(samples))
        _write_table(scratch / "edges.arrow", pa.table({"length": pa.array(paths.length)}))
        _write_table(scratch / "metadata.arrow", pa.Table.from_pandas(metadata, preserve_index=False))
        (scratch / MANIFEST).write_text(json.dumps(manifest, indent=1))
        scratch.chmod(0o755)  # mkdtemp keeps others out, who may well share the cache
        scratch.rename(folder)
    except OSError:
        if not (folder / MANIFEST).exists():  # else another process was faster with the same contents
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_table(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        # One batch: a column of one chunk is one array on disk.
        writer.write_table(table.combine_chunks(), max_chunksize=max(1, table.num_rows))
