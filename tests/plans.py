"""Settings of small plans, and what they are refused for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from aam.config import LoopConfig, PretrainConfig, RayConfig, TargetConfig, TrainConfig
from aam.plan import make_plan
from runs import TINY, data_config

OUT = Path("out")


def change_metadata(folder: Path, to: Path, change: Callable[[pd.DataFrame], pd.DataFrame | None]) -> Path:
    """Write the metadata of the synthetic samples anew, changed by a function of the frame."""
    frame = pd.read_csv(folder / "metadata.tsv", sep="\t", dtype=str, index_col=0, keep_default_na=False)
    changed = change(frame)
    path = to / "metadata.tsv"
    (frame if changed is None else changed).to_csv(path, sep="\t")
    return path


def pretrain(folder: Path, *, ray: RayConfig | None = None, loop: LoopConfig | None = None, **data):
    return PretrainConfig(
        output_dir=OUT,
        data=data_config(folder, **data),
        model=TINY,
        ray=ray or RayConfig(),
        loop=loop or LoopConfig(),
    )


def train(folder: Path, *, target: TargetConfig | None = None, ray: RayConfig | None = None, **data):
    return TrainConfig(
        output_dir=OUT,
        data=data_config(folder, **data),
        model=TINY,
        loss=target or TargetConfig(target="gradient"),
        ray=ray or RayConfig(),
    )


def refusal(config, pretrained=None) -> str:
    with pytest.raises(ValueError) as caught:
        make_plan(config, pretrained)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def site(**settings) -> TargetConfig:
    return TargetConfig(target="site", classifier=True, **settings)


def write_ids(path: Path, ids: list[str]) -> Path:
    path.write_text("\n".join(ids))
    return path
