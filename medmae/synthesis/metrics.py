"""How far a synthesis is from the truth, and whether the patch grid shows.

All on arrays (D, H, W) in the model's space (normalised intensities), inside a mask; independent of models and files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import ndimage

from medmae.plan import Triple

SSIM_SIGMA, SSIM_TRUNCATE = 1.5, 3.5  # an 11-voxel Gaussian window, as in Wang et al. 2004
SSIM_K1, SSIM_K2 = 0.01, 0.03
RANGE_PERCENTILES = (0.1, 99.9)


@dataclass(frozen=True)
class Score:
    """``psnr`` in dB, ``ssim`` at most 1, ``mae`` in the arrays' units, over ``voxels`` voxels."""

    psnr: float
    ssim: float
    mae: float
    voxels: int


class Truth:
    """An acquired volume to compare with; what depends on it alone is computed once.

    ``truth`` (D, H, W); ``brain`` (D, H, W) bool, not empty. Outside the brain truth and predictions count as 0.
    ``data_range``: the truth's 0.1 to 99.9 percentiles inside the brain, so that one bright voxel does not flatter
    the scores.
    """

    def __init__(self, truth: np.ndarray, brain: np.ndarray) -> None:
        self.box = _box(brain, margin=6)
        self.brain = brain[self.box]
        self.truth = np.where(self.brain, truth[self.box], 0).astype(np.float32)
        low, high = np.percentile(self.truth[self.brain], RANGE_PERCENTILES)
        self.data_range = float(high - low) or 1.0

    @cached_property
    def _moments(self) -> tuple[np.ndarray, np.ndarray]:
        mean = _blur(self.truth)
        return mean, _blur(self.truth**2) - mean**2

    def ssim_map(self, prediction: np.ndarray) -> np.ndarray:
        """The local index of Wang et al. 2004 (eq. 13) at every voxel, Gaussian windows, biased (co)variances."""
        mean, variance = self._moments
        other = _blur(prediction)
        other_variance = _blur(prediction**2) - other**2
        covariance = _blur(self.truth * prediction) - mean * other
        c1, c2 = (SSIM_K1 * self.data_range) ** 2, (SSIM_K2 * self.data_range) ** 2
        likeness = (2 * mean * other + c1) * (2 * covariance + c2)
        result: np.ndarray = likeness / ((mean**2 + other**2 + c1) * (variance + other_variance + c2))
        return result

    def scores(self, prediction: np.ndarray, regions: Sequence[np.ndarray | None] = (None,)) -> list[Score | None]:
        """One score a region: None the whole brain, else (D, H, W) bool; None for a region without brain voxels.

        PSNR = 10 log10(range² / mean squared error); SSIM is its map averaged over the region's voxels; both use
        the brain's data range everywhere.
        """
        inside = np.where(self.brain, prediction[self.box], 0).astype(np.float32)
        error = inside - self.truth
        likeness = self.ssim_map(inside)
        result: list[Score | None] = []
        for region in regions:
            mask = self.brain if region is None else self.brain & region[self.box]
            if not mask.any():
                result.append(None)
                continue
            differences = error[mask].astype(np.float64)
            mse = float(np.mean(differences**2))
            psnr = 10 * np.log10(self.data_range**2 / mse) if mse > 0 else float("inf")
            result.append(
                Score(float(psnr), float(likeness[mask].mean()), float(np.abs(differences).mean()), int(mask.sum()))
            )
        return result


def _blur(array: np.ndarray) -> np.ndarray:
    result: np.ndarray = ndimage.gaussian_filter(array, SSIM_SIGMA, truncate=SSIM_TRUNCATE)
    return result


def _box(mask: np.ndarray, margin: int) -> tuple[slice, ...]:
    found = ndimage.find_objects(mask.astype(np.uint8))[0]
    return tuple(slice(max(0, s.start - margin), s.stop + margin) for s in found)


def grid_energy_ratio(volume: np.ndarray, patch: Triple, mask: np.ndarray | None = None) -> float:
    """Energy at the patch frequency relative to the frequencies beside it: about 1 without a grid, above with one.

    ``volume`` (D, H, W) is a synthesis, or a residual. What is analysed is the mean absolute difference between
    neighbouring voxels, plane by plane along each axis: steps at patch borders, whose heights are random, have no
    energy at the patch frequency themselves, but their absolute differences peak there (the idea of blockiness
    measures, e.g. Wang, Sheikh & Bovik 2002). The profile's power (segments of four patches, Hann windows, summed:
    Welch 1967) at 1/patch is divided by the geometric mean of that at 0.5/patch and 1.5/patch, which is what a
    spectrum falling as a power law would have there; axes are pooled. NaN where no axis holds four patches.
    """
    energy = beside = 0.0
    for axis, period in enumerate(patch):
        profile = _step_profile(volume, axis, mask)
        if profile is None or len(profile) < 4 * period or period < 2:
            continue
        segments = np.lib.stride_tricks.sliding_window_view(profile, 4 * period)[:: max(1, period // 2)]
        taper = np.hanning(4 * period + 1)[:-1]
        centred = segments - (segments @ taper / taper.sum())[:, None]
        power = (np.abs(np.fft.rfft(centred * taper, axis=1)) ** 2).sum(axis=0)
        energy += power[4]
        beside += float(np.sqrt(power[2] * power[6]))
    return float(energy / beside) if beside > 0 else float("nan")


def _step_profile(volume: np.ndarray, axis: int, mask: np.ndarray | None) -> np.ndarray | None:
    """Mean absolute difference between successive planes along ``axis``, over voxel pairs inside the mask; only
    the stretch where the planes hold at least a tenth of the fullest one's voxels."""
    moved = np.moveaxis(volume, axis, 0).astype(np.float64)
    steps = np.abs(np.diff(moved, axis=0))
    if mask is None:
        result: np.ndarray = steps.mean(axis=(1, 2))
        return result
    inside = np.moveaxis(mask, axis, 0)
    pairs = inside[1:] & inside[:-1]
    counts = pairs.sum(axis=(1, 2))
    kept = np.flatnonzero(counts >= max(1, counts.max(initial=0) * 0.1))
    if len(kept) == 0:
        return None
    stretch = slice(kept[0], kept[-1] + 1)
    sums = (steps * pairs).sum(axis=(1, 2))[stretch]
    result = sums / np.maximum(counts[stretch], 1)
    return result
