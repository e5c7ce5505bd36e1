"""Volumes back into the studies that they came from: a series' files as the writers want them, in place or unpacked."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from medmae.errors import InputError
from medmae.imaging.dicom.opening import Member, Opener
from medmae.imaging.dicom.series import Series
from medmae.imaging.source import Source
from medmae.imaging.volume import Volume


def series_of(images: Mapping[str, Source], names: Sequence[str], study: str) -> dict[str, Series]:
    """{modality: series} of ``names``. Raises :class:`InputError` where one is no DICOM: what is written belongs to a
    patient's study, and only DICOM says which."""
    found = {m: images[m] for m in names}
    others = [m for m, source in found.items() if not isinstance(source, Series)]
    if others:
        raise InputError(
            "DICOM comes out only where DICOM goes in",
            where=study,
            field="--format",
            found=f"{', '.join(others)} from other files",
            expected="DICOM series",
            remedy="Give the study's DICOM folder, or use --format nifti.",
        )
    return {m: source for m, source in found.items() if isinstance(source, Series)}


@contextmanager
def on_disk(series: Mapping[str, Series]) -> Iterator[dict[str, list[Path]]]:
    """{modality: files}; members of a ZIP are unpacked for as long as the block lasts."""
    with tempfile.TemporaryDirectory(prefix="medmae-") as folder, Opener() as opener:
        found: dict[str, list[Path]] = {}
        for place, (name, one) in enumerate(series.items()):
            found[name] = []
            for number, file in enumerate(one.files):
                path = file if isinstance(file, Path) else Path(folder) / f"{place}-{number}.dcm"
                if isinstance(file, Member):
                    with opener.open(file) as stream:
                        path.write_bytes(stream.read())
                found[name].append(path)
        yield found


def export_synthesis(
    volume: Volume,
    series: Mapping[str, Series],
    like: str,
    out: Path,
    *,
    sources: Sequence[str],
    target: str,
    version: str,
    checkpoint: str,
    number: int = 1,
) -> list[Path]:
    """``volume``, on the grid of the modality ``like``, as a series in the folder ``out``, made from ``sources``, all
    of them among ``series``.

    ``number``: which of the series that are derived from ``like`` this is, so that they differ. See
    :func:`medmae.imaging.dicom_out.writing.write_synthetic_mr`.
    """
    from medmae.imaging.dicom_out.writing import write_synthetic_mr

    with on_disk(series) as files:
        return write_synthetic_mr(
            volume,
            files[like],
            out,
            target=target,
            sources=[files[m] for m in sources],
            source_modalities=list(sources),
            version=version,
            checkpoint_hash=checkpoint,
            place=number,
        )
