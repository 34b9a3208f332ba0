"""Presets: recipes of settings by name, which `--preset` puts below the flags that are given."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from aam.config import PretrainConfig, TrainConfig

Stage = Literal["pretrain", "train"]
STAGE_OF: dict[type, Stage] = {PretrainConfig: "pretrain", TrainConfig: "train"}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings that go well together, by the names of their fields in `aam.config`."""

    name: str
    description: str
    """In one line, for `--help`."""
    shared: dict[str, Any] = field(default_factory=dict)
    """Of both stages."""
    pretrain: dict[str, Any] = field(default_factory=dict)
    """Of stage 1, and with it the sizes of the encoder: stage 2 takes it as it was pretrained."""
    train: dict[str, Any] = field(default_factory=dict)
    """Of stage 2."""
    classifier: dict[str, Any] = field(default_factory=dict)
    """Of stage 2 with `--classifier`, in the place of those."""

    def settings(self, stage: Stage, *, classifier: bool = False) -> dict[str, Any]:
        """The settings of a stage."""
        if stage == "pretrain":
            return {**self.shared, **self.pretrain}
        return {**self.shared, **self.train, **(self.classifier if classifier else {})}


_ALL = (
    Preset(
        name="gut-small",
        description="some hundred to a few thousand samples on two CPU cores: frozen base, ensemble, all reads",
        pretrain={
            "batch_size": 32,
            "lr": 2e-3,
            "epochs": 100,
            "max_updates": 500,  # half a minute of a core for ibd, a minute for pmi
        },
        train={
            "freeze_base": True,
            "ensemble": True,
            "rarefy_depth": 0,
            "batch_size": 32,
            "lr": 1e-3,
            "epochs": 60,
            "target_loss": "mae",
            "class_weights": "balanced",
        },
        # Of few people, a network of classes soon learns them by heart (NOTES.md).
        classifier={"lr": 3e-4, "epochs": 10},
    ),
)
PRESETS = {preset.name: preset for preset in _ALL}


def find(name: str) -> Preset:
    """The preset of that name.

    Raises
    ------
    ValueError
        Where there is none.
    """
    if name not in PRESETS:
        raise ValueError(f"--preset {name}: no such preset; there is {', '.join(PRESETS)}")
    return PRESETS[name]


def listed(presets: Iterable[Preset] = _ALL) -> str:
    """Name and description of each, a line each."""
    return "\n".join(f"  {preset.name}: {preset.description}" for preset in presets)
