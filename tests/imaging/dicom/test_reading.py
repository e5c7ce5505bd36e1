"""Voxels and places of DICOM series, against closed forms, SimpleITK, nibabel and dcm2niix."""

from __future__ import annotations

import pickle
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from nibabel.nicom.dicomwrappers import wrapper_from_data

import medmae
from medmae.errors import InputError
from medmae.imaging.dicom.finding import find_series
from medmae.imaging.dicom.reading import read_series
from medmae.imaging.dicom.series import Series
from medmae.imaging.volume import Volume
from tests.imaging.dicom.build import PATIENT, Builder, affine_of, phantom, rotation

ORIGIN, SPACING = (-40.0, 25.0, -70.0), (0.9, 1.1, 2.5)
SHUFFLED = list(range(12))
random.Random(0).shuffle(SHUFFLED)


def only(path: Path) -> tuple[Series, Volume]:
    found, problems = find_series(path)
    assert not [problem for problem in problems if problem.fatal], problems
    assert len(found) == 1
    return found[0], read_series(found[0])


def by_simpleitk(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(voxels (i, j, k), affine to RAS) as ITK's series reader has them."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return from_itk(reader.Execute())


def from_itk(image: sitk.Image) -> tuple[np.ndarray, np.ndarray]:
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).transpose(2, 1, 0), np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def centroid(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    inside = np.argwhere(array > array.min())
    return inside.mean(0) @ affine[:3, :3].T + affine[:3, 3]


@pytest.mark.parametrize(
    "order",
    [lambda k: k, lambda k: 11 - k, lambda k: SHUFFLED[k]],
    ids=["as acquired", "reversed", "shuffled"],
)
def test_an_oblique_stack_lies_where_simpleitk_puts_it(tmp_path: Path, order: Callable[[int], int]) -> None:
    Builder(tmp_path).classic("s", order=order)
    series, volume = only(tmp_path)
    np.testing.assert_array_equal(volume.array, phantom())
    np.testing.assert_allclose(volume.affine, affine_of(rotation(), SPACING, ORIGIN), atol=1e-5)
    array, affine = by_simpleitk(tmp_path / "s")
    np.testing.assert_array_equal(volume.array, array)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-4)
    assert volume.array.dtype == np.float32
    assert series.grid == volume.grid and pickle.loads(pickle.dumps(series)) == series


def test_a_stack_sent_from_head_to_foot_keeps_its_world(tmp_path: Path) -> None:
    """Slices whose step runs against the normal of their planes: the array is ordered along the normal."""
    direction = rotation()
    direction[:, 2] *= -1
    Builder(tmp_path).classic("s", direction=direction)
    _, volume = only(tmp_path)
    true = affine_of(direction, SPACING, ORIGIN)
    np.testing.assert_array_equal(volume.array, phantom()[:, :, ::-1])
    assert np.linalg.norm(centroid(volume.array, volume.affine) - centroid(phantom(), true)) < 1e-4
    array, affine = by_simpleitk(tmp_path / "s")
    assert np.linalg.norm(centroid(volume.array, volume.affine) - centroid(array, affine)) < 1e-3


def test_dcm2niix_sees_the_same_voxels_at_the_same_millimetres(tmp_path: Path) -> None:
    program = dcm2niix()
    Builder(tmp_path).classic("s", order=lambda k: SHUFFLED[k], SeriesDescription="T1")
    (tmp_path / "out").mkdir()
    command = [program, "-z", "n", "-f", "image", "-o", str(tmp_path / "out"), str(tmp_path / "s")]
    subprocess.run(command, check=True, capture_output=True)
    (file,) = (tmp_path / "out").glob("*.nii")
    image = nib.load(file)
    _, volume = only(tmp_path / "s")
    ours = nib.as_closest_canonical(nib.Nifti1Image(volume.array, volume.affine))
    theirs = nib.as_closest_canonical(image)
    np.testing.assert_array_equal(ours.get_fdata(), theirs.get_fdata())
    np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-3)


def dcm2niix() -> str:
    try:
        from dcm2niix import bin as found
    except ImportError:
        found = shutil.which("dcm2niix")
    if not found:
        pytest.skip("dcm2niix is not installed")
    return str(found)


def test_every_slice_has_its_own_slope_and_intercept(tmp_path: Path) -> None:
    def change(k: int, dataset: pydicom.FileDataset) -> None:
        dataset.RescaleSlope, dataset.RescaleIntercept = f"{0.5 + k / 4:g}", f"{-1000 + 7 * k}"

    Builder(tmp_path, Modality="CT").classic("s", change=change)
    series, volume = only(tmp_path)
    k = np.arange(12)
    np.testing.assert_array_equal(volume.array, (phantom() * (0.5 + k / 4) - 1000 + 7 * k).astype(np.float32))
    assert series.modality == "ct"


def test_signed_values_of_twelve_bits_are_read_with_their_sign(tmp_path: Path) -> None:
    array = phantom().astype(np.int16) - 800

    def change(k: int, dataset: pydicom.FileDataset) -> None:
        dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 12, 11, 1

    Builder(tmp_path, Modality="CT").classic("s", array, change=change)
    np.testing.assert_array_equal(only(tmp_path)[1].array, array)


def test_a_tilted_gantry_gives_a_sheared_affine_and_moves_nothing(tmp_path: Path) -> None:
    direction, shear = rotation(0, 0, 0), np.array([0.0, 2.5 * np.tan(np.radians(18.0)), 0.0])
    Builder(tmp_path, Modality="CT").classic("s", direction=direction, shear=shear)
    series, volume = only(tmp_path)
    np.testing.assert_allclose(volume.affine, affine_of(direction, SPACING, ORIGIN, shear), atol=1e-5)
    np.testing.assert_array_equal(volume.array, phantom())
    assert series.tilt == pytest.approx(18.0, abs=1e-3)
    warnings: list = []
    read_series(series, warnings)
    assert "sheared" in warnings[0].what and not warnings[0].fatal


@pytest.mark.parametrize("modality", ["MR", "CT"])
def test_enhanced_multi_frame_objects_are_placed_frame_by_frame(tmp_path: Path, modality: str) -> None:
    def slope(k: int) -> tuple[float, float]:
        return 1 + k / 8, -3.0 * k

    file = Builder(tmp_path, Modality=modality).enhanced("s", order=lambda k: SHUFFLED[k], echoes=(0.0,), rescale=slope)
    series, volume = only(tmp_path)
    assert series.kind == "enhanced" and series.files == (file,)
    k = np.arange(12)
    np.testing.assert_array_equal(volume.array, (phantom() * (1 + k / 8) - 3 * k).astype(np.float32))
    np.testing.assert_allclose(volume.affine, affine_of(rotation(), SPACING, ORIGIN), atol=1e-5)


def test_an_enhanced_object_in_order_is_where_simpleitk_puts_it(tmp_path: Path) -> None:
    file = Builder(tmp_path).enhanced("s", echoes=(0.0,))
    array, affine = from_itk(sitk.ReadImage(str(file)))
    _, volume = only(tmp_path)
    np.testing.assert_array_equal(volume.array, array)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-4)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_mosaic_is_what_nibabel_makes_of_it(tmp_path: Path, reverse: bool) -> None:
    array = phantom((16, 16, 11))
    file = Builder(tmp_path).mosaic("s", array, reverse=reverse)
    series, volume = only(tmp_path)
    reference = wrapper_from_data(pydicom.dcmread(file))
    world = np.diag([-1.0, -1.0, 1.0, 1.0]) @ reference.affine  # of (row, column, slice)
    theirs = reference.get_data().transpose(1, 0, 2)
    world = world[:, [1, 0, 2, 3]]
    assert series.kind == "mosaic" and volume.shape == (16, 16, 11)
    if reverse:  # nibabel keeps the order of tiles, here slices run along the normal
        theirs = theirs[:, :, ::-1]
        world[:, 3] += world[:, 2] * 10
        world[:, 2] *= -1
    np.testing.assert_array_equal(volume.array, theirs)
    np.testing.assert_allclose(volume.affine, world, atol=1e-3)


def test_echoes_of_one_series_are_two_volumes(tmp_path: Path) -> None:
    builder, series = Builder(tmp_path), pydicom.uid.generate_uid()
    times = {"RepetitionTime": 3000.0, "ScanningSequence": "SE"}
    builder.classic("s", series=series, EchoNumbers=1, EchoTime=15.0, **times)
    builder.number -= 1
    builder.classic("t", phantom() + 7, series=series, EchoNumbers=2, EchoTime=100.0, **times)
    found, problems = find_series(tmp_path)
    assert not problems
    assert {(one.modality, one.part) for one in found} == {("pd", "1 of 2"), ("t2", "2 of 2")}
    values = {one.modality: read_series(one).array for one in found}
    np.testing.assert_array_equal(values["t2"] - values["pd"], 7)


def test_echoes_of_one_enhanced_object_are_two_volumes(tmp_path: Path) -> None:
    Builder(tmp_path).enhanced("s", echoes=(15.0, 100.0), EchoPulseSequence="SPIN")
    found, _ = find_series(tmp_path)
    assert [one.modality for one in found] == ["pd", "t2"]
    np.testing.assert_array_equal(read_series(found[1]).array - read_series(found[0]).array, 85)


def test_a_compressed_series_is_decoded(tmp_path: Path) -> None:
    def change(k: int, dataset: pydicom.FileDataset) -> None:
        dataset.compress(pydicom.uid.RLELossless, generate_instance_uid=False)

    Builder(tmp_path).classic("s", change=change)
    np.testing.assert_array_equal(only(tmp_path)[1].array, phantom())


def test_files_without_preamble_are_read(tmp_path: Path) -> None:
    for file in Builder(tmp_path).classic("s"):
        dataset = pydicom.dcmread(file)
        dataset.remove_private_tags()
        del dataset.file_meta, dataset.preamble
        dataset.save_as(file, implicit_vr=True, little_endian=True)
    np.testing.assert_array_equal(only(tmp_path)[1].array, phantom())


def test_a_slice_that_was_cut_off_after_the_header_was_read_is_named(tmp_path: Path) -> None:
    files = Builder(tmp_path).classic("s")
    found, _ = find_series(tmp_path)
    files[4].write_bytes(files[4].read_bytes()[:-100])
    with pytest.raises(InputError, match="slice cannot be read") as error:
        read_series(found[0])
    assert files[4].name in str(error.value)
    files[4].unlink()
    with pytest.raises(InputError, match="slice cannot be read"):
        read_series(found[0])


def test_nothing_of_the_patient_is_shown_by_a_series(tmp_path: Path) -> None:
    builder = Builder(tmp_path)
    builder.classic("s", SeriesDescription=f"T1 {PATIENT}")
    series, _ = only(tmp_path)
    for text in (repr(series), str(series), series.reason):
        assert PATIENT not in text and "ID-4711" not in text and builder.study not in text


def test_the_real_mr_series_is_as_simpleitk_reads_it(real_data: Callable[[str], Path]) -> None:
    folder = real_data("dicom/mr_T1_studyforrest_every4th")
    series, volume = only(folder)
    array, affine = by_simpleitk(folder)
    np.testing.assert_array_equal(volume.array, array)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-4)
    assert (series.modality, volume.orientation) == ("t1", "LPS")


def test_the_real_tilted_ct_is_refused_with_its_gaps(real_data: Callable[[str], Path]) -> None:
    found, problems = find_series(real_data("dicom/ct_head_GE_gantry_tilt"))
    assert not found
    (problem,) = problems
    assert problem.fatal and "unevenly" in problem.what
    for fact in ("1 to 14 4.00 mm", "14 to 15 1.08 mm", "15 to 28 7.00 mm", "18.5 degrees"):
        assert fact in str(problem.found)


def test_read_image_takes_a_folder_or_a_file_of_a_series(tmp_path: Path) -> None:
    files = Builder(tmp_path).classic("s")
    for path in (tmp_path / "s", str(files[3])):
        np.testing.assert_array_equal(medmae.read_image(path).array, phantom())
