"""Recognise a file by its first bytes, because suffixes lie, and read text or a QIIME 2 artifact's member.

A QIIME 2 artifact (.qza) is a zip: `<uuid>/metadata.yaml` names its type, its files lie in `<uuid>/data/`.
"""

import contextlib
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path

SHOWN = 5
"""Names that a message spells out before it only counts."""


class Kind(StrEnum):
    """What a file is, in the words of an error message."""

    HDF5 = "an HDF5 file"
    ZIP = "a zip archive"
    GZIP = "a gzip file (unpack it first: gunzip)"
    UTF16 = "UTF-16 text (save it as UTF-8)"
    EMPTY = "an empty file"
    BINARY = "a binary file of unknown type"
    JSON = "JSON text"
    FASTA = "FASTA text"
    NEXUS = "a NEXUS file (export it as newick)"
    NEWICK = "a newick tree"
    HTML = "an HTML or XML page (was a web page saved in place of the file?)"
    TABBED = "tab-separated text"
    TEXT = "plain text"


def file_kind(path: Path, expected: str) -> Kind:
    """Recognise a file by its first bytes; `expected` goes into the error where there is no such file."""
    try:
        with open(path, "rb") as stream:
            return kind_of(stream.read(4096))
    except OSError as error:
        found = "a directory" if isinstance(error, IsADirectoryError) else error.strerror
        raise ValueError(f"{path}: expected {expected}, found: {found}") from error


def kind_of(head: bytes) -> Kind:
    """Recognise content by its first bytes."""
    for magic, kind in (
        (b"\x89HDF\r\n\x1a\n", Kind.HDF5),
        (b"PK\x03\x04", Kind.ZIP),
        (b"PK\x05\x06", Kind.ZIP),
        (b"\x1f\x8b", Kind.GZIP),
        (b"\xff\xfe", Kind.UTF16),
        (b"\xfe\xff", Kind.UTF16),
    ):
        if head.startswith(magic):
            return kind
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text:
        return Kind.EMPTY
    if b"\0" in text:
        return Kind.BINARY
    starts = {b"{": Kind.JSON, b">": Kind.FASTA, b"(": Kind.NEWICK, b"<": Kind.HTML}
    if text[:1] in starts:
        return starts[text[:1]]
    if re.match(rb"(\[[^]]*\]\s*)+\(", text):  # a rooting comment: [&R] (...)
        return Kind.NEWICK
    if text[:6].upper() == b"#NEXUS":
        return Kind.NEXUS
    return Kind.TABBED if b"\t" in text else Kind.TEXT


def read_text(path: Path, kind: Kind, expected: str, member: str, types: Sequence[str]) -> str:
    """Read a text file of one kind, or the same text out of an artifact of one of the types."""
    found = file_kind(path, expected)
    content = read_member(path, member, types) if found == Kind.ZIP else b""
    if found == Kind.ZIP:
        found = kind_of(content[:4096])
    elif found == kind:
        content = Path(path).read_bytes()
    if found != kind:
        raise ValueError(f"{path}: expected {expected}, found {found}")
    return decode(content, path)


def decode(content: bytes, path: Path) -> str:
    """Decode UTF-8, with or without a byte order mark."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8"
        ) from error


def read_member(path: Path, name: str, types: Sequence[str]) -> bytes:
    """Read `<uuid>/data/<name>` of a QIIME 2 artifact, without extracting it."""
    expected = f"a QIIME 2 artifact of type {' or '.join(types)}"
    try:
        with zipfile.ZipFile(path) as archive:
            # Exact depth: the provenance inside an artifact repeats these names further down.
            members = archive.namelist()
            described = [m for m in members if m.count("/") == 1 and m.endswith("/metadata.yaml")]
            data = [m for m in members if m.count("/") == 2 and m.endswith(f"/data/{name}")]
            text = archive.read(described[0]).decode("utf-8", "replace") if described else ""
            match = re.search(r"^type:\s*([^\n%]+)", text, flags=re.MULTILINE)
            found = match.group(1).strip(" \r'\"") if match else None
            if found is not None and found not in types:
                raise ValueError(f"{path}: expected {expected}, found {found}")
            if not data:
                held = f"a zip archive with {some(members) or 'nothing in it'}"
                office = "an Office file such as .xlsx" if "[Content_Types].xml" in members else None
                raise ValueError(f"{path}: expected {expected}, found {office or held}")
            return archive.read(data[0])
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged zip archive ({error}): copy or download it again") from error


def is_special(path: Path) -> bool:
    """Whether a path leads to a pipe or a device: /dev/stdout, say, the target of whose link need not exist."""
    return path.exists() and not path.is_file()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write to, which takes the place of one of that name once it is whole; its folder is made.

    What is there and no file, a pipe or a device, is written to itself.
    """
    if is_special(path):
        yield path
        return
    path = path.resolve()  # a link stays, and what it leads to is replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        yield part
        if path.exists():
            shutil.copymode(path, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def some(names: Iterable[object]) -> str:
    """List the first few names and count the rest, for a message of one line."""
    shown = [short(str(name)) for name in names]
    return ", ".join(shown[:SHOWN]) + (f", ... ({len(shown) - SHOWN} more)" if len(shown) > SHOWN else "")


def short(name: str) -> str:
    """Cut a name that is a whole sequence to what a message can show."""
    return name if len(name) <= 40 else f"{name[:32]}... ({len(name)} letters)"
