"""Registration finds the motion that was made, and says when it did not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

import medmae
from medmae.errors import InputError
from medmae.imaging.geometry import crop_to
from medmae.imaging.nifti import read_nifti
from medmae.imaging.registration import STILL_MM, coregister
from medmae.imaging.volume import Volume
from tests.phantom import corners_of, made_up_head, motion, rescanned

DATA = Path(__file__).parents[3] / "shared" / "data"


def error_mm(registered: Volume, acquired: Volume, move: np.ndarray, corners: np.ndarray) -> float:
    """How far a corner of the head lies from where it was before ``move``: a closed form, no image is compared."""
    found = registered.affine @ np.linalg.inv(acquired.affine) @ move
    return float(np.linalg.norm(corners @ found[:3, :3].T + found[:3, 3] - corners, axis=1).max())


@pytest.fixture(scope="module")
def head() -> dict[str, Volume]:
    return made_up_head()


def test_images_that_moved_up_to_15_degrees_and_20_mm_are_brought_back_within_a_millimetre(head):
    t1 = head["t1"]
    corners = corners_of(t1)
    centre = corners.mean(axis=0)
    cases = {"t2": (15, 20, (1.5, 1.5, 5.0)), "ct": (12, 20, (1.5, 1.5, 3.0))}
    moves = {name: motion(degrees, mm, 5, centre) for name, (degrees, mm, _) in cases.items()}
    study = {"t1": Volume(t1.array, t1.affine, "1.2.3")}
    for name, (_, _, spacing) in cases.items():
        scan = rescanned(head[name], moves[name], spacing, 3)
        study[name] = Volume(scan.array, scan.affine, f"9.{name}")
    threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    result = coregister(study)
    assert sitk.ProcessObject.GetGlobalDefaultNumberOfThreads() == threads
    assert (result.reference, result.volumes["t1"], list(result.volumes)) == ("t1", study["t1"], list(study))
    for name, (degrees, mm, _) in cases.items():
        assert error_mm(result.volumes[name], study[name], moves[name], corners) < 1
        assert result.volumes[name].array is study[name].array  # nothing was interpolated
        assert result.volumes[name].frame == "1.2.3"
        facts = result.registrations[name]
        assert facts.moved and abs(facts.rotation_deg - degrees) < 0.7 and abs(facts.translation_mm - mm) < 1.5
        assert facts.spread_mm < 0.5 and facts.information > 1.5 * facts.information_before
        assert facts.overlap > 0.99 and facts.peak > 1.2
    told = repr(result.to_json()) + str(result.registrations["t2"])
    assert "1.2.3" not in told and "9.t2" not in told


def test_a_part_of_the_head_finds_its_place_in_the_whole_and_the_same_bits_every_time(head):
    t1 = head["t1"]
    i, j, k = t1.shape
    slab = crop_to(head["t2"], ((0, i), (0, j), (k // 2 - 14, k // 2 + 14)))
    move = motion(8, 15, 1, np.zeros(3))
    study = {"t1": t1, "t2": Volume(slab.array, move @ slab.affine)}
    first, second = coregister(study, "t1"), coregister(study, "t1")
    assert error_mm(first.volumes["t2"], study["t2"], move, corners_of(t1)) < 1
    np.testing.assert_array_equal(first.volumes["t2"].affine, second.volumes["t2"].affine)
    assert first.to_json() == second.to_json()


def test_images_that_lie_right_keep_their_affine(head):
    result = coregister({"t1": head["t1"], "t2": head["t2"]}, "t2")
    assert not result.registrations["t1"].moved
    np.testing.assert_array_equal(result.volumes["t1"].affine, head["t1"].affine)
    assert result.registrations["t1"].translation_mm < STILL_MM


def test_all_images_that_cannot_be_registered_are_named_with_the_reason(head):
    t1, rng = head["t1"], np.random.default_rng(1)
    noise = ndimage.gaussian_filter(rng.standard_normal(t1.shape), 3).astype(np.float32) + 1
    ball = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in t1.shape), indexing="ij"))
    study = {
        "t1": t1,
        "t2": Volume(noise, t1.affine),
        "flair": t1.with_array(np.zeros(t1.shape, np.float32)),
        "pd": t1.with_array(np.where(np.isin(np.arange(t1.array.size).reshape(t1.shape), 7), np.nan, t1.array)),
        "dwi": crop_to(t1, ((0, 76), (0, 90), (30, 33))),
        "ct": t1.with_array(((ball**2).sum(axis=0) < 0.8).astype(np.float32)),
    }
    with pytest.raises(InputError) as error:
        coregister(study)
    found = {problem.where: problem for problem in error.value.problems}
    assert set(found) == {"t2", "flair", "pd", "dwi", "ct"}
    assert "cannot be registered to t1" in found["t2"].what and found["t2"].found
    assert "every voxel is 0" in found["flair"].what
    assert "not finite" in found["pd"].what
    assert "too thin" in found["dwi"].what and found["dwi"].found == "6.0 mm"
    assert "cannot be registered to t1" in found["ct"].what  # a ball may be turned as one likes
    assert all(problem.remedy for problem in found.values())


def test_two_parts_of_a_head_that_share_nothing_are_refused(head):
    i, j, k = head["t1"].shape
    low = crop_to(head["t1"], ((0, i), (0, j), (0, k // 2 - 2)))
    high = crop_to(head["t2"], ((0, i), (0, j), (k // 2 + 2, k)))
    with pytest.raises(InputError, match="cannot be registered"):
        coregister({"t1": low, "t2": high})


def test_a_reference_that_is_not_there_is_refused(head):
    with pytest.raises(InputError, match="no such image"):
        coregister({"t1": head["t1"]}, "t2")
    with pytest.raises(InputError, match="at least one image"):
        coregister({})
    assert coregister({"t1": head["t1"]}).registrations == {}


def accuracy(folder: Path, trials: int) -> list[float]:
    """Errors after known motions of all modalities but T1, mm."""
    images = {path.name.split(".")[0]: read_nifti(path) for path in sorted(folder.glob("*.nii.gz"))}
    corners = corners_of(images["t1"])
    errors = []
    for trial in range(trials):
        study, moves = {"t1": images["t1"]}, {}
        for number, (name, spacing) in enumerate((("t1c", (1, 1, 3)), ("t2", (1.2, 1.2, 1.2)), ("flair", (1, 1, 5)))):
            strength = 1 - trial / 3
            moves[name] = motion(15 * strength, 20 * strength, 10 * trial + number, corners.mean(axis=0))
            study[name] = rescanned(images[name], moves[name], spacing, 10 * trial + number)
        done = coregister(study)
        errors += [error_mm(done.volumes[name], study[name], move, corners) for name, move in moves.items()]
    return errors


@pytest.mark.slow
def test_the_demo_cohorts_studies_with_lesions_are_registered_within_a_millimetre(tmp_path):
    made = medmae.make_demo_cohort(tmp_path, studies=0, held_out=3, spacing=1.5, jobs=1)
    errors = [e for study in sorted(made.held_out.iterdir()) for e in accuracy(study, 1)]
    assert max(errors) < 1, errors


@pytest.mark.slow
@pytest.mark.parametrize("patient", ["oms-cs07", "oms-cs26"])
def test_real_scans_are_registered_within_a_millimetre(patient):
    folder = DATA / "brain_mr_open" / patient / "ses-1"
    if not folder.exists():
        pytest.skip(f"no real scans here: {patient}")
    errors = accuracy(folder, 1)
    assert max(errors) < 1, errors
