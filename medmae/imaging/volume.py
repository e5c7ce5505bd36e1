"""Volume and Grid: voxels, and the place in the world that belongs to them.

Both are checked when they are made, so everything that takes one may trust it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from medmae.errors import InputError

MIN_SPACING = 0.01  # mm; below: microscopy, or a header in another unit
MAX_SPACING = 50.0  # mm; above: a header in another unit, or damaged
# Volume of the cell spanned by the three unit axis vectors: 1 for right angles, cos(tilt) for a tilted gantry. 0.1
# allows a shear of 84 degrees; anything flatter has no usable third dimension.
MIN_CELL = 0.1


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the voxels of an array are: ``shape`` and a 4x4 ``affine`` from voxel index to RAS+ mm (float64).

    Whole indices are voxel centres, so the voxels fill [-0.5, n - 0.5] along each axis. Raises :class:`InputError` for
    a shape or affine that places nothing (see :func:`check_affine`).
    """

    shape: tuple[int, int, int]
    affine: np.ndarray

    def __post_init__(self) -> None:
        shape = tuple(int(n) for n in self.shape)
        if len(shape) != 3 or min(shape) < 1:
            raise InputError(
                "a volume has three axes of at least one voxel",
                field="shape",
                found=shape,
                remedy="Give one 3-D image a file.",
            )
        affine = check_affine(self.affine)
        affine.flags.writeable = False
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "affine", affine)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Grid) and self.shape == other.shape and np.array_equal(self.affine, other.affine)

    def __hash__(self) -> int:
        return hash((self.shape, self.affine.tobytes()))

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance of neighbouring voxel centres along each axis, in mm."""
        i, j, k = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(i), float(j), float(k)

    @property
    def orientation(self) -> str:
        """The anatomical direction each axis runs towards, for oblique grids the nearest: ``"RAS"``, ``"LPS"``, ..."""
        return "".join(nib.orientations.aff2axcodes(self.affine))

    def corners_mm(self) -> np.ndarray:
        """The eight outer corners of the box that the voxels fill: (8, 3), mm."""
        return self.voxel_to_mm(list(product(*((-0.5, n - 0.5) for n in self.shape))))

    def voxel_to_mm(self, ijk: Any) -> np.ndarray:
        """Voxel indices (..., 3), fractions allowed, as RAS+ mm (..., 3)."""
        return np.asarray(ijk, dtype=np.float64) @ self.affine[:3, :3].T + self.affine[:3, 3]

    def mm_to_voxel(self, xyz: Any) -> np.ndarray:
        """RAS+ mm (..., 3) as fractional voxel indices (..., 3)."""
        offset = np.asarray(xyz, dtype=np.float64) - self.affine[:3, 3]
        return offset @ np.linalg.inv(self.affine[:3, :3]).T

    def to_json(self) -> dict[str, Any]:
        """Plain types, exact: ``Grid.from_json(grid.to_json()) == grid``."""
        return {"shape": list(self.shape), "affine": self.affine.tolist()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Grid:
        i, j, k = data["shape"]
        return cls((i, j, k), np.array(data["affine"], dtype=np.float64))


@dataclass(frozen=True, eq=False)
class Volume:
    """One 3-D image: ``array`` (axes i, j, k), its ``affine`` (4x4, voxel index to RAS+ mm) and, where known, the UID
    of its ``frame`` of reference. Raises :class:`InputError` when the array is not 3-D or the affine places nothing.
    """

    array: np.ndarray
    affine: np.ndarray
    frame: str | None = None

    def __post_init__(self) -> None:
        if np.ndim(self.array) != 3:
            raise InputError(
                "a volume is a 3-D array",
                field="array",
                found=f"shape {np.shape(self.array)}",
                expected="(i, j, k)",
                remedy="Select one volume or channel first.",
            )
        array = np.asarray(self.array)
        object.__setattr__(self, "array", array)
        object.__setattr__(self, "affine", Grid(array.shape, self.affine).affine)

    @property
    def grid(self) -> Grid:
        return Grid(self.shape, self.affine)

    @property
    def shape(self) -> tuple[int, int, int]:
        i, j, k = self.array.shape
        return i, j, k

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance of neighbouring voxel centres along each axis, in mm."""
        return self.grid.spacing

    @property
    def orientation(self) -> str:
        """The anatomical direction each axis runs towards: ``"RAS"``, ``"LPS"``, ..."""
        return self.grid.orientation

    def with_array(self, array: np.ndarray) -> Volume:
        """Other values at the same place; the shape must be the same."""
        if np.shape(array) != self.shape:
            raise InputError(
                "these voxels do not fit this grid", field="shape", found=np.shape(array), expected=self.shape
            )
        return Volume(array, self.affine, self.frame)


def check_affine(affine: Any, where: str | Path | None = None, field: str = "affine") -> np.ndarray:
    """``affine`` as a new 4x4 float64 array, if it places voxels in the world.

    Raises :class:`InputError` for another shape, non-finite entries, a last row other than (0, 0, 0, 1), a zero axis,
    spacing outside [0.01, 50] mm, linearly dependent axes, or a shear beyond 84 degrees. Gantry tilt (a shear of up to
    30 degrees) and any rotation or flip are fine.
    """

    def refuse(what: str, found: object, expected: str, remedy: str) -> InputError:
        return InputError(what, where=where, field=field, found=found, expected=expected, remedy=remedy)

    remedy = "Correct the header, or convert the original images again."
    try:
        matrix = np.array(affine, dtype=np.float64)
    except (TypeError, ValueError):
        raise refuse("an affine is a matrix of numbers", type(affine).__name__, "4x4", remedy) from None
    if matrix.shape != (4, 4):
        raise refuse("an affine is a 4x4 matrix", f"shape {matrix.shape}", "(4, 4)", remedy)
    if not np.isfinite(matrix).all():
        raise refuse("the affine has entries that are not numbers", _rows(matrix), "finite numbers", remedy)
    if not np.allclose(matrix[3], (0, 0, 0, 1), atol=1e-6):
        raise refuse("the affine's last row is wrong", matrix[3].tolist(), "0 0 0 1", remedy)
    spacing = np.linalg.norm(matrix[:3, :3], axis=0)
    sizes = " x ".join(f"{size:g}" for size in spacing) + " mm"
    if spacing.min() == 0:
        raise refuse("the affine is singular: an axis has no length", sizes, f"at least {MIN_SPACING} mm", remedy)
    cell = abs(np.linalg.det(matrix[:3, :3] / spacing))
    if cell < 1e-6:
        raise refuse("the affine is singular: its axes lie in one plane", _rows(matrix), "three directions", remedy)
    if spacing.min() < MIN_SPACING or spacing.max() > MAX_SPACING:
        expected = f"{MIN_SPACING:g} to {MAX_SPACING:g} mm"
        raise refuse("the voxel spacing is absurd", sizes, expected, "Check the header's unit; lengths are in mm here.")
    if cell < MIN_CELL:
        raise refuse("the axes are sheared nearly into one plane", f"cell {cell:.3f}", f"at least {MIN_CELL}", remedy)
    matrix[3] = (0, 0, 0, 1)
    return matrix


def _rows(matrix: np.ndarray) -> str:
    return "; ".join(" ".join(f"{value:g}" for value in row) for row in matrix[:3])
