"""NIfTI headers: checked field by field before anything is believed.

**Place.** The sform is used when it is coded, else the qform; when neither is, voxel sizes alone (nibabel's
convention, with a warning). Where both are coded and differ by more than 0.1 mm at a corner, the sform holds and a
warning says so; an sform that is unusable (singular, not finite) gives way to a usable qform. Lengths in metres or
micrometres become mm, with a warning.

**Patient data.** The header's free text and its extensions are never read into a result or a message.
"""

from __future__ import annotations

import gzip
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError

from medmae.errors import InputError, Problem
from medmae.imaging.geometry import corner_distance_mm
from medmae.imaging.volume import Grid, check_affine

FORM_TOLERANCE_MM = 0.1  # between sform and qform, at the corners
CONVERT_AGAIN = "Convert or download the file again."


@dataclass(frozen=True, eq=False)
class Header:
    """What a NIfTI file says about itself, without its voxels: ``grid`` (affine in mm), ``dtype`` as stored ("int16"),
    whether a scale factor applies, and warnings (``problems``)."""

    grid: Grid
    dtype: str
    scaled: bool
    problems: tuple[Problem, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.grid.shape

    @property
    def affine(self) -> np.ndarray:
        return self.grid.affine

    @property
    def spacing(self) -> tuple[float, float, float]:
        return self.grid.spacing

    @property
    def orientation(self) -> str:
        return self.grid.orientation


@dataclass(frozen=True, eq=False)
class Parsed:
    """A header that was checked, and how to take the voxels from the unpacked bytes."""

    header: Header
    dtype: np.dtype
    start: int  # of the voxels, in unpacked bytes
    end: int
    slope: float
    inter: float


def parse(stream: BinaryIO, path: Path) -> Parsed:
    raw = stream.read(540)
    fields = raw_structure(raw, path)
    named_gz = path.name.lower().endswith(".gz")
    packed = isinstance(stream, gzip.GzipFile)
    if named_gz != packed:
        raise InputError(
            "the file is not what its name says",
            where=path,
            found="gzip" if packed else "a NIfTI file that is not compressed",
            expected="gzip" if named_gz else "a NIfTI file that is not compressed",
            remedy=f"Rename it to end in {'.nii.gz' if packed else '.nii'}.",
        )
    shape = shape_of(fields, path)
    dtype = _dtype(fields, path)
    slope, inter = _scaling(fields, path)
    problems: list[Problem] = []
    grid = Grid(shape, affine_of(fields, shape, path, problems))
    least = 352 if int(fields["sizeof_hdr"]) == 348 else 544
    offset = float(fields["vox_offset"])
    start = max(least, int(offset)) if math.isfinite(offset) and offset < 2**40 else least
    end = start + math.prod(shape) * dtype.itemsize
    header = Header(grid, dtype.newbyteorder("=").name, (slope, inter) != (1.0, 0.0), tuple(problems))
    return Parsed(header, dtype, start, end, slope, inter)


def raw_structure(raw: bytes, path: Path) -> Any:
    """The header structure, for either version and byte order."""
    sizes = {int.from_bytes(raw[:4], order) for order in ("little", "big")} if len(raw) >= 348 else set()
    version = 1 if 348 in sizes else 2 if 540 in sizes and len(raw) >= 540 else 0
    magic = raw[344:348] if version == 1 else raw[4:8]
    if version and magic[:2] == b"ni":
        raise InputError(
            "the voxels are in another file (.hdr/.img pair)",
            where=path,
            field="magic",
            remedy="Convert it to .nii.gz.",
        )
    if not version or magic[:2] != b"n+":
        printable = not raw[:64].translate(None, bytes(range(32, 127)) + b"\t\n\r")
        looks_like = "text" if printable else "other data"
        raise InputError(
            "this is not a NIfTI file, whatever its name says",
            where=path,
            found=("an ANALYZE header" if version else looks_like) if raw else "an empty file",
            expected="a NIfTI header",
            remedy=CONVERT_AGAIN,
        )
    kind = nib.Nifti1Header if version == 1 else nib.Nifti2Header
    return kind(raw[: 348 if version == 1 else 540], check=False)


def shape_of(header: Any, path: Path) -> tuple[int, int, int]:
    dim = [int(n) for n in header["dim"]]
    count = dim[0]
    if not 1 <= count <= 7:
        raise InputError(
            "the number of axes is wrong", where=path, field="dim", found=count, expected="3", remedy=CONVERT_AGAIN
        )
    shape = dim[1 : count + 1]
    if count < 3:
        raise InputError(
            f"the image is {count}-D",
            where=path,
            field="dim",
            found=shape,
            expected="3-D",
            remedy="Give a whole volume.",
        )
    if min(shape[:3]) < 1 or min(shape) < 0:
        raise InputError(
            "an axis has no voxels", where=path, field="dim", found=shape, expected="at least 1", remedy=CONVERT_AGAIN
        )
    volumes = math.prod(max(1, n) for n in shape[3:])
    if volumes > 1:
        raise InputError(
            "the image has several volumes",
            where=path,
            field="dim",
            found=f"{volumes} volumes ({' x '.join(map(str, shape))})",
            expected="one 3-D volume",
            remedy="Extract the one to use, or average them, first.",
        )
    i, j, k = shape[:3]
    return i, j, k


def _dtype(header: Any, path: Path) -> np.dtype:
    code = int(header["datatype"])
    try:
        dtype = header.get_data_dtype()
    except (HeaderDataError, KeyError):
        raise InputError(
            "unknown voxel type", where=path, field="datatype", found=f"code {code}", remedy=CONVERT_AGAIN
        ) from None
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        name = "RGB" if dtype.names else "complex" if dtype.kind == "c" else str(dtype)
        raise InputError(
            f"{name} voxels are not an image of one quantity",
            where=path,
            field="datatype",
            found=f"code {code}",
            expected="integer or floating point",
            remedy="Export the magnitude, or one channel.",
        )
    return dtype


def _scaling(header: Any, path: Path) -> tuple[float, float]:
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or math.isnan(slope):  # both mean "not scaled"
        return 1.0, 0.0
    if not math.isfinite(slope) or not math.isfinite(inter):
        raise InputError(
            "the intensity scaling is not finite",
            where=path,
            field="scl_slope, scl_inter",
            found=f"{slope:g}, {inter:g}",
            expected="finite numbers",
            remedy=CONVERT_AGAIN,
        )
    return slope, inter


def affine_of(header: Any, shape: tuple[int, int, int], path: Path, problems: list[Problem]) -> np.ndarray:
    """The affine in mm by the rule in the module's docstring; warnings go to ``problems``."""

    factor = {1: 1000.0, 3: 0.001}.get(int(header["xyzt_units"]) & 7, 1.0)
    if factor != 1.0:
        unit = "metres" if factor > 1 else "micrometres"
        problems.append(_warning("lengths are not in mm; converted", path, "xyzt_units", unit, "Check the spacing."))
    scale = np.diag([factor, factor, factor, 1.0])
    codes = int(header["sform_code"]), int(header["qform_code"])
    sform = _usable(scale @ header.get_sform(), path, "sform") if codes[0] > 0 else None
    qform = _usable(scale @ _qform(header), path, "qform") if codes[1] > 0 else None
    if isinstance(sform, np.ndarray):
        _compare(Grid(shape, sform), qform, path, codes, problems)
        return sform
    if isinstance(qform, np.ndarray):
        if sform is not None:
            what, found = "the sform is unusable; the qform is used", str(sform.problem.found)
            problems.append(_warning(what, path, "sform", found, "Check where the image lies."))
        return qform
    for form in (sform, qform):
        if form is not None:
            raise form
    affine = check_affine(scale @ header.get_base_affine(), path, "pixdim")
    what = "the header does not say where the image lies; voxel sizes alone are used"
    remedy = "Left and right are assumed; convert the original images again to be sure."
    problems.append(_warning(what, path, "sform_code, qform_code", "0, 0", remedy))
    return affine


def _compare(
    used: Grid, qform: np.ndarray | InputError | None, path: Path, codes: tuple[int, int], problems: list[Problem]
) -> None:
    """Warn when the qform says something else than the sform that is used."""
    if isinstance(qform, InputError):
        what, found = "the qform is unusable; the sform is used", str(qform.problem.found)
        problems.append(_warning(what, path, "qform", found, "Nothing to do if the sform is right."))
    elif qform is not None:
        distance = corner_distance_mm(used, Grid(used.shape, qform))
        if distance > FORM_TOLERANCE_MM:
            what = "sform and qform disagree; the sform is used"
            found = f"{distance:.1f} mm apart at a corner (codes {codes[0]}, {codes[1]})"
            remedy = "Check that the image lies where it should; set both alike if not."
            problems.append(_warning(what, path, "sform, qform", found, remedy))


def _warning(what: str, path: Path, field: str, found: str, remedy: str) -> Problem:
    return Problem(what, str(path), field, found, remedy=remedy, fatal=False)


def _qform(header: Any) -> np.ndarray:
    try:
        return header.get_qform()
    except (ValueError, HeaderDataError):  # a quaternion or voxel size that is impossible
        return np.full((4, 4), np.nan)


def _usable(matrix: np.ndarray, path: Path, field: str) -> np.ndarray | InputError:
    try:
        return check_affine(matrix, path, field)
    except InputError as error:
        return error
