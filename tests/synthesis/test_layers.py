"""What is embedded and drawn is the image: read back by nibabel, SimpleITK and Pillow."""

from __future__ import annotations

import io
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from medmae.imaging.geometry import resample
from medmae.imaging.volume import Volume
from medmae.synthesis.layers import difference, grey, heat, middle, picture, shown_grid
from tests.synthesis.report_case import study


def image_of(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)


def test_embedded_nifti_has_the_values_at_the_same_millimetres(tmp_path: Path) -> None:
    volume = study()["t1"]
    grid = shown_grid(volume)
    values = resample(volume, grid).array
    layer = grey("T1", "", "", values)
    (tmp_path / "a.nii.gz").write_bytes(layer.nifti(grid))
    back = nib.load(tmp_path / "a.nii.gz")
    assert np.allclose(back.affine, grid.affine, atol=1e-4) and back.get_data_dtype() == np.uint8
    inside = values != 0
    assert np.abs(back.get_fdata() - values)[inside].max() <= (layer.high - layer.low) / 254 * 0.51 + 2  # and clipping
    itk = sitk.ReadImage(str(tmp_path / "a.nii.gz"))
    at = (12, 20, 15)
    assert itk[at] == pytest.approx(float(values[at]), abs=(layer.high - layer.low) / 254)
    x, y, z = itk.TransformIndexToPhysicalPoint(at)  # ITK's axes run left and back
    assert np.allclose((-x, -y, z), grid.voxel_to_mm(at), atol=1e-3)


def test_background_is_code_0_and_nothing_else_is() -> None:
    values = np.zeros((8, 8, 8), np.float32)
    values[2:6, 2:6, 2:6] = np.linspace(-3, 3, 64).reshape(4, 4, 4)
    values[3, 3, 3] = 0.001
    layer = grey("z", "", "sd", values)
    assert np.array_equal(layer.codes == 0, values == 0)
    assert layer.shades[values == 0].max() == 0


def test_two_images_of_a_unit_get_the_same_black_and_white() -> None:
    noise = np.random.default_rng(0)
    truth = noise.normal(5, 1, (12, 12, 12))
    made = noise.normal(5, 3, (12, 12, 12))
    a = grey("a", "", "", made, inside=np.ones(made.shape, bool), like=truth)
    b = grey("b", "", "", truth, like=truth)
    assert a.window == b.window == pytest.approx(tuple(np.percentile(truth, (0.5, 99.5))))
    assert a.high > b.high  # and what is brighter than the truth keeps its value


def test_difference_is_zero_in_the_middle_of_its_colours() -> None:
    values = np.array([-9.0, -2, -1, 0, 1, 2, 9, 5]).reshape(2, 2, 2)
    inside = np.ones((2, 2, 2), bool)
    inside[1, 1, 1] = False
    layer = difference("d", "", "sd", values, inside)
    back = layer.low + (layer.codes.ravel().astype(float) - 1) * layer.slope
    assert np.allclose(back, [-1.5, -1.5, -1, 0, 1, 1.5, 1.5, 0], atol=layer.slope / 2)
    none = np.zeros((8, 8, 8))
    pixels = image_of(picture(difference("d", "", "sd", none, none == 0), (4, 4, 4)))
    assert pixels.max() < 8  # no difference: no colour


def test_differences_are_blue_below_and_orange_above() -> None:
    values = np.full((20, 20, 20), 1.4)
    values[10:] = -1.4  # the patient's right, which is on the left
    axial = image_of(picture(difference("d", "", "sd", values, np.ones(values.shape, bool)), (10, 10, 10)))[:, :168]
    left, right = axial[20:-20, 10:70].mean(axis=(0, 1)), axial[20:-20, 100:160].mean(axis=(0, 1))
    assert left[2] > left[0] + 80 and right[0] > right[2] + 80


def test_heat_maps_begin_at_zero_and_bear_what_is_not_a_number() -> None:
    values = np.linspace(-1, 4, 27).reshape(3, 3, 3)
    values[0, 0, 0], values[2, 2, 2] = np.nan, np.inf
    layer = heat("anomaly", "a", "", "", values)
    assert layer.low == 0 and (layer.codes[values <= 0] == 0).all() and layer.codes[0, 0, 0] == 0
    assert heat("uncertainty", "u", "", "", np.zeros((2, 2, 2))).codes.max() == 0


def test_pictures_have_the_patients_right_on_the_left_and_up_is_up() -> None:
    values = np.full((40, 50, 60), 10.0)
    values[20:] = 60  # the patient's right
    values[:, :, 50:] = 100  # top
    layer = grey("x", "", "", values)
    strip = image_of(picture(layer, (10, 25, 30)))[..., 0]
    axial = strip[:, : round(168 * 40 / 50)]
    assert axial[:, 5:50].mean() > axial[:, -50:-5].mean() + 60
    sagittal = strip[:, -round(168 * 50 / 60) :]
    assert sagittal[5:20].mean() > sagittal[60:160].mean() + 100


def test_a_synthetic_picture_bears_its_mark_in_the_pixels() -> None:
    values = np.full((40, 50, 60), 10.0)
    plain, marked = (image_of(picture(grey("x", "", "", values, synthetic=s), (20, 25, 30))) for s in (False, True))
    amber = (np.abs(marked - np.array([255, 176, 0])).sum(axis=2) < 90).sum()
    assert amber > 2 * (marked.shape[0] + marked.shape[1])  # the frame, and words
    assert (np.abs(plain - np.array([255, 176, 0])).sum(axis=2) < 90).sum() == 0


def test_middle_is_the_centre_of_mass() -> None:
    codes = np.zeros((20, 20, 20), np.uint8)
    codes[4:9, 10:13, 2:5] = 7
    assert middle(codes) == (6, 11, 3)
    assert middle(np.zeros((4, 6, 8), np.uint8)) == (2, 3, 4)


def test_large_and_oblique_volumes_are_shown_small_and_cropped() -> None:
    angle = np.deg2rad(20)
    affine = np.eye(4)
    affine[:3, :3] = [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    affine[:3, :3] *= 0.4
    array = np.zeros((300, 310, 280), np.uint8)
    array[40:260, 50:280, 30:250] = 1
    grid = shown_grid(Volume(array, affine))
    assert max(grid.shape) <= 110 and np.allclose(grid.spacing, 1)
    centre = grid.voxel_to_mm((np.array(grid.shape) - 1) / 2)
    assert np.allclose(centre, Volume(array, affine).grid.voxel_to_mm([149.5, 164.5, 139.5]), atol=1)
