"""NIfTI files: read only when whole, written so that no half-written file can be met.

How a header is judged, and which of sform and qform holds: :mod:`medmae.imaging.nifti_header`. ``scl_slope`` and
``scl_inter`` are applied (in float64); voxels are float32. 4-D files with one volume are taken as 3-D; several volumes,
complex and RGB voxels are refused.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np

from medmae.errors import InputError, Problem
from medmae.imaging.files import replaced_file
from medmae.imaging.nifti_header import CONVERT_AGAIN, Header, Parsed, affine_of, parse, raw_structure, shape_of
from medmae.imaging.volume import Volume

SUFFIXES = (".nii", ".nii.gz")
_GZIP = b"\x1f\x8b"


def read_header(path: str | Path) -> Header:
    """The header of a NIfTI file, after checking that the file is complete; the voxels are not read.

    A truncated ``.nii.gz`` is found from the length that gzip keeps in its last four bytes; only when that length is
    not the expected one is the file unpacked to make sure. Raises :class:`InputError`.
    """
    path = Path(path)
    with _opened(path) as (stream, compressed):
        parsed = parse(stream, path)
    size = path.stat().st_size
    if compressed:
        with open(path, "rb") as raw:
            raw.seek(max(0, size - 4))
            size = int.from_bytes(raw.read(4), "little")
        if size != parsed.end % 2**32:
            with _opened(path) as (stream, _):
                size = _unpacked_size(stream, path)
    if size < parsed.end:
        raise _truncated(path, size, parsed.end)
    return parsed.header


def read_nifti(path: str | Path, problems: list[Problem] | None = None) -> Volume:
    """A NIfTI file as a :class:`Volume`: float32 voxels in the stored axis order, affine to RAS+ mm.

    Warnings (see the module's docstring) are appended to ``problems``. Voxel values are not judged: see
    :func:`check_voxels`. Raises :class:`InputError` for anything that is not one readable 3-D image.
    """
    path = Path(path)
    with _opened(path) as (stream, _):
        parsed = parse(stream, path)
        shape = parsed.header.shape
        raw = _read(stream, path, parsed.end - parsed.start, parsed)
    if problems is not None:
        problems.extend(parsed.header.problems)
    stored = np.frombuffer(raw, parsed.dtype).reshape(shape, order="F")
    with np.errstate(over="ignore", invalid="ignore"):  # too large for float32: infinite, see check_voxels
        if not parsed.header.scaled:
            array = stored.astype(np.float32, order="F")
        else:
            array = np.empty(shape, np.float32, order="F")
            for k in range(shape[2]):  # slice by slice: float64 arithmetic without a float64 copy of the volume
                array[:, :, k] = stored[:, :, k].astype(np.float64) * parsed.slope + parsed.inter
    return Volume(array, parsed.header.affine)


def read_image(path: str | Path, problems: list[Problem] | None = None) -> Volume:
    """The image in a file, whatever its format; today that is NIfTI (``.nii``, ``.nii.gz``). See :func:`read_nifti`."""
    path = Path(path)
    if path.is_dir() or not path.name.lower().endswith(SUFFIXES):
        raise InputError(
            "this is not a NIfTI file",
            where=path,
            found="a folder" if path.is_dir() else path.suffix or "no suffix",
            expected=" or ".join(SUFFIXES),
            remedy="Convert it to NIfTI first; DICOM is read as a study or with --image, see the docs.",
        )
    return read_nifti(path, problems)


def check_voxels(volume: Volume, where: str | Path) -> list[Problem]:
    """What makes the values of an image unusable: NaN or infinite voxels, all zero, all the same. One problem at most
    of each kind; an empty list is good."""
    array, name = volume.array, str(where)
    bad = array.size - int(np.count_nonzero(np.isfinite(array)))
    if bad:
        return [
            Problem(
                "voxels are not finite",
                name,
                "voxels",
                f"{bad} NaN or infinite of {array.size}",
                "finite numbers",
                "Replace them, for example by 0 where they mean background.",
            )
        ]
    low, high = array.min(), array.max()
    if low == high:
        what = "the image is empty: every voxel is 0" if low == 0 else "the image is constant"
        found = f"every voxel is {float(low):g}"
        return [Problem(what, name, "voxels", found, "an image", "Check the export, or leave this image out.")]
    return []


def write_nifti(volume: Volume, path: str | Path, dtype: Any = None, like: str | Path | None = None) -> None:
    """Write a volume as NIfTI-1 (``.nii`` or ``.nii.gz``), whole or not at all.

    The file appears under its name only once it is complete and on the disk. ``dtype`` defaults to the array's own
    (booleans as uint8, float16 and float64 as float32, 64-bit integers as int32); values are rounded for an integer
    type. sform and qform are both set, code 2 (aligned), in mm; a sheared affine has no qform. With ``like``, a NIfTI
    file on the same grid, sform, qform and their codes are that file's, bit for bit. No text is written. Missing
    folders are made. Raises :class:`InputError` when the values do not fit ``dtype`` or the file cannot be written.
    """
    path = Path(path)
    if not path.name.endswith(SUFFIXES):
        raise InputError("a NIfTI file's name ends in .nii or .nii.gz", where=path, remedy="Choose such a name.")
    array = _storable(volume.array, dtype, path)
    header = nib.Nifti1Header()
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape)
    _place(header, volume, like)
    header["scl_slope"], header["scl_inter"] = 1, 0
    header.set_data_offset(352)
    with replaced_file(path) as target:
        if path.name.endswith(".gz"):  # no name and no time in the gzip header: same volume, same bytes
            with gzip.GzipFile("", "wb", compresslevel=3, fileobj=target, mtime=0) as packed:
                _dump(header, array, packed)
        else:
            _dump(header, array, target)


# --- reading -------------------------------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, bool]]:
    """The file's unpacked bytes, and whether they are packed. Every way of failing becomes an InputError."""
    try:
        with open(path, "rb") as raw:
            compressed = raw.read(2) == _GZIP
            raw.seek(0)
            if compressed:
                with gzip.GzipFile(fileobj=raw) as stream:
                    yield stream, True  # type: ignore[misc]
            else:
                yield raw, False
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        found = "it ends early" if isinstance(error, EOFError) else "its checksum or contents are wrong"
        raise InputError(
            "the gzip file is truncated or damaged", where=path, found=found, remedy=CONVERT_AGAIN
        ) from None
    except FileNotFoundError:
        raise InputError("no such file", where=path, remedy="Check the path.") from None
    except OSError as error:
        raise InputError(
            "the file cannot be read",
            where=path,
            found=error.strerror or type(error).__name__,
            remedy="Check its permissions and the disk.",
        ) from None


def _read(stream: BinaryIO, path: Path, count: int, parsed: Parsed) -> bytearray:
    """``count`` voxel bytes from ``parsed.start``, and proof that the file ends as it should."""
    stream.seek(parsed.start)
    parts = bytearray()
    while len(parts) < count:  # in pieces: a damaged header may ask for more than there is memory
        part = stream.read(min(count - len(parts), 1 << 26))
        if not part:
            raise _truncated(path, parsed.start + len(parts), parsed.end)
        parts += part
    stream.read(1)  # at the end of a gzip member this checks its checksum
    return parts


def _unpacked_size(stream: BinaryIO, path: Path) -> int:
    size = 0
    while part := stream.read(1 << 20):
        size += len(part)
    return size


def _truncated(path: Path, found: int, expected: int) -> InputError:
    return InputError(
        "the file is truncated: voxels are missing",
        where=path,
        found=f"{found} bytes",
        expected=f"{expected} bytes",
        remedy=CONVERT_AGAIN,
    )


# --- writing -------------------------------------------------------------------------------------------------------


def _storable(array: np.ndarray, dtype: Any, path: Path) -> np.ndarray:
    default = {"b": np.uint8, "f": np.float32}.get(array.dtype.kind, array.dtype)
    if array.dtype.kind in "iu" and array.dtype.itemsize == 8:
        default = np.int32
    wanted = np.dtype(default if dtype is None else dtype)
    if wanted.kind not in "iuf" or array.dtype.kind not in "biuf":
        raise InputError(
            "this voxel type is not written", where=path, field="dtype", found=f"{array.dtype} as {wanted}"
        )
    if wanted.kind == "f" or array.dtype.kind == "b":
        return array.astype(wanted)
    values = np.rint(array) if array.dtype.kind == "f" else array
    low, high = (values.min(), values.max()) if np.isfinite(values).all() else (np.nan, np.nan)
    limits = np.iinfo(wanted)
    if not (low >= limits.min and high <= limits.max):
        raise InputError(
            "values do not fit the voxel type",
            where=path,
            field="dtype",
            found=f"{low:g} to {high:g}",
            expected=f"{limits.min} to {limits.max} for {wanted}",
            remedy="Write floating point.",
        )
    return values.astype(wanted)


def _place(header: Any, volume: Volume, like: str | Path | None) -> None:
    """sform, qform, voxel sizes and unit."""
    header.set_xyzt_units("mm")
    if like is not None:
        with _opened(Path(like)) as (stream, _):
            raw = stream.read(540)
        source = raw_structure(raw, Path(like))
        shape = shape_of(source, Path(like))
        if shape == volume.shape and np.abs(affine_of(source, shape, Path(like), []) - volume.affine).max() < 1e-4:
            for field in ("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"):
                header[field] = source[field]
            for field in ("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"):
                header[field] = source[field]
            header["pixdim"][:4] = source["pixdim"][:4]
            header["xyzt_units"] = int(source["xyzt_units"]) & 7
            return
    axes = volume.affine[:3, :3] / np.linalg.norm(volume.affine[:3, :3], axis=0)
    header.set_sform(volume.affine, code=2)
    if np.abs(axes.T @ axes - np.eye(3)).max() < 1e-4:
        header.set_qform(volume.affine, code=2)
    else:
        header.set_zooms(volume.spacing)


def _dump(header: Any, array: np.ndarray, target: Any) -> None:
    target.write(header.binaryblock + b"\0\0\0\0")
    for k in range(array.shape[2]):
        target.write(np.asarray(array[:, :, k], order="F").tobytes(order="F"))
