"""Interpolation between voxel indices: what :mod:`medmae.imaging.geometry` is made of.

SimpleITK interpolates, but between voxel indices rather than its own images: those cannot be sheared, indices can.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from scipy import ndimage

from medmae.errors import InputError
from medmae.imaging.volume import Grid

EXACT_TOLERANCE = 0.01  # voxels; below this, moving a voxel needs no interpolation
CONTINUATION = 1.25  # sigma in voxels: five voxels of support, where a cubic spline's ringing has died away
_FWHM = 2.0 * np.sqrt(2.0 * np.log(2.0))  # of a Gaussian with sigma 1


def float32(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, dtype=np.float32)


def exact_move(source: Grid, to: Grid) -> tuple[np.ndarray, np.ndarray] | None:
    """(signed permutation, shift) with index_here = permutation @ index_there + shift, if no interpolation is due."""
    matrix = np.linalg.inv(source.affine) @ to.affine
    turn, shift = np.rint(matrix[:3, :3]), np.rint(matrix[:3, 3])
    if not (np.abs(turn).sum(axis=0) == 1).all() or not (np.abs(turn).sum(axis=1) == 1).all():
        return None
    corners = np.array(list(product(*((0, n - 1) for n in to.shape))))
    error = corners @ (matrix[:3, :3] - turn).T + (matrix[:3, 3] - shift)
    return (turn.astype(int), shift.astype(int)) if np.abs(error).max() < EXACT_TOLERANCE else None


def move_voxels(
    array: np.ndarray, turn: np.ndarray, shift: np.ndarray, shape: Sequence[int], fill: float
) -> np.ndarray:
    """Voxels copied to ``shape`` so that new[index] = array[turn @ index + shift], ``fill`` beyond the edges."""
    axes = np.abs(turn).argmax(axis=0)  # the source axis of each new axis
    turned = array.transpose(axes)
    here, there = [], []
    for new, axis in enumerate(axes):
        n, sign, start = array.shape[axis], int(turn[axis, new]), int(shift[axis])
        first, last = (-start, n - 1 - start) if sign > 0 else (start - n + 1, start)  # new indices that have a source
        low, high = max(0, first), min(shape[new], last + 1)
        if low >= high:
            return np.full(shape, fill, array.dtype)
        there.append(slice(low, high))
        ends = (sign * low + start, sign * (high - 1) + start)
        stop = ends[1] + sign
        here.append(slice(ends[0], None if stop < 0 else stop, sign))
    inner = turned[tuple(here)]
    if inner.shape == tuple(shape):
        return np.array(inner, order="C")  # a copy: a result never shares memory with the image it came from
    result = np.full(shape, fill, array.dtype)
    result[tuple(there)] = inner
    return result


def steps_of(matrix: np.ndarray) -> np.ndarray:
    """A new voxel's width along each old axis, in old voxels (``matrix``: new index -> old index)."""
    return np.linalg.norm(matrix[:3, :3], axis=1)


def sigmas_of(steps: np.ndarray) -> np.ndarray:
    """The Gaussians (old voxels) that widen an old voxel to a new one: 0 where the grid does not get coarser."""
    return np.where(steps > 1 + 1e-3, np.sqrt(np.maximum(steps**2 - 1, 0)) / _FWHM, 0)


def _gaussian(array: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    for axis, sigma in enumerate(sigmas):
        if sigma > 0 and array.shape[axis] > 1:
            array = ndimage.gaussian_filter1d(array, sigma, axis=axis, mode="nearest")
    return array


def smooth(array: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Smoothed along the axes that a resampling by ``matrix`` makes coarser."""
    return _gaussian(array, sigmas_of(steps_of(matrix)))


def continued(array: np.ndarray, present: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """``array`` with the background near its foreground filled by the local mean of the foreground."""
    weight = _gaussian(present.astype(np.float32), sigmas)
    near = ~present & (weight > 1e-6)
    result = array.copy()
    result[near] = _gaussian(array, sigmas)[near] / weight[near]
    return result


def interpolate(array: np.ndarray, matrix: np.ndarray, shape: Sequence[int], order: int, fill: float) -> np.ndarray:
    """``array`` (float32, C order) at ``matrix @ index`` for every index of ``shape``."""
    if order not in (0, 1, 3):
        raise InputError("unknown interpolation", field="order", found=order, expected="0, 1 or 3")
    if min(array.shape) < 4:  # fewer voxels than a cubic spline has coefficients
        order = min(order, 1)
    reach = np.array(list(product(*((-0.5, n - 0.5) for n in array.shape)))) - matrix[:3, 3]
    reach = reach @ np.linalg.inv(matrix[:3, :3]).T  # the array's corners among the new voxels
    low = np.maximum(np.floor(reach.min(axis=0)).astype(int), 0)
    high = np.minimum(np.ceil(reach.max(axis=0)).astype(int) + 1, shape)
    result = np.full(tuple(shape), fill, np.float32)
    if (low < high).all():
        start = matrix[:3, :3] @ low + matrix[:3, 3]
        part = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        result[part] = _itk(array, matrix[:3, :3], start, high - low, order, fill)
    return result


def _itk(
    array: np.ndarray, matrix: np.ndarray, start: np.ndarray, shape: np.ndarray, order: int, fill: float
) -> np.ndarray:
    import SimpleITK as sitk  # here: 90 MB that a training on a prepared cohort does not need

    transform = sitk.AffineTransform(3)  # SimpleITK's axes are numpy's, reversed
    transform.SetMatrix(matrix[::-1, ::-1].ravel().tolist())
    transform.SetTranslation(start[::-1].tolist())
    resampler = sitk.ResampleImageFilter()
    resampler.SetSize(shape[::-1].tolist())
    resampler.SetTransform(transform)
    resampler.SetInterpolator({0: sitk.sitkNearestNeighbor, 1: sitk.sitkLinear, 3: sitk.sitkBSpline}[order])
    resampler.SetDefaultPixelValue(float(fill))
    return sitk.GetArrayFromImage(resampler.Execute(sitk.GetImageFromArray(array)))
