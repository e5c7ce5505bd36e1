"""Moving voxels between grids without moving anatomy: reorient, resample, crop, pad, compare.

Everything goes through the affines, so oblique, flipped, permuted and sheared grids need no special care.
Interpolation is in :mod:`medmae.imaging.interpolation`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import nibabel as nib
import numpy as np

from medmae.imaging.interpolation import (
    CONTINUATION,
    continued,
    exact_move,
    float32,
    interpolate,
    move_voxels,
    sigmas_of,
    smooth,
    steps_of,
)
from medmae.imaging.volume import Grid, Volume

GRID_TOLERANCE_MM = 0.1  # grids whose corners differ by less are the same grid written by two programs

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


# --- grids ---------------------------------------------------------------------------------------------------------


def reoriented_grid(grid: Grid, orientation: str) -> Grid:
    """The same voxels with axes permuted and flipped so that they run towards ``orientation`` (nearest, if oblique)."""
    now = nib.orientations.io_orientation(grid.affine)
    change = nib.orientations.ornt_transform(now, nib.orientations.axcodes2ornt(orientation))
    i, j, k = (grid.shape[int(axis)] for axis in np.argsort(change[:, 0]))
    return Grid((i, j, k), grid.affine @ nib.orientations.inv_ornt_aff(change, grid.shape))


def spacing_grid(grid: Grid, spacing: Sequence[float]) -> Grid:
    """A grid over the same box with the same centre and axes, at ``spacing`` mm.

    The number of voxels is rounded, so the extent is kept to half a new voxel (at least one voxel a side).
    """
    new = np.asarray(spacing, dtype=np.float64)
    old = np.asarray(grid.spacing)
    i, j, k = (max(1, int(n)) for n in np.floor(np.asarray(grid.shape) * old / new + 0.5))
    affine = np.eye(4)
    affine[:3, :3] = grid.affine[:3, :3] / old * new
    centre = grid.voxel_to_mm((np.asarray(grid.shape) - 1) / 2)
    affine[:3, 3] = centre - affine[:3, :3] @ ((np.array((i, j, k)) - 1) / 2)
    return Grid((i, j, k), affine)


def cropped_grid(grid: Grid, box: Box) -> Grid:
    """The part of a grid inside ``box``, ((lo, hi), ...) in voxels, hi excluded; a box beyond the edges pads."""
    low, high = np.array(box).T
    affine = grid.affine.copy()
    affine[:3, 3] = grid.voxel_to_mm(low)
    i, j, k = (int(n) for n in high - low)
    return Grid((i, j, k), affine)


def corner_distance_mm(a: Grid, b: Grid) -> float:
    """How far apart the outer corners of two grids are at most, in mm; infinite when the shapes differ."""
    if a.shape != b.shape:
        return float("inf")
    return float(np.linalg.norm(a.corners_mm() - b.corners_mm(), axis=1).max())


def grids_agree(a: Grid, b: Grid, tolerance_mm: float = GRID_TOLERANCE_MM) -> bool:
    """Whether two grids are one: same shape, and every outer corner within ``tolerance_mm``."""
    return corner_distance_mm(a, b) <= tolerance_mm


def overlap_share(a: Grid, b: Grid) -> float:
    """How much of the smaller field of view lies inside the other: 0 (apart) to 1 (contained).

    Estimated at 16 x 16 x 16 points spread evenly over the smaller box; right for oblique boxes too.
    """
    small, large = sorted((a, b), key=lambda grid: abs(np.linalg.det(grid.affine)) * np.prod(grid.shape))
    axes = [(np.arange(16) + 0.5) / 16 * n - 0.5 for n in small.shape]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    inside = large.mm_to_voxel(small.voxel_to_mm(points))
    return float(((inside >= -0.5) & (inside <= np.array(large.shape) - 0.5)).all(axis=1).mean())


# --- boxes ---------------------------------------------------------------------------------------------------------


def foreground_box(arrays: Iterable[np.ndarray]) -> Box:
    """The smallest box ((lo, hi), (lo, hi), (lo, hi)), hi excluded, with every voxel that is not 0 in any array.

    The arrays share one shape; when all are 0 everywhere the box is the whole of it.
    """
    present: np.ndarray | None = None
    for array in arrays:
        present = array != 0 if present is None else present | (array != 0)
    if present is None:
        raise ValueError("foreground_box needs at least one array")
    slab = np.asarray(present.any(axis=2))
    profiles = [np.asarray(p) for p in (slab.any(axis=1), slab.any(axis=0), present.any(axis=(0, 1)))]
    if not profiles[0].any():
        return _box((0, n) for n in present.shape)
    return _box((int(p.argmax()), int(len(p) - p[::-1].argmax())) for p in profiles)


def centred_box(shape: Sequence[int], size: Sequence[int]) -> Box:
    """The box of ``size`` voxels in the middle of ``shape``; it reaches beyond the edges where ``size`` is larger."""
    return _box(((n - s) // 2, (n - s) // 2 + s) for n, s in zip(shape, size, strict=True))


def crop_to(volume: Volume, box: Box, fill: float = 0.0) -> Volume:
    """The voxels inside ``box`` at the same place in mm; what lies beyond the volume's edges is ``fill``."""
    grid = cropped_grid(volume.grid, box)
    shift = np.array([low for low, _ in box])
    array = move_voxels(volume.array, np.eye(3, dtype=int), shift, grid.shape, fill)
    return Volume(array, grid.affine, volume.frame)


def _box(pairs: Iterable[tuple[int, int]]) -> Box:
    i, j, k = pairs
    return i, j, k


# --- voxels --------------------------------------------------------------------------------------------------------


def reorient(volume: Volume, orientation: str = "RAS") -> Volume:
    """Permute and flip the axes so that they run towards ``orientation``; values and places in mm are untouched."""
    grid = reoriented_grid(volume.grid, orientation)
    move = exact_move(volume.grid, grid)
    assert move is not None  # by construction
    return Volume(move_voxels(volume.array, *move, grid.shape, 0), grid.affine, volume.frame)


def resample(
    volume: Volume, to: Grid, order: Literal[0, 1, 3] = 1, fill: float = 0.0, antialias: bool = True
) -> Volume:
    """``volume`` on another grid, float32; a boolean volume stays boolean (interpolated share of at least a half).

    ``order``: 0 nearest, 1 linear, 3 cubic B-spline (linear where an axis has fewer than four voxels). Voxels whose
    centre lies outside the volume's box are ``fill``. With ``antialias`` an axis that gets coarser is smoothed first by
    the Gaussian that takes one voxel's width (full width at half maximum) to the other's. Grids that differ by flips,
    permutations and whole voxels only (to 0.01 voxel) are not interpolated at all: the values come through unchanged.
    """
    mask = volume.array.dtype == bool
    move = exact_move(volume.grid, to)
    if move is not None:
        array = move_voxels(volume.array if mask else float32(volume.array), *move, to.shape, fill)
        return Volume(array, to.affine, volume.frame)
    matrix = np.linalg.inv(volume.affine) @ to.affine  # index there -> index here
    source = float32(volume.array)
    if antialias and order > 0:
        source = smooth(source, matrix)
    array = interpolate(source, matrix, to.shape, 1 if mask and order == 3 else order, fill)
    return Volume(array >= 0.5 if mask else array, to.affine, volume.frame)


def resample_foreground(
    volume: Volume, to: Grid, order: Literal[0, 1, 3] = 1, antialias: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """An image whose 0 means background on another grid: (float32 array, its foreground, boolean).

    The foreground is where the interpolated share of non-zero voxels is at least a half; everything else is exactly 0.
    Before interpolation the image is continued a little way into its background, so that the rim of a skull-stripped
    brain is neither darkened by the zeros beside it nor rings into them.
    """
    present = volume.array != 0
    if exact_move(volume.grid, to) is not None:
        array = resample(volume, to).array
        return array, array != 0
    steps = steps_of(np.linalg.inv(volume.affine) @ to.affine) if antialias else np.ones(3)
    sigmas = np.maximum(CONTINUATION, sigmas_of(steps))
    margin = int(np.ceil(4 * sigmas.max())) + 2  # SciPy cuts its Gaussians at four sigma
    bounds = (
        (max(0, a - margin), min(n, b + margin))
        for (a, b), n in zip(foreground_box([present]), present.shape, strict=True)
    )
    volume = crop_to(volume, _box(bounds))  # a head fills a quarter of its image: leave the air out
    present = volume.array != 0
    inside = resample(Volume(present, volume.affine), to, 1, antialias=antialias).array
    source = float32(volume.array)
    if order > 0 and not present.all():
        source = continued(source, present, sigmas)
    array = resample(Volume(source, volume.affine), to, order, antialias=antialias).array
    array[~inside] = 0
    return array, inside


def resample_labels(volume: Volume, to: Grid) -> Volume:
    """A label map (whole numbers, 0 = background) on another grid, same dtype.

    Each class is interpolated linearly as a mask and every voxel takes the class with the largest share, which keeps
    borders smoother than nearest neighbour. Ties go to the lower label.
    """
    move = exact_move(volume.grid, to)
    if move is not None:
        return Volume(move_voxels(volume.array, *move, to.shape, 0), to.affine, volume.frame)
    matrix = np.linalg.inv(volume.affine) @ to.affine
    source = np.ascontiguousarray(volume.array)
    result = np.zeros(to.shape, source.dtype)
    best = interpolate(smooth((source == 0).astype(np.float32), matrix), matrix, to.shape, 1, 1.0)
    for label in (value for value in np.unique(source) if value != 0):
        share = interpolate(smooth((source == label).astype(np.float32), matrix), matrix, to.shape, 1, 0.0)
        wins = share > best
        result[wins], best[wins] = label, share[wins]
    return Volume(result, to.affine, volume.frame)
