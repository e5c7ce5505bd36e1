"""Pixels of a series as a volume: decoded by pydicom's installed decoders, rescaled frame by frame, float32."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pydicom
from pydicom.pixels import get_decoder
from pydicom.uid import UID

from medmae.errors import InputError, Problem
from medmae.imaging.dicom.mosaic import tile
from medmae.imaging.dicom.opening import Opener, read_errors
from medmae.imaging.dicom.series import Series
from medmae.imaging.dicom.values import syntax_of, tag_and_vr
from medmae.imaging.volume import Volume

_KEYWORDS: Final = (
    "Rows Columns NumberOfFrames SamplesPerPixel PhotometricInterpretation PlanarConfiguration "
    "BitsAllocated BitsStored HighBit PixelRepresentation PixelData ExtendedOffsetTable "
    "ExtendedOffsetTableLengths"
)
_NEEDED: Final = tuple(tag_and_vr(keyword)[0] for keyword in _KEYWORDS.split())
_REMEDY: Final = "Decompress the series, for example with dcmdjpeg, dcmdjpls or gdcmconv --raw."


def undecodable(syntax: str) -> Problem | None:
    """Why pixels in this transfer syntax cannot be read here; None when they can."""
    uid = UID(syntax)
    if not uid.is_valid:
        return Problem("an unknown transfer syntax", found="not a UID", remedy=_REMEDY)
    try:
        decoder = get_decoder(uid)
    except NotImplementedError:
        found = uid.name if uid.name != str(uid) else f"{uid}, which the standard does not know"
        return Problem("an unknown transfer syntax", found=found, expected="one of PS3.5, annex A", remedy=_REMEDY)
    if decoder.is_available:
        return None
    remedy = f"Install python-gdcm. Or: {_REMEDY[0].lower()}{_REMEDY[1:]}"
    return Problem("no decoder for this transfer syntax is installed", found=uid.name, remedy=remedy)


def read_series(series: Series, problems: list[Problem] | None = None) -> Volume:
    """The voxels of ``series``: float32, axes (column i, row j, slice k) of its grid, ``frame`` the frame of reference.

    Each slice is stored value x its own rescale slope + intercept, in float64 before rounding to float32 (PS3.3
    C.11.1.1.2: Hounsfield units of CT; no unit of MR). Warnings go to ``problems``. Raises :class:`InputError` when a
    file is gone, damaged or truncated, or has changed since its header was read.
    """
    columns, rows, count = series.grid.shape
    array = np.empty((columns, rows, count), np.float32, order="F")
    wanted: dict[int, list[tuple[int, int]]] = {}
    for k, (file, index) in enumerate(series.slices):
        wanted.setdefault(file, []).append((k, index))
    with Opener() as opener:
        for number, places in wanted.items():
            images = decoded(series, number, [index for _, index in places], opener)
            for (k, _), image in zip(places, images, strict=True):
                if image.shape != (rows, columns):
                    raise failed(series, number, "its size has changed since the header was read")
                slope, intercept = series.rescale[k]
                array[:, :, k] = (image.astype(np.float64) * slope + intercept).T
    if problems is not None and series.tilt > 0.2:
        problems.append(
            Problem(
                "the stack is sheared, as by a tilted gantry: kept as it is, with a sheared affine",
                str(series),
                found=f"{series.tilt:.1f} degrees",
                fatal=False,
            )
        )
    return Volume(array, series.grid.affine, series.frame_uid)


def decoded(series: Series, number: int, indices: list[int], opener: Opener) -> list[np.ndarray]:
    """The slices ``indices`` of one file, (rows, columns) of stored values each."""
    file = series.files[number]
    try:
        with opener.open(file) as stream:
            dataset = pydicom.dcmread(stream, force=True, specific_tags=list(_NEEDED))
            return frames_of(dataset, indices, mosaic=series.kind == "mosaic", shape=series.grid.shape)
    except read_errors() as error:
        reason = getattr(error, "strerror", None) or "it is damaged, or no decoder takes it"
        raise failed(series, number, reason) from None
    except (ValueError, AttributeError, TypeError):  # pydicom's words may quote the header
        raise failed(series, number, "its pixel data are truncated or do not fit its header") from None


def frames_of(dataset: Any, indices: list[int], *, mosaic: bool, shape: tuple[int, int, int]) -> list[np.ndarray]:
    if "TransferSyntaxUID" not in dataset.file_meta:  # older than file meta information: as the elements are written
        dataset.file_meta.TransferSyntaxUID = syntax_of(dataset)
    decoder = get_decoder(dataset.file_meta.TransferSyntaxUID)
    if mosaic:
        whole, _ = decoder.as_array(dataset, index=0)
        return [tile(whole, index, (shape[1], shape[0])) for index in indices]
    return [image for image, _ in decoder.iter_array(dataset, indices=indices)]


def failed(series: Series, number: int, found: str) -> InputError:
    return InputError(
        "a slice cannot be read",
        where=f"{series}: {series.files[number]}",
        field="PixelData",
        found=found,
        remedy="Copy or export the series again.",
    )
