"""Every normalisation can be undone, and background stays exactly 0."""

from __future__ import annotations

import json

import numpy as np
import pytest
from monai.transforms import NormalizeIntensity, ScaleIntensityRange

from medmae.errors import InputError
from medmae.imaging.intensity import Scale, normalise
from medmae.plan import Intensity


@pytest.fixture
def brain() -> np.ndarray:
    rng = np.random.default_rng(1)
    array = rng.normal(900, 200, size=(20, 24, 18)).astype(np.float32)
    array[:5] = 0
    array[:, :, 15:] = 0
    return array


def test_zscore_nonzero_equals_monai_and_leaves_background_exactly_zero(brain):
    result, scale = normalise(brain, Intensity())
    np.testing.assert_allclose(result, NormalizeIntensity(nonzero=True)(brain.copy()), atol=1e-5)
    assert (result[brain == 0] == 0).all() and (result[brain != 0] != 0).all()
    assert scale.mean == pytest.approx(brain[brain != 0].astype(float).mean(), rel=1e-9)
    assert scale.std == pytest.approx(brain[brain != 0].astype(float).std(ddof=0), rel=1e-9)


def test_zscore_over_everything_equals_monai(brain):
    result, _ = normalise(brain, Intensity(scheme="zscore"))
    np.testing.assert_allclose(result, NormalizeIntensity(nonzero=False)(brain.copy()), atol=1e-5)


def test_a_window_equals_monai_and_loses_only_what_was_clipped():
    ct = np.linspace(-1024, 2000, 4000, dtype=np.float32).reshape(10, 20, 20)
    result, scale = normalise(ct, Intensity(scheme="window", low=-175, high=250))
    np.testing.assert_allclose(result, ScaleIntensityRange(-175, 250, 0, 1, clip=True)(ct), atol=1e-6)
    np.testing.assert_allclose(scale.invert(result), np.clip(ct, -175, 250), atol=1e-3)


@pytest.mark.parametrize("scheme", ["zscore-nonzero", "zscore", "none"])
def test_inverting_gives_the_stored_values_back(brain, scheme):
    result, scale = normalise(brain, Intensity(scheme=scheme))
    assert result.dtype == np.float32
    back = scale.invert(result)
    np.testing.assert_allclose(back, brain, atol=1e-3)
    if scheme != "zscore":
        assert ((back == 0) == (brain == 0)).all()


def test_a_voxel_equal_to_the_mean_is_not_taken_for_background_even_in_float16():
    array = np.array([0, 1, 2, 3], np.float32)  # 2 is the mean of the others
    result, scale = normalise(array, Intensity())
    stored = result.astype(np.float16)
    assert (stored != 0).tolist() == [False, True, True, True]
    np.testing.assert_allclose(scale.invert(stored), array, atol=2e-3)


def test_large_values_keep_their_digits_in_the_statistics():
    # Summed in float32, ten million voxels near 30000 lose the mean's third digit.
    array = np.full(10_000_000, 30_000, np.float32)
    array[::2] += 1
    _, scale = normalise(array, Intensity())
    assert scale.mean == pytest.approx(30_000.5, abs=1e-6) and scale.std == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("value", [0.0, 7.0, 1e6 + 0.1])
@pytest.mark.parametrize("scheme", ["zscore-nonzero", "zscore"])
def test_constant_images_are_centred_not_divided_by_zero(value, scheme):
    result, scale = normalise(np.full((3, 3, 3), value, np.float32), Intensity(scheme=scheme))
    assert np.abs(result).max() <= 1e-5 and scale.std == 1
    np.testing.assert_allclose(scale.invert(result), value, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_voxels_are_named(brain, bad):
    brain[7, 7, 7] = bad
    with pytest.raises(InputError, match="1 NaN or infinite"):
        normalise(brain, Intensity())


def test_the_input_is_not_changed(brain):
    before = brain.copy()
    for intensity in (Intensity(), Intensity(scheme="zscore"), Intensity(scheme="window", low=0, high=1)):
        normalise(brain, intensity)
    np.testing.assert_array_equal(brain, before)


def test_a_scale_survives_json():
    for scale in (Scale("zscore-nonzero", 1 / 3, 2.5), Scale("window", low=-175.0, high=250.0)):
        assert Scale.from_json(json.loads(json.dumps(scale.to_json()))) == scale


def test_clip_cuts_z_scores_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    array = np.where(rng.random((12, 12, 12)) < 0.7, rng.normal(100, 10, (12, 12, 12)), 0)
    array[0, 0, 0] = 900
    free, scale = normalise(array, Intensity())
    cut, same = normalise(array, Intensity(clip=5))
    assert scale == same and free[0, 0, 0] > 5 and cut[0, 0, 0] == 5
    within = np.abs(free) <= 5
    np.testing.assert_array_equal(free[within], cut[within])
    with pytest.raises(ValueError, match="standard deviations"):
        Intensity(scheme="none", clip=5)
