"""Where the checkpoints of a run are.

A run has a home: its `--output-dir`, or `--storage-path`/NAME. Ray keeps the checkpoints, best and latest, under
`HOME/ray/train/`. When a run has ended, `best` and `last` in its `--output-dir` are these two.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from aam.config import RunConfig, is_uri
from aam.distributed.storage import copy_checkpoint, download, exists, fetch, join, name_of, read_json, resolve
from aam.training.checkpoint import CONFIG, is_checkpoint

TRAIN_RUN = "train"
SCORE = "val_loss"
RECORD, SWEEP, TRIALS = "run.json", "sweep.json", "trials"
_OWN = ("ray/", f"{TRIALS}/", "best/", "last/", "base/", ".aam")
"""What of a home is not copied to the run folder with the logs."""


def home_of(config: RunConfig) -> str:
    """Location of a run or sweep."""
    if config.ray.storage_path is None:
        return str(config.output_dir)
    return join(config.ray.storage_path, config.output_dir.name)


def ray_storage(home: str) -> str:
    """What Ray keeps of a run."""
    return join(home, "ray")


def find_best(location: str | Path) -> Path:
    """The checkpoint that a flag names, as a folder on this machine.

    Parameters
    ----------
    location : str or Path
        A checkpoint, a run folder (its best is taken) or a sweep (that of its best trial); path or URI.

    Raises
    ------
    ValueError
        Where there is none.
    """
    if is_uri(location):
        return _fetch_best(str(location))
    path = Path(location)
    if is_checkpoint(path):
        return path
    if not path.is_dir():
        raise ValueError(f"{path}: no such run folder or checkpoint")
    if is_checkpoint(path / "best"):
        return (path / "best").resolve()
    found = reported(str(path))
    if found is None:
        raise ValueError(f"{path}: neither a checkpoint nor a run folder with one (has its run written any?)")
    return Path(found[0])


def _fetch_best(location: str) -> Path:
    if exists(join(location, CONFIG)):
        return fetch(location)
    if not exists(location):
        raise ValueError(f"{location}: no such run folder or checkpoint")
    sweep = read_json(join(location, SWEEP))
    if sweep is not None and sweep.get("best") is not None:
        return _fetch_best(join(location, TRIALS, sweep["best"]))
    found = reported(location)
    if found is None:
        raise ValueError(f"{location}: neither a checkpoint nor a run folder with one (has its run written any?)")
    return fetch(found[0])


def run_record(location: str | Path) -> dict[str, Any] | None:
    """`run.json` of the run folder that a location is, or lies in; of a sweep, that of its best trial."""
    for folder in _folders_upwards(location):
        record = read_json(join(folder, RECORD))
        if record is not None:
            return record
        sweep = read_json(join(folder, SWEEP))
        if sweep is not None and sweep.get("best") is not None:
            return read_json(join(folder, TRIALS, sweep["best"], RECORD))
    return None


def _folders_upwards(location: str | Path) -> list[str]:
    """A location and the folders it may lie in, as a checkpoint lies in RUN/ray/train/."""
    if not is_uri(location):
        path = Path(location).resolve()
        return [str(folder) for folder in (path, *path.parents[:3])]
    base, mark, query = str(location).partition("?")
    scheme, _, path = base.partition("://")
    parts = path.strip("/").split("/")
    return [f"{scheme}://{'/'.join(parts[: len(parts) - up])}{mark}{query}" for up in range(min(4, len(parts) - 1))]


def has_checkpoints(home: str) -> bool:
    """Whether a run got as far as its first checkpoint."""
    return exists(join(ray_storage(home), TRAIN_RUN, "checkpoint_manager_snapshot.json"))


def reported(home: str) -> tuple[str, str] | None:
    """Best and latest checkpoint that Ray has of a run; None where it has none. Needs no cluster."""
    if not has_checkpoints(home):
        return None
    from ray.train import Result  # seconds to import, and most commands find `best` without it

    folder = join(ray_storage(home), TRAIN_RUN)
    filesystem, path = resolve(folder)
    logging.getLogger("ray.train").setLevel(logging.WARNING)  # else: four lines on how to start a new run
    try:
        result = Result.from_path(path, storage_filesystem=filesystem)
    except json.JSONDecodeError:  # a process was lost while it wrote the snapshot
        return _readable(Path(folder))
    best = result.get_best_checkpoint(SCORE, "min")
    if best is None or result.checkpoint is None:
        return None
    return join(folder, name_of(best.path)), join(folder, name_of(result.checkpoint.path))


def _readable(folder: Path) -> tuple[str, str] | None:
    """Best and latest by what the checkpoints say of themselves."""
    metrics = {}
    for path in sorted(folder.glob("epoch_*")):
        if is_checkpoint(path):
            metrics[path] = json.loads((path / CONFIG).read_text())["metrics"]
    if not metrics:
        return None
    # Of equals the later, as everywhere.
    best = min(reversed(metrics), key=lambda path: metrics[path]["val/total_loss"])
    return str(best), str(list(metrics)[-1])


def place_checkpoints(output_dir: Path, home: str) -> Path:
    """Put `best` and `last` of a run into its folder: links where they lie in it, else copies; returns the best."""
    found = reported(home)
    assert found is not None, f"{home}: the run reported no checkpoint"
    for name, location in zip(("best", "last"), found, strict=True):
        place = output_dir / name
        if home == str(output_dir):
            link(place, Path(location))
        else:
            copy_checkpoint(location, place)
    return (output_dir / "best").resolve()


def link(place: Path, target: Path) -> None:
    """Make `place` a link to a folder below its own."""
    place.unlink(missing_ok=True)
    place.symlink_to(target.relative_to(place.parent))


def copy_logs(home: str, output_dir: Path) -> None:
    """Bring the logs in a run folder up to date with those in its home."""
    if home != str(output_dir) and exists(home):
        download(home, output_dir, wanted=lambda path: not path.startswith(_OWN))
