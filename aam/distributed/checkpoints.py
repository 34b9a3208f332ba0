"""Where the checkpoints of a run are.

Ray keeps them, best and latest, under `<run folder>/ray/train/`; when a run has ended, `best` and `last` in the
run folder point at them.
"""

from __future__ import annotations

from pathlib import Path

from aam.training.checkpoint import is_checkpoint

TRAIN_RUN = "train"
SCORE = "val_loss"


def storage(output_dir: Path) -> Path:
    """Ray's storage of a run folder."""
    return output_dir / "ray"


def find_best(path: Path) -> Path:
    """The checkpoint that a flag names: a checkpoint itself, or the best of a run folder.

    Raises
    ------
    ValueError
        Where there is none.
    """
    if is_checkpoint(path):
        return path
    if not path.is_dir():
        raise ValueError(f"{path}: no such run folder or checkpoint")
    if is_checkpoint(path / "best"):
        return (path / "best").resolve()
    found = reported(path)
    if found is None:
        raise ValueError(f"{path}: neither a checkpoint nor a run folder with one (has its run written any?)")
    return found[0]


def has_checkpoints(output_dir: Path) -> bool:
    """Whether a run got as far as its first checkpoint."""
    return (storage(output_dir) / TRAIN_RUN / "checkpoint_manager_snapshot.json").exists()


def reported(output_dir: Path) -> tuple[Path, Path] | None:
    """Best and latest checkpoint that Ray has of a run; None where it has none. Needs no cluster."""
    run = storage(output_dir) / TRAIN_RUN
    if not has_checkpoints(output_dir):
        return None
    from ray.train import Result  # seconds to import, and most commands find `best` without it

    result = Result.from_path(str(run))
    best = result.get_best_checkpoint(SCORE, "min")
    if best is None or result.checkpoint is None:
        return None
    return Path(best.path), Path(result.checkpoint.path)


def link_checkpoints(output_dir: Path) -> Path:
    """Point `best` and `last` of a run folder at the checkpoints; returns the best."""
    found = reported(output_dir)
    assert found is not None, f"{output_dir}: the run reported no checkpoint"
    for name, target in zip(("best", "last"), found, strict=True):
        link = output_dir / name
        link.unlink(missing_ok=True)
        link.symlink_to(target.relative_to(output_dir))
    return found[0]
