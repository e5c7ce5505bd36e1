"""A ZIP's list of members, judged before one byte of them is unpacked.

An archive that was made to do harm is refused whole, with everything that is wrong with it: nothing in it is to be
trusted. Members are afterwards read in place and in memory, so no name in the archive ever becomes a path to write.
"""

from __future__ import annotations

import re
import stat
import zipfile
from pathlib import Path
from typing import Final

from medmae.errors import Problem
from medmae.imaging.dicom.opening import Member

MOST_MEMBERS: Final = 500_000  # a large archive of thin slices has tens of thousands
LARGEST_MEMBER: Final = 4 << 30  # bytes unpacked; the largest multi-frame objects have one or two GiB
LARGEST_ARCHIVE: Final = 200 << 30
# Deflate packs zeros 1032 to 1. Images with much background come to 10 or 20; a blank slice alone may come to 1000, so
# small members are judged together.
HIGHEST_RATIO: Final = 100
SMALL: Final = 16 << 20
MOST_TOLD: Final = 5  # members named for one kind of fault
READABLE: Final = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
NESTED: Final = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst")


def members_of(path: Path) -> tuple[list[Member], list[Problem]]:
    """The files in a ZIP, and what is wrong with it; no files when something is.

    Refused: absolute paths and paths with ``..``, links and devices, encryption, methods of compression that Python
    does not know, members or a whole too large, ratios of a bomb, members that share their bytes, too many of them.
    Archives inside the archive are left out with a warning.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            found = [info for info in archive.infolist() if not info.is_dir()]
    except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
        found_text = error.strerror if isinstance(error, OSError) else "its list of members is damaged"
        return [], [Problem("this ZIP cannot be read", str(path), found=found_text, remedy="Copy or pack it again.")]
    problems = [problem for check in (faults_of_members, faults_of_sizes) for problem in check(path, found)]
    if problems:
        return [], problems
    nested = [info for info in found if info.filename.lower().endswith(NESTED)]
    if nested:
        problems = [
            Problem(
                f"{len(nested)} archives inside this archive: left out",
                str(path),
                remedy="Unpack them first if they hold images.",
                fatal=False,
            )
        ]
    plain = [info for info in found if info not in nested and not hidden(info.filename)]
    return sorted({Member(path, info.filename) for info in plain}), problems


def hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def outside(name: str) -> bool:
    """Whether a member's name leads out of the folder that the archive would be unpacked to."""
    parts = re.split(r"[/\\]", name)
    return ".." in parts or parts[0] == "" or bool(re.match(r"[A-Za-z]:", name)) or "\0" in name


def special(info: zipfile.ZipInfo) -> bool:
    """Whether a member is a link, a device or a pipe (the type bits of a Unix mode, in the upper half)."""
    kind = stat.S_IFMT(info.external_attr >> 16)
    return kind not in (0, stat.S_IFREG)


def faults_of_members(path: Path, members: list[zipfile.ZipInfo]) -> list[Problem]:
    """What is wrong with single members, one problem a kind."""
    kinds = {
        "members that lead out of the archive's folder": [m for m in members if outside(m.orig_filename)],
        "links or devices among the members": [m for m in members if special(m)],
        "encrypted members": [m for m in members if m.flag_bits & 0x1],
        "members packed in a way that is not read": [m for m in members if m.compress_type not in READABLE],
        "names that come twice": repeated(members),
    }
    return [
        Problem(
            f"the ZIP is refused: {what}",
            str(path),
            found=", ".join(repr(m.orig_filename) for m in some[:MOST_TOLD])
            + (", ..." if len(some) > MOST_TOLD else ""),
            expected="plain files below one folder, not encrypted",
            remedy="Ask where it comes from; pack the images again.",
        )
        for what, some in kinds.items()
        if some
    ]


def repeated(members: list[zipfile.ZipInfo]) -> list[zipfile.ZipInfo]:
    """Members whose name an earlier one has: which of them a program would see is anybody's guess."""
    seen: set[str] = set()
    twice = []
    for member in members:
        if member.filename in seen:
            twice.append(member)
        seen.add(member.filename)
    return twice


def faults_of_sizes(path: Path, members: list[zipfile.ZipInfo]) -> list[Problem]:
    """Bombs, by what the list of members says; reading stops at the size that is said there."""
    size = sum(m.file_size for m in members)
    packed = sum(m.compress_size for m in members)
    largest = max(members, key=lambda m: m.file_size, default=None)
    wild = [m for m in members if m.file_size > SMALL and m.file_size > HIGHEST_RATIO * m.compress_size]
    gib = 1 << 30
    faults: list[tuple[bool, str, str, str]] = [
        (len(members) > MOST_MEMBERS, "too many members", f"{len(members)}", f"at most {MOST_MEMBERS}"),
        (
            largest is not None and largest.file_size > LARGEST_MEMBER,
            "a member that is too large",
            f"{largest.file_size / gib:.1f} GiB" if largest else "",
            f"at most {LARGEST_MEMBER // gib} GiB",
        ),
        (size > LARGEST_ARCHIVE, "too large unpacked", f"{size / gib:.0f} GiB", f"at most {LARGEST_ARCHIVE // gib}"),
        (
            bool(wild) or (size > 4 * SMALL and size > HIGHEST_RATIO * packed),
            "it unpacks to far more than it holds, as a bomb does",
            f"{size / 2**20:.0f} MiB from {packed / 2**20:.2f} MiB",
            f"at most {HIGHEST_RATIO} to 1",
        ),
        (
            packed > path.stat().st_size,
            "its members share their bytes, as in a bomb",
            f"{packed} bytes of members",
            f"at most the file's {path.stat().st_size}",
        ),
    ]
    remedy = "Unpack it yourself if you trust it, and give the folder."
    return [
        Problem(f"the ZIP is refused: {what}", str(path), found=found, expected=expected, remedy=remedy)
        for wrong, what, found, expected in faults
        if wrong
    ]
