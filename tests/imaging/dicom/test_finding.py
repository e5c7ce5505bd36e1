"""What is wrong with DICOM is found in one pass over the headers, named, and stops nothing else."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import SecondaryCaptureImageStorage, generate_uid

from medmae.errors import Problem
from medmae.imaging.dicom.finding import find_series
from medmae.imaging.dicom.reading import read_series
from medmae.imaging.dicom.zips import members_of
from tests.imaging.dicom.build import Builder, phantom, rotation

Change = Callable[[int, pydicom.FileDataset], object]


def fatal(path: Path) -> list[Problem]:
    found, problems = find_series(path)
    assert not found
    return [problem for problem in problems if problem.fatal]


def good(path: Path, name: str = "good") -> None:
    Builder(path, PatientID="ANOTHER").classic(name, SeriesDescription="T2")


def test_missing_slices_are_counted_and_placed(tmp_path: Path) -> None:
    Builder(tmp_path).classic("bad", skip=(4, 5))
    good(tmp_path)
    found, problems = find_series(tmp_path)
    assert [one.modality for one in found] == ["t2"]
    (problem,) = problems
    assert problem.fatal and problem.what == "slices are missing: 2"
    assert str(problem.where).endswith("bad series 1")
    assert "1 to 4 2.50 mm, 4 to 5 7.50 mm, 5 to 10 2.50 mm" in str(problem.found)


@pytest.mark.parametrize(
    ("positions", "gap"),
    [(lambda k: k + 0.5 * (k > 6), "7 to 8 3.75 mm"), (lambda k: k if k < 6 else 6 + (k - 6) * 1.3, "7 to 12 3.25 mm")],
)
def test_uneven_spacing_is_told_in_millimetres(tmp_path: Path, positions: Callable[[int], float], gap: str) -> None:
    Builder(tmp_path).classic("bad", positions=positions)
    (problem,) = fatal(tmp_path)
    assert "unevenly spaced" in problem.what and gap in str(problem.found)


def test_a_slice_shifted_sideways_is_noticed(tmp_path: Path) -> None:
    def change(k: int, dataset: pydicom.FileDataset) -> None:
        if k == 6:
            moved = np.array(dataset.ImagePositionPatient, float) + rotation()[:, 0] * 1.5
            dataset.ImagePositionPatient = [f"{v:.6f}" for v in moved]

    Builder(tmp_path).classic("bad", change=change)
    (problem,) = fatal(tmp_path)
    assert "beside their places" in problem.what and "1.5" in problem.what


def test_jitter_of_a_twentieth_of_a_millimetre_is_no_fault(tmp_path: Path) -> None:
    Builder(tmp_path).classic("s", positions=lambda k: k + 0.02 * (-1) ** k)
    assert len(find_series(tmp_path)[0]) == 1


@pytest.mark.parametrize(
    ("attribute", "value"), [("PatientID", "OTHER-ID"), ("PatientName", "Else^Somebody")], ids=["id", "name"]
)
def test_two_patients_in_one_study_are_refused_unnamed(tmp_path: Path, attribute: str, value: str) -> None:
    builder = Builder(tmp_path)
    builder.classic("a")
    builder.classic("b", **{attribute: value})
    (problem,) = fatal(tmp_path)
    assert "two patients" in problem.what and attribute in problem.what
    assert value not in str(problem) and "ID-4711" not in str(problem)


def test_one_name_spelt_in_two_ways_is_one_patient(tmp_path: Path) -> None:
    builder = Builder(tmp_path)
    builder.classic("a", PatientName="Müller^Ann", SpecificCharacterSet="ISO_IR 100")
    builder.classic("b", PatientName="MÜLLER^ANN^^", SpecificCharacterSet="ISO_IR 192")
    assert len(find_series(tmp_path)[0]) == 2


def test_copies_are_passed_over_and_two_images_of_one_uid_refused(tmp_path: Path) -> None:
    files = Builder(tmp_path / "x").classic("s")
    shutil.copy(files[3], tmp_path / "x" / "copy.dcm")
    found, problems = find_series(tmp_path / "x")
    assert len(found) == 1 and not problems[0].fatal and "copies" in problems[0].what
    other = pydicom.dcmread(files[3])
    other.PixelData = bytes(len(other.PixelData))
    other.save_as(tmp_path / "x" / "copy.dcm")
    (problem,) = fatal(tmp_path / "x")
    assert "same SOPInstanceUID" in problem.what and "copy.dcm" in str(problem.found)
    assert str(other.SOPInstanceUID) not in str(problem)


def syntax(uid: str) -> Change:
    def change(_: int, dataset: pydicom.FileDataset) -> None:
        dataset.file_meta.TransferSyntaxUID = uid
        dataset.is_decompressed = False
        dataset.PixelData = pydicom.encaps.encapsulate([bytes(64)])
        dataset["PixelData"].is_undefined_length = True

    return change


@pytest.mark.parametrize(
    ("uid", "told"),
    [
        ("1.2.3.4.5.6.7", "unknown transfer syntax"),
        ("1.2.840.10008.1.2.4.100", "unknown transfer syntax"),  # MPEG2 video
    ],
)
def test_a_transfer_syntax_that_nothing_decodes_is_named(tmp_path: Path, uid: str, told: str) -> None:
    Builder(tmp_path).classic("bad", change=syntax(uid))
    good(tmp_path)
    found, problems = find_series(tmp_path)
    assert [one.modality for one in found] == ["t2"]
    assert problems[0].fatal and told in problems[0].what and "Decompress" in str(problems[0].remedy)


def test_a_decoder_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pydicom.pixels.decoders import JPEGLSLosslessDecoder

    monkeypatch.setattr(JPEGLSLosslessDecoder, "_available", {})
    Builder(tmp_path).classic("bad", change=syntax("1.2.840.10008.1.2.4.80"))
    (problem,) = fatal(tmp_path)
    assert "no decoder" in problem.what and "JPEG-LS" in str(problem.found)
    assert "Install python-gdcm" in str(problem.remedy)


def test_truncated_pixels_are_found_by_the_headers(tmp_path: Path) -> None:
    files = Builder(tmp_path).classic("bad")
    files[2].write_bytes(files[2].read_bytes()[:-50])
    (problem,) = fatal(tmp_path)
    assert "truncated" in problem.what and "1 of 12 files, 50 bytes" in str(problem.found)


def test_a_file_cut_off_in_its_header_is_named(tmp_path: Path) -> None:
    files = Builder(tmp_path).classic("bad")
    files[2].write_bytes(files[2].read_bytes()[:400])
    problems = fatal(tmp_path)
    assert any(files[2].name in str(p.where) for p in problems) or any("missing" in p.what for p in problems)


def test_a_study_of_localisers_gives_nothing(tmp_path: Path) -> None:
    builder = Builder(tmp_path)
    series = generate_uid()
    for turn in (0, 90):
        builder.classic(f"s{turn}", phantom((20, 16, 3)), direction=rotation(turn, 0, 0), series=series)
    builder.classic("named", SeriesDescription="AAHead_Scout_64ch")
    builder.classic("typed", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    found, problems = find_series(tmp_path)
    assert not found and {problem.what for problem in problems} == {"a localiser: left out"}
    assert len(problems) == 3 or len(problems) == 4


def test_a_topogram_in_the_series_of_its_slices_is_set_aside(tmp_path: Path) -> None:
    builder, series = Builder(tmp_path, Modality="CT"), generate_uid()
    builder.classic("a", series=series)
    localiser = {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}
    builder.classic("b", phantom((30, 20, 1)), direction=rotation(90, 0, 0), series=series, **localiser)
    found, problems = find_series(tmp_path)
    assert [one.grid.shape for one in found] == [(20, 16, 12)] and not problems


def test_screenshots_colour_images_and_reports_are_left_out(tmp_path: Path) -> None:
    builder = Builder(tmp_path)
    builder.classic("s", SeriesDescription="T2")

    def no_place(_: int, dataset: pydicom.FileDataset) -> None:
        dataset.SOPClassUID, dataset.Modality = SecondaryCaptureImageStorage, "OT"
        del dataset.ImagePositionPatient, dataset.ImageOrientationPatient

    def colour(_: int, dataset: pydicom.FileDataset) -> None:
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "RGB", 0
        dataset.PixelData = dataset.PixelData * 3

    def report(_: int, dataset: pydicom.FileDataset) -> None:
        del dataset.Rows, dataset.Columns, dataset.PixelData
        dataset.Modality = "SR"

    for name, change in {"capture": no_place, "colour": colour, "report": report}.items():
        builder.classic(name, change=change)
    (tmp_path / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    (tmp_path / "notes.txt").write_text("not DICOM" * 50)
    found, problems = find_series(tmp_path)
    assert [one.modality for one in found] == ["t2"]
    assert len([p for p in problems if not p.fatal]) == 2


def test_slices_that_nothing_tells_apart_are_refused(tmp_path: Path) -> None:
    builder, series = Builder(tmp_path), generate_uid()
    builder.classic("a", series=series)
    builder.classic("b", series=series)
    (problem,) = fatal(tmp_path)
    assert "one position" in problem.what


def test_a_series_over_time_is_left_out_with_a_word(tmp_path: Path) -> None:
    builder, series = Builder(tmp_path), generate_uid()
    for time in range(4):
        builder.classic(str(time), series=series, TemporalPositionIdentifier=time + 1)
    found, problems = find_series(tmp_path)
    assert not found and "over time" in problems[0].what and problems[0].found == "4 volumes"


def test_a_synthesised_series_is_flagged(tmp_path: Path) -> None:
    builder = Builder(tmp_path)
    builder.classic("a", SeriesDescription="SYNTHETIC FLAIR - NOT ACQUIRED")

    def mark(_: int, dataset: pydicom.FileDataset) -> None:
        dataset.add_new(0x0008001C, "CS", "YES")  # SyntheticData

    builder.classic("b", change=mark, SeriesDescription="T2")
    builder.classic("c", SeriesDescription="T2")
    assert [one.synthetic for one in find_series(tmp_path)[0]] == [True, True, False]


def test_slices_of_a_stack_that_was_thinned_evenly_are_doubted(tmp_path: Path) -> None:
    Builder(tmp_path).classic("s", SpacingBetweenSlices=0.625)
    found, problems = find_series(tmp_path)
    assert len(found) == 1 and "every 4th slice" in problems[0].what and not problems[0].fatal


# --- ZIPs ----------------------------------------------------------------------------------------------------------


def zipped(folder: Path, archive: Path) -> Path:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as target:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                target.write(file, file.relative_to(folder))
    return archive


def test_a_zip_is_read_as_its_folder_is_and_nothing_is_written(tmp_path: Path) -> None:
    Builder(tmp_path / "in").classic("s/deep")
    archive = zipped(tmp_path / "in", tmp_path / "study.zip")
    direct, packed = find_series(tmp_path / "in")[0][0], find_series(archive)[0][0]
    before = sorted(tmp_path.rglob("*"))
    a, b = read_series(direct), read_series(packed)
    np.testing.assert_array_equal(a.array, b.array)
    assert a.grid == b.grid and sorted(tmp_path.rglob("*")) == before
    assert str(packed) == f"{archive}/s/deep series 1"


def link(target: zipfile.ZipFile) -> None:
    info = zipfile.ZipInfo("s/link.dcm")
    info.external_attr = 0o120777 << 16
    target.writestr(info, "/etc/passwd")


def bomb(target: zipfile.ZipFile) -> None:
    target.writestr("s/zeros.dcm", bytes(64 << 20))


def many_small_bombs(target: zipfile.ZipFile) -> None:
    for number in range(10):
        target.writestr(f"s/zeros{number}.dcm", bytes(8 << 20))


def twice(target: zipfile.ZipFile) -> None:
    with pytest.warns(UserWarning, match="Duplicate"):
        target.writestr("s/0000.dcm", b"other")


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda z: z.writestr("../evil.dcm", b"x"), "lead out"),
        (lambda z: z.writestr("s/../../evil.dcm", b"x"), "lead out"),
        (lambda z: z.writestr("/etc/evil.dcm", b"x"), "lead out"),
        (lambda z: z.writestr("C:\\evil.dcm", b"x"), "lead out"),
        (lambda z: z.writestr("..\\evil.dcm", b"x"), "lead out"),
        (link, "links"),
        (bomb, "bomb"),
        (many_small_bombs, "bomb"),
        (twice, "twice"),
    ],
)
def test_a_zip_that_means_harm_is_refused_and_the_others_are_done(
    tmp_path: Path, harm: Callable[[zipfile.ZipFile], None], told: str
) -> None:
    folder = tmp_path / "data"
    Builder(tmp_path / "in").classic("s")
    folder.mkdir()
    archive = zipped(tmp_path / "in", folder / "bad.zip")
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as target:
        harm(target)
    good(folder)
    before = sorted(tmp_path.rglob("*"))
    found, problems = find_series(folder)
    assert [one.modality for one in found] == ["t2"]
    (problem,) = [p for p in problems if p.fatal]
    assert told in problem.what and problem.where == str(archive)
    assert sorted(tmp_path.rglob("*")) == before


def test_encrypted_members_and_too_many_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Builder(tmp_path / "in").classic("s")
    archive = zipped(tmp_path / "in", tmp_path / "a.zip")
    raw = bytearray(archive.read_bytes())
    at = raw.index(b"PK\x01\x02")
    raw[at + 8] |= 1  # the flag of encryption in the list of members
    (tmp_path / "b.zip").write_bytes(raw)
    assert "encrypted" in members_of(tmp_path / "b.zip")[1][0].what
    monkeypatch.setattr("medmae.imaging.dicom.zips.MOST_MEMBERS", 5)
    assert "too many" in members_of(archive)[1][0].what
    archive.write_bytes(archive.read_bytes()[:-40])
    assert "cannot be read" in members_of(archive)[1][0].what


def test_archives_in_an_archive_are_left_out(tmp_path: Path) -> None:
    Builder(tmp_path / "in").classic("s")
    zipped(tmp_path / "in", tmp_path / "in" / "inner.zip")
    found, problems = find_series(zipped(tmp_path / "in", tmp_path / "outer.zip"))
    assert len(found) == 1 and "inside this archive" in problems[0].what and not problems[0].fatal
