"""A volume as the stack of slices that DICOM knows: rows, columns, positions in LPS mm.

DICOM's patient axes run to the left, the back and the head (PS3.3 C.7.6.2.1.1), an affine's to the right, the front and
the head. Voxels are moved between axes but never interpolated.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from medmae.errors import InputError
from medmae.imaging.volume import Volume

MAX_BENT = 0.05  # mm; how far right angles between rows and columns may move a voxel, half of what readers are held to
_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True, eq=False)
class Stack:
    """``array`` (slices, rows, columns); ``positions`` (slices, 3): the middle of each slice's first voxel in LPS mm;
    ``orientation`` (2, 3): unit vectors along a row and down a column; ``pixel_spacing``: between rows, between
    columns, mm; ``spacing``: between slices, along their normal, mm."""

    array: np.ndarray
    positions: np.ndarray
    orientation: np.ndarray
    pixel_spacing: tuple[float, float]
    spacing: float


def stack_of(volume: Volume, orientation: np.ndarray | None = None, backwards: bool = False) -> Stack:
    """``volume`` cut into slices along the axis that comes nearest to the normal of ``orientation`` (2, 3: row and
    column of the template in LPS), rows and columns likewise. Without one, i runs along rows, j down columns, k over
    slices.

    Slices follow one another along row x column, or against it with ``backwards``. A sheared stack (a tilted gantry) is
    written as scanners write it: each slice a rectangle at its own position. Raises :class:`InputError` where rows and
    columns meet at another angle than a right one, which no DICOM image can say.
    """
    affine = _TO_LPS @ volume.affine
    order, flips = _match(affine, volume.shape, orientation)
    array = volume.array.transpose(order)
    matrix = affine[:, [*order, 3]]
    for axis, flip in enumerate(flips):
        if flip:
            matrix[:, 3] += matrix[:, axis] * (array.shape[axis] - 1)
            matrix[:, axis] *= -1
            array = np.flip(array, axis)
    columns, rows, slices = array.shape
    inplane = matrix[:3, :2]
    lengths = np.linalg.norm(inplane, axis=0)
    straight = _straight(inplane / lengths)
    normal = np.cross(straight[:, 0], straight[:, 1])
    if (matrix[:3, 2] @ normal < 0) != backwards:
        matrix[:, 3] += matrix[:, 2] * (slices - 1)
        matrix[:, 2] *= -1
        array = np.flip(array, 2)
    positions = matrix[:3, 3] + np.arange(slices)[:, None] * matrix[:3, 2]
    return Stack(
        array.transpose(2, 1, 0),
        positions,
        straight.T,
        (float(lengths[1]), float(lengths[0])),
        float(abs(matrix[:3, 2] @ normal)),
    )


def decimals(values: Iterable[float]) -> list[str]:
    """Numbers as decimal strings, as exact as 16 characters allow (PS3.5 section 6.2, DS)."""
    from pydicom.valuerep import format_number_as_ds

    return [format_number_as_ds(float(value) + 0.0) for value in values]


def _match(
    affine: np.ndarray, shape: tuple[int, int, int], orientation: np.ndarray | None
) -> tuple[tuple[int, int, int], tuple[bool, bool]]:
    """Which voxel axis runs along rows, which down columns, which over slices; and whether the first two are turned."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    bent = {(i, j, k): _bend(axes, affine, shape, (i, j)) for i, j, k in permutations(range(3))}
    possible = [order for order, amount in bent.items() if amount <= MAX_BENT]
    if not possible:
        raise InputError(
            "no two axes of this volume meet at a right angle, so it has no slices that DICOM can hold",
            field="affine",
            found=f"{min(bent.values()):.2f} mm off at the corners",
            expected=f"at most {MAX_BENT} mm",
            remedy="Resample it onto the grid of the series that is its template.",
        )
    if orientation is None:
        natural = (0, 1, 2)
        return (natural if natural in possible else possible[0]), (False, False)
    wanted = np.stack([*orientation, np.cross(*orientation)], axis=1)
    closeness = wanted.T @ axes  # [direction of the template, axis of the volume]
    best = max(possible, key=lambda order: sum(abs(closeness[place, axis]) for place, axis in enumerate(order)))
    return best, (bool(closeness[0, best[0]] < 0), bool(closeness[1, best[1]] < 0))


def _bend(axes: np.ndarray, affine: np.ndarray, shape: tuple[int, int, int], inplane_axes: tuple[int, int]) -> float:
    """How far, in mm, the farthest voxel of a slice moves when its axes are made to meet at right angles."""
    pair = list(inplane_axes)
    inplane = axes[:, pair]
    reach = np.linalg.norm(affine[:3, pair], axis=0) * (np.array(shape)[pair] - 1)
    moved = (_straight(inplane) - inplane) * reach
    return float(max(np.linalg.norm(moved[:, 0] + moved[:, 1]), *np.linalg.norm(moved, axis=0)))


def _straight(inplane: np.ndarray) -> np.ndarray:
    """The nearest two orthonormal columns: (3, 2)."""
    left, _, right = np.linalg.svd(inplane, full_matrices=False)
    return left @ right
