"""Where DICOM bytes lie: a file of its own, or a member of a ZIP, read in place and never unpacked to disk."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

HEAD = 132  # preamble and the letters DICM (PS3.10, section 7.1)


@dataclass(frozen=True, order=True)
class Member:
    """A file inside a ZIP."""

    archive: Path
    name: str

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"


File: TypeAlias = Path | Member


class Opener:
    """Opens files; a ZIP stays open from its first member to the end of the block, so its list is read once."""

    def __init__(self) -> None:
        self.stack = ExitStack()
        self.archives: dict[Path, zipfile.ZipFile] = {}

    def __enter__(self) -> Opener:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()
        self.archives.clear()

    @contextmanager
    def open(self, file: File) -> Iterator[IO[bytes]]:
        """The bytes of ``file``. Raises OSError, or ``zipfile.BadZipFile`` for a damaged member."""
        if isinstance(file, Path):
            with open(file, "rb") as stream:
                yield stream
            return
        with self.archive(file.archive).open(file.name) as stream:
            yield stream

    def archive(self, path: Path) -> zipfile.ZipFile:
        if path not in self.archives:
            self.archives[path] = self.stack.enter_context(zipfile.ZipFile(path))
        return self.archives[path]

    def size(self, file: File) -> int:
        """Bytes, unpacked."""
        if isinstance(file, Path):
            return file.stat().st_size
        return self.archive(file.archive).getinfo(file.name).file_size

    def stamp(self, file: File) -> tuple[int, int]:
        """(bytes, time of change in ns); the time is the ZIP's for its members."""
        where = file if isinstance(file, Path) else file.archive
        return self.size(file), where.stat().st_mtime_ns


def folder_of(file: File) -> str:
    """Where a file lies, as it is told to a user."""
    return str(file.parent) if isinstance(file, Path) else str(file).rpartition("/")[0]


def is_dicom(head: bytes) -> bool:
    """Whether a file that begins so is DICOM: the letters DICM, or, in files older than the preamble, a first element
    of group 0008 or 0002 (little endian) that such files begin with."""
    if head[128:132] == b"DICM":
        return True
    return head[:2] in (b"\x02\x00", b"\x08\x00") and head[3:4] == b"\0" and head[2] <= 0x20 and len(head) == HEAD


def has_dicom(path: Path) -> bool:
    """:func:`is_dicom` of a file on disk; False for what cannot be opened."""
    try:
        with open(path, "rb") as stream:
            return is_dicom(stream.read(HEAD))
    except OSError:
        return False


def is_zip(path: Path) -> bool:
    """Whether a file's name and first bytes are a ZIP's."""
    try:
        with open(path, "rb") as stream:
            return path.suffix.lower() == ".zip" and stream.read(2) == b"PK"
    except OSError:
        return False


def read_errors() -> tuple[type[Exception], ...]:
    """What opening and reading a file or a member can raise."""
    import zlib

    found: tuple[Any, ...] = (OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError)
    return (*found, KeyError)
