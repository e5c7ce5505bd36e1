"""Intensities: from stored values to what the network sees, and back.

Each scheme of :class:`medmae.plan.Intensity` returns a :class:`Scale` that undoes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from medmae.errors import InputError
from medmae.plan import Intensity

# The smallest normalised magnitude a foreground voxel may have: a voxel that equals the mean would otherwise become 0
# and be taken for background. 2^-20 (about 1e-6 standard deviations) is exact in float16, the prepared store's type.
LEAST = np.float32(2.0**-20)


@dataclass(frozen=True)
class Scale:
    """What :func:`normalise` did to one image. ``kind`` is the plan's scheme; ``mean`` and ``std`` belong to the
    z-scores, ``low`` and ``high`` to the window."""

    kind: str
    mean: float = 0.0
    std: float = 1.0
    low: float | None = None
    high: float | None = None

    def apply(self, array: np.ndarray, foreground: np.ndarray | None = None) -> np.ndarray:
        """Stored values as normalised ones, float32. ``foreground`` (bool): see :func:`normalise`."""
        values = np.asarray(array, dtype=np.float32)
        if self.kind == "none":
            return values.copy()
        if self.kind == "window":
            low, high = self._window()
            return (np.clip(values, low, high) - np.float32(low)) / np.float32(high - low)
        result = (values - np.float32(self.mean)) / np.float32(self.std)
        if self.kind == "zscore-nonzero":
            inside = values != 0 if foreground is None else foreground
            result[np.abs(result) < LEAST] = LEAST
            result[~inside] = 0
        return result

    def invert(self, array: np.ndarray) -> np.ndarray:
        """Normalised values as stored ones, float32. For ``zscore-nonzero`` what is exactly 0 is background and stays
        0; for ``window`` values beyond [low, high] are not restored."""
        values = np.asarray(array, dtype=np.float32)
        if self.kind == "none":
            return values.copy()
        if self.kind == "window":
            low, high = self._window()
            return values * np.float32(high - low) + np.float32(low)
        result = values * np.float32(self.std) + np.float32(self.mean)
        return np.where(values == 0, np.float32(0), result) if self.kind == "zscore-nonzero" else result

    def _window(self) -> tuple[float, float]:
        if self.low is None or self.high is None:
            raise InputError("a window needs low and high", field="scale", found=self)
        return self.low, self.high

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Scale:
        return cls(**data)


def normalise(
    array: np.ndarray, intensity: Intensity, foreground: np.ndarray | None = None
) -> tuple[np.ndarray, Scale]:
    """``array`` (any shape) as the network sees it, float32, and the :class:`Scale` that undoes it.

    ``zscore-nonzero`` takes mean and biased standard deviation (in float64) over ``foreground``, a boolean array that
    defaults to ``array != 0``; everything else becomes exactly 0 and no foreground voxel does. ``zscore`` takes them
    over all voxels. A constant image is only centred. z-scores beyond ``clip`` standard deviations are cut to it (and
    come back so). Raises :class:`InputError` when values are not finite.
    """
    values = np.asarray(array, dtype=np.float32)
    scheme = intensity.scheme
    if scheme == "window":
        scale = Scale("window", low=intensity.low, high=intensity.high)
    elif scheme == "none":
        scale = Scale("none")
    else:
        if scheme == "zscore-nonzero":
            foreground = values != 0 if foreground is None else np.asarray(foreground, dtype=bool)
            sample = values[foreground]
        else:
            sample = values
        mean, std = _statistics(sample)
        scale = Scale(scheme, mean, std)
    result = scale.apply(values, foreground)
    if intensity.clip is not None:
        np.clip(result, -intensity.clip, intensity.clip, out=result)
    return result, scale


def _statistics(sample: np.ndarray) -> tuple[float, float]:
    if sample.size == 0:
        return 0.0, 1.0
    with np.errstate(invalid="ignore"):  # refused below, with a count
        mean = float(sample.mean(dtype=np.float64))
        std = float(sample.std(dtype=np.float64))  # biased: divided by n
    if not np.isfinite(mean) or not np.isfinite(std):
        raise InputError(
            "voxels are not finite",
            field="voxels",
            found=f"{int((~np.isfinite(sample)).sum())} NaN or infinite",
            expected="finite numbers",
            remedy="Replace them, for example by 0 where they mean background.",
        )
    # A constant image leaves rounding noise of the sum as its deviation: dividing by that would amplify nothing.
    return mean, std if std > 1e-7 * max(1e-30, abs(mean)) else 1.0
