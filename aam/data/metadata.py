"""Read sample metadata: QIIME 2 / Qiita tab-separated text, every cell kept as the text it was.

scikit-bio parses the file. Before it, the header is made to suit it; after it, the words for "no value"
become missing. Types are decided only where a column is used, by `numeric_column` and `text_column`.
"""

import csv
import difflib
import io
import math
import re
import textwrap
from collections import Counter
from pathlib import Path
from typing import cast

import pandas as pd

from aam.data.files import SHOWN, Kind, decode, file_kind, some

# Compared after strip and casefold; anything that begins with "missing:" counts too (INSDC: "missing: control
# sample", Qiita: "Missing: Not provided"). Only words that nobody would choose for a class are here:
# "unknown", "none", "null", "other", "no" and "-" are real answers in questionnaires and stay.
_MISSING = {
    "not collected",  # Qiita and INSDC, as are the next four
    "not applicable",
    "not provided",
    "restricted access",
    "missing",
    "labcontrol test",  # Qiita's blanks
    "nan",  # pandas
    "<na>",
    "na",  # R
    "n/a",
    "#n/a",  # a failed look-up in a spreadsheet
}
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")  # float() also takes 1_000 and inf
_ID_WORDS = {"sampleid", "samplename", "sample", "id", "name"}
_EXPECTED = "tab-separated metadata with one row per sample"


def read_metadata(path: Path) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Read a metadata file; the first column holds the sample ids, whatever its header.

    Returns
    -------
    tuple
        A frame (index: sample id, cells: text or None where missing) and the notes a user should be told.
    """
    rows = _rows(path)
    at = _header_at(rows, path)
    header, given = rows[at], rows[at][0]
    if given in header[1:]:
        raise ValueError(f"{path}: two columns are named {given!r}: rename or remove one")
    notes = []
    if not is_id_header(given):
        header[0] = "sample-id"
        notes.append(f"first column {given!r} is read as the sample ids")
    # scikit-bio reserves some names for the ids; Qiita's files have `sample_name` as an ordinary column too.
    stand_in = {name: f"column {name}" for name in header[1:] if is_id_header(name)}
    header[1:] = [stand_in.get(name, name) for name in header[1:]]
    comments = _check_rows(rows[at + 1 :], len(header), path)
    if comments:
        notes.append(f"lines that begin with # were skipped: {len(comments)} ({some(comments)})")

    frame = _parse(rows, header[1:], path)
    frame = frame.rename(columns={new: old for old, new in stand_in.items()}).rename_axis(index="sample_id")
    for name in frame.columns:
        frame[name], words = _without_missing_words(text_column(frame, name, source=path))
        if words:
            shown = ", ".join(f"{word!r} {count}" for word, count in words.most_common(3))
            shown += ", ..." if len(words) > 3 else ""
            notes.append(f"column {name!r}: read as missing: {shown}")
    return frame, tuple(notes)


def numeric_column(frame: pd.DataFrame, column: str, *, source: Path | str) -> pd.Series:
    """Return a column as float64, NaN where missing; a cell that is no finite number is an error."""
    text = text_column(frame, column, source=source)
    wrong: dict[str, object] = {}  # each offending value, with the first sample that has it
    for name, cell in text.items():
        if cell is not None and not _is_number(cell):
            wrong.setdefault(cell, name)
    if wrong:
        shown = ", ".join(f"{cell!r} (sample {name})" for cell, name in list(wrong.items())[:SHOWN])
        shown += f", ... ({len(wrong) - SHOWN} more values)" if len(wrong) > SHOWN else ""
        raise ValueError(
            f"{source}: column {column!r} is not numeric: {shown}; "
            "correct the cells, or pass --classifier to predict classes"
        )
    values = [math.nan if cell is None else float(cell) for cell in text]
    return pd.Series(values, index=text.index, name=column, dtype="float64")


def text_column(frame: pd.DataFrame, column: str, *, source: Path | str) -> pd.Series:
    """Return a column as text, None where missing."""
    if column not in frame.columns:
        names = [str(name) for name in frame.columns]
        folded = {name.casefold(): name for name in reversed(names)}
        close = [folded[name] for name in difflib.get_close_matches(column.casefold(), folded, n=SHOWN)]
        rest = [name for name in names if name not in close]
        hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
        others = ", ".join(map(repr, rest[:40])) or "none"
        others += f", ... ({len(rest) - 40} more)" if len(rest) > 40 else ""
        raise ValueError(f"{source}: no column {column!r}: {hint}{'other' if close else 'its'} columns: {others}")
    return cast(pd.Series, frame[column])


def _is_number(cell: str) -> bool:
    return _NUMBER.fullmatch(cell) is not None and math.isfinite(float(cell))


def _rows(path: Path) -> list[list[str]]:
    """Split the file into stripped cells, without its empty lines."""
    kind = file_kind(path, _EXPECTED)
    if kind not in (Kind.TABBED, Kind.TEXT):
        hint = ": save the sheet as tab-separated text" if kind == Kind.ZIP else ""
        found = "a zip archive (an Excel workbook?)" if kind == Kind.ZIP else kind
        raise ValueError(f"{path}: expected {_EXPECTED}, found {found}{hint}")
    text = decode(Path(path).read_bytes(), path)
    if "\t" not in text:
        found = "comma-separated text" if "," in text else "text without any tab"
        raise ValueError(f"{path}: expected {_EXPECTED}, found {found}: save it as tab-separated text")
    reader = csv.reader(io.StringIO(text, newline=""), dialect="excel-tab", strict=True)
    try:
        rows = [[cell.strip() for cell in row] for row in reader]
    except csv.Error as error:
        raise ValueError(f'{path}: line {reader.line_num}: {error}: is a quote (") left open?') from error
    return [row for row in rows if any(row)]


def _header_at(rows: list[list[str]], path: Path) -> int:
    """Find the header: the first row that is no comment. Removes the empty cells at its end."""
    for at, row in enumerate(rows):
        # "#SampleID" is a header, in any spelling, "# exported on Monday" is a comment.
        word = re.sub("[^a-z]", "", row[0].casefold())
        is_comment = row[0].startswith("#") and (word not in _ID_WORDS or not any(row[1:]))
        if is_comment and not is_id_header(row[0]):
            continue
        while not row[-1]:
            row.pop()
        if len(row) < 2:
            raise ValueError(f"{path}: expected {_EXPECTED}; the header {some(row)!r} has one column only")
        return at
    raise ValueError(f"{path}: expected {_EXPECTED}, found only comments (lines that begin with #)")


def _check_rows(rows: list[list[str]], width: int, path: Path) -> list[str]:
    """Refuse rows that scikit-bio would refuse without saying which; return the comments' first cells."""
    comments = []
    for row in rows:
        if row[0].startswith(("#q2:", "#sk:")):
            continue
        if row[0].startswith("#"):
            comments.append(row[0])
        elif not row[0]:
            raise ValueError(f"{path}: a row has no sample id ({some(filter(None, row))}): give it one or remove it")
        elif any(row[width:]):
            raise ValueError(
                f"{path}: the row of sample {row[0]!r} has {len(row)} cells, the header {width}: "
                "name the columns, or remove the surplus cells"
            )
    return comments


def is_id_header(name: str) -> bool:
    """Whether scikit-bio takes a first cell for the header of the sample ids."""
    # Here and not above, as in `_parse`: it takes a second, which the processes that only train should not.
    from skbio.metadata import base

    return bool(base.is_id_header(name))


def _parse(rows: list[list[str]], columns: list[str], path: Path) -> pd.DataFrame:
    """Let scikit-bio check and parse the rows, every column as text."""
    from skbio.metadata import SampleMetadata
    from skbio.metadata.io import MetadataFileError

    text = io.StringIO(newline="")
    csv.writer(text, dialect="excel-tab").writerows(rows)
    text.seek(0)
    try:
        # Overrules `#q2:types` and `#q2:missing`: "007" stays "007", and missing words are counted here.
        metadata = SampleMetadata.load(
            text,  # pyright: ignore[reportArgumentType] (an open file does as well as a path)
            column_types=dict.fromkeys(columns, "categorical"),
            column_missing_schemes=dict.fromkeys(columns, "blank"),
        )
    except MetadataFileError as error:
        reason = str(error).split("There may be more errors")[0]
        reason = reason.replace("There was an issue with loading the metadata file:", "")
        raise ValueError(f"{path}: {textwrap.shorten(reason, 300, placeholder=' ...')}") from error
    frame = metadata.to_dataframe().astype(object)
    return cast(pd.DataFrame, frame.where(frame.notna(), None))


def _without_missing_words(cells: pd.Series) -> tuple[pd.Series, Counter[str]]:
    def is_missing(cell: str | None) -> bool:
        folded = "" if cell is None else cell.casefold()
        return folded in _MISSING or folded.startswith("missing:")

    said = cells.map(is_missing)
    return cells.mask(said, None).astype(object), Counter(cells[said])
