"""A structure stays where it is in millimetres, on any grid."""

from __future__ import annotations

from functools import lru_cache

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from medmae.imaging.geometry import (
    centred_box,
    corner_distance_mm,
    crop_to,
    cropped_grid,
    foreground_box,
    grids_agree,
    overlap_share,
    reorient,
    reoriented_grid,
    resample,
    resample_labels,
    spacing_grid,
)
from medmae.imaging.volume import Grid, Volume

# An asymmetric object in the world: (centre in mm, sigma in mm, weight).
BLOBS = (((6.0, -4.0, 3.0), 5.0, 1.0), ((-9.0, 8.0, -5.0), 6.0, 0.7), ((2.0, 12.0, 9.0), 5.5, -0.4))


def world(xyz: np.ndarray) -> np.ndarray:
    """The object's value at RAS+ mm (..., 3)."""
    return sum(w * np.exp(-((xyz - np.array(c)) ** 2).sum(-1) / (2 * s**2)) for c, s, w in BLOBS)


@lru_cache(maxsize=32)
def indices(shape: tuple[int, ...]) -> np.ndarray:
    return np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)


def scanned(grid: Grid) -> Volume:
    """The object as an ideal scanner would record it on ``grid``."""
    return Volume(world(nib.affines.apply_affine(grid.affine, indices(grid.shape))).astype(np.float32), grid.affine)


def centred(shape: tuple[int, int, int], linear: np.ndarray, middle: tuple[float, float, float] = (0, 0, 0)) -> Grid:
    offset = np.array(middle) - linear @ ((np.array(shape) - 1) / 2)
    return Grid(shape, nib.affines.from_matvec(linear, offset))


OBLIQUE = Rotation.from_euler("xyz", [17, -23, 31], degrees=True).as_matrix()
SHEAR = np.array([[1, 0, 0], [0, 1, 0.33], [0, 0, 1.0]])
GRIDS = {
    "RAS": centred((80, 84, 78), np.eye(3)),
    "LPS": centred((80, 84, 78), np.diag([-1.0, -1, 1])),
    "permuted axes": centred((70, 60, 66), np.array([[0, 0, 1.2], [-1.1, 0, 0], [0, 1.3, 0]])),
    "anisotropic": centred((90, 90, 28), np.diag([0.9, 0.9, 3.0])),
    "oblique": centred((84, 80, 82), OBLIQUE, (1.3, -2.1, 0.4)),
    "oblique, anisotropic, flipped": centred((90, 86, 30), OBLIQUE @ np.diag([-0.9, 0.95, 2.7])),
    "gantry tilt": centred((80, 80, 40), np.diag([1.0, 1.0, 2.0]) @ SHEAR),
}


def itk_image(volume: Volume) -> sitk.Image:
    """The same volume as an image of ITK's own, which thinks in LPS."""
    image = sitk.GetImageFromArray(volume.array.transpose(2, 1, 0).astype(np.float32))
    to_lps = np.diag([-1.0, -1, 1])
    spacing = np.linalg.norm(volume.affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin((to_lps @ volume.affine[:3, 3]).tolist())
    image.SetDirection((to_lps @ volume.affine[:3, :3] / spacing).ravel().tolist())
    return image


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("other", ["RAS", "oblique"])
def test_resampling_leaves_the_object_where_it_is(name, other, order):
    source, to = GRIDS[name], GRIDS[other]
    moved = resample(scanned(source), to, order, antialias=False)
    np.testing.assert_array_equal(moved.affine, to.affine)
    # Compare with the object itself, where the source grid has a voxel of margin.
    xyz = nib.affines.apply_affine(to.affine, indices(to.shape))
    at = nib.affines.apply_affine(np.linalg.inv(source.affine), xyz)
    inside = ((at >= 1) & (at <= np.array(source.shape) - 2)).all(-1)
    error = np.abs(moved.array - world(xyz))[inside].max()
    # Linear error is at most h^2/8 times the curvature (1/s^2) along each axis.
    bound = sum(h**2 for h in source.spacing) / (8 * 5.0**2) * 1.1 if order == 1 else 0.01
    assert error < bound
    # And the centre of mass of the object moves by less than a tenth of a voxel.
    truth, found = np.where(inside, world(xyz), 0).clip(0.2), np.where(inside, moved.array, 0).clip(0.2)
    centres = [((v - 0.2)[..., None] * xyz).sum((0, 1, 2)) / (v - 0.2).sum() for v in (truth, found)]
    assert np.linalg.norm(centres[0] - centres[1]) < 0.1 * min(to.spacing)


@pytest.mark.parametrize(
    ("order", "interpolator"), [(0, sitk.sitkNearestNeighbor), (1, sitk.sitkLinear), (3, sitk.sitkBSpline)]
)
@pytest.mark.parametrize("name", ["LPS", "anisotropic", "oblique", "oblique, anisotropic, flipped"])
def test_resampling_equals_simpleitk_on_its_own_geometry(name, order, interpolator):
    rng = np.random.default_rng(3)
    source = Volume(rng.normal(size=GRIDS[name].shape).astype(np.float32), GRIDS[name].affine)
    to = centred(
        (40, 37, 33),
        Rotation.from_euler("z", 8, degrees=True).as_matrix() @ np.diag([1.1, 1.3, 1.2]),
        (9.13, 5.21, 0.17),
    )
    expected = sitk.Resample(
        itk_image(source), itk_image(Volume(np.zeros(to.shape), to.affine)), sitk.Transform(), interpolator, -3.0
    )
    found = resample(source, to, order, fill=-3.0, antialias=False).array
    different = np.abs(found - sitk.GetArrayFromImage(expected).transpose(2, 1, 0)) > 1e-3
    assert different.mean() < 1e-4  # a voxel exactly on the border of two may fall to either side


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "LAI", "RPI"])
@pytest.mark.parametrize("name", GRIDS)
def test_reorienting_equals_nibabel_and_loses_nothing(name, orientation):
    volume = scanned(GRIDS[name])
    result = reorient(volume, orientation)
    image = nib.Nifti1Image(volume.array, volume.affine)
    change = nib.orientations.ornt_transform(
        nib.io_orientation(volume.affine), nib.orientations.axcodes2ornt(orientation)
    )
    expected = image.as_reoriented(change)
    np.testing.assert_allclose(result.affine, expected.affine, atol=1e-9)
    np.testing.assert_array_equal(result.array, np.asanyarray(expected.dataobj))
    assert result.orientation == orientation
    np.testing.assert_array_equal(reorient(result, volume.orientation).array, volume.array)


def test_flips_and_whole_voxel_shifts_are_exact_for_any_values_even_ids():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 60_000, size=(7, 8, 9)).astype(np.int32)
    volume = Volume(labels, GRIDS["permuted axes"].affine)
    to = cropped_grid(reoriented_grid(volume.grid, "LPS"), ((-2, 9), (1, 6), (3, 20)))
    there = resample_labels(volume, to)
    back = resample_labels(there, volume.grid)
    kept = back.array != 0
    np.testing.assert_array_equal(back.array[kept], labels[kept])
    assert 0.3 < kept.mean() < 0.8
    np.testing.assert_array_equal(resample(volume, to, 3).array, there.array)


@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.7, 1.3, 2.0), (3.1, 3.1, 3.1)])
@pytest.mark.parametrize("name", GRIDS)
def test_a_new_spacing_keeps_centre_axes_and_extent(name, spacing):
    old = GRIDS[name]
    new = spacing_grid(old, spacing)
    np.testing.assert_allclose(new.spacing, spacing)
    np.testing.assert_allclose(new.corners_mm().mean(axis=0), old.corners_mm().mean(axis=0), atol=1e-9)
    np.testing.assert_allclose(new.affine[:3, :3] / new.spacing, old.affine[:3, :3] / old.spacing, atol=1e-12)
    difference = np.array(new.shape) * new.spacing - np.array(old.shape) * old.spacing
    assert (np.abs(difference) <= np.array(spacing) / 2 + 1e-9).all()


def test_a_single_slice_keeps_at_least_one_voxel():
    assert spacing_grid(Grid((64, 64, 1), np.diag([1, 1, 1, 1.0])), (1, 1, 5)).shape == (64, 64, 1)


def test_every_voxel_of_a_new_spacing_has_a_value_up_to_the_edge():
    for shape in ((11, 12, 13), (1, 2, 3)):
        volume = Volume(np.full(shape, 5, np.float32), np.diag([1.0, 1.3, 2.2, 1]))
        for spacing in ((0.3, 0.3, 0.3), (1, 1, 1), (1.7, 1.7, 1.7)):
            for order in (1, 3):
                result = resample(volume, spacing_grid(volume.grid, spacing), order, fill=-1)
                np.testing.assert_allclose(result.array, 5, atol=1e-4)


def test_outside_of_the_volume_is_the_fill_value():
    volume = Volume(np.ones((4, 4, 4), np.float32), np.eye(4))
    to = Grid((8, 1, 1), nib.affines.from_matvec(np.eye(3), [-2.25, 1.5, 1.5]))
    values = resample(volume, to, 1, fill=-9).array.ravel()
    assert values.tolist() == [-9, -9, 1, 1, 1, 1, -9, -9]  # the box reaches from -0.5 to 3.5 mm


def test_downsampling_does_not_alias():
    # Stripes of 2 mm, sampled every 5 mm: without smoothing they would come out as stripes of 10 mm.
    stripes = np.tile(np.array([0, 1], np.float32)[:, None, None], (50, 20, 20))
    volume = Volume(stripes, np.eye(4))
    to = spacing_grid(volume.grid, (5, 1, 1))
    inner = (slice(2, -2),)
    assert resample(volume, to, 1, antialias=False).array[inner].std() > 0.4
    smooth = resample(volume, to, 1).array[inner]
    assert smooth.std() < 0.02 and abs(smooth.mean() - 0.5) < 0.01


def test_antialiasing_has_the_width_of_the_new_voxel_whatever_the_axes():
    # The world's x is the target's axis 2, made 5 times coarser: a point is spread by a Gaussian along x alone, whose
    # full width at half maximum is sqrt(5^2 - 1^2).
    point = np.zeros((61, 61, 61), np.float32)
    point[30, 30, 30] = 1
    turned = Grid((61, 61, 61), np.array([[0, 0, 1.0, 2], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]))
    coarse = spacing_grid(turned, (1, 1, 5))
    result = resample(Volume(point, np.eye(4)), coarse, 1).array
    line = result[30, 30]
    x = coarse.affine[0, 2] * np.arange(len(line)) + coarse.affine[0, 3]
    sigma = np.sqrt(24) / 2.35482
    np.testing.assert_allclose(
        line, np.exp(-((x - 30) ** 2) / (2 * sigma**2)) / (sigma * np.sqrt(2 * np.pi)), atol=0.006
    )
    assert line.max() > 0.15 and np.count_nonzero(result.any(axis=2)) == 1


def test_a_mask_stays_a_mask_of_the_same_size():
    grid = GRIDS["oblique"]
    ball = np.linalg.norm(nib.affines.apply_affine(grid.affine, indices(grid.shape)), axis=-1) < 20
    for other in ("RAS", "anisotropic", "gantry tilt"):
        moved = resample(Volume(ball, grid.affine), GRIDS[other], 3)
        assert moved.array.dtype == bool
        volume = moved.array.sum() * abs(np.linalg.det(moved.affine))
        assert volume == pytest.approx(4 / 3 * np.pi * 20**3, rel=0.02)


def test_labels_keep_their_values_type_and_shape():
    grid = GRIDS["oblique, anisotropic, flipped"]
    xyz = nib.affines.apply_affine(grid.affine, indices(grid.shape))
    radius = np.linalg.norm(xyz, axis=-1)
    labels = np.select([radius < 10, radius < 20], [7, 300], 0).astype(np.int16)
    to = GRIDS["RAS"]
    moved = resample_labels(Volume(labels, grid.affine), to)
    assert moved.array.dtype == np.int16 and set(np.unique(moved.array)) == {0, 7, 300}
    there = np.linalg.norm(nib.affines.apply_affine(to.affine, indices(to.shape)), axis=-1)
    clear = (np.abs(there - 10) > 1.5) & (np.abs(there - 20) > 1.5)  # half the slice distance from any border
    np.testing.assert_array_equal(moved.array[clear], np.select([there < 10, there < 20], [7, 300], 0)[clear])


def test_the_foreground_box_is_the_union_of_all_images():
    a, b = np.zeros((10, 11, 12)), np.zeros((10, 11, 12))
    a[2, 3, 4] = -1
    b[5, 3, 9] = 2
    box = foreground_box([a, b])
    assert box == ((2, 6), (3, 4), (4, 10))
    assert all(isinstance(edge, int) for pair in box for edge in pair)
    assert foreground_box([np.zeros((2, 3, 4))]) == ((0, 2), (0, 3), (0, 4))


@pytest.mark.parametrize("name", GRIDS)
def test_cropping_and_padding_keep_millimetres(name):
    volume = scanned(GRIDS[name])
    box = ((5, 40), (-7, 60), (3, 90))
    result = crop_to(volume, box, fill=-5)
    assert result.shape == (35, 67, 87)
    xyz = nib.affines.apply_affine(result.affine, indices(result.shape))
    padded = result.array == -5
    np.testing.assert_allclose(result.array[~padded], world(xyz)[~padded], atol=1e-5)
    i, j, k = volume.shape
    assert (~padded).sum() == 35 * min(60, j) * (k - 3)


def test_a_centred_box_pads_small_volumes_evenly():
    assert centred_box((10, 11, 3), (4, 4, 8)) == ((3, 7), (3, 7), (-3, 5))


def test_grids_are_compared_in_millimetres_at_the_corners():
    grid = GRIDS["oblique"]
    shifted = grid.affine.copy()
    shifted[:3, 3] += [0.03, 0.04, 0]
    assert corner_distance_mm(grid, Grid(grid.shape, shifted)) == pytest.approx(0.05)
    assert grids_agree(grid, Grid(grid.shape, shifted)) and not grids_agree(grid, Grid(grid.shape, shifted), 0.04)
    # A tenth of a degree about the centre moves the corners of a 240 mm box by 0.3 mm: not one grid.
    turn = Rotation.from_euler("z", 0.1, degrees=True).as_matrix()
    large = centred((240, 240, 155), np.eye(3))
    assert corner_distance_mm(large, centred((240, 240, 155), turn)) == pytest.approx(
        np.hypot(120, 120) * np.radians(0.1), rel=1e-3
    )
    assert not grids_agree(large, centred((240, 240, 154), np.eye(3)))


def test_overlap_of_fields_of_view():
    a = centred((100, 100, 100), np.eye(3))
    assert overlap_share(a, centred((20, 20, 20), OBLIQUE)) == 1
    assert overlap_share(centred((100, 100, 100), np.eye(3), (50, 0, 0)), a) == pytest.approx(0.5, abs=0.04)
    assert overlap_share(a, centred((20, 20, 20), np.eye(3), (500, 0, 0))) == 0


@pytest.mark.parametrize("seed", range(8))
def test_any_affine_takes_the_object_to_any_other(seed):
    rng = np.random.default_rng(seed)

    def anywhere() -> Grid:
        turn = Rotation.random(rng=rng).as_matrix()
        shear = np.eye(3) + np.triu(rng.uniform(-0.4, 0.4, (3, 3)), 1)
        flips = np.diag(rng.choice([-1, 1], 3) * rng.uniform(0.8, 1.6, 3))
        shape = tuple(int(n) for n in rng.integers(50, 70, 3))
        return centred(shape, turn @ shear @ flips, tuple(rng.uniform(-4, 4, 3)))

    source, to = anywhere(), anywhere()
    moved = resample(scanned(source), to, 3, fill=np.nan, antialias=False)
    xyz = nib.affines.apply_affine(to.affine, indices(to.shape))
    at = nib.affines.apply_affine(np.linalg.inv(source.affine), xyz)
    inside = ((at >= 2) & (at <= np.array(source.shape) - 3)).all(-1)
    assert inside.sum() > 10_000
    np.testing.assert_allclose(moved.array[inside], world(xyz)[inside], atol=0.01)
    outside = ((at < -0.51) | (at > np.array(source.shape) - 0.49)).any(-1)
    assert np.isnan(moved.array[outside]).all()
