"""Prepare small tables, and read back what was kept."""

from pathlib import Path

import biom
from source_files import A, B, C, a_table, write_hdf5

from aam.config import DataConfig
from aam.data.dataset import PreparedDataset
from aam.data.prepare import prepare

TREE = f"(({A}:1,{B}:2):3,{C}:4);"


def prepared(folder: Path, table: biom.Table | None = None, *, tree=TREE, metadata=None, **settings):
    """Prepare a small table, and a tree and metadata given as text."""
    files: dict = {"table": write_hdf5(folder / "table.biom", table or a_table())}
    for name, text in (("tree", tree), ("metadata", metadata)):
        if text is not None:
            files[name] = folder / f"{name}.txt"
            files[name].write_text(text)
    config = DataConfig(**files, **{"cache_dir": folder / "cache", **settings})
    return prepare(config, max_bp=150, use_tree=tree is not None)


def reads(dataset: PreparedDataset) -> dict[str, dict[str, int]]:
    """Sample to sequence to reads."""
    found = {}
    for row, sample in enumerate(dataset.sample_ids):
        asvs, counts = dataset.sample(row)
        names = [dataset.sequences[i] for i in asvs]
        found[sample] = dict(zip(names, counts.tolist(), strict=True))
    return found


def folders(cache: Path) -> list[Path]:
    return list(cache.iterdir())


def root_length(dataset: PreparedDataset, sequence: str) -> float:
    paths, row = dataset.paths, dataset.sequences.index(sequence)
    return paths.length[paths.nodes[paths.offsets[row] : paths.offsets[row + 1]]].sum()
