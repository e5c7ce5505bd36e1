"""A synthesised modality as classic MR Image objects, in the study of the scans it was made from.

Sections are those of PS3.3 (edition 2024e). The MR Image IOD (A.4) is: Patient C.7.1.1, General Study C.7.2.1, General
Series C.7.3.1, Frame of Reference C.7.4.1, General Equipment C.7.5.1, General Acquisition C.7.10.1, General Image
C.7.6.1, General Reference C.12.4, Image Plane C.7.6.2, Image Pixel C.7.6.3, MR Image C.8.3.1, VOI LUT C.11.2, SOP
Common C.12.1 and Common Instance Reference C.12.2.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from medmae.errors import InputError
from medmae.imaging.dicom_out.files import write_folder
from medmae.imaging.dicom_out.identity import (
    BODY_PARTS,
    PATIENT_POSITIONS,
    frame_of_reference,
    identity,
    is_unicode,
    plain,
)
from medmae.imaging.dicom_out.pixels import Pixels, quantise
from medmae.imaging.dicom_out.quiet import quiet
from medmae.imaging.dicom_out.references import add_hierarchy, images_near, source_item
from medmae.imaging.dicom_out.source import SourceImage, SourceSeries, read_source, refuse_other_patients
from medmae.imaging.dicom_out.stack import Stack, decimals, stack_of
from medmae.imaging.dicom_out.uids import (
    MANUFACTURER,
    SCHEME,
    code,
    content_hash,
    derived_uid,
    private_scheme,
    synthesising_equipment,
)
from medmae.imaging.volume import Volume

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

MR_IMAGE_STORAGE: Final = "1.2.840.10008.5.1.4.1.1.4"
NOT_MR: Final = ("ct", "pet")
_LOSSY_METHODS: Final = ("ISO_10918_1", "ISO_14495_1", "ISO_15444_1", "ISO_15444_15", "ISO_18181_1", "ISO_13818_2")


@quiet()
def write_synthetic_mr(
    volume: Volume,
    template: Sequence[str | Path],
    out: str | Path,
    *,
    target: str,
    sources: Sequence[Sequence[str | Path]],
    version: str,
    checkpoint_hash: str,
    source_modalities: Sequence[str] = (),
    series_number: int | None = None,
    place: int = 1,
    created: datetime | None = None,
) -> list[Path]:
    r"""Write ``volume``, a synthesis of the modality ``target``, as a new series of MR Image objects, one a slice.

    ``template``: the files, in any order, of the series on whose grid the volume lies (or of any series of its frame of
    reference: slices are cut along the axes nearest to the template's, never interpolated). ``sources``: the files of
    each series that the model was given, ``source_modalities`` their names. ``out``: a folder, written whole or not at
    all; a synthesis that is there is replaced. Returns the files, ``0001.dcm`` and on, in the order of instance
    numbers.

    What the objects say, and where the standard says what that means:

    - *Not acquired.* Image Type DERIVED\SECONDARY\OTHER\SYNTHETIC (C.7.6.1.1.2, C.8.3.1.1.1), Synthetic Data YES,
      Content Qualification RESEARCH (C.12.1), Series Description and Image Comments that begin SYNTHETIC. Derivation
      Description, Derivation Code and Source Image Sequence (C.12.4), Contributing Equipment with the purpose
      "Synthesizing Equipment" (C.12.1). CID 7203 of derivations has no code for a synthesis, so it is a private one.
    - *Whose.* Patient and study as in the template, by an allow-list (:mod:`medmae.imaging.dicom_out.identity`); its
      Frame of Reference; new series and instance UIDs, derived from content (:mod:`medmae.imaging.dicom_out.uids`).
    - *No acquisition.* Scanning Sequence, of type 1, is RM (research mode), Sequence Variant NONE; Scan Options, MR
      Acquisition Type, Repetition Time, Echo Time, Echo Train Length, of types 2 and 2C, are empty; dates, times and
      settings of acquisition are absent (C.8.3.1, C.7.10.1).
    - *Values.* 16-bit integers and a slope (:func:`medmae.imaging.dicom_out.pixels.quantise`). The MR Image IOD has no
      Modality LUT; the standard's place for the slope is Real World Value Mapping Sequence (C.7.6.1). Rescale Slope and
      Intercept say the same, as scanners do (a Standard Extended SOP Class, PS3.2 section 3.11), because it is what
      readers apply. The window is in rescaled units, its function LINEAR_EXACT (C.11.2.1.3), as widths may be below 1.

    ``created``, if given, is written as Contribution DateTime; it makes the UIDs of each run new, so leave it out where
    a repeated run must be recognised. ``series_number``: by default a hundred times the template's, plus
    ``place``, which counts the series derived from it.

    Raises :class:`InputError`: templates and sources that are not one series each of one patient, a volume in another
    frame of reference, one whose rows and columns meet at no right angle, voxels that are not finite, a target that is
    no MR contrast, a folder with other files in it.
    """
    _check_words(target, version, checkpoint_hash, source_modalities)
    pattern = read_source(template)
    made_from = [read_source(files, f"source {place}") for place, files in enumerate(sources, 1)]
    if not made_from:
        raise InputError("a synthesis is made from at least one series", field="sources", found="none")
    refuse_other_patients(pattern, made_from)
    frame = _frame(volume, pattern)
    stack = stack_of(volume, pattern.orientation, pattern.runs_against_normal())
    pixels = quantise(stack.array)

    common = identity(pattern.header, pattern.images[0].raw)
    number = pattern.derived_number(place) if series_number is None else series_number
    _say_series(common, pattern, target, number, frame)
    _say_origin(common, target, version, checkpoint_hash, source_modalities, created)
    _say_lossy(common, made_from)
    _say_mr(common)
    _say_pixels(common, stack, pixels)
    near = [images_near(series, stack) for series in made_from]
    parts = [_slice(common, stack, pixels, index, near) for index in range(len(stack.array))]
    _identify(common, parts)
    return write_folder(Path(out), common, parts)


def series_description(target: str, unicode: bool = True) -> str:
    """``SYNTHETIC FLAIR – NOT ACQUIRED``; with a hyphen where the character set has no dash."""
    return f"SYNTHETIC {target.upper()} {'–' if unicode else '-'} NOT ACQUIRED"


def _check_words(target: str, version: str, checkpoint: str, modalities: Sequence[str]) -> None:
    """Words that end up in headers: short, plain, and none that could carry a path or a name."""
    given = {"target": target, "version": version, "checkpoint_hash": checkpoint}
    given |= {f"source_modalities[{place}]": name for place, name in enumerate(modalities)}
    for field, word in given.items():
        if not re.fullmatch(
            r"[A-Za-z0-9][A-Za-z0-9.+:_-]{0,99}" if field == "checkpoint_hash" else r"[\w.+-]{1,24}", word
        ):
            raise InputError("this word does not fit into a DICOM header", field=field, expected="letters and digits")
    if target.lower() in NOT_MR:
        raise InputError(
            "this modality is not an MR image",
            field="target",
            found=target,
            expected="an MR contrast",
            remedy="Write it as NIfTI.",
        )


def _frame(volume: Volume, template: SourceSeries) -> str:
    frame = frame_of_reference(template.header)
    if volume.frame is not None and volume.frame != frame:
        raise InputError(
            "the volume and its template are in different frames of reference",
            field="FrameOfReferenceUID",
            expected="the same",
            remedy="Choose a series of the volume's own frame as template, or register them first.",
        )
    return frame


def _say_series(dataset: Dataset, template: SourceSeries, target: str, number: int, frame: str) -> None:
    """General Series, Frame of Reference and General Equipment modules."""
    dataset.SOPClassUID = MR_IMAGE_STORAGE
    dataset.Modality = "MR"
    dataset.SeriesNumber = number
    dataset.SeriesDescription = series_description(target, is_unicode(dataset))
    position = plain(template.header, "PatientPosition")
    dataset.PatientPosition = position if position in PATIENT_POSITIONS else ""
    part = plain(template.header, "BodyPartExamined").upper()
    if part in BODY_PARTS:
        dataset.BodyPartExamined = part
    else:
        dataset.Laterality = ""  # type 2C, required where the body part is one of a pair, which is then unknown
    dataset.FrameOfReferenceUID = frame
    dataset.PositionReferenceIndicator = ""


def _say_origin(
    dataset: Dataset,
    target: str,
    version: str,
    checkpoint: str,
    modalities: Sequence[str],
    created: datetime | None,
) -> None:
    """General Equipment, General Image, General Reference and SOP Common modules: what it is and what made it."""
    name = target.upper()
    inputs = ", ".join(modality.upper() for modality in modalities) or "the source images"
    tool = f"medmae {version}, checkpoint {checkpoint}"
    dataset.Manufacturer = dataset.ManufacturerModelName = MANUFACTURER
    dataset.SoftwareVersions = version
    dataset.ImageType = ["DERIVED", "SECONDARY", "OTHER", "SYNTHETIC"]
    dataset.SyntheticData = "YES"
    dataset.ContentQualification = "RESEARCH"
    dataset.BurnedInAnnotation = "NO"
    dataset.ImageComments = (
        f"SYNTHETIC {name}, NOT ACQUIRED: predicted by a neural network. "
        "It may miss or invent findings. Not for diagnosis."
    )
    dataset.DerivationDescription = f"{name} was not acquired; it was predicted from {inputs} by {tool}"
    dataset.DerivationCodeSequence = [code("SYNTHESIS", SCHEME, "Not acquired, synthesized by a neural network")]
    dataset.CodingSchemeIdentificationSequence = [private_scheme()]
    equipment = synthesising_equipment(version, f"{name} by {tool}")
    if created is not None:
        equipment.ContributionDateTime = created.strftime("%Y%m%d%H%M%S%z")
    dataset.ContributingEquipmentSequence = [equipment]


def _say_lossy(dataset: Dataset, sources: Sequence[SourceSeries]) -> None:
    """Lossy Image Compression is 01 for good once a source was compressed with loss (C.7.6.1.1.5)."""
    headers = [series.header for series in sources if plain(series.header, "LossyImageCompression") == "01"]
    dataset.LossyImageCompression = "01" if headers else "00"
    for header in headers[:1]:
        ratio, method = plain(header, "LossyImageCompressionRatio"), plain(header, "LossyImageCompressionMethod")
        if re.fullmatch(r"[0-9.]{1,16}", ratio) and method in _LOSSY_METHODS:
            dataset.LossyImageCompressionRatio, dataset.LossyImageCompressionMethod = ratio, method


def _say_mr(dataset: Dataset) -> None:
    """MR Image Module: what is required, and no sequence that never ran."""
    dataset.ScanningSequence = "RM"
    dataset.SequenceVariant = "NONE"
    for name in ("ScanOptions", "MRAcquisitionType", "RepetitionTime", "EchoTime", "EchoTrainLength"):
        setattr(dataset, name, None)


def _say_pixels(dataset: Dataset, stack: Stack, pixels: Pixels) -> None:
    """Image Plane, Image Pixel, General Image and VOI LUT modules, as far as all slices share them."""
    from pydicom.dataelem import DataElement
    from pydicom.dataset import Dataset

    row, column = stack.orientation
    dataset.ImageOrientationPatient = decimals([*row, *column])
    dataset.PixelSpacing = decimals(stack.pixel_spacing)
    dataset.SliceThickness = dataset.SpacingBetweenSlices = decimals([stack.spacing])[0]
    dataset.Rows, dataset.Columns = stack.array.shape[1:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 1
    dataset.RescaleIntercept, dataset.RescaleSlope, dataset.RescaleType = 0, decimals([pixels.slope])[0], "US"
    dataset.WindowCenter, dataset.WindowWidth = decimals([pixels.center, pixels.width])
    dataset.VOILUTFunction = "LINEAR_EXACT"
    mapping = Dataset()
    mapping.add(DataElement("RealWorldValueFirstValueMapped", "SS", -32768))
    mapping.add(DataElement("RealWorldValueLastValueMapped", "SS", 32767))
    mapping.RealWorldValueIntercept, mapping.RealWorldValueSlope = 0.0, pixels.slope
    mapping.LUTExplanation, mapping.LUTLabel = "Synthesized intensity", "SYNTHETIC"
    mapping.MeasurementUnitsCodeSequence = [code("1", "UCUM", "no units")]
    dataset.RealWorldValueMappingSequence = [mapping]


def _slice(
    common: Dataset,
    stack: Stack,
    pixels: Pixels,
    index: int,
    near: Sequence[Sequence[Sequence[SourceImage]]],
) -> Dataset:
    """What one object says beyond ``common``, still without its UID."""
    from pydicom.dataset import Dataset

    part = Dataset()
    part.InstanceNumber = index + 1
    part.ImagePositionPatient = decimals(stack.positions[index])
    named = [image for by_slice in near for image in by_slice[index]]
    part.SourceImageSequence = [source_item(image) for image in named]
    add_hierarchy(part, named, common.StudyInstanceUID)
    part.add_new("PixelData", "OW", pixels.stored[index].astype("<i2").tobytes())
    return part


def _identify(common: Dataset, parts: Sequence[Dataset]) -> None:
    """Series and instance UIDs from what the objects say and show."""
    shared = content_hash(common)
    hashes = [content_hash(part) for part in parts]
    common.SeriesInstanceUID = derived_uid("series", shared, *hashes)
    for part, digest in zip(parts, hashes, strict=True):
        part.SOPInstanceUID = derived_uid("instance", common.SeriesInstanceUID, digest)
