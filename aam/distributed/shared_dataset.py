"""The prepared dataset on nodes that do not see the driver's disk."""

from __future__ import annotations

from pathlib import Path

from aam.config import is_uri
from aam.data.dataset import MANIFEST, PreparedDataset
from aam.data.prepare import default_cache
from aam.distributed.storage import exists, fetch_to, join, upload


def share_dataset(dataset: PreparedDataset, storage_path: str) -> None:
    """Copy a dataset to where all nodes can read it."""
    location = join(storage_path, "datasets", dataset.folder.name)
    if not exists(join(location, MANIFEST)):
        upload(dataset.folder, location, last=MANIFEST)


def dataset_at_hand(dataset: PreparedDataset, storage_path: str | None) -> PreparedDataset:
    """The dataset as a folder that this machine sees.

    Raises
    ------
    ValueError
        Where it sees neither the folder of the driver nor a shared one.
    """
    folder = dataset.folder
    if (folder / MANIFEST).exists():
        return dataset
    if storage_path is None:
        raise ValueError(
            f"{folder}: this node does not see the prepared dataset; give --storage-path, or a --cache-dir "
            "that all nodes see"
        )
    shared = join(storage_path, "datasets", folder.name)
    folder = default_cache() / folder.name if is_uri(shared) else Path(shared)
    if not (folder / MANIFEST).exists():
        fetch_to(shared, folder)
    return PreparedDataset(folder)
