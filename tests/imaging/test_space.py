"""Into the model's space and back onto the patient's own grid."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from medmae.errors import InputError
from medmae.imaging.geometry import grids_agree
from medmae.imaging.nifti import read_nifti, write_nifti
from medmae.imaging.space import to_model_space
from medmae.imaging.volume import Grid, Volume
from medmae.plan import Image, Intensity

DATA = Path(__file__).parents[3] / "shared" / "data"
OBLIQUE = Rotation.from_euler("xyz", [17, -23, 31], degrees=True).as_matrix()
LINEAR = {
    "RAS": np.eye(3),
    "LPS": np.diag([-1.0, -1, 1]),
    "permuted": np.array([[0, 0, 1.0], [-1, 0, 0], [0, 1, 0]]),
    "anisotropic": np.diag([0.8, 0.8, 4.0]),
    "oblique": OBLIQUE @ np.diag([-0.9, 1.1, 2.0]),
    "tilted": np.array([[1.0, 0, 0], [0, 1, 0.8], [0, 0, 2.4]]),
}


def head(linear: np.ndarray, extent: float = 96.0) -> Volume:
    """A skull-stripped head: an ellipsoid 30 x 36 x 28 mm about (3, -5, 4) mm, brighter towards the right."""
    spacing = np.linalg.norm(linear, axis=0)
    shape = tuple(int(n) for n in np.ceil(extent / spacing))
    offset = -linear @ ((np.array(shape) - 1) / 2)
    affine = nib.affines.from_matvec(linear, offset)
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    xyz = nib.affines.apply_affine(affine, index)
    inside = (((xyz - [3, -5, 4]) / [30, 36, 28]) ** 2).sum(-1) < 1
    texture = 1000 + 8 * xyz[..., 0] + 60 * np.sin(xyz[..., 1] / 6) + 40 * np.cos(xyz[..., 2] / 7)
    return Volume(np.where(inside, texture, 0).astype(np.float32), affine)


def centre_mm(weights: np.ndarray, affine: np.ndarray) -> np.ndarray:
    return nib.affines.apply_affine(affine, ndimage.center_of_mass(weights))


@pytest.mark.parametrize("name", ["RAS", "LPS", "permuted"])
def test_at_the_models_spacing_the_round_trip_is_exact(name):
    volume = head(LINEAR[name])
    study = to_model_space({"t1": volume}, Image())
    assert study.grid.orientation == "RAS"
    # The crop is the ellipsoid's own box, and no voxel was interpolated.
    assert np.abs(np.array(study.arrays["t1"].shape) - [60, 72, 56]).max() <= 1
    raw = to_model_space({"t1": volume}, Image(intensity=Intensity(scheme="none")))
    assert set(np.unique(raw.arrays["t1"])) == set(np.unique(volume.array))
    back = raw.to_native(raw.arrays["t1"], "t1", raw.scales["t1"])
    np.testing.assert_array_equal(back.array, volume.array)
    back = study.to_native(study.arrays["t1"], "t1", study.scales["t1"])
    np.testing.assert_allclose(back.array, volume.array, atol=2e-3)
    np.testing.assert_array_equal(back.array == 0, volume.array == 0)
    np.testing.assert_array_equal(back.affine, volume.affine)


@pytest.mark.parametrize("spacing", [(1, 1, 1), (1.5, 1.5, 1.5)])
@pytest.mark.parametrize("name", LINEAR)
def test_a_structure_stays_where_it_is_there_and_back(name, spacing):
    volume = head(LINEAR[name])
    study = to_model_space({"t1": volume}, Image(spacing=spacing))
    array = study.arrays["t1"]
    np.testing.assert_allclose(study.grid.spacing, spacing)
    voxel = max(volume.spacing)
    truth = centre_mm(volume.array != 0, volume.affine)
    assert np.linalg.norm(centre_mm(array != 0, study.grid.affine) - truth) < 0.1 * voxel
    assert np.linalg.norm(truth - [3, -5, 4]) < 0.1 * voxel  # the test's own head, sampled
    back = study.to_native(array, "t1", study.scales["t1"], order=3)
    assert back.shape == volume.shape
    np.testing.assert_array_equal(back.affine, volume.affine)
    assert np.linalg.norm(centre_mm(back.array != 0, back.affine) - truth) < 0.1 * voxel
    both = (back.array != 0) & (volume.array != 0)
    assert 2 * both.sum() / ((back.array != 0).sum() + (volume.array != 0).sum()) > 0.98
    deep = ndimage.binary_erosion(volume.array != 0, iterations=2)
    assert np.abs(back.array - volume.array)[deep].max() < 0.12 * np.ptp(volume.array[deep])
    assert np.abs(back.array - volume.array)[deep].mean() < 0.01 * np.ptp(volume.array[deep])


@pytest.mark.parametrize("name", ["anisotropic", "oblique", "tilted"])
def test_nothing_leaks_into_the_background(name):
    """Cubic interpolation rings; none of it may be counted as foreground, neither there nor after the way back."""
    volume = head(LINEAR[name])
    study = to_model_space({"t1": volume}, Image())
    array, grid = study.arrays["t1"], study.grid
    index = np.stack(np.meshgrid(*(np.arange(n) for n in array.shape), indexing="ij"), -1)
    xyz = nib.affines.apply_affine(grid.affine, index)
    reach = (((xyz - [3, -5, 4]) / ([30, 36, 28] + 1.0 * np.max(volume.spacing))) ** 2).sum(-1)
    assert (array[reach > 1] == 0).all() and (reach > 1).any()
    brain = array[array != 0]
    assert abs(brain.mean()) < 1e-5 and abs(brain.std() - 1) < 1e-5
    back = study.to_native(array, "t1", study.scales["t1"], order=3)
    far = ndimage.binary_dilation(volume.array != 0, iterations=2)
    assert (back.array[~far] == 0).all()
    # The rim is as bright as the head, neither mixed with the zeros beside it nor ringing.
    assert back.array[back.array != 0].min() > 0.95 * volume.array[volume.array != 0].min()


def test_images_and_results_never_share_memory():
    volume = head(LINEAR["RAS"])
    before = volume.array.copy()
    study = to_model_space({"t1": volume}, Image(foreground_crop=False, intensity=Intensity(scheme="none")))
    back = study.to_native(study.arrays["t1"], "t1")
    assert not np.shares_memory(back.array, study.arrays["t1"])
    study.arrays["t1"][:] = 7
    filled = study.to_native(before, "t1", fill=-1.0)
    assert filled.array.min() == -1
    np.testing.assert_array_equal(volume.array, before)
    assert before.min() == 0


def test_smaller_than_a_crop_is_not_padded_and_comes_back():
    volume = head(np.diag([3.0, 3, 3]), extent=30)
    study = to_model_space({"t1": volume}, Image(spacing=(3, 3, 3), crop=(128, 128, 128)))
    assert max(study.grid.shape) <= 10
    np.testing.assert_allclose(
        study.to_native(study.arrays["t1"], "t1", study.scales["t1"]).array, volume.array, atol=1e-2
    )


def test_modalities_on_different_grids_meet_on_one_and_return_to_their_own():
    volumes = {"t1": head(LINEAR["RAS"]), "flair": head(LINEAR["oblique"]), "t2": head(LINEAR["anisotropic"])}
    study = to_model_space(volumes, Image())
    shapes = {array.shape for array in study.arrays.values()}
    assert shapes == {study.grid.shape}
    masks = [array != 0 for array in study.arrays.values()]
    assert (masks[0] & masks[1] & masks[2]).sum() > 0.93 * (masks[0] | masks[1] | masks[2]).sum()
    inside = ndimage.binary_erosion(masks[0] & masks[1] & masks[2], iterations=4)
    for other in ("flair", "t2"):
        there = study.scales[other].invert(study.arrays[other])[inside]
        here = study.scales["t1"].invert(study.arrays["t1"])[inside]
        assert np.abs(there - here).mean() < 6  # of a range of about 700
    for name, volume in volumes.items():
        result = study.to_native(study.arrays["t1"], name, study.scales["t1"], order=3)
        assert result.shape == volume.shape and np.array_equal(result.affine, volume.affine)
        deep = ndimage.binary_erosion(volume.array != 0, iterations=3)
        assert np.abs(result.array - volume.array)[deep].mean() < 6


def test_a_smaller_field_of_view_does_not_cut_the_others():
    whole = head(LINEAR["RAS"])
    slab = Volume(
        whole.array[:, :, 40:60].copy(), nib.affines.from_matvec(np.eye(3), whole.grid.voxel_to_mm([0, 0, 40]))
    )
    for volumes in ({"t1": whole, "dwi": slab}, {"dwi": slab, "t1": whole}):
        study = to_model_space(volumes, Image())
        back = study.to_native(study.arrays["t1"], "t1", study.scales["t1"])
        np.testing.assert_allclose(back.array, whole.array, atol=2e-3)
        assert (study.arrays["dwi"] != 0).sum() == (slab.array != 0).sum()


def test_grids_that_differ_by_rounding_are_one_grid():
    first = head(LINEAR["RAS"])
    nudged = first.affine.copy()
    nudged[:3, 3] += 0.04
    second = Volume(first.array, nudged)
    study = to_model_space({"t1": first, "t2": second}, Image())
    np.testing.assert_array_equal(study.arrays["t1"], study.arrays["t2"])
    back = study.to_native(study.arrays["t2"], "t2", study.scales["t2"])
    np.testing.assert_allclose(back.array, second.array, atol=2e-3)
    np.testing.assert_array_equal(back.affine, nudged)


def test_masks_labels_and_any_grid_of_the_world_come_back_too():
    volume = head(LINEAR["oblique"])
    study = to_model_space({"t1": volume}, Image())
    mask = study.arrays["t1"] != 0
    elsewhere = head(LINEAR["permuted"])
    back = study.to_native(mask, elsewhere.grid)
    assert back.array.dtype == bool and grids_agree(back.grid, elsewhere.grid)
    share = (back.array & (elsewhere.array != 0)).sum() / (back.array | (elsewhere.array != 0)).sum()
    assert share > 0.93
    labels = study.to_native(mask.astype(np.uint8) * 3, elsewhere.grid)
    assert labels.array.dtype == np.uint8
    np.testing.assert_array_equal(labels.array == 3, back.array)


def test_a_ct_window_keeps_water_and_fills_the_outside_with_air():
    ct = head(LINEAR["anisotropic"])
    ct = ct.with_array(np.where(ct.array == 0, -1000, ct.array / 10 - 100).astype(np.float32))  # soft tissue about 0 HU
    image = Image(intensity=Intensity(scheme="window", low=-175, high=250), foreground_crop=False, spacing=(1, 1, 1))
    study = to_model_space({"ct": ct}, image)
    array = study.arrays["ct"]
    assert array.min() == 0 and array.max() <= 1
    assert np.abs(np.array(array.shape) - 96).max() <= 1
    back = study.to_native(array, "ct", study.scales["ct"], order=3)
    deep = ndimage.binary_erosion(ct.array > -1000, iterations=2)
    assert np.abs(back.array - ct.array)[deep].mean() < 2
    larger = Grid((130, 130, 40), nib.affines.from_matvec(np.diag([0.8, 0.8, 4]), [-52, -52, -78]))
    wide = study.to_native(array, larger, study.scales["ct"])
    assert wide.array[0, 0, 0] == -175


def test_without_foreground_crop_the_whole_field_of_view_is_kept():
    study = to_model_space({"t1": head(LINEAR["LPS"])}, Image(foreground_crop=False))
    assert study.grid.shape == (96, 96, 96)


def test_what_does_not_belong_together_is_refused():
    here = head(LINEAR["RAS"])
    far = Volume(here.array, nib.affines.from_matvec(np.eye(3), [400, 0, 0]))
    with pytest.raises(InputError, match="do not show the same place"):
        to_model_space({"t1": here, "t2": far}, Image())
    framed = Volume(here.array, here.affine, frame="1.2.3"), Volume(here.array, here.affine, frame="1.2.4")
    with pytest.raises(InputError, match="different frames"):
        to_model_space({"t1": framed[0], "t2": framed[1]}, Image())
    with pytest.raises(InputError, match="at least one image"):
        to_model_space({}, Image())
    study = to_model_space({"t1": here}, Image())
    with pytest.raises(InputError, match="Did you mean 't1'"):
        study.to_native(study.arrays["t1"], "t1c")
    with pytest.raises(InputError, match="not on the model's grid"):
        study.to_native(study.arrays["t1"][1:], "t1")
    broken = here.array.copy()
    broken[48, 48, 48] = np.nan
    with pytest.raises(InputError, match="t2: voxels: voxels are not finite"):
        to_model_space({"t1": here, "t2": here.with_array(broken)}, Image())


def test_an_empty_modality_does_not_break_the_study():
    here = head(LINEAR["RAS"])
    study = to_model_space({"t1": here, "t2": here.with_array(np.zeros_like(here.array))}, Image())
    assert study.arrays["t2"].shape == study.arrays["t1"].shape and not study.arrays["t2"].any()


# --- real scans ------------------------------------------------------------------------------------------------------


def scan(*parts: str) -> Volume:
    path = DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs the real scans ({path.name})")
    return read_nifti(path)


def test_a_real_stroke_study_on_three_grids_round_trips():
    volumes = {name: scan("isles22_stroke_0009", f"{name}.nii.gz") for name in ("dwi", "adc", "flair")}
    study = to_model_space(volumes, Image())
    for name, limit in (("dwi", 0.03), ("adc", 0.04), ("flair", 0.15)):
        original = volumes[name].array
        back = study.to_native(study.arrays[name], name, study.scales[name], order=3)
        np.testing.assert_array_equal(back.affine, volumes[name].affine)
        brain = original != 0
        assert np.abs(back.array - original)[brain].mean() < limit * original[brain].std()
        assert ((back.array != 0) ^ brain).sum() < 0.01 * brain.sum()


def test_real_brains_at_their_own_spacing_come_back_unchanged_from_disk(tmp_path):
    volumes = {m: scan("brain_mr_open", "oms-lg01", "ses-1", f"{m}.nii.gz") for m in ("t1", "t2", "flair")}
    study = to_model_space(volumes, Image(spacing=(1.5, 1.5, 1.5)))
    source = DATA / "brain_mr_open" / "oms-lg01" / "ses-1" / "t1.nii.gz"
    write_nifti(
        study.to_native(study.arrays["t1"], "t1", study.scales["t1"]), tmp_path / "t1.nii.gz", np.int16, like=source
    )
    before, after = nib.load(source), nib.load(tmp_path / "t1.nii.gz")
    np.testing.assert_array_equal(np.asanyarray(after.dataobj), np.asanyarray(before.dataobj))
    np.testing.assert_array_equal(after.affine, before.affine)


@pytest.mark.parametrize(
    ("name", "spacing"), [("msd_sub-spleen2_ct", (0.7, 0.7, 2.5)), ("totalseg_example_ct", (2.0, 2.0, 2.0))]
)
def test_real_ct_comes_back_within_the_window(name, spacing):
    ct = scan("ct", f"{name}.nii.gz")
    image = Image(spacing=spacing, intensity=Intensity(scheme="window", low=-175, high=250))
    study = to_model_space({"ct": ct}, image)
    back = study.to_native(study.arrays["ct"], "ct", study.scales["ct"], order=3)
    assert back.shape == ct.shape
    error = np.abs(back.array - np.clip(ct.array, -175, 250))[1:-1, 1:-1, 1:-1]
    assert error.mean() < 4 and np.corrcoef(back.array.ravel(), np.clip(ct.array, -175, 250).ravel())[0, 1] > 0.995
