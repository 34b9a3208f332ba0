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

    def settings(self, stage: Stage) -> dict[str, Any]:
        """What the preset says of a stage."""
        return {**self.shared, **(self.pretrain if stage == "pretrain" else self.train)}


_ALL = (
    Preset(
        name="gut-small",
        description="some hundred to a few thousand samples on two CPU cores: frozen base, ensemble, all reads",
        shared={"precision": "fastest"},
        pretrain={
            "embedding_dim": 64,
            "attention_layers": 2,
            "asv_layers": 2,
            "batch_size": 32,
            "lr": 1e-3,
            "epochs": 12,
            "max_updates": 200,  # what 12 epochs are of 530 samples: rich tables cost ten times as much an update
            "asv_chunk_size": 1024,  # batches of samples as rich as soil's would take 20 GiB
        },
        train={
            "freeze_base": True,
            "ensemble": True,
            "rarefy_depth": 0,
            "head_layers": 0,  # attention of its own takes most of the time and is no better (NOTES.md)
            "batch_size": 16,
            "lr": 1e-3,
            "dropout": 0.4,
            "weight_decay": 0.1,
            "epochs": 60,  # 50 samples are too few updates an epoch to learn from in 20
            "max_updates": 1000,
            "target_loss": "mae",
            "class_weights": "balanced",
        },
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
