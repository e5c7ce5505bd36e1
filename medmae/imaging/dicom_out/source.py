"""The series that an output object is made from: headers of its files, checked to be one series of one patient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medmae.errors import InputError, Problem
from medmae.imaging.dicom_out.identity import is_uid, plain, raw_texts

if TYPE_CHECKING:
    from pydicom.dataelem import RawDataElement
    from pydicom.dataset import Dataset

_NEEDED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")


@dataclass(frozen=True, eq=False)
class SourceImage:
    """One file: its ``header`` (everything but the pixels). ``positions`` (frames, 3): the middles of the first voxels
    in LPS mm; ``orientation`` (2, 3): the unit vectors along a row and down a column; both None where the file has
    none."""

    header: Dataset
    raw: Mapping[str, RawDataElement]  # the patient's texts as they are in the file
    positions: np.ndarray | None
    orientation: np.ndarray | None

    def uid(self, name: str) -> str:
        return plain(self.header, name)


@dataclass(frozen=True, eq=False)
class SourceSeries:
    """All images of one series, in the order of their instance numbers."""

    images: tuple[SourceImage, ...]

    @property
    def header(self) -> Dataset:
        return self.images[0].header

    @property
    def orientation(self) -> np.ndarray | None:
        return self.images[0].orientation

    def derived_number(self, place: int) -> int:
        """A Series Number for what is made from this series: 3 gives 301, 302, ...; an integer string holds 32 bits."""
        number = _number(self.header, "SeriesNumber")
        return (number if 0 <= number < 2**31 // 100 else 0) * 100 + place

    def runs_against_normal(self) -> bool:
        """Whether instance numbers count down along row x column, so that a new series can be numbered alike."""
        if self.orientation is None or any(image.positions is None for image in self.images):
            return False
        along = np.concatenate([image.positions for image in self.images]) @ np.cross(*self.orientation)
        return len(along) > 1 and bool(along[-1] < along[0])


def read_source(files: Sequence[str | Path], role: str = "template") -> SourceSeries:
    """The headers of the files of one series (one a slice, or one multi-frame file), given in any order.

    Raises :class:`InputError` with all problems: no file, files that are not DICOM, headers without UIDs, files of
    several series, studies or patients, an instance that is there twice. Values from headers are not quoted.
    """
    if isinstance(files, str | Path):
        files = [files]
    problems: list[Problem] = []
    images = [image for path in files if (image := _read(Path(path), problems)) is not None]
    if not files:
        problems.append(Problem("a series needs at least one file", field=role, found="no file"))
    if not problems:
        problems += _inconsistent(images, Path(files[0]).parent)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        first = problems[0]
        raise InputError(
            f"{first.what}{more}",
            where=first.where,
            field=first.field,
            found=first.found,
            expected=first.expected,
            remedy=first.remedy,
            problems=problems,
        )
    return SourceSeries(tuple(sorted(images, key=lambda image: _number(image.header, "InstanceNumber"))))


def read_headers(files: Iterable[Path]) -> tuple[dict[Path, Dataset], list[Problem]]:
    """The header of each file of any series, and a problem for each that has none."""
    problems: list[Problem] = []
    images = {path: _read(path, problems) for path in files}
    return {path: image.header for path, image in images.items() if image is not None}, problems


def refuse_other_patients(template: SourceSeries, others: Iterable[SourceSeries]) -> None:
    """Raise :class:`InputError` where a source is of another patient than the template; values are not quoted."""
    for place, series in enumerate(others, 1):
        fields = [name for name in ("PatientID", "PatientBirthDate") if _contradict(template, series, name)]
        unknown = not (plain(template.header, "PatientID") and plain(series.header, "PatientID"))
        if not fields and unknown and _contradict(template, series, "StudyInstanceUID"):
            fields = ["PatientID"]  # another study, and nothing that says it is the same patient's
        if fields:
            raise InputError(
                "a source series is of another patient than the template",
                where=f"source {place}",
                field=", ".join(fields),
                remedy="Give series of one patient.",
            )


def _contradict(one: SourceSeries, other: SourceSeries, name: str) -> bool:
    values = plain(one.header, name), plain(other.header, name)
    return all(values) and values[0] != values[1]


def _read(path: Path, problems: list[Problem]) -> SourceImage | None:
    import pydicom
    from pydicom.errors import InvalidDicomError

    field = None
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True)
        raw = raw_texts(header)
        missing = [name for name in _NEEDED if not is_uid(plain(header, name))]
        if not missing:
            return SourceImage(header, raw, *_place(header))
        what, remedy = "the header lacks UIDs that every DICOM object has", "Export the series again."
        field = ", ".join(missing)
    except InvalidDicomError:
        what, remedy = "this is not a DICOM file", "Leave it out; a DICOM file has 'DICM' at byte 128."
    except OSError as error:
        what, remedy = f"the file cannot be read: {error.strerror or type(error).__name__}", "Check the path."
    except Exception:  # damaged files make pydicom raise many kinds, whose texts quote values
        what, remedy = "the DICOM header is damaged", "Export the series again."
    problems.append(Problem(what, str(path), field, remedy=remedy))
    return None


def _inconsistent(images: Sequence[SourceImage], folder: Path) -> list[Problem]:
    problems = []
    where = str(folder)
    for name, what in (("PatientID", "patients"), ("StudyInstanceUID", "studies"), ("SeriesInstanceUID", "series")):
        count = len({image.uid(name) for image in images})
        if count > 1:
            remedy = "Give the files of one series."
            problems.append(Problem(f"these files are of several {what}", where, name, str(count), "1", remedy))
    double = len(images) - len({image.uid("SOPInstanceUID") for image in images})
    if double:
        remedy = "Leave the copies out."
        problems.append(
            Problem("instances are there more than once", where, "SOPInstanceUID", f"{double}", "0", remedy)
        )
    return problems


def _place(header: Dataset) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Positions and orientation, of a classic image or of the frames of an enhanced one."""
    with suppress(Exception):
        if "PerFrameFunctionalGroupsSequence" not in header:
            return _numbers([header.ImagePositionPatient]), _orthonormal(header.ImageOrientationPatient)
        frames = list(header.PerFrameFunctionalGroupsSequence)
        shared = list(header.get("SharedFunctionalGroupsSequence") or [])
        groups = (*shared[:1], frames[0])
        turned = next(group.PlaneOrientationSequence[0] for group in groups if "PlaneOrientationSequence" in group)
        positions = [frame.PlanePositionSequence[0].ImagePositionPatient for frame in frames]
        return _numbers(positions), _orthonormal(turned.ImageOrientationPatient)
    return None, None


def _numbers(values: Any) -> np.ndarray:
    return np.array([[float(number) for number in row] for row in values]).reshape(-1, 3)


def _orthonormal(values: Any) -> np.ndarray | None:
    directions = _numbers([values[:3], values[3:]])
    lengths = np.linalg.norm(directions, axis=1)
    if not np.allclose(lengths, 1, atol=1e-2) or abs(directions[0] @ directions[1]) > 1e-2:
        return None
    return directions / lengths[:, None]


def _number(header: Dataset, name: str) -> int:
    with suppress(ValueError):
        return int(plain(header, name))
    return 0
