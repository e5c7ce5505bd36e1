"""One DICOM object's header: the attributes that decide what it is and where it lies, and no others.

Only the elements of ``WANTED`` are read from a file. Texts among them serve recognition and comparison in memory; no
``repr`` shows them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import IO, Final

import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from medmae.imaging.dicom.facts import Facts, facts_of
from medmae.imaging.dicom.opening import HEAD, File, is_dicom
from medmae.imaging.dicom.values import Values, syntax_of, tag_and_vr

_TEXTS = """SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID FrameOfReferenceUID Modality ImageType
SeriesNumber InstanceNumber AcquisitionNumber SeriesDescription ProtocolName SequenceName PulseSequenceName
ScanningSequence SequenceVariant EchoPulseSequence InversionRecovery AcquisitionContrast MRAcquisitionType SyntheticData
ContrastBolusAgent ContrastBolusAgentSequence PatientID IssuerOfPatientID PatientName PhotometricInterpretation"""
_NUMBERS = """RepetitionTime EchoTime EffectiveEchoTime InversionTime InversionTimes EchoNumbers FlipAngle
ImagePositionPatient ImageOrientationPatient PixelSpacing SpacingBetweenSlices SliceThickness GantryDetectorTilt Rows
Columns NumberOfFrames SamplesPerPixel BitsAllocated BitsStored HighBit PixelRepresentation RescaleSlope
RescaleIntercept DiffusionBValue DiffusionGradientOrientation TemporalPositionIdentifier TriggerTime
SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence SiemensImagesInMosaic SiemensBValue
SiemensCSAImageHeader PhilipsBValue GEBValue"""
WANTED: Final = tuple(tag_and_vr(keyword)[0] for keyword in (_TEXTS + " " + _NUMBERS).split())
DICOMDIR: Final = "1.2.840.10008.1.3.10"  # Media Storage Directory
NATIVE: Final = (
    ImplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
)

Pair = tuple[float, float]


@dataclass(frozen=True)
class Frame:
    """One slice. ``position`` (mm, LPS: DICOM's axes run left, posterior and head, PS3.3 C.7.6.2.1.1) is the centre of
    its first pixel, ``orientation`` the directions along a row and along a column, ``spacing`` (rows, columns) mm.
    ``index``: the frame's number in the object's pixels from 0, or a mosaic's tile."""

    file: File
    index: int
    shape: tuple[int, int]  # rows, columns
    position: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing: tuple[float, ...]
    rescale: Pair | None
    facts: Facts

    @property
    def placed(self) -> bool:
        """Whether the header says where the slice lies."""
        return (len(self.position), len(self.orientation), len(self.spacing)) == (3, 6, 2)


@dataclass(frozen=True)
class Instance:
    """One object (file) with its frames. ``missing``: bytes of pixels that the file lacks; ``between``: mm that the
    header states from slice to slice."""

    file: File
    study: str = field(repr=False)
    series: str = field(repr=False)
    sop: str = field(repr=False)
    frame_of_reference: str = field(repr=False)
    patient: tuple[str, str, str] = field(repr=False)  # id, issuer, name: compared and hashed, never told
    number: int | None
    modality: str
    syntax: str
    samples: int
    photometric: str
    kind: str
    has_pixels: bool
    missing: int
    between: float | None
    frames: tuple[Frame, ...] = field(repr=False, default=())
    problem: str = ""  # why the frames could not be made out


def read_instance(stream: IO[bytes], file: File, size: int) -> Instance | None:
    """The header in ``stream`` (``size`` bytes), or None when this is no DICOM image: another format, a directory of
    a disc, a report, a plan. Raises what pydicom raises for a damaged file."""
    head = stream.read(HEAD)
    if not is_dicom(head):
        return None
    stream.seek(0)
    dataset = pydicom.dcmread(stream, force=True, stop_before_pixels=True, specific_tags=list(WANTED))
    values = Values(dataset)
    sop_class = values.text("SOPClassUID")
    # Images have rows: what has none is a report, a plan or a directory.
    if sop_class == DICOMDIR or not values.number("Rows") or not values.text("SeriesInstanceUID"):
        return None
    syntax = syntax_of(dataset)
    has_pixels, missing = pixels_after(stream, values, syntax, size)
    kind, frames, problem = frames_of(dataset, values, file)
    return Instance(
        file=file,
        study=values.text("StudyInstanceUID"),
        series=values.text("SeriesInstanceUID"),
        sop=values.text("SOPInstanceUID"),
        frame_of_reference=values.text("FrameOfReferenceUID"),
        patient=patient_of(values),
        number=values.integer("SeriesNumber"),
        modality=values.text("Modality").upper(),
        syntax=syntax,
        samples=values.integer("SamplesPerPixel") or 1,
        photometric=values.text("PhotometricInterpretation").upper(),
        kind=kind,
        has_pixels=has_pixels,
        missing=missing,
        between=values.number("SpacingBetweenSlices"),
        frames=frames,
        problem=problem,
    )


def frames_of(dataset: Dataset, values: Values, file: File) -> tuple[str, tuple[Frame, ...], str]:
    """(kind, frames, why there are none) by the kind of object."""
    from medmae.imaging.dicom.enhanced import frames_of_enhanced
    from medmae.imaging.dicom.mosaic import frames_of_mosaic, is_mosaic

    if values.items("PerFrameFunctionalGroupsSequence"):
        return ("enhanced", *frames_of_enhanced(dataset, file))
    if is_mosaic(values):
        return ("mosaic", *frames_of_mosaic(values, file))
    if (values.integer("NumberOfFrames") or 1) > 1:
        return "enhanced", (), "several frames without functional groups, which say where each of them lies"
    return "classic", (frame_of(values, file, 0),), ""


def frame_of(values: Values, file: File, index: int) -> Frame:
    """A frame from the attributes that describe it."""
    return Frame(
        file=file,
        index=index,
        shape=(values.integer("Rows") or 0, values.integer("Columns") or 0),
        position=values.numbers("ImagePositionPatient"),
        orientation=values.numbers("ImageOrientationPatient"),
        spacing=values.numbers("PixelSpacing"),
        rescale=rescale_of(values),
        facts=facts_of(values),
    )


def rescale_of(values: Values) -> Pair | None:
    """(slope, intercept), 1 and 0 where not stated (PS3.3 C.7.6.16.2.9, C.11.1.1.2); None when they are no numbers or
    the slope is 0."""
    stated = [values.texts(name) for name in ("RescaleSlope", "RescaleIntercept")]
    slope, intercept = values.number("RescaleSlope"), values.number("RescaleIntercept")
    if (any(stated[0]) and slope is None) or (any(stated[1]) and intercept is None) or slope == 0:
        return None
    return (1.0 if slope is None else slope), (0.0 if intercept is None else intercept)


def patient_of(values: Values) -> tuple[str, str, str]:
    """(id, issuer, name), reduced to letters and digits: one person's name is spelt with carets, blanks, capitals and
    character sets as each machine likes."""
    return (
        values.text("PatientID").strip(),
        values.text("IssuerOfPatientID").strip(),
        re.sub(r"[^a-z0-9]", "", values.text("PatientName").partition("=")[0].lower()),
    )


def pixels_after(stream: IO[bytes], values: Values, syntax: str, size: int) -> tuple[bool, int]:
    """(whether pixels follow the header, how many bytes of them are missing; 0 where compression hides it)."""
    if syntax == DeflatedExplicitVRLittleEndian:
        return True, 0
    start = stream.tell()
    following = stream.read(4)
    if following not in (b"\xe0\x7f\x10\x00", b"\x7f\xe0\x00\x10"):
        return False, 0
    if syntax not in NATIVE:
        return True, 0
    header = 8 if syntax == ImplicitVRLittleEndian else 12
    sizes = [values.integer(name) or 1 for name in ("Rows", "Columns", "SamplesPerPixel", "NumberOfFrames")]
    expected = (values.integer("BitsAllocated") or 16) // 8
    for count in sizes:
        expected *= count
    return True, max(0, start + header + expected - size)
