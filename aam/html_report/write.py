"""A run folder gets its report: one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from aam.data.files import replacing
from aam.html_report import REPORT
from aam.html_report.about import about, settings, subtitle_of, title_of, training
from aam.html_report.importance import importance
from aam.html_report.ordination import unifrac
from aam.html_report.page import Html, Section, element, page
from aam.html_report.run_files import Run
from aam.html_report.scores import baselines, predictions

_SECTIONS: tuple[tuple[str, str, Callable[[Run], Html], bool], ...] = (
    ("about", "What was trained", about, False),
    ("training", "Training", training, False),
    ("predictions", "Predicted and true", predictions, True),
    ("unifrac", "UniFrac", unifrac, False),
    ("baselines", "Baselines", baselines, True),
    ("asvs", "Important ASVs", importance, False),
    ("settings", "Settings", settings, False),
)
"""Id, title, what writes it, and whether it is for stage 2 alone."""


def write_report(folder: Path, base_record: dict[str, Any] | None = None) -> Path:
    """Write the report of a finished run into its folder.

    A part that cannot be made says why in its place, and on the terminal; the others are made all the same.

    Parameters
    ----------
    folder : Path
        Run folder, with `best` in it.
    base_record : dict, optional
        `run.json` of the stage 1 run that it started from.
    """
    run = Run.read(folder, base_record)
    sections = [
        Section(id=name, title=title, content=_made(title, write, run))
        for name, title, write, of_stage_2 in _SECTIONS
        if run.target is not None or not of_stage_2
    ]
    path = folder / REPORT
    with replacing(path) as scratch:
        scratch.write_text(page(title_of(run), subtitle_of(run), sections), encoding="utf-8")
    return path


def _made(title: str, write: Callable[[Run], Html], run: Run) -> Html:
    try:
        return write(run)
    except Exception as error:  # files that are gone, memory that is short: not worth the other parts
        reason = f"{type(error).__name__}: {error}"
        print(f"note: report: {title!r} could not be made: {reason}", flush=True)
        return element("p", f"This part could not be made: {reason}", class_="warning")
