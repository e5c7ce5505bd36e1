"""A volume cannot exist at an impossible place."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest

from medmae.errors import InputError
from medmae.imaging.volume import Grid, Volume, check_affine


def tilted(degrees: float) -> np.ndarray:
    """1 x 1 x 5 mm with a gantry tilt: the slice axis leans towards the second axis."""
    affine = np.diag([1.0, 1.0, 5.0, 1.0])
    affine[1, 2] = 5 * np.sin(np.radians(degrees))
    affine[2, 2] = 5 * np.cos(np.radians(degrees))
    return affine


@pytest.mark.parametrize(
    ("affine", "says"),
    [
        (np.diag([1, np.nan, 1, 1]), "not numbers"),
        (np.diag([1, np.inf, 1, 1]), "not numbers"),
        (np.diag([1, 0, 1, 1]), "singular"),
        (np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "singular"),
        (np.diag([0.005, 1, 1, 1]), "absurd"),
        (np.diag([1, 1, 51, 1]), "absurd"),
        (tilted(85), "sheared"),
        (np.eye(3), "4x4"),
        ("east", "matrix of numbers"),
        (np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]), "last row"),
    ],
)
def test_an_impossible_affine_is_refused_with_file_field_value_and_remedy(affine, says):
    with pytest.raises(InputError, match=says) as caught:
        check_affine(affine, where="scan.nii.gz", field="sform")
    problem = caught.value.problem
    assert problem.where == "scan.nii.gz" and problem.field == "sform"
    assert problem.found and problem.expected and problem.remedy


@pytest.mark.parametrize("affine", [tilted(30), tilted(-45), np.diag([0.01, 50, 1, 1]), np.diag([-1, -1, 1, 1])])
def test_gantry_tilt_flips_and_extreme_but_real_spacings_are_accepted(affine):
    np.testing.assert_array_equal(check_affine(affine), affine)


def test_a_grid_knows_its_spacing_orientation_and_corners():
    # Axis 0 runs to posterior, axis 1 to superior, axis 2 to left: spacing 2, 3, 4.
    affine = np.array([[0, 0, -4, 90], [-2, 0, 0, 50], [0, 3, 0, -20], [0, 0, 0, 1.0]])
    grid = Grid((10, 20, 30), affine)
    assert grid.spacing == (2, 3, 4)
    assert grid.orientation == "PSL" == "".join(nib.aff2axcodes(affine))
    corners = grid.corners_mm()
    np.testing.assert_allclose(corners.min(axis=0), [90 - 4 * 29.5, 50 - 2 * 9.5, -20 - 1.5])
    np.testing.assert_allclose(corners.max(axis=0), [90 + 2, 50 + 1, -20 + 3 * 19.5])


def test_voxels_and_millimetres_convert_as_nibabel_does_and_back():
    rng = np.random.default_rng(0)
    affine = nib.affines.from_matvec(rng.normal(size=(3, 3)) + 2 * np.eye(3), [5, -6, 7])
    grid = Grid((4, 5, 6), affine)
    points = rng.uniform(-3, 9, size=(7, 2, 3))
    np.testing.assert_allclose(grid.voxel_to_mm(points), nib.affines.apply_affine(affine, points))
    np.testing.assert_allclose(grid.mm_to_voxel(grid.voxel_to_mm(points)), points, atol=1e-9)


def test_a_grid_survives_json_exactly():
    grid = Grid((4, 5, 6), np.diag([1 / 3, 0.7, 1.1, 1]))
    assert Grid.from_json(json.loads(json.dumps(grid.to_json()))) == grid
    assert Grid((4, 5, 7), grid.affine) != grid


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 4, 1), (4, 0, 4)])
def test_only_three_axes_with_voxels_make_a_volume(shape):
    with pytest.raises(InputError):
        Volume(np.zeros(shape), np.eye(4))


def test_the_affine_of_a_volume_cannot_be_changed_from_outside():
    affine = np.eye(4)
    volume = Volume(np.zeros((2, 2, 2)), affine)
    affine[0, 0] = 7
    assert volume.spacing == (1, 1, 1)
    with pytest.raises(ValueError, match="read-only"):
        volume.affine[0, 0] = 7


def test_other_values_must_have_the_same_shape():
    volume = Volume(np.zeros((2, 3, 4)), np.diag([1, 2, 3, 1]), frame="1.2.3")
    other = volume.with_array(np.ones((2, 3, 4)))
    assert other.frame == "1.2.3" and other.spacing == (1, 2, 3)
    with pytest.raises(InputError, match="do not fit"):
        volume.with_array(np.ones((4, 3, 2)))
