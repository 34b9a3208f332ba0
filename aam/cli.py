"""Command lines of the jobs: flags from the settings, faults of a user in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import tyro

C = TypeVar("C")


def main(config_type: type[C], function: Callable[[C], None]) -> None:
    """Parse the command line into settings and call a function with them.

    A ValueError (a user's fault) or a failed run ends in one line on standard error and exit code 1, without a
    traceback; `AAM_DEBUG=1` shows it.

    Parameters
    ----------
    config_type : type
        Settings dataclass; its docstrings are the help.
    function : callable
        Takes the settings.
    """
    try:
        config = tyro.cli(config_type, description=config_type.__doc__, config=(tyro.conf.OmitArgPrefixes,))
        function(_absolute(config))
    except (ValueError, RuntimeError, OSError) as error:
        if os.environ.get("AAM_DEBUG"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _absolute(config: Any) -> Any:
    """The same settings with absolute paths: workers run in folders of their own."""
    changed = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Path):
            changed[field.name] = Path(os.path.abspath(value.expanduser()))
        elif is_dataclass(value):
            changed[field.name] = _absolute(value)
    return replace(config, **changed)
