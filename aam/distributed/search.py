"""What a sweep draws from: settings by name, as Tune domains."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ray import tune

from aam.config import RunConfig, SweepConfig

GROUPS = ("data", "model", "loss", "loop", "ray")
"""Fields of a run's settings that hold its flags."""
_FIXED = {
    # where and on what the trials run
    *("num_workers", "cpus_per_worker", "use_gpu", "placement", "storage_path", "ray_address", "max_failures"),
    *("table", "tree", "metadata", "sequences", "train_ids", "val_ids", "test_ids", "cache_dir", "group_column"),
    *("val_fraction", "test_fraction", "missing_samples", "max_missing_from_tree", "max_bp", "seed"),
    *("epochs", "max_updates", "patience", "max_skipped_updates", "histogram_every"),
    # what the validation loss is made of
    *("base_weight", "nuc_weight", "mask_fraction", "target", "classifier", "target_transform", "target_loss"),
    *("quantiles", "class_weights", "target_weight", "count_weight", "count_mask_fraction"),
}
"""Settings that are the same for all trials: with others, their validation losses could not be compared."""


def search_space(sweep: SweepConfig, config: RunConfig) -> dict[str, Any]:
    """Tune domains of the settings to search.

    Parameters
    ----------
    sweep : SweepConfig
        With the flags.
    config : PretrainConfig or TrainConfig
        What the trials share.

    Raises
    ------
    ValueError
        For a setting that is not there or must not differ, and values that are not of its type.
    """
    space: dict[str, Any] = {}
    if sweep.lr is not None or not (sweep.token_limit or sweep.search):
        space["lr"] = _range(*(sweep.lr or (1e-5, 1e-3)), is_log=True)
    if sweep.token_limit:
        space["token_limit"] = tune.choice(list(sweep.token_limit))
    types = setting_types(config)
    for text in sweep.search:
        name, equals, values = text.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        if not equals or not values:
            raise ValueError(f"--search {text}: expected NAME=A,B,C or NAME=LO..HI or NAME=LO..HI:log")
        if name in space:
            raise ValueError(f"--search {text}: {name} is searched already")
        if name in _FIXED:
            raise ValueError(f"--search {text}: {name} must be the same for all trials, or they cannot be compared")
        if name not in types:
            near = difflib.get_close_matches(name, types, n=1)
            raise ValueError(
                f"--search {text}: no setting {name!r} to search{f'; did you mean {near[0]!r}' if near else ''}"
            )
        space[name] = _domain(text, values, types[name])
    return space


def setting_types(config: RunConfig) -> dict[str, Any]:
    """Settings that trials may differ in, with the type of their values, or the words to choose from."""
    found = {}
    for group in GROUPS:
        hints = get_type_hints(type(getattr(config, group)))
        for field in fields(getattr(config, group)):
            if field.name not in _FIXED:
                words = _words(hints[field.name])
                options = [t for t in get_args(hints[field.name]) or (hints[field.name],) if t is not type(None)]
                found[field.name] = words or options[0]
    return found


def _words(hint: Any) -> tuple[str, ...]:
    """Words of a Literal, which may be optional."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return next((get_args(option) for option in get_args(hint) if get_origin(option) is Literal), ())


def _domain(text: str, values: str, kind: Any) -> Any:
    if isinstance(kind, tuple):
        chosen = [value.strip() for value in values.split(",")]
        if wrong := [value for value in chosen if value not in kind]:
            raise ValueError(f"--search {text}: {wrong[0]!r} is none of {', '.join(kind)}")
        return tune.choice(chosen)
    try:
        if ".." not in values:
            return tune.choice([_value(value, kind) for value in values.split(",")])
        ends, _, log = values.partition(":")
        if log not in ("", "log") or kind not in (int, float):
            raise ValueError
        low, high = (_value(end, kind) for end in ends.split(".."))
        if kind is int:
            return tune.lograndint(low, high + 1) if log else tune.randint(low, high + 1)
        return _range(low, high, is_log=bool(log))
    except ValueError:
        raise ValueError(
            f"--search {text}: expected values of type {kind.__name__} as NAME=A,B,C"
            + (" or NAME=LO..HI or NAME=LO..HI:log (LO below HI; above 0 for log)" if kind in (int, float) else "")
        ) from None


def _value(text: str, kind: type) -> Any:
    if kind is bool:
        if text.strip().lower() not in ("true", "false"):
            raise ValueError
        return text.strip().lower() == "true"
    return kind(text.strip())


def _range(low: float, high: float, *, is_log: bool) -> Any:
    if low == high:
        return tune.choice([low])
    if low > high or (is_log and low <= 0):
        raise ValueError
    return tune.loguniform(low, high) if is_log else tune.uniform(low, high)
