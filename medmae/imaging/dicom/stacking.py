"""Slices into a stack: ordered along the normal, evenly spaced, on one affine, or refused with the gaps in mm.

Geometry as in PS3.3 C.7.6.2.1.1: pixel (row r, column c) lies at position + c * spacing[1] * X + r * spacing[0] * Y,
with X the direction along a row and Y along a column. The step from slice to slice is measured, never taken from
SpacingBetweenSlices or SliceThickness, and need not be along the normal: a tilted gantry shears the stack, and the
affine is sheared likewise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from medmae.errors import InputError
from medmae.imaging.dicom.header import Frame
from medmae.imaging.volume import Grid

FEWEST: Final = 3  # with two slices nothing can be said about the evenness of their spacing
TOLERANCE_MM: Final = 0.1  # that a slice may lie off its place on the affine, or a tenth of the spacing if less
SAME_MM: Final = 0.01  # slices closer along the normal lie at one position
SAME_DIRECTION: Final = 5e-4  # of direction cosines: 0.06 mm at 128 mm from the centre
MOST_GAPS: Final = 6  # runs of equal gaps that a message tells
TILTED_DEGREES: Final = 0.2  # shears below this are rounding, and are kept all the same
_LPS_TO_RAS: Final = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Stack:
    """``frames`` in order along the normal, their ``grid`` (axes: column, row, slice; RAS+ mm), ``tilt`` in degrees
    between the normal and the step from slice to slice."""

    frames: tuple[Frame, ...]
    grid: Grid
    tilt: float


class NotAStack(Exception):
    """Why slices make no volume: ``what`` is wrong, and what was ``found``; both free of anything but geometry."""

    def __init__(self, what: str, found: str) -> None:
        super().__init__(what)
        self.what, self.found = what, found


def normal_of(frame: Frame) -> np.ndarray:
    """The unit normal of a slice: X x Y."""
    x, y = np.reshape(frame.orientation, (2, 3))
    cross = np.cross(x, y)
    return np.asarray(cross / (np.linalg.norm(cross) or 1.0))


def distances(frames: Sequence[Frame]) -> np.ndarray:
    """(n,) how far along the normal of the first each slice lies, in mm."""
    return np.array([frame.position for frame in frames]) @ normal_of(frames[0])


def coincide(frames: Sequence[Frame]) -> bool:
    """Whether some slices lie at one position."""
    return len(frames) > 1 and float(np.diff(np.sort(distances(frames))).min()) < SAME_MM


def same_plane(a: Frame, b: Frame) -> bool:
    """Whether two slices can belong to one stack: matrix, pixel spacing, orientation."""
    return (
        a.shape == b.shape
        and np.allclose(a.spacing, b.spacing, rtol=1e-4, atol=0)
        and np.allclose(a.orientation, b.orientation, rtol=0, atol=SAME_DIRECTION)
    )


def check_plane(frame: Frame) -> None:
    """Raise :class:`NotAStack` for an orientation or a spacing that places nothing."""
    x, y = np.reshape(frame.orientation, (2, 3))
    lengths = np.linalg.norm(x), np.linalg.norm(y)
    if max(abs(length - 1) for length in lengths) > 1e-2 or abs(float(x @ y)) > 1e-2:
        found = f"lengths {lengths[0]:.3f} and {lengths[1]:.3f}, product {float(x @ y):.3f}"
        raise NotAStack("the directions of rows and columns are not two perpendicular unit vectors", found)
    if min(frame.spacing) <= 0:
        raise NotAStack("the pixel spacing is not positive", " x ".join(f"{s:g}" for s in frame.spacing) + " mm")


def stack(frames: Sequence[Frame]) -> Stack:
    """Order ``frames`` (of one plane, see :func:`same_plane`) and place them. Raises :class:`NotAStack`."""
    check_plane(frames[0])
    if len(frames) < FEWEST:
        raise NotAStack("too few slices for a volume", f"{len(frames)}, at least {FEWEST} are needed")
    along = distances(frames)
    order = np.argsort(along, kind="stable")
    ordered = tuple(frames[int(k)] for k in order)
    gaps = np.diff(along[order])
    if gaps.min() < SAME_MM:
        raise NotAStack(
            "several slices lie at one position and nothing in the header tells them apart",
            f"{int((gaps < SAME_MM).sum())} of {len(frames)} slices",
        )
    positions = np.array([frame.position for frame in ordered])
    step = (positions[-1] - positions[0]) / (len(ordered) - 1)
    spacing = float(np.linalg.norm(step))
    line = positions[0] + np.arange(len(ordered))[:, None] * step
    off = float(np.linalg.norm(positions - line, axis=1).max())
    tilt = math.degrees(math.acos(min(1.0, abs(float(step @ normal_of(ordered[0]))) / spacing)))
    if off > min(TOLERANCE_MM, spacing / 10):
        raise uneven(gaps, positions, normal_of(ordered[0]), off)
    try:
        grid = grid_of(ordered, step)
    except InputError as error:
        raise NotAStack(error.problem.what, error.problem.found or "") from None
    return Stack(ordered, grid, tilt)


def grid_of(frames: Sequence[Frame], step: np.ndarray) -> Grid:
    """The grid of ordered slices: axis i along a row, j along a column, k from slice to slice."""
    frame = frames[0]
    x, y = np.reshape(frame.orientation, (2, 3))
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = x * frame.spacing[1], y * frame.spacing[0], step
    affine[:3, 3] = frame.position
    rows, columns = frame.shape
    return Grid((columns, rows, len(frames)), _LPS_TO_RAS @ affine)


def uneven(gaps: np.ndarray, positions: np.ndarray, normal: np.ndarray, off: float) -> NotAStack:
    """Why slices do not lie evenly on a line: some are missing, the gaps differ, or they are shifted sideways."""
    told = runs(gaps)
    sideways = np.diff(positions, axis=0) - gaps[:, None] * normal
    lean = float(np.median(np.degrees(np.arctan2(np.linalg.norm(sideways, axis=1), gaps))))
    if lean > TILTED_DEGREES:
        told += f"; the stack is also tilted by {lean:.1f} degrees, as by a gantry"
    usual = float(np.median(gaps))
    multiples = np.rint(gaps / usual)
    if (np.abs(gaps - multiples * usual) <= max(TOLERANCE_MM, 0.02 * usual)).all() and multiples.min() >= 1:
        missing = int((multiples - 1).sum())
        if missing:
            return NotAStack(f"slices are missing: {missing}", told)
        return NotAStack(f"slices lie up to {off:.2f} mm beside their places in an even stack", told)
    return NotAStack("the slices are unevenly spaced", told)


def runs(gaps: np.ndarray) -> str:
    """``slices 1 to 14 4 mm apart, 14 to 15 1.08 mm, ...``: neighbouring equal gaps together, slices from 1."""
    starts = [0, *(int(k) + 1 for k in np.flatnonzero(np.abs(np.diff(gaps)) > 0.02)), len(gaps)]
    told = [
        f"{first + 1} to {last + 1} {float(np.mean(gaps[first:last])):.2f} mm"
        for first, last in zip(starts[:-1], starts[1:], strict=True)
    ]
    more = f", and {len(told) - MOST_GAPS} more" if len(told) > MOST_GAPS else ""
    return "gaps between slices, in order along the normal: " + ", ".join(told[:MOST_GAPS]) + more
