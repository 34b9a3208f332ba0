"""Command lines of the jobs: flags from the settings and back, faults of a user in one line."""

from __future__ import annotations

import inspect
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import tyro

from aam import presets
from aam.config import Location, PredictRayConfig, RayConfig, in_copied_folder, is_uri

C = TypeVar("C")

FLAGS_OF_STAGES = ("--pretrain-flags", "--train-flags")


def main(config_type: type[C], function: Callable[[C], None]) -> None:
    """Parse the command line into settings and call a function with them.

    See `reporting_faults` for what becomes of errors.

    Parameters
    ----------
    config_type : type
        Settings dataclass; its docstrings are the help.
    function : callable
        Takes the settings.
    """
    reporting_faults(lambda: function(parse(config_type)))


def reporting_faults(function: Callable[[], None]) -> None:
    """Call a function; a ValueError (a user's fault) or a failed run ends in one line and exit code 1.

    There is no traceback then; `AAM_DEBUG=1` shows it.
    """
    try:
        function()
    except BrokenPipeError:  # whoever read has had enough: `| head`
        sys.exit(141)  # 128 + SIGPIPE, as of the shell's own tools
    except (ValueError, RuntimeError, OSError) as error:
        if os.environ.get("AAM_DEBUG"):
            raise
        first, *lines = str(error).strip().split("\n\n", 1)
        print(f"error: {' '.join(first.split())}", *lines, sep="\n", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def parse(config_type: type[C], arguments: Sequence[str] | None = None) -> C:
    """Settings out of flags (those of the command line, unless given), with absolute paths.

    Workers, and jobs that were submitted, run in folders of their own. A preset goes below the flags: for one stage, in
    front of them; for a job of several stages, in front of `pretrain_flags` and `train_flags`, without what is given
    to all stages.

    Raises
    ------
    ValueError
        For a preset that there is not.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = _preset_name(arguments) if _has_presets(config_type) else None
    preset = None if name is None else presets.find(name)
    stage = presets.STAGE_OF.get(config_type)
    classifier = "--classifier" in arguments
    below = [] if preset is None or stage is None else flags(preset.settings(stage, classifier=classifier))
    config = tyro.cli(
        config_type,
        args=[*below, *arguments],
        description=_description(config_type),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    if preset is not None and stage is None:
        config = _for_its_stages(config, preset, arguments)
    return _absolute(config)


def parse_known(config_type: type[C], arguments: Sequence[str] | None = None) -> tuple[C, list[str]]:
    """Settings out of the flags that they know, and the other arguments."""
    config, others = tyro.cli(
        config_type,
        args=arguments,
        description=_description(config_type),
        config=(tyro.conf.OmitArgPrefixes,),
        return_unknown_args=True,
    )
    return _absolute(config), others


def _has_presets(config_type: Any) -> bool:
    return any(field.name == "preset" for field in fields(config_type))


def _description(config_type: Any) -> str | None:
    text = inspect.getdoc(config_type)
    return f"{text}\n\nPresets (--preset NAME):\n{presets.listed()}" if _has_presets(config_type) else text


def _preset_name(arguments: list[str]) -> str | None:
    """Value of the last --preset."""
    name = None
    for argument, following in zip_longest(arguments, arguments[1:]):
        flag, equals, value = argument.partition("=")
        if flag == "--preset":
            name = value if equals else following
    return name


def _for_its_stages(config: Any, preset: presets.Preset, arguments: list[str]) -> Any:
    """Put what a preset says of each stage below the flags of that stage; a flag given to all stages is above it."""
    names = {argument.partition("=")[0][2:].replace("-", "_") for argument in arguments if argument.startswith("--")}
    given = names | {name.removeprefix("no_") for name in names}
    of_stages = {}
    classifier = config.loss.classifier or "--classifier" in shlex.split(config.train_flags)
    for stage in presets.STAGE_OF.values():
        settings = preset.settings(stage, classifier=classifier)
        below = {name: value for name, value in settings.items() if name not in given}
        of_stages[f"{stage}_flags"] = f"{shlex.join(flags(below))} {getattr(config, f'{stage}_flags')}".strip()
    return replace(config, **of_stages)


def with_values_attached(arguments: list[str]) -> list[str]:
    """Write `--train-flags "--lr 1e-3"` with an equals sign; the parser would take the value for a flag."""
    attached: list[str] = []
    for argument in arguments:
        if attached and attached[-1] in FLAGS_OF_STAGES:
            attached[-1] += f"={argument}"
        else:
            attached.append(argument)
    return attached


def to_arguments(config: Any) -> list[str]:
    """The flags that give these settings; those that are as by default, or as in their preset, are left out."""
    name, stage = getattr(config, "preset", None), presets.STAGE_OF.get(type(config))
    if name is None or stage is None:
        return _differing(config, {})
    return _differing(config, presets.find(name).settings(stage, classifier=getattr(config.loss, "classifier", False)))


def _differing(config: Any, preset: dict[str, Any]) -> list[str]:
    arguments: list[str] = []
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            arguments += _differing(value, preset)
        elif value != preset.get(field.name, _default(field)):
            arguments += flags({field.name: value})
    return arguments


def flags(settings: dict[str, Any]) -> list[str]:
    """The flags that give settings, by the names of their fields in `aam.config`."""
    arguments: list[str] = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool) and name not in _TRUE_FALSE_OR_NONE:
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple | list):
            arguments += [f"--{flag}", *map(str, value)]
        elif str(value).startswith("-"):  # apart from its flag, it would be taken for one
            arguments.append(f"--{flag}={value}")
        else:
            arguments += [f"--{flag}", str(value)]
    return arguments


_TRUE_FALSE_OR_NONE = {
    name
    for of in (RayConfig, PredictRayConfig)
    for name, hint in get_type_hints(of).items()
    if set(get_args(hint)) == {bool, type(None)}
}
"""Fields whose flags take True, False or None as a value."""


def _default(field: Field) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _absolute(config: Any) -> Any:
    """The same settings with absolute paths."""
    changed = {}
    hints = get_type_hints(type(config))
    for field in fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if isinstance(value, Path):
            changed[field.name] = _absolute_path(value)
        elif value is not None and (hint is Location or Location in get_args(hint)):
            changed[field.name] = value if is_uri(value) else str(_absolute_path(Path(value)))
        elif is_dataclass(value):
            changed[field.name] = _absolute(value)
    return replace(config, **changed)


def _absolute_path(path: Path) -> Path:
    path = path.expanduser()
    if not path.is_absolute() and in_copied_folder() and not path.exists():
        raise ValueError(
            f"{path}: this job runs in a copy of the folder that it was submitted with; give an absolute path "
            f'("$PWD/{path}", say)'
        )
    return Path(os.path.abspath(path))
