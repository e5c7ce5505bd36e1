"""Siemens mosaics: the slices of a volume as tiles of one large image, described in the maker's private header.

ImagePositionPatient is then that of an image of the mosaic's size with the same centre as each slice, so the corner of
a slice lies half the difference of the sizes further in. Tiles run along rows, in a square with room for all of them.
The direction from slice to slice is SliceNormalVector of the private image header (CSA, element (0029,xx10)).
"""

from __future__ import annotations

import math
import struct
from dataclasses import replace

import numpy as np

from medmae.imaging.dicom.header import Frame, frame_of
from medmae.imaging.dicom.opening import File
from medmae.imaging.dicom.values import Values

_TAG = struct.Struct("<64si4siii")  # name, multiplicity, representation, type, number of items, mark
_MOST_TAGS = 1000  # a real header has about a hundred; more is damage


def is_mosaic(values: Values) -> bool:
    """Whether an object is a mosaic: ImageType says so."""
    return "MOSAIC" in (part.upper() for part in values.texts("ImageType"))


def frames_of_mosaic(values: Values, file: File) -> tuple[tuple[Frame, ...], str]:
    """(the tiles as slices, why they could not be made out)."""
    private = read_csa(values.blob("SiemensCSAImageHeader"))
    count = values.integer("SiemensImagesInMosaic") or int(number(private, "NumberOfImagesInMosaic", 0))
    whole = frame_of(values, file, 0)
    if not count:
        return (), "a mosaic that does not say how many slices it holds"
    across = math.ceil(math.sqrt(count))
    rows, columns = (size // across for size in whole.shape)
    if not whole.placed or rows * across != whole.shape[0] or columns * across != whole.shape[1]:
        return (), "a mosaic whose size or place does not fit its number of slices"
    step = values.number("SpacingBetweenSlices") or values.number("SliceThickness")
    if not step:
        return (), "a mosaic that does not say how far apart its slices lie"
    along_row, along_column = np.reshape(whole.orientation, (2, 3))
    normal = np.cross(along_row, along_column)
    stated = private.get("SliceNormalVector", ())
    if len(stated) < 3:
        return (), "a mosaic that does not say in which direction its slices follow one another"
    normal *= math.copysign(1.0, float(np.dot(normal, [float(v) for v in stated[:3]])))
    inset = along_row * whole.spacing[1] * (whole.shape[1] - columns) / 2
    inset += along_column * whole.spacing[0] * (whole.shape[0] - rows) / 2
    corner = np.array(whole.position) + inset
    facts = replace(whole.facts, volume=values.integer("InstanceNumber") or 0)
    return tuple(
        replace(
            whole,
            index=index,
            shape=(rows, columns),
            position=tuple((corner + index * step * normal).tolist()),
            facts=facts,
        )
        for index in range(count)
    ), ""


def tile(image: np.ndarray, index: int, shape: tuple[int, int]) -> np.ndarray:
    """Slice ``index`` of ``shape`` (rows, columns) out of a mosaic."""
    rows, columns = shape
    row, column = divmod(index, image.shape[1] // columns)
    return image[row * rows : (row + 1) * rows, column * columns : (column + 1) * columns]


def number(tags: dict[str, tuple[str, ...]], name: str, default: float) -> float:
    try:
        return float(tags[name][0])
    except (KeyError, IndexError, ValueError):
        return default


def read_csa(blob: bytes) -> dict[str, tuple[str, ...]]:
    """{name: values as text} of a CSA header of the second kind (it begins with SV10); {} for anything else."""
    if blob[:4] != b"SV10" or len(blob) < 16:
        return {}
    tags: dict[str, tuple[str, ...]] = {}
    try:
        count, at = struct.unpack_from("<i", blob, 8)[0], 16
        for _ in range(min(count, _MOST_TAGS)):
            name, _, _, _, items, _ = _TAG.unpack_from(blob, at)
            at += _TAG.size
            values = []
            for _ in range(items):
                length = struct.unpack_from("<4i", blob, at)[1]
                at += 16
                if length < 0:
                    return tags
                values.append(blob[at : at + length].split(b"\0")[0].decode("latin-1").strip())
                at += math.ceil(length / 4) * 4  # values begin at multiples of four bytes
            tags[name.split(b"\0")[0].decode("latin-1")] = tuple(value for value in values if value)
    except struct.error:  # cut off: what was read so far is whole
        pass
    return tags
