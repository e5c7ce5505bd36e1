"""Synthesised modalities as DICOM: in their place, marked as what they are, with the identity and no more."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset

from medmae.errors import InputError
from medmae.imaging.dicom_out.pixels import quantise
from medmae.imaging.dicom_out.writing import write_synthetic_mr
from medmae.imaging.volume import Volume
from tests.imaging.dicom_out.made_series import (
    LPS,
    affine,
    assert_same_place,
    by_dcm2niix,
    by_pydicom,
    by_simpleitk,
    dciodvfy_errors,
    head,
    valid,
    write_series,
)

DATA = Path(__file__).parents[4] / "shared" / "data"
GRIDS = {
    "axial": affine(),
    "oblique": affine((17, -23, 9)),
    "sagittal": affine((0, 80, 0)),
    "upside down": affine((178, 5, 0)),
    "mirrored": affine((5, 0, 10)) @ np.diag([1.0, 1.0, -1.0, 1.0]),  # slices against row x column
}


def write(volume: Volume, template: list[Path], out: Path, **more: Any) -> list[Path]:
    options: dict[str, Any] = {
        "target": "flair",
        "sources": [template],
        "version": "0.1.0",
        "checkpoint_hash": "c0ffee",
    }
    return write_synthetic_mr(volume, template, out, **{**options, **more})


# --- place ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [by_pydicom, by_simpleitk, by_dcm2niix])
@pytest.mark.parametrize("numbering", ["forward", "reversed", "shuffled"])
@pytest.mark.parametrize("grid", GRIDS)
def test_voxels_are_read_back_at_their_millimetres(
    tmp_path: Path, grid: str, numbering: str, read: Callable[[list[Path]], tuple[np.ndarray, np.ndarray]]
) -> None:
    template = write_series(tmp_path / "in", GRIDS[grid], numbering=numbering)
    files = write(Volume(head(), GRIDS[grid]), template, tmp_path / "out")
    assert_same_place(*read(files), head(), GRIDS[grid], step=0.03)


@pytest.mark.parametrize("read", [by_pydicom, by_simpleitk, by_dcm2niix])
def test_a_volume_with_other_axes_is_cut_along_the_templates(
    tmp_path: Path, read: Callable[[list[Path]], tuple[np.ndarray, np.ndarray]]
) -> None:
    """As it is after a model that works in RAS: the voxels in another order, at the same places."""
    matrix = GRIDS["oblique"]
    template = write_series(tmp_path / "in", matrix)
    turned = np.flip(head().transpose(2, 0, 1), (0, 2))
    places = np.zeros((4, 4))
    places[[2, 0, 1, 3], [0, 1, 2, 3]] = 1
    places[2, 0], places[1, 2] = -1, -1
    places[2, 3], places[1, 3] = turned.shape[0] - 1, turned.shape[2] - 1
    files = write(Volume(turned, matrix @ places), template, tmp_path / "out")
    assert_same_place(*read(files), head(), matrix, step=0.03)
    made, source = pydicom.dcmread(files[0]), pydicom.dcmread(template[0])
    np.testing.assert_allclose(made.ImageOrientationPatient, source.ImageOrientationPatient, atol=1e-9)
    assert (made.Rows, made.Columns, len(files)) == (source.Rows, source.Columns, len(template))


def test_instances_are_numbered_as_the_templates(tmp_path: Path) -> None:
    for numbering in ("forward", "reversed"):
        template = write_series(tmp_path / numbering, GRIDS["oblique"], numbering=numbering)
        files = write(Volume(head(), GRIDS["oblique"]), template, tmp_path / f"out-{numbering}")
        there = {int(one.InstanceNumber): one.ImagePositionPatient for one in map(pydicom.dcmread, template)}
        made = {int(one.InstanceNumber): one.ImagePositionPatient for one in map(pydicom.dcmread, files)}
        for number, place in there.items():
            np.testing.assert_allclose(made[number], place, atol=1e-6)


def test_a_tilted_stack_has_each_slice_at_its_own_place(tmp_path: Path) -> None:
    tilted = affine()
    tilted[1, 2] = 0.8  # mm that each slice lies further in front: a gantry tilt of 18 degrees
    files = write(Volume(head(), tilted), write_series(tmp_path / "in", tilted), tmp_path / "out")
    assert_same_place(*by_pydicom(files), head(), tilted, step=0.03)
    assert float(pydicom.dcmread(files[0]).SpacingBetweenSlices) == pytest.approx(2.5)  # along the normal (C.7.6.2)


def test_rows_and_columns_at_no_right_angle_are_refused(tmp_path: Path) -> None:
    skewed = affine((10, 10, 10))
    skewed[:3, 1] += skewed[:3, 0] * 0.3
    skewed[:3, 2] += skewed[:3, 0] + skewed[:3, 1]
    template = write_series(tmp_path / "in", affine())
    with pytest.raises(InputError, match="right angle.*mm off at the corners"):
        write(Volume(head(), skewed), template, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_enhanced_series_is_a_template_too(tmp_path: Path) -> None:
    template = write_series(tmp_path / "in", GRIDS["oblique"], enhanced=True)
    files = write(Volume(head(), GRIDS["oblique"]), template, tmp_path / "out")
    assert_same_place(*by_simpleitk(files), head(), GRIDS["oblique"], step=0.03)
    source = pydicom.dcmread(template[0])
    assert pydicom.dcmread(files[3]).SourceImageSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
    assert valid(files[3])


def test_the_real_series_comes_back_where_it_was(tmp_path: Path) -> None:
    folder = DATA / "dicom" / "mr_T1_studyforrest_every4th"
    if not folder.exists():
        pytest.skip("no real scans here: dicom/mr_T1_studyforrest_every4th")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    matrix[:3, 3] = image.GetOrigin()
    array = sitk.GetArrayFromImage(image).transpose(2, 1, 0).astype(np.float32) * 0.37
    files = write(Volume(array, LPS @ matrix), list(folder.glob("*.dcm")), tmp_path / "out", target="t2")
    for read in (by_simpleitk, by_dcm2niix):
        assert_same_place(*read(files), array, LPS @ matrix, step=0.003)
    assert valid(files[0])


@pytest.mark.parametrize("grid", GRIDS)
def test_dciodvfy_finds_no_error(tmp_path: Path, grid: str) -> None:
    for part in ("HEAD", None):  # whose laterality is known to be none, or not known
        source = write_series(tmp_path / f"in-{part}", GRIDS[grid], BodyPartExamined=part)
        files = write(Volume(head(), GRIDS[grid]), source, tmp_path / f"out-{part}", sources=[source])
        assert [dciodvfy_errors(path) for path in files] == [[]] * 14


# --- what the objects say ---------------------------------------------------------------------------------------------


def test_it_is_marked_as_synthetic_everywhere_a_reader_looks(tmp_path: Path) -> None:
    template = write_series(tmp_path / "in", affine())
    files = write(Volume(head(), affine()), template, tmp_path / "out", source_modalities=("t1",))
    for path in files:
        made = pydicom.dcmread(path)
        assert list(made.ImageType) == ["DERIVED", "SECONDARY", "OTHER", "SYNTHETIC"]
        assert (
            made.SyntheticData == "YES" and made.BurnedInAnnotation == "NO" and made.ContentQualification == "RESEARCH"
        )
        assert made.SeriesDescription == "SYNTHETIC FLAIR – NOT ACQUIRED" and made.SpecificCharacterSet == "ISO_IR 192"
        assert made.ImageComments.startswith("SYNTHETIC FLAIR, NOT ACQUIRED")
        assert made.DerivationDescription == (
            "FLAIR was not acquired; it was predicted from T1 by medmae 0.1.0, checkpoint c0ffee"
        )
        assert made.DerivationCodeSequence[0].CodingSchemeDesignator == "99MEDMAE"
        (tool,) = made.ContributingEquipmentSequence
        assert (tool.Manufacturer, tool.SoftwareVersions) == (
            "medmae",
            "0.1.0",
        ) and "c0ffee" in tool.ContributionDescription
        assert tool.PurposeOfReferenceCodeSequence[0].CodeValue == "109100"
        assert valid(path)


def test_no_acquisition_is_pretended(tmp_path: Path) -> None:
    files = write(Volume(head(), affine()), write_series(tmp_path / "in", affine()), tmp_path / "out")
    made = pydicom.dcmread(files[0])
    assert (made.ScanningSequence, made.SequenceVariant) == ("RM", "NONE")
    for name in ("ScanOptions", "MRAcquisitionType", "RepetitionTime", "EchoTime", "EchoTrainLength"):
        assert name in made and not made[name].value, name  # of type 2: there, and empty
    acquired = "InversionTime FlipAngle MagneticFieldStrength AcquisitionDate AcquisitionTime AcquisitionDateTime "
    acquired += "AcquisitionNumber SequenceName ProtocolName StationName ContentDate SeriesDate ContrastBolusAgent"
    assert not [name for name in acquired.split() if name in made]
    assert not [element for element in made.iterall() if element.tag.is_private]


def test_study_patient_and_frame_are_the_templates_and_uids_are_new(tmp_path: Path) -> None:
    template = write_series(tmp_path / "in", affine(), TimezoneOffsetFromUTC="+0100")
    files = write(Volume(head(), affine()), template, tmp_path / "out")
    source = pydicom.dcmread(template[0])
    made = [pydicom.dcmread(path) for path in files]
    same = "PatientName PatientID PatientBirthDate PatientSex StudyInstanceUID StudyDate StudyTime "
    same += "AccessionNumber StudyID FrameOfReferenceUID PatientPosition BodyPartExamined TimezoneOffsetFromUTC"
    for name in same.split():
        assert all(one[name].value == source[name].value for one in made), name
    assert all(one.ReferringPhysicianName == "" for one in made)
    assert len({one.SeriesInstanceUID for one in made}) == 1 and made[0].SeriesInstanceUID != source.SeriesInstanceUID
    uids = {one.SOPInstanceUID for one in made}
    assert len(uids) == len(files) and all(re.fullmatch(r"2\.25\.[1-9]\d{0,38}", uid) for uid in uids)
    assert {one.file_meta.MediaStorageSOPInstanceUID for one in made} == uids


def test_every_slice_names_the_sources_at_its_place(tmp_path: Path) -> None:
    study = pydicom.uid.generate_uid()
    template = write_series(tmp_path / "t1", affine(), study=study)
    other = write_series(tmp_path / "t2", affine((4, 0, 0)), study=study)
    prior = write_series(tmp_path / "prior", affine())
    files = write(Volume(head(), affine()), template, tmp_path / "out", sources=[template, other, prior])
    source = {str(one.SOPInstanceUID): one for one in map(pydicom.dcmread, [*template, *other, *prior])}
    for path in files:
        made = pydicom.dcmread(path)
        named = [item.ReferencedSOPInstanceUID for item in made.SourceImageSequence]
        assert {item.PurposeOfReferenceCodeSequence[0].CodeValue for item in made.SourceImageSequence} == {"121322"}
        assert len({source[uid].SeriesInstanceUID for uid in named}) == 3
        at_place = [uid for uid in named if source[uid].ImagePositionPatient == made.ImagePositionPatient]
        assert at_place
        here = {series.SeriesInstanceUID: series for series in made.ReferencedSeriesSequence}
        (elsewhere,) = made.StudiesContainingOtherReferencedInstancesSequence
        assert elsewhere.StudyInstanceUID == pydicom.dcmread(prior[0]).StudyInstanceUID
        listed = [*here.values(), *elsewhere.ReferencedSeriesSequence]
        assert {i.ReferencedSOPInstanceUID for series in listed for i in series.ReferencedInstanceSequence} == set(
            named
        )
    assert valid(files[0])


def test_a_source_with_lossy_compression_marks_the_synthesis(tmp_path: Path) -> None:
    lossy = {"LossyImageCompression": "01", "LossyImageCompressionRatio": 7.5}
    template = write_series(tmp_path / "in", affine(), LossyImageCompressionMethod="ISO_10918_1", **lossy)
    made = pydicom.dcmread(write(Volume(head(), affine()), template, tmp_path / "out")[0])
    assert made.LossyImageCompression == "01" and made.LossyImageCompressionMethod == "ISO_10918_1"
    assert valid(tmp_path / "out" / "0001.dcm")


def test_the_creation_time_is_told_if_given(tmp_path: Path) -> None:
    template = write_series(tmp_path / "in", affine())
    when = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
    made = pydicom.dcmread(write(Volume(head(), affine()), template, tmp_path / "out", created=when)[0])
    assert made.ContributingEquipmentSequence[0].ContributionDateTime == "20260304050607+0000"


# --- UIDs -------------------------------------------------------------------------------------------------------------


def test_the_same_content_has_the_same_uids_and_any_other_has_others(tmp_path: Path) -> None:
    template = write_series(tmp_path / "in", affine())
    first = write(Volume(head(), affine()), template, tmp_path / "a")
    again = write(Volume(head(), affine()), template[::-1], tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    touched = head()
    touched[9, 12, 7] += 1
    renamed = write_series(tmp_path / "renamed", affine(), PatientID="P1")
    others = [
        write(Volume(touched, affine()), template, tmp_path / "c"),
        write(Volume(head(), affine()), template, tmp_path / "d", checkpoint_hash="another"),
        write(Volume(head(), affine()), template, tmp_path / "e", version="0.2.0"),
        write(Volume(head(), affine()), template, tmp_path / "f", target="t2"),
        write(Volume(head(), affine()), renamed, tmp_path / "g"),
    ]
    uids = [{pydicom.dcmread(path).SOPInstanceUID for path in files} for files in [first, *others]]
    assert len(set().union(*uids)) == sum(map(len, uids))
    assert len({pydicom.dcmread(files[0]).SeriesInstanceUID for files in [first, *others]}) == 6


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-6, 0.01, 1, 37.5, 1e4, 1e9])
def test_values_are_kept_to_a_twenty_thousandth_and_background_stays_zero(scale: float) -> None:
    array = (head() - 300 * (head() > 0)) * scale
    pixels = quantise(array)
    np.testing.assert_allclose(pixels.stored * pixels.slope, array, rtol=0, atol=pixels.slope * 0.5000001)
    assert pixels.slope <= np.abs(array).max() / 13000
    assert (pixels.stored[array == 0] == 0).all()
    assert float(f"{pixels.slope:.0e}") == pixels.slope  # one digit: exact as a decimal string


def test_whole_numbers_are_stored_as_they_are() -> None:
    array = np.rint(head())
    pixels = quantise(array)
    assert pixels.slope == 1
    np.testing.assert_array_equal(pixels.stored, array)


def test_the_window_shows_what_is_not_background(tmp_path: Path) -> None:
    files = write(Volume(head(), affine()), write_series(tmp_path / "in", affine()), tmp_path / "out")
    made = pydicom.dcmread(files[0])
    low, high = np.percentile(head()[head() != 0], (0.5, 99.5))
    assert float(made.WindowCenter) == pytest.approx((low + high) / 2, rel=1e-3)
    assert float(made.WindowWidth) == pytest.approx(high - low, rel=1e-3)
    (mapping,) = made.RealWorldValueMappingSequence
    assert mapping.RealWorldValueSlope == float(made.RescaleSlope) and made.RescaleIntercept == 0


def test_an_empty_image_is_written_and_nan_is_refused(tmp_path: Path) -> None:
    template = write_series(tmp_path / "in", affine())
    files = write(Volume(np.zeros((20, 24, 14)), affine()), template, tmp_path / "out")
    assert valid(files[0])
    broken = head()
    broken[3, 4, 5] = np.nan
    with pytest.raises(InputError, match="1 NaN or infinite"):
        write(Volume(broken, affine()), template, tmp_path / "nan")


# --- patient data -----------------------------------------------------------------------------------------------------

SECRET = "Zebrowski"
PATIENT_MODULE = ("PatientName", "PatientID", "IssuerOfPatientID", "DeidentificationMethod")


def plant(folder: Path) -> list[Path]:
    """A series with the patient's name in every text attribute that its headers can have, private ones too."""
    template = write_series(folder, affine())
    for path in template:
        one = pydicom.dcmread(path)
        texts = "StudyDescription SeriesDescription ProtocolName InstitutionName InstitutionAddress StationName "
        texts += "AccessionNumber StudyID ReferringPhysicianName PerformingPhysicianName OperatorsName ImageComments "
        texts += "PatientComments OtherPatientNames EthnicGroup AdditionalPatientHistory RequestedProcedureDescription "
        texts += (
            "Manufacturer ManufacturerModelName DeviceSerialNumber SoftwareVersions SequenceName ContrastBolusAgent "
        )
        texts += "PositionReferenceIndicator DerivationDescription Occupation PatientAddress MedicalAlerts "
        texts += (
            "PatientMotherBirthName RequestingService BodyPartExamined PatientPosition LossyImageCompressionMethod "
        )
        texts += "PatientName PatientID IssuerOfPatientID DeidentificationMethod"
        with pytest.warns(UserWarning):  # where the name is no valid value
            for name in texts.split():
                setattr(one, name, f"{SECRET}^A" if "Name" in name else SECRET)
        one.PatientIdentityRemoved = "YES"
        item = Dataset()
        item.CodeMeaning, item.ScheduledProcedureStepDescription = SECRET, SECRET
        one.RequestAttributesSequence = [item]
        one.ProcedureCodeSequence = [item]
        one.private_block(0x0031, SECRET, create=True).add_new(1, "LT", SECRET)
        one.save_as(path)
    return template


def bytes_without(path: Path, names: tuple[str, ...]) -> bytes:
    one = pydicom.dcmread(path)
    for name in names:
        assert SECRET in str(one.get(name)), name
        delattr(one, name)
    clean = path.with_suffix(".clean")
    one.save_as(clean)
    return clean.read_bytes()


def test_a_name_in_every_text_attribute_reaches_nothing_but_the_patient_module(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    template = plant(tmp_path / "in")
    for path in template:  # pydicom quotes a UID that is none when it reads it
        one = pydicom.dcmread(path)
        one.FrameOfReferenceUID = f"1.2.3{SECRET}"
        one.save_as(path)
    recwarn.clear()
    caplog.clear()
    with caplog.at_level(0):
        files = write(Volume(head(), affine()), template, tmp_path / "out")
    for path in files:
        assert SECRET.lower().encode() not in bytes_without(path, PATIENT_MODULE).lower()
    assert SECRET not in caplog.text and not [warning for warning in recwarn if SECRET in str(warning.message)]
    assert not any(SECRET in str(path) for path in (tmp_path / "out").rglob("*"))
    assert valid(files[0])


def test_errors_quote_no_header(tmp_path: Path) -> None:
    template = plant(tmp_path / "in")
    other = write_series(tmp_path / "other", affine(), PatientID="Q7654321")
    with pytest.raises(InputError) as caught:
        write(Volume(head(), affine()), [*template, *other], tmp_path / "out")
    text = " ".join(map(str, caught.value.problems))
    assert {problem.field for problem in caught.value.problems} == {
        "PatientID",
        "StudyInstanceUID",
        "SeriesInstanceUID",
    }
    assert SECRET not in text and "Q7654321" not in text
    with pytest.raises(InputError, match="another patient") as caught:
        write(Volume(head(), affine()), template, tmp_path / "out", sources=[template, other])
    assert SECRET not in str(caught.value) and "Q7654321" not in str(caught.value)


@pytest.mark.parametrize(
    ("declared", "name"),
    [
        ("ISO_IR 100", "Äneas^Rüdiger"),
        ("ISO_IR 144", "Люкceмбypг"),
        ("ISO_IR 192", "Wang^XiaoDong=王^小东"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        (["", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞=홍^길동"),
    ],
)
def test_names_keep_their_letters_from_any_character_set(tmp_path: Path, declared: Any, name: str) -> None:
    template = write_series(tmp_path / "in", affine(), SpecificCharacterSet=declared, PatientName=name)
    made = pydicom.dcmread(write(Volume(head(), affine()), template, tmp_path / "out")[0])
    assert str(made.PatientName) == name
    assert made.SpecificCharacterSet == "ISO_IR 192" and made.SeriesDescription.startswith("SYNTHETIC FLAIR – NOT")
    assert valid(tmp_path / "out" / "0001.dcm")


def test_bytes_of_an_undeclared_character_set_are_kept_as_they_are(tmp_path: Path) -> None:
    """Latin 1 or Latin 2? The header does not say, so nobody may decide it for the patient."""
    template = write_series(tmp_path / "in", affine(), PatientName="Xnov^k")
    for path in template:
        path.write_bytes(path.read_bytes().replace(b"Xnov^k", b"\xd8nov^k"))
    files = write(Volume(head(), affine()), template, tmp_path / "out")
    for path in files:
        made = pydicom.dcmread(path)
        assert made.get_item("PatientName").value.strip() == b"\xd8nov^k"
        assert "SpecificCharacterSet" not in made
        assert made.SeriesDescription == "SYNTHETIC FLAIR - NOT ACQUIRED"


# --- wrong use --------------------------------------------------------------------------------------------------------


def test_all_that_is_wrong_with_a_template_is_told_at_once(tmp_path: Path) -> None:
    template = write_series(tmp_path / "in", affine())
    (tmp_path / "note.dcm").write_text("not an image")
    headless = write_series(tmp_path / "headless", affine(), StudyInstanceUID=None)[0]
    with pytest.raises(InputError) as caught:
        write(
            Volume(head(), affine()),
            [*template, tmp_path / "note.dcm", headless, tmp_path / "gone.dcm"],
            tmp_path / "o",
        )
    assert len(caught.value.problems) == 3
    text = " ".join(map(str, caught.value.problems))
    assert "not a DICOM file" in text and "StudyInstanceUID" in text and "gone.dcm" in text


def test_copies_of_an_instance_are_refused(tmp_path: Path) -> None:
    template = write_series(tmp_path / "in", affine())
    copy = tmp_path / "copy.dcm"
    copy.write_bytes(template[0].read_bytes())
    with pytest.raises(InputError, match="more than once"):
        write(Volume(head(), affine()), [*template, copy], tmp_path / "out")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"target": "ct"}, "not an MR image"),
        ({"target": "fl\\air"}, "does not fit into a DICOM header"),
        ({"checkpoint_hash": "/home/someone/run"}, "does not fit into a DICOM header"),
        ({"sources": []}, "at least one series"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    template = write_series(tmp_path / "in", affine())
    with pytest.raises(InputError, match=message):
        write(Volume(head(), affine()), template, tmp_path / "out", **more)


def test_a_volume_of_another_frame_of_reference_is_refused(tmp_path: Path) -> None:
    template = write_series(tmp_path / "in", affine())
    with pytest.raises(InputError, match="different frames of reference"):
        write(Volume(head(), affine(), frame="1.2.3"), template, tmp_path / "out")


def test_a_folder_with_other_files_is_left_alone_and_an_earlier_synthesis_replaced(tmp_path: Path) -> None:
    template = write_series(tmp_path / "in", affine())
    out = tmp_path / "out"
    write(Volume(head(), affine()), template, out)
    short = write_series(tmp_path / "short", affine(), (20, 24, 5))
    assert len(write(Volume(head((20, 24, 5)), affine()), short, out)) == 5 == len(list(out.iterdir()))
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="other files"):
        write(Volume(head(), affine()), template, out)
    assert (out / "notes.txt").read_text() == "mine"
    assert not list(tmp_path.glob(".*.tmp"))
