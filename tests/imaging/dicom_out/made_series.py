"""Series for the tests of DICOM output: small, made with pydicom and not with the code under test; and independent ways
back from DICOM to voxels in millimetres."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

MR, ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1"
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def rotation(x: float, y: float, z: float) -> np.ndarray:
    """Rotation about the axes x, y and z by degrees."""
    result = np.eye(3)
    for axis, angle in enumerate(np.deg2rad([x, y, z])):
        first, second = [place for place in range(3) if place != axis]
        turn = np.eye(3)
        turn[first, first] = turn[second, second] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        result = turn @ result
    return result


def affine(turned: tuple[float, float, float] = (0, 0, 0), spacing: tuple[float, ...] = (0.9, 1.1, 2.5)) -> np.ndarray:
    """Voxel index (i along rows, j down columns, k over slices) to RAS mm; unturned, the slices are axial."""
    matrix = np.eye(4)
    matrix[:3, :3] = np.diag([-1, -1, 1]) @ rotation(*turned) * spacing
    matrix[:3, 3] = (41.3, -17.9, -63.1)
    return matrix


def head(shape: tuple[int, int, int] = (20, 24, 14)) -> np.ndarray:
    """An ellipsoid of noise in zeros, not symmetric in any axis, with fractions."""
    grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    inside = (grid[0] - 0.2) ** 2 + (grid[1] + 0.1) ** 2 + grid[2] ** 2 < 0.7
    noise = np.random.default_rng(3).uniform(50, 900, shape)
    return np.where(inside, noise + 200 * grid[0] + 100 * grid[2], 0.0)


def write_series(
    folder: Path,
    matrix: np.ndarray,
    shape: tuple[int, int, int] = (20, 24, 14),
    *,
    numbering: str = "forward",
    enhanced: bool = False,
    study: str | None = None,
    **fields: Any,
) -> list[Path]:
    """Files of a series on the grid of ``matrix`` (to RAS mm); ``fields`` overwrite attributes, None removes one.
    ``numbering`` of instances: forward, reversed or shuffled along the slices; file names are shuffled too."""
    folder.mkdir(parents=True)
    to_lps = LPS @ matrix
    row, column = (to_lps[:3, axis] / np.linalg.norm(to_lps[:3, axis]) for axis in (0, 1))
    count = shape[2]
    numbers = np.arange(count)
    if numbering == "reversed":
        numbers = numbers[::-1]
    elif numbering == "shuffled":
        numbers = np.random.default_rng(5).permutation(count)
    common = header(study)
    common.ImageOrientationPatient = [f"{value:.12f}" for value in (*row, *column)]
    common.PixelSpacing = [float(np.linalg.norm(to_lps[:3, 1])), float(np.linalg.norm(to_lps[:3, 0]))]
    common.Rows, common.Columns = shape[1], shape[0]
    places = [[f"{value:.10f}" for value in to_lps[:3, 3] + k * to_lps[:3, 2]] for k in range(count)]
    if enhanced:
        datasets = [_enhanced(common, places)]
    else:
        datasets = []
        for k in range(count):
            one = copy.deepcopy(common)
            one.InstanceNumber, one.ImagePositionPatient = int(numbers[k]) + 1, places[k]
            one.SOPClassUID, one.SOPInstanceUID = MR, generate_uid(entropy_srcs=[str(common.SeriesInstanceUID), str(k)])
            one.PixelData = np.full((shape[1], shape[0]), k, "<i2").tobytes()
            datasets.append(one)
    paths = []
    for place, dataset in enumerate(datasets):
        for name, value in fields.items():
            if value is None:
                dataset.pop(name, None)
            else:
                setattr(dataset, name, value)
        paths.append(folder / f"{(place * 7) % 31:03d}_{place}.dcm")
        save(dataset, paths[-1])
    return paths


def header(study: str | None = None) -> Dataset:
    dataset = Dataset()
    dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate, dataset.PatientSex = (
        "Doe^Jane",
        "P1",
        "19610203",
        "F",
    )
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study or generate_uid(), generate_uid()
    dataset.FrameOfReferenceUID = generate_uid(entropy_srcs=[str(dataset.StudyInstanceUID)])
    dataset.StudyDate, dataset.StudyTime, dataset.AccessionNumber, dataset.StudyID = "20240305", "101112", "A-77", "4"
    dataset.ReferringPhysicianName = "House^Gregory"
    dataset.Modality, dataset.SeriesNumber, dataset.Manufacturer = "MR", 3, "SIEMENS"
    dataset.SeriesDescription, dataset.ProtocolName, dataset.StationName = "t1_mprage", "head", "MR-1"
    dataset.BodyPartExamined, dataset.PatientPosition = "HEAD", "HFS"
    dataset.ScanningSequence, dataset.SequenceVariant, dataset.ScanOptions = ["GR", "IR"], "MP", ""
    dataset.MRAcquisitionType, dataset.EchoTime, dataset.RepetitionTime, dataset.InversionTime = "3D", 2.9, 2300, 900
    dataset.AcquisitionDate, dataset.AcquisitionTime, dataset.EchoTrainLength = "20240305", "101500", 1
    dataset.ImageType, dataset.SliceThickness, dataset.FlipAngle = ["ORIGINAL", "PRIMARY", "M"], 2.5, 9
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 1
    block = dataset.private_block(0x0029, "A VENDOR", create=True)
    block.add_new(0x10, "LO", "private")
    return dataset


def _enhanced(common: Dataset, places: list[list[str]]) -> Dataset:
    dataset = copy.deepcopy(common)
    dataset.SOPClassUID, dataset.SOPInstanceUID, dataset.InstanceNumber = ENHANCED_MR, generate_uid(), 1
    dataset.NumberOfFrames = len(places)
    shared, orientation, measures = Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient = dataset.ImageOrientationPatient
    measures.PixelSpacing, measures.SliceThickness = dataset.PixelSpacing, 2.5
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [orientation], [measures]
    dataset.SharedFunctionalGroupsSequence = [shared]
    frames = []
    for place in places:
        frame, plane = Dataset(), Dataset()
        plane.ImagePositionPatient = place
        frame.PlanePositionSequence = [plane]
        frames.append(frame)
    dataset.PerFrameFunctionalGroupsSequence = frames
    del dataset.ImageOrientationPatient, dataset.PixelSpacing
    dataset.PixelData = np.zeros((len(places), dataset.Rows, dataset.Columns), "<i2").tobytes()
    return dataset


def save(dataset: Dataset, path: Path) -> None:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = dataset.SOPClassUID, dataset.SOPInstanceUID
    dataset.file_meta = meta
    dataset.save_as(path, enforce_file_format=True)


# --- back to voxels in millimetres ----------------------------------------------------------------------------------


def by_pydicom(files: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """(n, 3) RAS mm and (n,) values of all voxels, by equation C.7.6.2.1-1 of PS3.3 and the rescale slope."""
    points, values = [], []
    for path in files:
        one = pydicom.dcmread(path)
        rows, columns = np.meshgrid(np.arange(one.Rows), np.arange(one.Columns), indexing="ij")
        right, down = np.array(one.ImageOrientationPatient, float).reshape(2, 3)
        between_rows, between_columns = map(float, one.PixelSpacing)
        place = np.array(one.ImagePositionPatient, float)
        lps = place + columns[..., None] * between_columns * right + rows[..., None] * between_rows * down
        points.append((lps * [-1, -1, 1]).reshape(-1, 3))
        values.append(one.pixel_array.ravel() * float(one.RescaleSlope) + float(one.RescaleIntercept))
    return np.concatenate(points), np.concatenate(values)


def by_simpleitk(files: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(files[0].parent)))
    image = reader.Execute()
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    matrix[:3, 3] = image.GetOrigin()
    return _points(sitk.GetArrayFromImage(image).transpose(2, 1, 0), LPS @ matrix)


def by_dcm2niix(files: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    out = files[0].parent.with_name(files[0].parent.name + "-nifti")
    out.mkdir()
    command = [dcm2niix(), "-b", "n", "-z", "n", "-f", "image", "-o", str(out), str(files[0].parent)]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = out.glob("*.nii")
    image = nib.load(path)
    return _points(np.asarray(image.dataobj, float), image.affine)


def _points(array: np.ndarray, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    index = np.indices(array.shape).reshape(3, -1).T
    return index @ matrix[:3, :3].T + matrix[:3, 3], array.ravel()


def assert_same_place(
    points: np.ndarray, values: np.ndarray, array: np.ndarray, matrix: np.ndarray, step: float
) -> None:
    """Every voxel of ``array`` is among ``points`` within 0.1 mm, its value within ``step``; so is the centroid."""
    assert len(values) == array.size
    index = (points - matrix[:3, 3]) @ np.linalg.inv(matrix[:3, :3]).T
    whole = np.rint(index).astype(int)
    assert np.linalg.norm((index - whole) @ matrix[:3, :3].T, axis=1).max() < 0.1
    assert len(np.unique(whole, axis=0)) == array.size
    np.testing.assert_allclose(values, array[tuple(whole.T)], rtol=0, atol=step)
    truth, weights = _points(array, matrix)
    centroid = np.average(truth, axis=0, weights=weights)
    assert np.linalg.norm(np.average(points, axis=0, weights=values) - centroid) < 0.1


# --- programs ---------------------------------------------------------------------------------------------------------


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (Debian packages: dicom3tools, dcmtk, orthanc)")
    return found


def dcm2niix() -> str:
    beside = Path(sys.executable).with_name("dcm2niix")
    if beside.exists():
        return str(beside)
    found = shutil.which("dcm2niix")
    if found is None:
        pytest.skip("dcm2niix is not installed (pip install dcm2niix)")
    return found


def dciodvfy_errors(path: Path) -> list[str]:
    """What dicom3tools' validator calls an error. Debian's releases of it, of 2022 and of January 2024, do not know the
    attribute Synthetic Data (0008,001C) and take it for a mistake: that one complaint, and no other, is passed over."""
    shown = subprocess.run([program("dciodvfy"), "-new", str(path)], capture_output=True, text=True)
    assert "MRImage" in shown.stderr + shown.stdout or "Segmentation" in shown.stderr + shown.stdout
    too_new = "Error - </(0008,001c)> - Attribute with an even group number is not a recognized standard attribute"
    return [line for line in (shown.stdout + shown.stderr).splitlines() if line.startswith("Error") and line != too_new]


def valid(path: Path) -> bool:
    """Whether dciodvfy finds no error, where it is installed; that it does find none is a test of its own."""
    return shutil.which("dciodvfy") is None or not dciodvfy_errors(path)
