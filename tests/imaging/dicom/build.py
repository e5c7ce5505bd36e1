"""DICOM objects for the tests, written with pydicom: an oblique, asymmetric phantom in every kind of file."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    generate_uid,
)

PATIENT = "PLANTED^NAME"
STORAGE = {"MR": MRImageStorage, "CT": CTImageStorage}
ENHANCED = {"MR": EnhancedMRImageStorage, "CT": EnhancedCTImageStorage}
# Every attribute of a text representation that a header of an image may well hold, and some that it may not.
_NAMES = (
    "PatientName PatientComments OtherPatientNames ReferringPhysicianName InstitutionName "
    "InstitutionAddress StationName StudyDescription SeriesDescription ProtocolName OperatorsName "
    "PerformingPhysicianName AccessionNumber StudyID ImageComments DerivationDescription "
    "RequestingPhysician RequestedProcedureDescription AdditionalPatientHistory DeviceSerialNumber "
    "PatientAddress NameOfPhysiciansReadingStudy PerformedProcedureStepDescription SoftwareVersions "
    "ManufacturerModelName Manufacturer SequenceName FilterType ScanOptions BodyPartExamined "
    "AcquisitionComments PatientID IssuerOfPatientID ScanningSequence SequenceVariant ImageType "
    "ContrastBolusAgent"
)
TEXTS = _NAMES.split()


def rotation(x: float = 20, y: float = -15, z: float = 10) -> np.ndarray:
    """A rotation by three angles in degrees; its columns are the directions of rows, columns and slices."""
    result = np.eye(3)
    for axis, degrees in enumerate((x, y, z)):
        turn, (a, b) = np.eye(3), [k for k in range(3) if k != axis]
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        turn[a, a], turn[a, b], turn[b, a], turn[b, b] = cos, -sin, sin, cos
        result = result @ turn
    return result


def phantom(shape: tuple[int, int, int] = (20, 16, 12)) -> np.ndarray:
    """Stored values (column, row, slice), uint16: an ellipsoid that is no mirror image of itself, 0 around it."""
    i, j, k = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    inside = (i + 0.2) ** 2 + (j - 0.1) ** 2 * 1.4 + k**2 < 0.7
    return np.where(inside, 300 + 200 * i + 90 * j + 40 * k, 0).astype(np.uint16)


def affine_of(
    direction: np.ndarray,
    spacing: tuple[float, float, float],
    origin: tuple[float, ...],
    shear: np.ndarray | None = None,
) -> np.ndarray:
    """Index (column, row, slice) to RAS+ mm, in closed form."""
    matrix = np.eye(4)
    matrix[:3, :3] = direction * spacing
    if shear is not None:
        matrix[:3, 2] += shear
    matrix[:3, 3] = origin
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ matrix


class Builder:
    """One study's objects. Attributes of every file: ``common``; ``write`` makes series of them."""

    def __init__(self, folder: Path, **common: Any) -> None:
        self.folder, self.study, self.frame = folder, generate_uid(), generate_uid()
        self.common: dict[str, Any] = {"PatientName": PATIENT, "PatientID": "ID-4711", "Modality": "MR", **common}
        self.number = 0

    def dataset(self, storage: str, **attributes: Any) -> FileDataset:
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = storage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        result = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        result.SOPClassUID, result.SOPInstanceUID = storage, meta.MediaStorageSOPInstanceUID
        result.StudyInstanceUID, result.FrameOfReferenceUID = self.study, self.frame
        result.SamplesPerPixel, result.PhotometricInterpretation = 1, "MONOCHROME2"
        result.BitsAllocated = result.BitsStored = 16
        result.HighBit, result.PixelRepresentation = 15, 0
        for name, value in {"ImageType": ["ORIGINAL", "PRIMARY", "M"], **self.common, **attributes}.items():
            setattr(result, name, value)
        return result

    def classic(
        self,
        name: str,
        array: np.ndarray | None = None,
        *,
        direction: np.ndarray | None = None,
        spacing: tuple[float, float, float] = (0.9, 1.1, 2.5),
        origin: tuple[float, float, float] = (-40.0, 25.0, -70.0),
        shear: np.ndarray | None = None,
        order: Callable[[int], int] = lambda k: k,
        change: Callable[[int, FileDataset], object] = lambda k, dataset: None,
        skip: tuple[int, ...] = (),
        positions: Callable[[int], float] = float,
        series: str | None = None,
        **attributes: Any,
    ) -> list[Path]:
        """One file a slice in folder ``name``; the file names and instance numbers run as ``order`` says, ``change``
        may do anything to a slice before it is written. Returns the files in order of slices."""
        array = phantom() if array is None else array
        direction = rotation() if direction is None else direction
        self.number += 1
        series, files = series or generate_uid(), []
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        step = direction[:, 2] * spacing[2] + (0 if shear is None else shear)
        for k in range(array.shape[2]):
            if k in skip:
                continue
            dataset = self.dataset(STORAGE[self.common["Modality"]], SeriesNumber=self.number, **attributes)
            dataset.SeriesInstanceUID, dataset.InstanceNumber = series, order(k) + 1
            dataset.Rows, dataset.Columns = array.shape[1], array.shape[0]
            dataset.PixelSpacing = [spacing[1], spacing[0]]
            dataset.ImageOrientationPatient = [f"{v:.10f}" for v in (*direction[:, 0], *direction[:, 1])]
            dataset.ImagePositionPatient = [f"{v:.8f}" for v in np.array(origin) + step * positions(k)]
            dataset.PixelData = np.ascontiguousarray(array[:, :, k].T).tobytes()
            change(k, dataset)
            file = (
                self.folder / name / f"IM{order(k):04}{k:04}"
                if order(k) % 2
                else self.folder / name / f"{order(k):04}.dcm"
            )
            dataset.save_as(file, enforce_file_format=True)
            files.append(file)
        return files

    def enhanced(
        self,
        name: str,
        array: np.ndarray | None = None,
        *,
        order: Callable[[int], int] = lambda k: k,
        spacing: tuple[float, float, float] = (0.9, 1.1, 2.5),
        origin: tuple[float, float, float] = (-40.0, 25.0, -70.0),
        echoes: tuple[float, ...] = (90.0,),
        rescale: Callable[[int], tuple[float, float]] = lambda k: (1.0, 0.0),
        **attributes: Any,
    ) -> Path:
        """One multi-frame file; frame ``order(k)`` holds slice ``k``, every echo after the other in one object."""
        array, direction = phantom() if array is None else array, rotation()
        self.number += 1
        count = array.shape[2]
        dataset = self.dataset(
            ENHANCED[self.common["Modality"]], SeriesNumber=self.number, InstanceNumber=1, **attributes
        )
        dataset.SeriesInstanceUID = generate_uid()
        dataset.Rows, dataset.Columns, dataset.NumberOfFrames = array.shape[1], array.shape[0], count * len(echoes)
        orientation, measures = Dataset(), Dataset()
        orientation.ImageOrientationPatient = [f"{v:.10f}" for v in (*direction[:, 0], *direction[:, 1])]
        measures.PixelSpacing, measures.SliceThickness = [spacing[1], spacing[0]], spacing[2]
        shared = Dataset()
        shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = Sequence([orientation]), Sequence([measures])
        timing = Dataset()
        timing.RepetitionTime = 4000.0
        shared.MRTimingAndRelatedParametersSequence = Sequence([timing])
        dataset.SharedFunctionalGroupsSequence = Sequence([shared])
        items, pixels = [], []
        inverse = {order(k): k for k in range(count)}
        for echo in echoes:
            for number in range(count):
                k = inverse[number]
                item, plane, value, content, te = Dataset(), Dataset(), Dataset(), Dataset(), Dataset()
                place = np.array(origin) + direction[:, 2] * spacing[2] * k
                plane.ImagePositionPatient = [f"{v:.8f}" for v in place]
                value.RescaleSlope, value.RescaleIntercept = (f"{v:g}" for v in rescale(k))
                value.RescaleType = "US"
                content.StackID, content.InStackPositionNumber = "1", k + 1
                te.EffectiveEchoTime = echo
                item.PlanePositionSequence, item.FrameContentSequence = Sequence([plane]), Sequence([content])
                item.PixelValueTransformationSequence = Sequence([value])
                if self.common["Modality"] == "MR":
                    item.MREchoSequence = Sequence([te])
                items.append(item)
                pixels.append(np.ascontiguousarray(array[:, :, k].T + int(echo)).astype(np.uint16).tobytes())
        dataset.PerFrameFunctionalGroupsSequence = Sequence(items)
        dataset.PixelData = b"".join(pixels)
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        dataset.save_as(self.folder / name / "IM0001", enforce_file_format=True)
        return self.folder / name / "IM0001"

    def mosaic(self, name: str, array: np.ndarray, *, reverse: bool = False, **attributes: Any) -> Path:
        """A Siemens mosaic of the slices of ``array`` with the private header that describes it."""
        direction, spacing, origin = rotation(), (2.0, 2.0, 3.0), np.array([-40.0, 25.0, -70.0])
        columns, rows, count = array.shape
        across = math.ceil(math.sqrt(count))
        whole = np.zeros((rows * across, columns * across), np.uint16)
        for k in range(count):
            r, c = divmod(k, across)
            whole[r * rows : (r + 1) * rows, c * columns : (c + 1) * columns] = array[:, :, k].T
        shift = direction[:, 0] * spacing[0] * columns * (across - 1) / 2
        shift = shift + direction[:, 1] * spacing[1] * rows * (across - 1) / 2
        self.number += 1
        dataset = self.dataset(MRImageStorage, SeriesNumber=self.number, InstanceNumber=1, **attributes)
        dataset.ImageType, dataset.Manufacturer = ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"], "SIEMENS"
        dataset.SeriesInstanceUID = generate_uid()
        dataset.Rows, dataset.Columns = whole.shape
        dataset.PixelSpacing, dataset.SpacingBetweenSlices = [spacing[1], spacing[0]], spacing[2]
        dataset.SliceThickness = spacing[2]
        dataset.ImageOrientationPatient = [f"{v:.10f}" for v in (*direction[:, 0], *direction[:, 1])]
        dataset.ImagePositionPatient = [f"{v:.8f}" for v in origin - shift]
        normal = direction[:, 2] * (-1 if reverse else 1)
        blob = csa(
            {
                "NumberOfImagesInMosaic": [str(count)],
                "SliceNormalVector": [f"{v:.8f}" for v in normal],
                "AcquisitionMatrixText": [f"{rows}*{columns}"],
            }
        )
        dataset.private_block(0x29, "SIEMENS CSA HEADER", create=True).add_new(0x10, "OB", blob)
        dataset.PixelData = whole.tobytes()
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        dataset.save_as(self.folder / name / "IM0001", enforce_file_format=True)
        return self.folder / name / "IM0001"


def csa(tags: dict[str, list[str]]) -> bytes:
    """A CSA header of the second kind (SV10), as Siemens writes them: six items a tag, padded to four bytes."""
    parts = [b"SV10\4\3\2\1", struct.pack("<II", len(tags), 77)]
    for name, values in tags.items():
        items = [value.encode() + b"\0" for value in values] + [b""] * (6 - len(values))
        kind = {"N": b"US\0\0", "S": b"FD\0\0", "A": b"SH\0\0"}[name[0]]
        parts.append(struct.pack("<64si4siii", name.encode(), len(values), kind, 4, len(items), 77))
        for item in items:
            parts.append(struct.pack("<4i", len(item), len(item), 77, len(item)) + item + b"\0" * (-len(item) % 4))
    blob = b"".join(parts)
    return blob + b"\0" * (len(blob) % 2)
