"""An image made ready to be aligned: what :mod:`medmae.imaging.motions` compares.

It is brought onto isotropic grids of three sizes with axes at right angles, so that thick slices, tilted gantries and
any orientation need no special care. Coordinates are RAS+ mm, for SimpleITK too: a rigid motion is one in any system.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from scipy import ndimage

from medmae.imaging.geometry import resample
from medmae.imaging.volume import Grid, Volume

HEAD = 160.0  # mm, the edge of a cube as large as a brain's box; for smaller things everything in mm shrinks likewise
AIR = 0.1  # share of the robust range of values that is background: where Smith's BET starts (HBM 17, 2002)
MARGIN = 30.0  # mm of background added where an image ends in background: what lies beyond is known, then
EDGE = 0.02  # share of a face that may be foreground for the image to end in background there
AROUND = 6.0  # mm around the foreground that are looked at too: an edge has two sides


@dataclass(frozen=True)
class Stage:
    """One resolution: voxels of ``spacing`` mm, ``samples`` of them looked at, steps from ``first`` mm to ``last``."""

    spacing: float
    samples: int
    first: float
    last: float
    iterations: int


COARSE = Stage(8.0, 8_000, 6.0, 0.2, 60)
MIDDLE = Stage(4.0, 30_000, 2.0, 0.05, 60)
FINE = Stage(2.0, 60_000, 1.0, 0.01, 60)
STAGES = (COARSE, MIDDLE, FINE)


@dataclass(frozen=True)
class Level:
    """An image at one resolution: SimpleITK's ``image`` and ``around``, the mask of ``looked`` voxels."""

    image: Any
    around: Any
    looked: int


@dataclass(frozen=True)
class Subject:
    """An image ready to be aligned: a level for each of :data:`STAGES`; its foreground's ``centre``, ``corners`` (8, 3)
    and root mean square ``radius``, mm; ``points`` (n, 3) spread over the foreground; ``seen``, the grid that was
    acquired; ``scale``, its size in heads (at most 1)."""

    levels: tuple[Level, ...]
    centre: np.ndarray
    corners: np.ndarray
    radius: float
    points: np.ndarray
    seen: Grid
    scale: float


def subject(volume: Volume) -> Subject | None:
    """``volume`` at all resolutions; None when nothing stands out from its background."""
    volume = Volume(np.asarray(volume.array, np.float32), volume.affine)
    axes, low, high = _box(volume.grid)
    rough = _at(
        volume,
        axes,
        low,
        high,
        float(np.cbrt((high - low).prod())) / 48,
        fill=float(volume.array.min()),
        antialias=False,
    )
    dark, bright = np.percentile(rough.array, (2, 98))
    threshold = dark + AIR * (bright - dark)
    inside = rough.array > threshold
    if not inside.any() or inside.all() or not bright > dark:
        return None
    points = rough.grid.voxel_to_mm(np.argwhere(inside))
    extent = np.ptp(points @ axes, axis=0) + rough.spacing
    scale = float(np.clip(np.cbrt(extent.prod()) / HEAD, 0.01, 1.0))
    for axis, n in enumerate(inside.shape):
        first, last = (inside.take(index, axis).mean() < EDGE for index in (0, n - 1))
        low[axis] -= MARGIN * scale * first
        high[axis] += MARGIN * scale * last
    window = (float(dark), float(np.percentile(rough.array[inside], 99.5)))
    levels: list[Level] = []
    finer = volume
    for stage in reversed(STAGES):
        finer = _at(finer, axes, low, high, stage.spacing * scale, fill=float(dark), antialias=True)
        levels.insert(0, _level(finer, threshold, window, scale))
    box = np.stack([(points @ axes).min(axis=0), (points @ axes).max(axis=0)])
    corners = np.array(list(product(*box.T))) @ axes.T
    centre = points.mean(axis=0)
    radius = float(np.sqrt(((points - centre) ** 2).sum(axis=1).mean()))
    some = points[:: max(1, len(points) // 2000)]
    return Subject(tuple(levels), centre, corners, radius, some, volume.grid, scale)


def _box(grid: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Axes at right angles (3, 3), the first two in the grid's slices, and along them the ends of the box around the
    grid, mm."""
    axes, upper = np.linalg.qr(grid.affine[:3, :3])
    axes = axes * np.sign(np.diag(upper))
    corners = grid.corners_mm() @ axes
    return axes, corners.min(axis=0), corners.max(axis=0)


def _at(
    volume: Volume,
    axes: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    spacing: float,
    *,
    fill: float,
    antialias: bool,
) -> Volume:
    i, j, k = (max(1, int(n)) for n in np.ceil((high - low) / spacing - 1e-6))
    affine = np.eye(4)
    affine[:3, :3] = axes * spacing
    affine[:3, 3] = axes @ ((low + high) / 2 - spacing * (np.array((i, j, k)) - 1) / 2)
    return resample(volume, Grid((i, j, k), affine), 1, fill, antialias)


def _level(volume: Volume, threshold: float, window: Sequence[float], scale: float) -> Level:
    steps = max(1, round(AROUND * scale / volume.spacing[0]))
    inside = ndimage.binary_opening(volume.array > threshold)  # without specks of noise
    around = ndimage.binary_dilation(inside if inside.any() else volume.array > threshold, iterations=steps)
    image = _itk(np.clip(volume.array, window[0], window[1]), volume.grid)
    return Level(image, _itk(around.astype(np.uint8), volume.grid), int(around.sum()))


def _itk(array: np.ndarray, grid: Grid) -> Any:
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    image.SetSpacing(grid.spacing)
    image.SetOrigin(grid.affine[:3, 3].tolist())
    image.SetDirection((grid.affine[:3, :3] / grid.spacing).ravel().tolist())
    return image
