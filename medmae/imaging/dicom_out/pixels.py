"""Floating-point voxels as 16-bit integers with a slope, and the window to show them in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medmae.errors import InputError

_LARGEST = 32767
_STEPS = (1.0, 2.0, 5.0)


@dataclass(frozen=True, eq=False)
class Pixels:
    """``stored`` int16 of the shape given; a voxel is ``stored x slope``, 0 is 0. ``center`` and ``width`` of the
    window are in the voxels' units."""

    stored: np.ndarray
    slope: float
    center: float
    width: float


def quantise(array: np.ndarray) -> Pixels:
    """``array`` in 16 bits: off by at most half a ``slope``.

    Whole numbers that fit keep slope 1. Otherwise the slope is the finest of ..., 0.1, 0.2, 0.5, 1, 2, 5, ... that
    fits, which leaves at least 13000 steps from 0 to the largest value, a scanner's own 12 bits and more. There is no
    intercept: background that is 0 stays 0 for readers that apply the slope and for those that do not.

    ``array`` has the slices first. Raises :class:`InputError` for voxels that are not finite.
    """
    values = np.ascontiguousarray(array, dtype=np.float32 if array.dtype.itemsize <= 4 else np.float64)
    if not np.isfinite(values).all():
        bad = values.size - int(np.isfinite(values).sum())
        raise InputError(
            "voxels are not finite",
            field="voxels",
            found=f"{bad} NaN or infinite of {values.size}",
            expected="finite numbers",
            remedy="A checkpoint that gives NaN is damaged, or an input was.",
        )
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    largest = max(-low, high)
    whole = largest <= _LARGEST and bool((values == np.rint(values)).all())
    slope = 1.0 if whole else _slope(largest)
    stored = np.empty(values.shape, np.int16)
    for index, plane in enumerate(values):  # float64 arithmetic without a float64 copy of the volume
        stored[index] = np.rint(plane.astype(np.float64) / slope)
    center, width = _window(values, slope)
    return Pixels(stored, slope, center, width)


def _window(values: np.ndarray, slope: float) -> tuple[float, float]:
    """Centre and width that hold what is not background, between its 0.5th and 99.5th percentile."""
    shown = values.ravel()[:: max(1, values.size // 1_000_000)]  # a million voxels know the percentiles well enough
    shown = shown[shown != 0]
    low, high = np.percentile(shown.astype(np.float64), (0.5, 99.5)) if shown.size else (0.0, 1.0)
    return _rounded(float(low + high) / 2), _rounded(max(float(high - low), slope))


def _slope(largest: float) -> float:
    """The finest of 1, 2 and 5 times a power of ten with which ``largest`` fits."""
    if largest < 1e-30:
        return 1.0
    power = int(np.floor(np.log10(largest / _LARGEST))) - 1
    steps = (float(f"{step:g}e{power + more}") for more in range(4) for step in _STEPS)
    return next(step for step in steps if largest / step <= _LARGEST)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
