"""What an image of a study comes from: a NIfTI file or a DICOM series, and what can be done with either."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TypeAlias

from medmae.errors import InputError, Problem
from medmae.files import file_hash
from medmae.imaging import nifti
from medmae.imaging.dicom.opening import Opener, has_dicom
from medmae.imaging.dicom.series import Series
from medmae.imaging.volume import Volume

Source: TypeAlias = Path | Series


def read_source(source: Source, problems: list[Problem] | None = None) -> Volume:
    """The image as a :class:`Volume` (float32; affine to RAS+ mm; the frame of reference where DICOM states one).

    Warnings go to ``problems``. Raises :class:`InputError` for what cannot be read.
    """
    if isinstance(source, Series):
        from medmae.imaging.dicom.reading import read_series

        return read_series(source, problems)
    return nifti.read_image(source, problems)


def read_image(path: str | Path | Series, problems: list[Problem] | None = None) -> Volume:
    """The image that a path names: a NIfTI file, a folder of one DICOM series, or a file of one.

    See :func:`open_source` and :func:`read_source`.
    """
    return read_source(path if isinstance(path, Series) else open_source(Path(path)), problems)


def stamp(source: Source) -> dict[str, int]:
    """{"size", "mtime_ns"} of a file; of a series the sums over its files and its number of slices, so that any
    change of one shows. Raises OSError."""
    if not isinstance(source, Series):
        status = source.stat()
        return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    with Opener() as opener:
        stamps = [opener.stamp(file) for file in source.files]
    sizes, times = zip(*stamps, strict=True)
    return {"size": sum(sizes), "mtime_ns": sum(times), "slices": fingerprint(source)}


def fingerprint(series: Series) -> int:
    """Which slices of which files a series is: two series may share their files."""
    text = repr([(str(series.files[file]), index) for file, index in series.slices])
    return int(hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:12], 16)


def sha256(source: Source) -> str:
    """SHA-256 of a file's bytes; of a series, over the digest of each slice's file and its frame, in order of slices,
    so that it depends on no name. Raises OSError."""
    if not isinstance(source, Series):
        return file_hash(source)
    whole = hashlib.sha256()
    with Opener() as opener:
        digests = []
        for file in source.files:
            with opener.open(file) as stream:
                digests.append(hashlib.file_digest(stream, "sha256").digest())  # type: ignore[arg-type]
    for file_number, index in source.slices:
        whole.update(digests[file_number] + index.to_bytes(4, "little"))
    return whole.hexdigest()


def open_source(path: Path) -> Source:
    """What ``path`` names: a NIfTI file as it is; a folder of one DICOM series, or a file of one, as that series.

    Raises :class:`InputError` when a folder holds no series or several, or the series is damaged.
    """
    if not path.is_dir() and not has_dicom(path):
        return path
    from medmae.imaging.dicom.finding import find_series

    classic_file = not path.is_dir()
    found, problems = find_series(path.parent if classic_file else path)
    if classic_file:
        found = [series for series in found if path in series.files]
    if len(found) == 1:
        return found[0]
    fatal = [problem for problem in problems if problem.fatal] if not found else []
    raise InputError(
        f"{len(found)} DICOM volumes here" if found else "no DICOM series here that can be used",
        where=path,
        found=", ".join(f"series {series.number}" + (f" ({series.part})" if series.part else "") for series in found)
        or None,
        expected="one series",
        remedy="Name the folder of one series, or a file of it.",
        problems=fatal,
    )
