"""A series: slices of DICOM files that make one volume, known by its headers and not yet read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from medmae.imaging.dicom.opening import File, folder_of
from medmae.imaging.volume import Grid

Kind: TypeAlias = Literal["classic", "enhanced", "mosaic"]


@dataclass(frozen=True)
class Series:
    """One volume in DICOM; picklable, and safe to print: UIDs are kept in memory only.

    ``files``: in order of their first slice along the normal; one a slice (classic), or one or few with many slices.
    ``slices``: for each slice of the volume (number in ``files``, frame of that file or tile of a mosaic), from 0.
    ``rescale``: for each slice (slope, intercept). ``grid``: axes are column index i, row index j, slice k; RAS+ mm.
    ``modality``: canonical, None when not recognised; ``confidence`` 0 to 1 and ``reason`` say why. ``number``:
    SeriesNumber. ``part``: which of the volumes of a series this is ("2 of 3"), "" for the only one. ``tilt``: degrees
    between the stack's axis and its slices' normal. ``original``: not derived from other images. ``synthetic``: made
    by a model, as SyntheticData or its description says.
    """

    files: tuple[File, ...]
    slices: tuple[tuple[int, int], ...] = field(repr=False)
    rescale: tuple[tuple[float, float], ...] = field(repr=False)
    grid: Grid
    kind: Kind
    modality: str | None
    confidence: float
    reason: str
    number: int | None
    study_uid: str = field(repr=False)
    series_uid: str = field(repr=False)
    frame_uid: str | None = field(repr=False, default=None)
    patient: tuple[str, str] = field(repr=False, default=("", ""))  # id and its issuer, to be hashed
    part: str = ""
    tilt: float = 0.0
    three_d: bool = False
    original: bool = True
    synthetic: bool = False

    def __str__(self) -> str:
        """Where it is: folder and series number, which say nothing about the patient but what the path says."""
        return place(self.files[0], self.number, self.part)


def place(file: File, number: int | None, part: str = "") -> str:
    """How a series is told to a user."""
    name = folder_of(file) + (" series" if number is None else f" series {number}")
    return f"{name}, volume {part}" if part else name
