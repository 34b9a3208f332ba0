"""Files at a location: a path, or a URI of storage that all nodes see (s3://, gs://, ...), by pyarrow.fs."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyarrow import fs

from aam.config import is_uri
from aam.data.files import replacing
from aam.data.prepare import default_cache
from aam.training.checkpoint import replace_directory


def join(location: str | Path, *parts: str) -> str:
    """A location further down; the query of a URI (`?endpoint_override=...`) stays at its end."""
    if not is_uri(location):
        return str(Path(location, *parts))
    base, mark, query = str(location).partition("?")
    return "/".join([base.rstrip("/"), *parts]) + mark + query


def name_of(location: str | Path) -> str:
    """Last part of a location."""
    return str(location).partition("?")[0].rstrip("/").rsplit("/", 1)[-1]


def resolve(location: str | Path) -> tuple[fs.FileSystem, str]:
    """File system of a location, and its path there.

    Raises
    ------
    ValueError
        For a URI that pyarrow does not know.
    """
    if not is_uri(location):
        return fs.LocalFileSystem(), str(location)
    try:
        filesystem, path = fs.FileSystem.from_uri(str(location))
    except (ValueError, OSError) as error:
        raise ValueError(f"{location}: not a location that pyarrow.fs can open ({error})") from None
    return filesystem, path


def check_writable(location: str) -> None:
    """Create the folder of a location and a file in it.

    Raises
    ------
    ValueError
        Where that cannot be done; now rather than after the first epoch.
    """
    try:
        write_text(join(location, ".aam"), "")
    except OSError as error:
        raise ValueError(
            f"--storage-path {location}: cannot be written to ({_first_line(error)}); check that it exists, the "
            "credentials, and for S3 the region (AWS_REGION)"
        ) from None


def exists(location: str | Path) -> bool:
    """Whether there is a file, or a folder, at a location."""
    return _info(location).type != fs.FileType.NotFound


def _info(location: str | Path) -> fs.FileInfo:
    filesystem, path = resolve(location)
    try:
        return filesystem.get_file_info(path)
    except OSError as error:
        raise ValueError(f"{location}: cannot be reached ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def read_text(location: str | Path) -> str:
    """The text of a file."""
    filesystem, path = resolve(location)
    with filesystem.open_input_stream(path) as file:
        return file.read().decode()


def write_text(location: str | Path, text: str) -> None:
    """Write a file; folders are made as needed."""
    filesystem, path = resolve(location)
    filesystem.create_dir(path.rpartition("/")[0], recursive=True)
    with filesystem.open_output_stream(path) as file:
        file.write(text.encode())


def read_json(location: str | Path) -> Any:
    """Content of a JSON file; None where there is no such file."""
    return json.loads(read_text(location)) if exists(location) else None


def upload(folder: Path, location: str, *, last: str = "") -> None:
    """Copy a folder to a location; the file named `last` tells others that it is whole."""
    filesystem, path = resolve(location)
    filesystem.create_dir(path, recursive=True)
    for file in sorted(_files(folder), key=lambda file: file.name == last):
        _upload_file(file, folder, filesystem, path)


def _files(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.rglob("*")) if p.is_file()]


def _upload_file(file: Path, folder: Path, filesystem: fs.FileSystem, path: str) -> None:
    target = f"{path}/{file.relative_to(folder).as_posix()}"
    filesystem.create_dir(target.rpartition("/")[0], recursive=True)
    with file.open("rb") as source, filesystem.open_output_stream(target) as sink:
        while block := source.read(1 << 22):
            sink.write(block)


def download(location: str, folder: Path, *, wanted: Callable[[str], bool] = lambda _: True) -> None:
    """Copy what is at a location into a folder; files that are there in the same size and as new stay.

    Parameters
    ----------
    location : str
        A folder.
    folder : Path
        Where to.
    wanted : callable
        Takes the path of a file below the location, says whether to copy it.
    """
    filesystem, path = resolve(location)
    for info in filesystem.get_file_info(fs.FileSelector(path, recursive=True)):
        relative = info.path.removeprefix(path).lstrip("/")
        if info.type != fs.FileType.File or not wanted(relative):
            continue
        target = folder / relative
        if target.exists():
            have = target.stat()
            if have.st_size == info.size and have.st_mtime_ns >= (info.mtime_ns or 0):
                continue
        with (
            replacing(target) as scratch,
            filesystem.open_input_stream(info.path) as source,
            scratch.open("wb") as sink,
        ):
            while block := source.read(1 << 22):
                sink.write(block)


def fetch(location: str | Path) -> Path:
    """A folder of a location on this machine: itself where it is a path, else a copy in the cache.

    The copy is made anew when the files at the location have changed.
    """
    if not is_uri(location):
        return Path(location)
    filesystem, path = resolve(location)
    infos = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    content = sorted((i.path, i.size, i.mtime_ns) for i in infos if i.type == fs.FileType.File)
    key = hashlib.sha256(repr((str(location), content)).encode()).hexdigest()[:16]
    folder = default_cache() / "fetched" / f"{name_of(location)}-{key}"
    if not folder.exists():
        fetch_to(str(location), folder)
    return folder


def fetch_to(location: str, folder: Path) -> None:
    """Download a folder whole or not at all; workers of one node may do so at the same time."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        own = Path(scratch) / "content"
        download(location, own)
        own.chmod(0o755)
        try:
            own.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster with the same contents
                raise


class Uploader:
    """Keeps a copy of a growing folder at a location, by the files that have changed.

    Parameters
    ----------
    folder : Path
        The folder.
    location : str
        Where its copy is.
    """

    def __init__(self, folder: Path, location: str) -> None:
        self.folder = folder
        self.filesystem, self.path = resolve(location)
        self.seen: dict[Path, tuple[int, int]] = {}

    def __call__(self) -> None:
        """Upload what has changed since the last call."""
        for file in _files(self.folder):
            stat = file.stat()
            state = (stat.st_size, stat.st_mtime_ns)
            if self.seen.get(file) != state:
                _upload_file(file, self.folder, self.filesystem, self.path)
                self.seen[file] = state


def copy_checkpoint(location: str, path: Path) -> None:
    """Put a checkpoint of a location in the place of a folder."""
    replace_directory(path, lambda scratch: download(location, scratch))
