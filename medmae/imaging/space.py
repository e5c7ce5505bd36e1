"""The model's space: a study's images on one grid, cropped and normalised, and the way back.

reorient → resample to the plan's spacing → crop to the box of all foregrounds → normalise. The first three are one
move between grids, so each voxel is interpolated once on the way in and once on the way back, and not at all when the
patient's grid already is the model's up to flips, permutations and whole-voxel crops.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np

from medmae.errors import InputError, Problem, nearest
from medmae.imaging.geometry import (
    centred_box,
    cropped_grid,
    foreground_box,
    grids_agree,
    overlap_share,
    reoriented_grid,
    resample,
    resample_foreground,
    resample_labels,
    spacing_grid,
)
from medmae.imaging.intensity import Scale, normalise
from medmae.imaging.volume import Grid, Volume
from medmae.plan import Image

MIN_OVERLAP = 0.1  # share of the smaller field of view; scans of one session that share less are not of one place
REGISTER = "Register the images to one another first (prepare and reconstruct: --coregister), or check their headers."


@dataclass(frozen=True, eq=False)
class ModelStudy:
    """A study in the model's space.

    ``arrays``: float32 (D, H, W), all on ``grid``; background is exactly 0 for ``zscore-nonzero``. ``native``: each
    image's own grid. ``scales``: how each was normalised. ``frame``: the frame of reference, where known.
    """

    arrays: dict[str, np.ndarray]
    grid: Grid
    native: dict[str, Grid]
    scales: dict[str, Scale]
    frame: str | None = None

    def to_native(
        self,
        array: np.ndarray,
        like: str | Grid,
        scale: Scale | None = None,
        order: Literal[0, 1, 3] = 1,
        *,
        fill: float | None = None,
        antialias: bool = False,
    ) -> Volume:
        """An array in the model's space on a patient's own grid: same shape and affine as ``like``. See
        :func:`to_native`; ``like`` is a modality of the study or any grid in the same world."""
        if isinstance(like, str):
            if like not in self.native:
                remedy = nearest(like, self.native)
                raise InputError("the study has no such image", field="like", found=like, remedy=remedy)
            like = self.native[like]
        reference = next(iter(self.native.values()))
        place = reference if grids_agree(reference, like) else like  # as on the way in
        result = to_native(array, self.grid, place, scale, order, fill=fill, antialias=antialias)
        return Volume(result.array, like.affine, self.frame)


def to_native(
    array: np.ndarray,
    grid: Grid,
    like: Grid,
    scale: Scale | None = None,
    order: Literal[0, 1, 3] = 1,
    *,
    fill: float | None = None,
    antialias: bool = False,
) -> Volume:
    """``array`` on the model's ``grid``, put onto the grid ``like`` in one interpolation.

    Floats give float32, after ``scale`` has been undone; booleans a boolean mask; whole numbers a label map.
    Outside of the model's grid the result is ``fill``: by default background, which is 0, or a window's lower bound.
    What is exactly 0 in ``array`` stays exactly 0 (cubic ringing does not leak into the background), unless the scale
    gives 0 another meaning. ``antialias`` averages over the voxels of a coarser grid; off by default, because an image
    that was finely resampled from that very grid comes back unblurred without it.
    """
    array = np.asarray(array)
    if array.shape != grid.shape:
        raise InputError("this array is not on the model's grid", field="array", found=array.shape, expected=grid.shape)
    if array.dtype == bool:
        return resample(Volume(array, grid.affine), like, 1, antialias=antialias)
    if array.dtype.kind in "iu":
        return resample_labels(Volume(array, grid.affine), like)
    values = Volume(array if scale is None else scale.invert(array), grid.affine)
    if scale is not None and scale.kind in ("zscore-nonzero", "none"):
        moved, inside = resample_foreground(values, like, order, antialias)
        if fill:
            moved[~inside] = fill
        return Volume(moved, like.affine)
    if fill is None:
        fill = scale.low if scale is not None and scale.low is not None else 0.0
    result = resample(values, like, order, fill, antialias)
    if scale is None:
        inside = resample(Volume(array != 0, grid.affine), like, 1, antialias=antialias).array
        result.array[~inside] = fill
    return result


def to_model_space(volumes: Mapping[str, Volume], image: Image, order: Literal[0, 1, 3] = 3) -> ModelStudy:
    """``volumes`` {modality: Volume} of one study in the space that ``image`` (a plan's section) describes.

    The grid has the axes of the first volume, brought to ``image.orientation`` and ``image.spacing``, and covers what
    all volumes cover (their foregrounds only, with ``image.foreground_crop``). Volumes on other grids are brought onto
    it; outside of its own field of view a volume is background. Except for a ``window``, voxels that are 0 in the
    stored image are background: the mask of the others is resampled too, and what lies outside is exactly 0.

    Raises :class:`InputError` when there is no volume, when frames of reference differ, or when fields of view do not
    overlap by a tenth of the smaller one.
    """
    if not volumes:
        raise InputError("a study needs at least one image", field="images", found="none")
    if problems := other_places(volumes):
        raise InputError(problems[0].what, problems=problems)
    first = next(iter(volumes.values()))
    base = spacing_grid(reoriented_grid(first.grid, image.orientation), image.spacing)
    grid = _covering(base, volumes.values(), image.foreground_crop)
    moved, inside = {}, {}
    for name, volume in volumes.items():
        same = grids_agree(volume.grid, first.grid)  # one grid, written with a little noise: no interpolation for that
        placed = Volume(volume.array, first.affine) if same else volume
        moved[name], inside[name] = _move(placed, grid, image, order)
    if image.foreground_crop:
        box = foreground_box(moved[name] if mask is None else mask for name, mask in inside.items())
        cut = tuple(slice(*pair) for pair in box)
        grid = cropped_grid(grid, box)
        moved = {name: array[cut] for name, array in moved.items()}
        inside = {name: mask if mask is None else mask[cut] for name, mask in inside.items()}
    arrays, scales = {}, {}
    for name, array in moved.items():
        try:
            arrays[name], scales[name] = normalise(array, image.intensity, inside[name])
        except InputError as error:
            problem = error.problem
            raise InputError(
                problem.what,
                where=name,
                field=problem.field,
                found=problem.found,
                expected=problem.expected,
                remedy=problem.remedy,
            ) from None
        arrays[name] = np.ascontiguousarray(arrays[name])
    native = {name: volume.grid for name, volume in volumes.items()}
    frame = next((volume.frame for volume in volumes.values() if volume.frame is not None), None)
    return ModelStudy(arrays, grid, native, scales, frame)


def other_places(volumes: Mapping[str, Volume]) -> list[Problem]:
    """What keeps images of one study from being in one world and looking at one place."""
    problems = []
    first = next(iter(volumes), "")
    for name, volume in volumes.items():
        frame = volumes[first].frame
        if volume.frame is not None and frame is not None and volume.frame != frame:
            what = f"{name} and {first} have different frames of reference"  # the UIDs stay unsaid: they identify
            problems.append(Problem(what, name, "frame of reference", remedy=REGISTER))
            continue
        share = overlap_share(volumes[first].grid, volume.grid)
        if share < MIN_OVERLAP:
            found, expected = f"fields of view overlap by {share:.0%}", f"at least {MIN_OVERLAP:.0%}"
            what = f"{name} and {first} do not show the same place"
            problems.append(Problem(what, name, "affine", found, expected, REGISTER))
    return problems


def _covering(base: Grid, volumes: Iterable[Volume], foreground: bool) -> Grid:
    """``base`` extended or cut by whole voxels to cover the volumes, or what is not 0 in them."""
    lows, highs = [], []
    for volume in volumes:
        box = foreground_box([volume.array]) if foreground else centred_box(volume.shape, volume.shape)
        corners = base.mm_to_voxel(volume.grid.voxel_to_mm(list(product(*((a - 0.5, b - 0.5) for a, b in box)))))
        lows.append(corners.min(axis=0))
        highs.append(corners.max(axis=0))
    # The voxels whose centres lie inside; the tolerance keeps float noise from adding an empty slice.
    low = np.ceil(np.min(lows, axis=0) + 1e-3).astype(int)
    high = np.floor(np.max(highs, axis=0) - 1e-3).astype(int) + 1
    i, j, k = zip(low.tolist(), np.maximum(high, low + 1).tolist(), strict=True)
    return cropped_grid(base, (i, j, k))


def _move(volume: Volume, grid: Grid, image: Image, order: Literal[0, 1, 3]) -> tuple[np.ndarray, np.ndarray | None]:
    """The volume on ``grid`` (float32) and its foreground there (None where the scheme knows no background)."""
    if image.intensity.scheme == "window":
        return resample(volume, grid, order, fill=float(volume.array.min())).array, None
    return resample_foreground(volume, grid, order)
