"""Whole volumes from windows: nothing lost, nothing doubled, and the patch grid averaged away."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from monai.data.utils import compute_importance_map
from monai.inferers import sliding_window_inference

from medmae.errors import InputError, MedmaeError
from medmae.synthesis.windows import blending_weight, corners_inside, patch_shifts, predict_volume, window_starts
from tests.synthesis.fakes import Linear, plan


@pytest.mark.parametrize("shape", [(32, 32, 32), (50, 41, 33), (20, 70, 7), (96, 32, 31)])
@pytest.mark.parametrize("shifts", [1, 4])
@pytest.mark.parametrize("overlap", [0.0, 0.5])
def test_identity_model_gives_back_the_volume_whatever_its_size(shape, shifts, overlap):
    volume = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    model = Linear(plan(shifts=shifts, overlap=overlap), {"t1": 1.0})
    result = predict_volume(model, {"t1": volume}, ["flair"])
    assert result.arrays["flair"].shape == shape
    assert np.abs(result.arrays["flair"] - volume).max() < 1e-5


@pytest.mark.parametrize("shift", [(0, 0, 0), (-4, 2, 3)])
def test_the_windows_that_run_are_those_with_foreground(shift):
    rng = np.random.default_rng(0)
    foreground = np.pad(rng.random((40, 30, 25)) < 0.0008, 10)
    starts, window = [[10, 20, 33], [10, 25], [12]], (12, 9, 16)
    found = {tuple(c) for c in corners_inside(starts, shift, window, foreground).tolist()}
    expected = set()
    for start in itertools.product(*starts):
        low = tuple(s + d for s, d in zip(start, shift, strict=True))
        if foreground[tuple(slice(s, s + w) for s, w in zip(low, window, strict=True))].any():
            expected.add(low)
    assert found == expected and 0 < len(found) < 6


@pytest.mark.parametrize("size", range(1, 100, 7))
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("reach", [0, 8])
def test_windows_cover_an_axis_however_far_they_are_shifted(size, overlap, reach):
    starts = window_starts(size, 32, overlap, reach)
    for shift in (-reach, 0, reach) if size > 32 else (0,):
        covered = np.zeros(size, bool)
        for start in starts:
            covered[max(0, start + shift) : max(0, start + shift + 32)] = True
        assert covered.all()
    assert max(np.diff(starts), default=0) <= max(1, int(32 * (1 - overlap)))


def test_blending_weight_is_monais_gaussian():
    window = (32, 16, 48)
    expected = compute_importance_map(window, mode="gaussian", sigma_scale=0.125)
    torch.testing.assert_close(blending_weight(window), expected.float(), rtol=1e-4, atol=1e-6)


def test_without_shifts_it_is_monais_sliding_window_inference():
    # Sizes where both place their windows alike: the window plus whole strides.
    volume = torch.from_numpy(np.random.default_rng(1).normal(size=(1, 1, 64, 48, 32)).astype(np.float32))
    ramp = torch.linspace(-1, 1, 32).view(1, 1, 32, 1, 1)  # what a voxel becomes depends on its place in the window

    class Ramp(Linear):
        def reconstruct(self, images, targets):
            return {t: torch.tanh(images["t1"]) * (1 + ramp) for t in targets}

    expected = sliding_window_inference(
        volume, (32, 32, 32), 1, lambda x: torch.tanh(x) * (1 + ramp), overlap=0.5, mode="gaussian", sigma_scale=0.125
    )
    result = predict_volume(Ramp(plan()), {"t1": volume[0, 0].numpy()}, ["t2"])
    np.testing.assert_allclose(result.arrays["t2"], expected[0, 0].numpy(), atol=1e-5)


def test_shifts_are_equally_spaced_along_every_axis():
    for count in (1, 2, 4, 8):
        shifts = np.array(patch_shifts((16, 16, 16), count))
        assert shifts[0].tolist() == [0, 0, 0]
        for axis in range(3):
            assert sorted(shifts[:, axis] % 16) == list(range(0, 16, 16 // count))


def _energy(residual: np.ndarray, patch: int) -> float:
    """Power at the patch frequency (first harmonic along each axis), by a plain Fourier sum."""
    wave = [np.exp(-2j * np.pi * np.arange(n) / patch) for n in residual.shape]
    return float(
        sum((np.abs(np.tensordot(np.moveaxis(residual, a, -1), w, 1)) ** 2).mean() for a, w in enumerate(wave))
    )


def test_a_fixed_pattern_in_every_patch_is_averaged_away():
    axis = np.abs(np.arange(16) - 7.5) / 7.5  # error grows towards the patch's border, as a decoder's does
    pattern = (axis[:, None, None] ** 4 + axis[None, :, None] ** 4 + axis[None, None, :] ** 4).astype(np.float32)
    volume = np.zeros((96, 96, 96), np.float32)
    energies = {}
    for shifts in (1, 2, 4, 8):
        model = Linear(plan(crop=(64, 64, 64), shifts=shifts), pattern=pattern, grid_multiple=(16, 16, 16))
        error = predict_volume(model, {"t1": volume}, ["t2"]).arrays["t2"][8:88, 8:88, 8:88]
        energies[shifts] = _energy(error - error.mean(), 16)
        assert math.isclose(error.mean(), pattern.mean(), rel_tol=0.1)
    # Overlapping windows alone leave most of it; four placements cancel the first three harmonics.
    assert energies[2] < energies[1] / 100
    assert energies[4] < energies[1] / 1000
    assert energies[8] < energies[1] / 1000


def test_windows_without_foreground_are_not_run():
    volume = np.zeros((128, 32, 32), np.float32)
    volume[:20] = 1
    everything, some = Linear(weights={"t1": 1.0}), Linear(weights={"t1": 1.0})
    predict_volume(everything, {"t1": volume}, ["t2"])
    result = predict_volume(some, {"t1": volume}, ["t2"], foreground=volume != 0)
    assert (everything.calls, some.calls) == (7, 2)
    assert result.windows == 2
    np.testing.assert_allclose(result.arrays["t2"], volume, atol=1e-6)


def test_batches_of_windows_change_nothing():
    volume = np.random.default_rng(2).normal(size=(50, 40, 35)).astype(np.float32)
    model = Linear(plan(shifts=2), {"t1": 0.7}, 0.1)
    one, five = (predict_volume(model, {"t1": volume}, ["t2"], batch=b).arrays["t2"] for b in (1, 5))
    np.testing.assert_allclose(one, five, atol=1e-6)


def test_a_smaller_batch_is_tried_when_memory_runs_out():
    class Hungry(Linear):
        def reconstruct(self, images, targets):
            if images["t1"].shape[0] > 2:
                raise torch.OutOfMemoryError("no")
            return super().reconstruct(images, targets)

    volume = np.random.default_rng(3).normal(size=(64, 64, 40)).astype(np.float32)
    result = predict_volume(Hungry(weights={"t1": 1.0}), {"t1": volume}, ["t2"], batch=8)
    np.testing.assert_allclose(result.arrays["t2"], volume, atol=1e-5)


def test_a_model_that_diverged_is_an_error_not_an_image():
    with pytest.raises(MedmaeError, match="not finite"):
        predict_volume(Linear(intercept=float("nan")), {"t1": np.ones((32, 32, 32), np.float32)}, ["t2"])


def test_images_of_different_sizes_are_refused():
    with pytest.raises(InputError, match="one grid"):
        predict_volume(Linear(), {"t1": np.ones((8, 8, 8)), "t2": np.ones((8, 8, 9))}, ["flair"])
