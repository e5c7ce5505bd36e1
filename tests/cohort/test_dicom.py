"""DICOM as a layout: studies named by hashes, one series a modality, through every command as NIfTI goes."""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.uid import generate_uid
from typer.testing import CliRunner

import medmae
from medmae.cli import app
from medmae.cohort.dicom import subject_name
from medmae.cohort.integrity import inspect
from medmae.cohort.layouts import find_studies
from medmae.cohort.prepared import Cohort
from medmae.cohort.store import prepare
from medmae.errors import InputError
from medmae.imaging.dicom.series import Series
from medmae.imaging.nifti import read_nifti
from medmae.plan import Plan
from medmae.synthesis.reconstruct import reconstruct
from tests.imaging.dicom.build import TEXTS, Builder, phantom
from tests.synthesis.fakes import Linear, plan

TIMES = {
    "t1": {"SeriesDescription": "T1", "RepetitionTime": 500.0, "EchoTime": 10.0, "ScanningSequence": "SE"},
    "t2": {"SeriesDescription": "T2", "RepetitionTime": 5000.0, "EchoTime": 100.0, "ScanningSequence": "SE"},
    "flair": {
        "SeriesDescription": "FLAIR",
        "RepetitionTime": 9000.0,
        "EchoTime": 100.0,
        "InversionTime": 2500.0,
        "ScanningSequence": ["SE", "IR"],
    },
}


def study(folder: Path, *modalities: str, patient: str = "ID-4711", **more: Any) -> Builder:
    builder = Builder(folder, PatientID=patient)
    for number, name in enumerate(modalities):
        builder.classic(name, phantom((20, 16, 12)) * (number + 1), **{**TIMES[name], **more})
    return builder


def test_studies_are_found_and_named_by_hashes_that_last(tmp_path: Path) -> None:
    study(tmp_path / "Doe, Jane" / "first", "t1", "t2")
    study(tmp_path / "Doe, Jane" / "second", "flair")
    study(tmp_path / "another", "t1", patient="OTHER")
    layout = find_studies(tmp_path)
    assert layout.name == "dicom" and not layout.problems
    assert sorted(tuple(one.images) for one in layout.studies) == [("flair",), ("t1",), ("t1", "t2")]
    assert len({one.subject for one in layout.studies}) == 2
    assert all(one.id.startswith("study-") and "Doe" not in one.id + one.subject for one in layout.studies)
    assert [one.id for one in find_studies(tmp_path).studies] == [one.id for one in layout.studies]
    assert {type(source) for one in layout.studies for source in one.images.values()} == {Series}


def test_a_subject_is_a_patient_of_one_issuer() -> None:
    same = subject_name(("4711", "A"), "study-1")
    assert same == subject_name(("4711", "A"), "study-2") != subject_name(("4711", "B"), "study-1")
    assert subject_name(("", ""), "study-1") == "subject-1"


def test_a_zip_gives_the_studies_of_its_folder(tmp_path: Path) -> None:
    study(tmp_path / "in", "t1", "flair")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as target:
        for file in (tmp_path / "in").rglob("*"):
            target.write(file, file.relative_to(tmp_path))
    direct, packed = find_studies(tmp_path / "in"), find_studies(tmp_path / "all.zip")
    assert [one.id for one in packed.studies] == [one.id for one in direct.studies]


def test_a_tree_with_nifti_is_nifti_and_says_what_it_left_out(tmp_path: Path, scan: Callable[..., Path]) -> None:
    study(tmp_path / "dicom", "t1")
    scan(tmp_path / "a" / "t1.nii.gz")
    layout = find_studies(tmp_path)
    assert layout.name == "folders" and len(layout.studies) == 1
    assert any("DICOM in a tree with NIfTI" in problem.what and not problem.fatal for problem in layout.problems)


# --- which series --------------------------------------------------------------------------------------------------


def numbers(path: Path, **options: Any) -> dict[str, int | None]:
    (one,) = find_studies(path, **options).studies
    return {name: source.number for name, source in one.images.items() if isinstance(source, Series)}


def test_of_two_series_the_finer_3d_original_is_taken_and_told(tmp_path: Path) -> None:
    builder = Builder(tmp_path)
    builder.classic("thick", spacing=(0.9, 1.1, 5.0), **TIMES["t1"])
    builder.classic("3d", MRAcquisitionType="3D", **TIMES["t1"])
    builder.classic("derived", MRAcquisitionType="3D", ImageType=["DERIVED", "SECONDARY"], **TIMES["t1"])
    assert numbers(tmp_path) == {"t1": 2}
    (problem,) = find_studies(tmp_path).problems
    assert "3 series are t1" in problem.what and "taken series 2" in str(problem.found) and not problem.fatal
    assert numbers(tmp_path, series={"t1": 1}) == {"t1": 1}


def test_a_repeated_scan_replaces_the_one_before(tmp_path: Path) -> None:
    builder = Builder(tmp_path)
    builder.classic("a", **TIMES["t2"])
    builder.classic("b", **TIMES["t2"])
    assert numbers(tmp_path) == {"t2": 2}


def test_unknown_doubtful_and_synthetic_series_wait_to_be_asked_for(tmp_path: Path) -> None:
    builder = study(tmp_path, "t1")
    builder.classic("x", SeriesDescription="something")
    builder.classic("y", **{**TIMES["t1"], "SeriesDescription": "T2"})
    builder.classic("z", SeriesDescription="SYNTHETIC FLAIR - NOT ACQUIRED")
    layout = find_studies(tmp_path)
    assert [tuple(one.images) for one in layout.studies] == [("t1",)]
    assert len(layout.problems) == 3 and not any(problem.fatal for problem in layout.problems)
    assert all("--image" in str(problem.remedy) for problem in layout.problems)
    assert numbers(tmp_path, series={"flair": 4, "t2": 2}) == {"t1": 1, "t2": 2, "flair": 4}
    assert any("no series of this number" in p.what for p in find_studies_problems(tmp_path, {"pd": 77}))


def find_studies_problems(path: Path, series: dict[str, int]) -> list[medmae.Problem]:
    with pytest.raises(InputError) as error:
        find_studies(path, series=series)
    return list(error.value.problems)


def test_a_damaged_modality_stops_its_study_and_a_damaged_spare_does_not(tmp_path: Path) -> None:
    bad = study(tmp_path / "bad", "t1")
    bad.classic("flair", skip=(5,), **TIMES["flair"])
    fine = study(tmp_path / "fine", "t1", "flair", patient="B")
    fine.classic("flair2", skip=(5,), **TIMES["flair"])
    found = inspect(tmp_path, jobs=1)
    assert [tuple(one.images) for one in found.studies] == [("t1", "flair")]
    fatal = [problem for problem in found.problems if problem.fatal]
    assert len(fatal) == 1 and "slices are missing: 1" in fatal[0].what
    assert found.failed == [str(fatal[0].where).split(": ")[0]] and found.failed[0].startswith("study-")


def test_a_study_of_localisers_only_is_refused_by_name(tmp_path: Path) -> None:
    Builder(tmp_path / "a").classic("s", SeriesDescription="localizer")
    with pytest.raises(InputError, match="localisers only"):
        find_studies(tmp_path)


def test_the_command_does_the_others_and_exits_with_one(tmp_path: Path) -> None:
    good = study(tmp_path / "good", "t1")
    mixed = Builder(tmp_path / "mixed")
    mixed.classic("a", **TIMES["t1"])
    mixed.classic("b", PatientID="OTHER", **TIMES["t2"])
    lacking = Builder(tmp_path / "lacking", PatientID="C")
    lacking.classic("s", skip=(3,), **TIMES["t1"])
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as target:
        target.writestr("../evil.dcm", b"x")
    seen = CliRunner().invoke(app, ["inspect", str(tmp_path), "--json"])
    assert seen.exit_code == 1
    facts = json.loads(seen.stdout)
    assert facts["counts"]["usable"] == 1 and len(facts["failed"]) == 3
    (series,) = facts["studies"][0]["series"].values()
    assert series["number"] == 1 and series["confidence"] == 0.95 and "timing agrees" in series["reason"]
    assert good.study not in seen.output and mixed.study not in seen.output


# --- through the package -------------------------------------------------------------------------------------------


def tiny() -> Plan:
    image = {"crop": [16, 16, 16], "spacing": [2.0, 2.0, 2.0]}
    return Plan.load(
        {
            "name": "x",
            "method": "bm-mae",
            "modalities": ["t1", "t2", "flair"],
            "image": image,
            "model": {"patch": [8] * 3},
        }
    )


def test_a_cohort_from_dicom_is_that_from_the_same_images_as_nifti(tmp_path: Path) -> None:
    study(tmp_path / "dicom", "t1", "flair")
    (one,) = find_studies(tmp_path / "dicom").studies
    for name, source in one.images.items():
        volume = medmae.imaging.source.read_source(source)
        (tmp_path / "nifti" / "a").mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(volume.array, volume.affine), tmp_path / "nifti" / "a" / f"{name}.nii.gz")
    made = {kind: prepare(tmp_path / kind, tiny(), tmp_path / f"{kind}-cohort", jobs=1) for kind in ("dicom", "nifti")}
    a, b = (Cohort.open(made[kind].cohort_path).studies[0] for kind in ("dicom", "nifti"))
    assert a.modalities == b.modalities == ("t1", "flair")
    for name in a.modalities:
        np.testing.assert_allclose(a.array(name).astype(float), b.array(name).astype(float), atol=2e-3)


def test_preparing_again_does_only_what_has_changed(tmp_path: Path) -> None:
    study(tmp_path / "dicom", "t1")
    out = tmp_path / "cohort"
    assert len(prepare(tmp_path / "dicom", tiny(), out, jobs=1).done) == 1
    assert len(prepare(tmp_path / "dicom", tiny(), out, jobs=1).skipped) == 1
    file = next((tmp_path / "dicom").rglob("*.dcm"))
    file.touch()
    assert len(prepare(tmp_path / "dicom", tiny(), out, jobs=1).skipped) == 1
    dataset = pydicom.dcmread(file)
    dataset.PixelData = bytes([7]) * len(dataset.PixelData)
    dataset.save_as(file)
    assert len(prepare(tmp_path / "dicom", tiny(), out, jobs=1).done) == 1


def test_workers_of_their_own_take_series_too(tmp_path: Path) -> None:
    for number in range(2):
        study(tmp_path / "dicom" / str(number), "t1", patient=str(number))
    assert len(prepare(tmp_path / "dicom", tiny(), tmp_path / "cohort", jobs=2).done) == 2


def synthesiser() -> Linear:
    return Linear(plan(("t1", "t2", "flair"), crop=(16, 16, 16)), weights={"t1": 1.0})


def test_a_synthesis_from_dicom_lies_on_the_scan_and_knows_its_sources(tmp_path: Path) -> None:
    study(tmp_path / "in", "t1", "t2")
    made = reconstruct(tmp_path / "in", synthesiser(), tmp_path / "out", targets=["flair"], report=True)
    (one,) = find_studies(tmp_path / "in").studies
    (file,) = made.written
    assert file.name == f"{one.id}_flair.nii.gz"
    like = one.images["t1"]
    assert isinstance(like, Series)
    np.testing.assert_allclose(read_nifti(file).affine, like.grid.affine, atol=1e-4)
    car = json.loads(file.with_name(f"{one.id}_flair.json").read_text())
    assert set(car["sources"]) == {"t1", "t2"} and len(car["sources"]["t1"]["sha256"]) == 64


@pytest.mark.parametrize("how", ["number", "folder", "file", "alone"])
def test_a_series_is_named_by_number_folder_or_file(tmp_path: Path, how: str) -> None:
    folder = tmp_path / "in"
    files = Builder(folder).classic("x", SeriesDescription="something")
    value = {"number": "1", "folder": folder / "x", "file": files[3], "alone": folder / "x"}[how]
    sources = [] if how == "alone" else [folder]
    made = reconstruct(sources, synthesiser(), tmp_path / "out", targets=["flair"], images={"t1": value})
    assert [path.name[:6] for path in made.written] == ["study-"] and not made.failed


def test_series_that_cannot_be_named_so_are_refused(tmp_path: Path) -> None:
    study(tmp_path / "in", "t1", "t2")
    with pytest.raises(InputError, match="2 DICOM volumes here"):
        reconstruct([], synthesiser(), tmp_path / "out", images={"t1": tmp_path / "in"})
    with pytest.raises(InputError, match="needs a study"):
        reconstruct([], synthesiser(), tmp_path / "out", images={"t1": "3"})


def test_choices_are_told_by_reconstruct(tmp_path: Path) -> None:
    study(tmp_path / "in", "t1", "t2").classic("again", **TIMES["t1"])
    made = reconstruct(tmp_path / "in", synthesiser(), tmp_path / "out", targets=["flair"])
    assert any("2 series are t1" in problem.what for problem in made.warnings)


def test_nnunet_gets_a_series_as_a_file_for_as_long_as_it_reads(tmp_path: Path) -> None:
    from medmae.nnunet.predict import as_files

    study(tmp_path / "in", "t1")
    (one,) = find_studies(tmp_path / "in").studies
    with as_files(one.images) as files:
        volume = read_nifti(files["t1"])
        np.testing.assert_array_equal(volume.array, medmae.read_image(tmp_path / "in" / "t1").array)
    assert not files["t1"].exists()


# --- privacy -------------------------------------------------------------------------------------------------------

SECRET = "ZYXWPLANTED"


def plant(_: int, dataset: pydicom.FileDataset) -> None:
    """The name in every text attribute, valid there or not."""
    for keyword in TEXTS:
        old = dataset.get(keyword)
        value = f"{SECRET}^{keyword[:3]}"
        if keyword in ("SeriesDescription", "ProtocolName"):
            value = f"{old or ''} {SECRET}"
        elif keyword in ("ScanningSequence", "ImageType"):
            value = [*(old if isinstance(old, list | pydicom.multival.MultiValue) else [old or "SE"]), f"{SECRET}^x"]
        tag = tag_for_keyword(keyword)
        assert tag is not None
        dataset.add_new(tag, dictionary_VR(tag), value)
    dataset.private_block(0x11, f"{SECRET} MAKER", create=True).add_new(1, "LO", SECRET)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_planted_name_reaches_no_message_log_cohort_or_side_car(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    builder = Builder(tmp_path / "in" / "good")
    for name in ("t1", "t2"):
        builder.classic(name, change=plant, **TIMES[name])
    builder.classic("agent", change=plant, SeriesDescription="unknown")
    for kind, options in {
        "missing": {"skip": (3,)},
        "uneven": {"positions": lambda k: k + 0.4 * (k > 5)},
        "scout": {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]},
    }.items():
        Builder(tmp_path / "in" / kind).classic("s", change=plant, **{**TIMES["t1"], **options})
    mixed = Builder(tmp_path / "in" / "mixed")
    mixed.classic("a", change=plant, **TIMES["t1"])
    mixed.classic("b", **TIMES["t2"])
    caplog.set_level(logging.DEBUG)
    caplog.clear()  # pydicom quoted the values as they were planted
    capfd.readouterr()
    text = [repr(find_studies(tmp_path / "in"))]
    text += [CliRunner().invoke(app, ["inspect", str(tmp_path / "in"), *more]).output for more in ([], ["--json"])]
    assert "study-" in text[1] and "slices are missing" in text[1]
    prepare(tmp_path / "in", tiny(), tmp_path / "out" / "cohort", jobs=1)
    made = reconstruct(tmp_path / "in", synthesiser(), tmp_path / "out" / "made", targets=["flair"], report=True)
    assert made.written
    text += [str(made.to_json()), caplog.text, *capfd.readouterr()]
    assert not [t for t in text if SECRET in t or "ID-4711" in t or builder.study in t]
    written = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert len(written) >= 5
    secrets = [SECRET.encode(), b"ID-4711", builder.study.encode(), builder.frame.encode()]
    assert not [file for file in written for secret in secrets if secret in file.read_bytes()]


def test_volumes_in_two_frames_of_reference_are_no_study_to_work_on(tmp_path: Path) -> None:
    builder = study(tmp_path / "in", "t1")
    builder.frame = generate_uid()
    builder.classic("t2", **TIMES["t2"])
    with pytest.raises(InputError) as error:
        reconstruct(tmp_path / "in", synthesiser(), tmp_path / "out", targets=["flair"])
    assert "different frames of reference" in error.value.problems[0].what


def test_real_dicom_goes_through(real_data: Callable[[str], Path]) -> None:
    found = inspect(real_data("dicom"), jobs=1)
    assert [tuple(one.images) for one in found.usable] == [("t1",)]
    assert len(found.failed) == 1 and found.layout == "dicom"
