"""Files: written whole or not at all (beside their place, flushed to the disk, then renamed), and found in folders."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from medmae.errors import InputError, Problem

_REMEDIES = {
    errno.EACCES: "Choose a folder you may write to, or change its permissions.",
    errno.EPERM: "Choose a folder you may write to, or change its permissions.",
    errno.EROFS: "The disk is read-only: choose another folder.",
    errno.ENOSPC: "The disk is full: free some space or choose another disk, and run again.",
    errno.EDQUOT: "Your quota is used up: free some space or choose another disk, and run again.",
    errno.ENOTDIR: "A part of the path is a file: choose another folder.",
    errno.EISDIR: "There is a folder of this name: choose another name.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
}


@contextmanager
def replaced_file(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file to write that takes the place of ``path`` when the block ends well, and leaves no trace otherwise.

    Written in the same folder (made if missing), fsynced, renamed. Raises :class:`InputError` with a remedy when the
    system refuses (no permission, full or read-only disk); an older file of that name is then untouched.
    """
    path = Path(path)
    # Short, so that a long but valid name stays valid with the temporary part added.
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not tempfile: its files are private to the user, ours follow the umask like any other output.
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            with os.fdopen(handle, "wb") as target:
                yield target
                target.flush()
                os.fsync(target.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(path.parent)
    except OSError as error:
        raise InputError(
            "the file cannot be written",
            where=path,
            found=error.strerror or type(error).__name__,
            remedy=_REMEDIES.get(error.errno or 0, "Check the folder and the disk."),
        ) from None


def _sync_folder(folder: Path) -> None:
    """Make the rename itself last through a power cut, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def walk(root: Path, problems: list[Problem]) -> Iterator[tuple[Path, list[Path]]]:
    """Every folder below ``root`` with its files, in order of name, hidden ones left out, links followed once."""
    seen: set[str] = set()

    def unreadable(error: OSError) -> None:
        problems.append(
            Problem(
                "this folder cannot be read", error.filename, found=error.strerror, remedy="Change its permissions."
            )
        )

    for folder, subfolders, files in os.walk(root, onerror=unreadable, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield Path(folder), [Path(folder, name) for name in sorted(files) if not name.startswith(".")]
