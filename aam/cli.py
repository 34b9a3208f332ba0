"""Command lines of the jobs: flags from the settings and back, faults of a user in one line."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import tyro

from aam.config import Location, in_copied_folder, is_uri

C = TypeVar("C")


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

    Workers, and jobs that were submitted, run in folders of their own.
    """
    return _absolute(
        tyro.cli(
            config_type, args=arguments, description=inspect.getdoc(config_type), config=(tyro.conf.OmitArgPrefixes,)
        )
    )


def parse_known(config_type: type[C], arguments: Sequence[str] | None = None) -> tuple[C, list[str]]:
    """Settings out of the flags that they know, and the other arguments."""
    config, others = tyro.cli(
        config_type,
        args=arguments,
        description=inspect.getdoc(config_type),
        config=(tyro.conf.OmitArgPrefixes,),
        return_unknown_args=True,
    )
    return _absolute(config), others


def to_arguments(config: Any) -> list[str]:
    """The flags that give these settings; those that are as by default are left out."""
    arguments: list[str] = []
    for field in fields(config):
        value = getattr(config, field.name)
        flag = field.name.replace("_", "-")
        if is_dataclass(value):
            arguments += to_arguments(value)
        elif value is None or value == _default(field):
            continue
        elif isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple):
            arguments += [f"--{flag}", *map(str, value)]
        else:
            arguments += [f"--{flag}", str(value)]
    return arguments


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
