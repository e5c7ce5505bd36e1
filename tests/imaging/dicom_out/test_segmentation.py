"""Label maps as DICOM Segmentation: voxels in their place, segments named and coded, identity and no more."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from medmae.errors import InputError
from medmae.imaging.dicom_out.segment_codes import Coded, SegmentCode, segment_code
from medmae.imaging.dicom_out.segmentation import write_segmentation
from medmae.imaging.volume import Volume
from tests.imaging.dicom_out.made_series import affine, dciodvfy_errors, head, valid, write_series
from tests.imaging.dicom_out.test_writing import GRIDS, PATIENT_MODULE, SECRET, bytes_without, plant

WHEN = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
NAMES = {1: "edema", 2: "something of ours", 4: "enhancing tumor"}


def labels(shape: tuple[int, int, int] = (20, 24, 14)) -> np.ndarray:
    result = np.zeros(shape, np.uint8)
    result[head(shape) > 300] = 1
    result[5:9, 6:13, 3:7] = 4
    return result


def write(volume: Volume, template: list[Path], out: Path, **more: Any) -> Path:
    options: dict[str, Any] = {"names": NAMES, "version": "0.1.0", "checkpoint_hash": "c0ffee", "created": WHEN}
    return write_segmentation(volume, template, out, **{**options, **more})


def voxels(path: Path, matrix: np.ndarray, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """{segment label: mask on the grid of ``matrix``}, from the frames' positions (PS3.3 C.7.6.2.1-1) alone."""
    one = pydicom.dcmread(path)
    frames = one.pixel_array.reshape(-1, one.Rows, one.Columns)
    shared = one.SharedFunctionalGroupsSequence[0]
    right, down = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float).reshape(2, 3)
    between_rows, between_columns = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
    names = {item.SegmentNumber: item.SegmentLabel for item in one.SegmentSequence}
    result = {name: np.zeros(shape, bool) for name in names.values()}
    for pixels, groups in zip(frames, one.PerFrameFunctionalGroupsSequence, strict=True):
        rows, columns = np.nonzero(pixels)
        place = np.array(groups.PlanePositionSequence[0].ImagePositionPatient, float)
        lps = place + columns[:, None] * between_columns * right + rows[:, None] * between_rows * down
        index = (lps * [-1, -1, 1] - matrix[:3, 3]) @ np.linalg.inv(matrix[:3, :3]).T
        assert np.abs(index - np.rint(index)).max(initial=0) < 1e-3
        number = groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        result[names[number]][tuple(np.rint(index).astype(int).T)] = True
    return result


@pytest.mark.parametrize("enhanced", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_labels_are_where_they_were(tmp_path: Path, grid: str, enhanced: bool) -> None:
    template = write_series(tmp_path / "in", GRIDS[grid], numbering="shuffled", enhanced=enhanced)
    path = write(Volume(labels(), GRIDS[grid]), template, tmp_path / "seg.dcm")
    there = voxels(path, GRIDS[grid], (20, 24, 14))
    for value, name in NAMES.items():
        np.testing.assert_array_equal(there[name], labels() == value)
    assert valid(path)


def test_dciodvfy_finds_no_error(tmp_path: Path) -> None:
    template = write_series(tmp_path / "in", GRIDS["oblique"])
    assert not dciodvfy_errors(write(Volume(labels(), GRIDS["oblique"]), template, tmp_path / "seg.dcm"))


def test_labels_in_other_axes_and_on_another_grid_are_where_they_were(tmp_path: Path) -> None:
    fine = affine((17, -23, 9), (0.5, 0.6, 1.2))
    template = write_series(tmp_path / "in", GRIDS["oblique"])
    path = write(Volume(labels(), fine), template, tmp_path / "seg.dcm")
    np.testing.assert_array_equal(voxels(path, fine, (20, 24, 14))["edema"], labels() == 1)
    assert valid(path)


def test_segments_are_named_coded_and_said_to_be_automatic(tmp_path: Path) -> None:
    template = write_series(tmp_path / "in", affine())
    one = pydicom.dcmread(write(Volume(labels(), affine()), template, tmp_path / "seg.dcm"))
    assert (one.SegmentationType, one.Modality) == ("BINARY", "SEG")
    assert [item.SegmentLabel for item in one.SegmentSequence] == list(NAMES.values())
    types = [item.SegmentedPropertyTypeCodeSequence[0] for item in one.SegmentSequence]
    assert (types[0].CodeValue, types[0].CodingSchemeDesignator) == ("79654002", "SCT")
    assert (types[1].CodingSchemeDesignator, types[1].CodeMeaning) == ("99MEDMAE", "something of ours")
    assert (types[2].CodeValue, types[2].CodingSchemeDesignator) == ("C113842", "NCIt")
    for item in one.SegmentSequence:
        assert item.SegmentAlgorithmType == "AUTOMATIC" and item.SegmentAlgorithmName == "medmae"
        assert item.SegmentationAlgorithmIdentificationSequence[0].AlgorithmVersion == "0.1.0"
    source = pydicom.dcmread(template[0])
    for name in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID"):
        assert one[name].value == source[name].value
    assert (one.ContentDate, one.ContentTime) == ("20260304", "050607")
    listed = one.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    assert {item.ReferencedSOPInstanceUID for item in listed} == {pydicom.dcmread(p).SOPInstanceUID for p in template}


def test_known_codes_are_those_of_the_standards_tables() -> None:
    """Against pydicom's copy of PS3.16 CID 7150 and 7151."""
    from pydicom.sr._concepts_dict import concepts

    from medmae.imaging.dicom_out import segment_codes

    coded = [part for code in segment_codes._KNOWN.values() for part in (code.category, code.type)]
    assert len(segment_codes._KNOWN) > 15
    for part in coded:
        known = [entry[part.value] for entry in concepts[part.scheme].values() if part.value in entry]
        assert any(meaning == part.meaning and {7150, 7151} & set(groups) for meaning, groups in known), part
    assert set(segment_codes._SYNONYMS.values()) <= set(segment_codes._KNOWN)
    assert segment_code("Peritumoral_Edema") == segment_code("oedema")


def test_a_code_can_be_given(tmp_path: Path) -> None:
    mine = SegmentCode(Coded("49755003", "SCT", "Morphologically Abnormal Structure"), Coded("9", "99SITE", "Ours"))
    template = write_series(tmp_path / "in", affine())
    one = pydicom.dcmread(write(Volume(labels(), affine()), template, tmp_path / "seg.dcm", codes={2: mine}))
    assert one.SegmentSequence[1].SegmentedPropertyTypeCodeSequence[0].CodingSchemeDesignator == "99SITE"


def test_an_empty_label_map_is_an_object_without_segmented_voxels(tmp_path: Path) -> None:
    template = write_series(tmp_path / "in", affine())
    path = write(Volume(np.zeros((20, 24, 14), np.uint8), affine()), template, tmp_path / "seg.dcm")
    one = pydicom.dcmread(path)
    assert len(one.SegmentSequence) == 3 and not one.pixel_array.any()
    assert valid(path)


def test_same_content_and_time_same_uids(tmp_path: Path) -> None:
    template = write_series(tmp_path / "in", affine())
    other = labels()
    other[0, 0, 0] = 1
    first = write(Volume(labels(), affine()), template, tmp_path / "a.dcm")
    again = write(Volume(labels(), affine()), template, tmp_path / "b.dcm")
    changed = write(Volume(other, affine()), template, tmp_path / "c.dcm")
    assert first.read_bytes() == again.read_bytes()
    assert pydicom.dcmread(first).SOPInstanceUID != pydicom.dcmread(changed).SOPInstanceUID


def test_what_is_segmented_from_a_synthesis_is_synthetic(tmp_path: Path) -> None:
    template = write_series(tmp_path / "in", affine(), SyntheticData="YES")
    assert pydicom.dcmread(write(Volume(labels(), affine()), template, tmp_path / "a.dcm")).SyntheticData == "YES"


def test_a_name_in_every_text_attribute_reaches_nothing_but_the_patient_module(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    template = plant(tmp_path / "in")
    caplog.clear()
    with caplog.at_level(0):
        path = write(Volume(labels(), affine()), template, tmp_path / "seg.dcm")
    assert SECRET.lower().encode() not in bytes_without(path, PATIENT_MODULE).lower()
    assert SECRET not in caplog.text and pydicom.dcmread(template[0]).SOPInstanceUID not in caplog.text


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    template = write_series(tmp_path / "in", affine())
    bad = labels()
    bad[3, 3, 3], bad[4, 4, 4] = 7, 9
    with pytest.raises(InputError) as caught:
        write(Volume(bad, affine(), frame="1.2.3"), template, tmp_path / "seg.dcm", names={**NAMES, 0: "nothing"})
    text = " ".join(map(str, caught.value.problems))
    assert len(caught.value.problems) == 3 and "[7, 9]" in text and "[0]" in text
    with pytest.raises(InputError, match="whole numbers"):
        write(Volume(labels() * 0.5, affine()), template, tmp_path / "seg.dcm")
    assert not (tmp_path / "seg.dcm").exists()
