"""Scores that agree with scikit-image, and a grid measure that sees grids and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from medmae.synthesis.metrics import Truth, grid_energy_ratio


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    truth = ndimage.gaussian_filter(rng.normal(size=(40, 36, 30)), 2).astype(np.float32) * 10
    prediction = truth + ndimage.gaussian_filter(rng.normal(size=truth.shape), 1).astype(np.float32)
    return truth, prediction


def test_scores_over_a_whole_volume_are_those_of_scikit_image(pair):
    truth, prediction = pair
    everything = Truth(truth, np.ones_like(truth, bool))
    low, high = np.percentile(truth, (0.1, 99.9))
    assert everything.data_range == pytest.approx(high - low, rel=1e-5)
    (score,) = everything.scores(prediction)
    assert score.psnr == pytest.approx(peak_signal_noise_ratio(truth, prediction, data_range=high - low), abs=1e-4)
    assert score.mae == pytest.approx(np.abs(truth - prediction).mean(), rel=1e-5)
    _, full = structural_similarity(
        truth,
        prediction,
        data_range=high - low,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    assert score.ssim == pytest.approx(full.mean(), abs=1e-4)
    assert score.voxels == truth.size


def test_ssim_in_a_mask_is_the_masks_part_of_the_map(pair):
    truth, prediction = pair
    brain = np.zeros_like(truth, bool)
    brain[8:30, 6:28, 5:25] = True
    lesion = np.zeros_like(brain)
    lesion[12:16, 10:15, 8:12] = True
    scored = Truth(truth, brain)
    whole, inside, nothing = scored.scores(prediction, (None, lesion, ~brain))
    outside_zero = [np.where(brain, a, 0) for a in (truth, prediction)]
    _, full = structural_similarity(
        *outside_zero,
        data_range=scored.data_range,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    assert whole.ssim == pytest.approx(full[brain].mean(), abs=1e-4)
    assert inside.ssim == pytest.approx(full[lesion].mean(), abs=1e-4)
    assert inside.mae == pytest.approx(np.abs(truth - prediction)[lesion].mean(), rel=1e-5)
    assert inside.voxels == lesion.sum()
    assert nothing is None


def test_what_lies_outside_the_brain_does_not_count(pair):
    truth, prediction = pair
    brain = np.zeros_like(truth, bool)
    brain[8:30, 6:28, 5:25] = True
    spoilt = np.where(brain, prediction, 1000.0).astype(np.float32)
    assert Truth(truth, brain).scores(spoilt) == Truth(truth, brain).scores(prediction)


def test_a_perfect_synthesis_scores_perfectly(pair):
    truth, _ = pair
    (score,) = Truth(truth, np.ones_like(truth, bool)).scores(truth)
    assert (score.psnr, score.mae) == (float("inf"), 0.0)
    assert score.ssim == pytest.approx(1.0, abs=1e-5)


def _blocks(shape, patch, rng):
    """Constant blocks of random height: the steps at patch borders that a decoder leaves."""
    heights = rng.normal(size=[-(-n // p) for n, p in zip(shape, patch, strict=True)])
    for axis, step in enumerate(patch):
        heights = np.repeat(heights, step, axis)
    return heights[tuple(slice(n) for n in shape)]


def test_the_grid_measure_is_about_one_for_an_image_without_a_grid():
    ratios = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        smooth = ndimage.gaussian_filter(rng.normal(size=(96, 100, 90)), 3)
        ratios.append(grid_energy_ratio(smooth, (16, 16, 16)))
    assert 0.3 < np.exp(np.mean(np.log(ratios))) < 2
    assert max(ratios) < 4


@pytest.mark.parametrize("patch", [(16, 16, 16), (8, 8, 8)])
def test_the_grid_measure_sees_faint_steps_at_patch_borders(patch):
    rng = np.random.default_rng(1)
    smooth = ndimage.gaussian_filter(rng.normal(size=(96, 100, 90)), 3)
    smooth /= smooth.std()
    steps = _blocks(smooth.shape, patch, rng)
    faint, strong = (grid_energy_ratio(smooth + a * steps, patch) for a in (0.25, 0.6))
    assert faint > 5
    assert strong > 5 * faint
    moved = np.roll(smooth + 0.5 * steps, (3, 5, 7), (0, 1, 2))  # wherever the grid begins
    assert grid_energy_ratio(moved, patch) > 50


def test_the_grid_measure_looks_inside_the_mask_only():
    rng = np.random.default_rng(2)
    smooth = ndimage.gaussian_filter(rng.normal(size=(96, 96, 96)), 3)
    smooth /= smooth.std()
    mask = np.zeros(smooth.shape, bool)
    mask[10:90, 10:90, 10:90] = True
    outside = np.where(mask, smooth, smooth + _blocks(smooth.shape, (8, 8, 8), rng))
    assert grid_energy_ratio(outside, (8, 8, 8), mask) == pytest.approx(grid_energy_ratio(smooth, (8, 8, 8), mask))


def test_the_grid_measure_is_undefined_for_a_volume_of_few_patches():
    assert np.isnan(grid_energy_ratio(np.random.default_rng(0).normal(size=(40, 40, 40)), (16, 16, 16)))
