"""A label map as a DICOM Segmentation object (PS3.3 A.51), by highdicom."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medmae.errors import InputError, Problem
from medmae.imaging.dicom_out.files import write_file
from medmae.imaging.dicom_out.identity import frame_of_reference, identity, is_unicode, plain
from medmae.imaging.dicom_out.quiet import quiet
from medmae.imaging.dicom_out.segment_codes import Coded, SegmentCode, segment_code
from medmae.imaging.dicom_out.source import SourceImage, SourceSeries, read_source
from medmae.imaging.dicom_out.stack import Stack, decimals, stack_of
from medmae.imaging.dicom_out.uids import MANUFACTURER, content_hash, derived_uid, private_scheme
from medmae.imaging.volume import Volume

if TYPE_CHECKING:
    from pydicom.dataset import Dataset


@quiet()
def write_segmentation(
    labels: Volume,
    template: Sequence[str | Path],
    out: str | Path,
    *,
    names: Mapping[int, str],
    version: str,
    checkpoint_hash: str,
    codes: Mapping[int, SegmentCode] | None = None,
    series_number: int | None = None,
    created: datetime | None = None,
) -> Path:
    """Write ``labels`` (whole numbers, 0 is background) as one binary Segmentation object, a segment for each name.

    ``template``: the files of the series on whose grid, or in whose frame of reference, the labels lie. ``names``: of
    each label value; a label without a voxel is kept as an empty segment, so that the meaning of numbers does not
    depend on the study. ``codes``: category and type of a label where :func:`segment_code` does not know its name.
    ``out``: the file. Segment numbers count from 1 in the order of label values, as PS3.3 C.8.20.4.1 asks.

    Algorithm Type is AUTOMATIC, the algorithm's family (123110, DCM, "Artificial Intelligence") (C.8.20.2, CID 7162).
    Patient and study come from the template by an allow-list, as in
    :func:`~medmae.imaging.dicom_out.writing.write_synthetic_mr`. Synthetic Data is YES if the template's is, as C.12.1
    expects of what is derived from synthetic data. ``created`` (default: now) is the object's Content Date and Time,
    which a Segmentation must have; UIDs are derived from content, that time included.

    Raises :class:`InputError`: labels that are no whole numbers or have no name, names that do not fit, a template that
    is not one series, labels in another frame of reference, a sheared grid.
    """
    pattern = read_source(template)
    frame = frame_of_reference(pattern.header)
    _check(labels, names, frame)
    patient = identity(pattern.header, pattern.images[0].raw)
    if not is_unicode(patient):  # the template's own character set, which may lack these letters
        names = {value: name.encode("ascii", "replace").decode() for value, name in names.items()}
    stack = stack_of(labels, pattern.orientation, pattern.runs_against_normal())
    created = created or datetime.now().astimezone()
    described = [
        _describe(number, names[value], (codes or {}).get(value) or segment_code(names[value]), version)
        for number, value in enumerate(sorted(names), 1)
    ]
    dataset = _segmentation(pattern, frame, stack, _numbered(stack.array, names), described, version, series_number)
    dataset.update(patient)
    _finish(dataset, pattern, created, checkpoint_hash)
    out = Path(out)
    write_file(out, dataset)
    return out


def _check(labels: Volume, names: Mapping[int, str], frame: str) -> None:
    problems = []
    values = np.unique(labels.array)
    whole = bool(np.isfinite(values).all() and (values == np.rint(values)).all())
    if not whole:
        problems.append(Problem("a label map holds whole numbers", field="labels", found="fractions or NaN"))
    unnamed = sorted({int(value) for value in values if value != 0} - set(names)) if whole else []
    if unnamed:
        remedy = "Name every label that occurs."
        problems.append(Problem("labels have no name", field="names", found=str(unnamed)[:80], remedy=remedy))
    odd = [value for value, name in names.items() if value < 1 or not re.fullmatch(r"[^\\\x00-\x1f]{1,64}", name)]
    if odd or not names:
        expected = "values of 1 and more, names of 1 to 64 characters without a backslash"
        problems.append(Problem("names do not fit into DICOM", field="names", found=str(odd)[:80], expected=expected))
    if labels.frame is not None and labels.frame != frame:
        remedy = "Choose a template of the labels' own frame."
        what = "labels and template are in different frames of reference"
        problems.append(Problem(what, field="FrameOfReferenceUID", remedy=remedy))
    if problems:
        raise InputError.of(problems)


def _numbered(array: np.ndarray, names: Mapping[int, str]) -> np.ndarray:
    """Label values as segment numbers 1, 2, ... ."""
    result = np.zeros(array.shape, np.uint8 if len(names) < 256 else np.uint16)
    for number, value in enumerate(sorted(names), 1):
        result[array == value] = number
    return result


def _describe(number: int, name: str, meaning: SegmentCode, version: str) -> Any:
    import highdicom as hd
    from pydicom.sr.codedict import codes

    def concept(coded: Coded) -> Any:
        return hd.sr.CodedConcept(coded.value, coded.scheme, coded.meaning)

    return hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=name,
        segmented_property_category=concept(meaning.category),
        segmented_property_type=concept(meaning.type),
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name=MANUFACTURER, version=version, family=codes.DCM.ArtificialIntelligence
        ),
    )


def _segmentation(
    pattern: SourceSeries,
    frame: str,
    stack: Stack,
    numbered: np.ndarray,
    described: Sequence[Any],
    version: str,
    series_number: int | None,
) -> Any:
    """The object with placeholders for patient, UIDs and times."""
    import highdicom as hd

    return hd.seg.Segmentation(
        source_images=_bare_sources(pattern, frame, stack),
        pixel_array=numbered,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=described,
        series_instance_uid=derived_uid("placeholder"),
        series_number=pattern.derived_number(2) if series_number is None else series_number,
        sop_instance_uid=derived_uid("placeholder"),
        instance_number=1,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=MANUFACTURER,
        software_versions=version,
        device_serial_number="none",  # type 1 in Enhanced General Equipment (C.7.5.2); a program has none
        content_label="SEGMENTATION",
        content_description="Segmentation by a neural network, not verified",
        series_description="SEGMENTATION by medmae, not verified",
        pixel_measures=hd.PixelMeasuresSequence(stack.pixel_spacing, stack.spacing, stack.spacing),
        plane_orientation=hd.PlaneOrientationSequence("PATIENT", stack.orientation.ravel().tolist()),
        plane_positions=[hd.PlanePositionSequence("PATIENT", place.tolist()) for place in stack.positions],
        omit_empty_frames=bool(numbered.any()),  # without a segmented voxel there would be no frame at all
    )


def _bare_sources(pattern: SourceSeries, frame: str, stack: Stack) -> list[Dataset]:
    """The template's images with what highdicom needs to refer to them, and nothing of the patient: highdicom copies
    whole modules, free text included."""
    from pydicom.dataset import Dataset

    result = []
    for image in pattern.images:
        bare = Dataset()
        for name in ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
            setattr(bare, name, image.uid(name))
        for name in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID"):
            setattr(bare, name, "")
        bare.StudyDate = bare.StudyTime = bare.ReferringPhysicianName = ""
        bare.Modality = "MR"
        bare.FrameOfReferenceUID = frame
        bare.Rows, bare.Columns = stack.array.shape[1:]
        _place(bare, image, stack)
        result.append(bare)
    return result


def _place(bare: Dataset, image: SourceImage, stack: Stack) -> None:
    """Where the image's planes are, in the words of classic or of multi-frame images; nothing where it does not say."""
    from pydicom.dataset import Dataset

    if image.positions is None or image.orientation is None:
        return
    turned = decimals(image.orientation.ravel())
    if plain(image.header, "NumberOfFrames") in ("", "0"):
        bare.ImagePositionPatient, bare.ImageOrientationPatient = decimals(image.positions[0]), turned
        bare.PixelSpacing, (bare.SliceThickness,) = decimals(stack.pixel_spacing), decimals([stack.spacing])
        return
    shared, orientation, measures = Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient = turned
    measures.PixelSpacing, (measures.SliceThickness,) = decimals(stack.pixel_spacing), decimals([stack.spacing])
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [orientation], [measures]
    frames = []
    for position in image.positions:
        frame, plane = Dataset(), Dataset()
        plane.ImagePositionPatient = decimals(position)
        frame.PlanePositionSequence = [plane]
        frames.append(frame)
    bare.NumberOfFrames = len(frames)
    bare.SharedFunctionalGroupsSequence, bare.PerFrameFunctionalGroupsSequence = [shared], frames


def _finish(dataset: Any, pattern: SourceSeries, created: datetime, checkpoint: str) -> None:
    """Times, origin, and the UIDs that follow from all of it."""
    dataset.ContentDate = dataset.InstanceCreationDate = created.strftime("%Y%m%d")
    dataset.ContentTime = dataset.InstanceCreationTime = created.strftime("%H%M%S")
    for item in dataset.get("ContributingEquipmentSequence", []):  # highdicom names itself there
        item.ContributionDateTime = created.strftime("%Y%m%d%H%M%S%z")
    for name in ("SeriesDate", "SeriesTime"):
        dataset.pop(name, None)
    dataset.CodingSchemeIdentificationSequence = [private_scheme()]
    dataset.ContentQualification = "RESEARCH"
    if any(plain(image.header, "SyntheticData") == "YES" for image in pattern.images):
        dataset.SyntheticData = "YES"
    for item in dataset.SegmentSequence:
        item.SegmentDescription = f"medmae checkpoint {checkpoint}"[:64]
    del dataset.SeriesInstanceUID, dataset.SOPInstanceUID
    organisation = [*dataset.DimensionOrganizationSequence, *dataset.DimensionIndexSequence]
    for item in organisation:  # highdicom's is random
        item.DimensionOrganizationUID = derived_uid("placeholder")
    digest = content_hash(dataset)
    for item in organisation:
        item.DimensionOrganizationUID = derived_uid("dimensions", digest)
    dataset.SeriesInstanceUID = derived_uid("segmentation series", digest)
    dataset.SOPInstanceUID = derived_uid("segmentation", digest)
