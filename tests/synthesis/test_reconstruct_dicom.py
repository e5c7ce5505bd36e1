"""DICOM in, DICOM out: a synthesis goes back into the study that it came from."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest

import medmae
from medmae.cohort.layouts import find_studies
from medmae.errors import InputError
from medmae.imaging.dicom.finding import find_series
from medmae.imaging.dicom_out.exporting import on_disk
from medmae.imaging.nifti import read_nifti
from medmae.synthesis.reconstruct import reconstruct
from medmae.synthesis.trust import Errors, calibrate
from tests.cohort.test_dicom import SECRET, TIMES, plant, study, synthesiser
from tests.imaging.dicom.build import Builder, phantom
from tests.imaging.dicom_out.test_writing import PATIENT_MODULE
from tests.synthesis.test_predicting import model_of


def zipped(folder: Path) -> Path:
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*.dcm")):
            archive.write(file, file.relative_to(folder))
    return folder.with_suffix(".zip")


@pytest.mark.parametrize("packed", [False, True])
def test_a_synthesis_is_a_series_of_the_patients_own_study(tmp_path: Path, packed: bool) -> None:
    study(tmp_path / "in", "t1", "t2")
    given = zipped(tmp_path / "in") if packed else tmp_path / "in"
    made = reconstruct(given, synthesiser(), tmp_path / "dicom", targets=["flair"], format="dicom")
    plain = reconstruct(given, synthesiser(), tmp_path / "nifti", targets=["flair"])
    (one,) = find_studies(given).studies
    (folder,) = made.written
    assert folder.name == f"{one.id}_flair" and json.loads(folder.with_suffix(".json").read_text())["synthetic"]
    (series,), problems = find_series(folder)
    assert series.synthetic and not problems
    assert series.study_uid == one.images["t1"].study_uid and series.frame_uid == one.images["t1"].frame_uid  # type: ignore[union-attr]
    back, expected = medmae.read_image(folder), read_nifti(plain.written[0])
    inside = np.argwhere(expected.array > 0)[::50]
    there = np.rint(back.grid.mm_to_voxel(expected.grid.voxel_to_mm(inside))).astype(int)
    apart = np.linalg.norm(back.grid.voxel_to_mm(there) - expected.grid.voxel_to_mm(inside), axis=1)
    assert apart.max() < 0.1
    np.testing.assert_allclose(
        back.array[tuple(there.T)], expected.array[tuple(inside.T)], atol=expected.array.max() / 2**14
    )
    header = pydicom.dcmread(sorted(folder.iterdir())[0])
    assert header.SeriesDescription.startswith("SYNTHETIC FLAIR") and header.SyntheticData == "YES"
    assert header.SeriesNumber == 101


def test_a_heat_map_is_a_series_of_its_own(tmp_path: Path) -> None:
    from tests.synthesis.fakes import plan
    from tests.synthesis.test_predicting import Expecting

    study(tmp_path / "in", "t1", "t2")
    model = Expecting(plan(overlap=0.0), {"t1": 1.0})
    made = reconstruct(tmp_path / "in", model, tmp_path / "o", targets=["flair"], format="dicom", anomaly=True)
    assert [path.name.partition("_")[2] for path in made.written] == ["flair", "anomaly"]
    numbers = [pydicom.dcmread(next(path.iterdir())).SeriesNumber for path in made.written]
    assert numbers == [101, 102]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_planted_name_stays_in_the_patient_module_of_all_that_is_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    builder = Builder(tmp_path / "in")
    for name in ("t1", "t2"):
        builder.classic(name, phantom((20, 16, 12)), change=plant, **TIMES[name])
    model, errors = model_of("bm-mae"), Errors()
    rng = np.random.default_rng(0)
    for subject in "ab":
        errors.add(subject, "flair", 2, rng.random(4000), rng.random(4000))
    model.metadata["calibration"] = calibrate(errors).to_json()
    caplog.set_level(0)
    caplog.clear()  # pydicom quoted the values as they were planted
    capfd.readouterr()
    out = tmp_path / "out"
    made = reconstruct(
        tmp_path / "in", model, out, targets=["flair"], format="dicom", report=True, anomaly=True, device="cpu"
    )
    assert sorted(path.name.partition("_")[2] for path in made.written) == ["anomaly", "flair", "flair_uncertainty"]
    assert SECRET not in "".join([str(made), str(made.to_json()), caplog.text, *capfd.readouterr()])
    files = [file for file in out.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".dcm", ".json", ".html"}
    for file in files:
        assert SECRET not in str(file)
        if file.suffix == ".dcm":
            header = pydicom.dcmread(file)
            assert SECRET in str(header.PatientName)
            for name in PATIENT_MODULE:
                if name in header:
                    delattr(header, name)
            header.save_as(file)
        assert SECRET.lower().encode() not in file.read_bytes().lower(), file.name


def test_dicom_comes_out_only_where_it_goes_in(tmp_path: Path) -> None:
    study(tmp_path / "in", "t1", "t2")
    (folder,) = reconstruct(tmp_path / "in", synthesiser(), tmp_path / "n", targets=["flair"]).written[:1]
    image = tmp_path / "case" / "t1.nii.gz"
    image.parent.mkdir()
    image.write_bytes(folder.read_bytes())
    with pytest.raises(InputError) as error:
        reconstruct(tmp_path / "case", synthesiser(), tmp_path / "o", targets=["flair"], format="dicom")
    (problem,) = error.value.problems
    assert "only where DICOM goes in" in problem.what and "nifti" in (problem.remedy or "")
    assert not list((tmp_path / "o").iterdir())
    with pytest.raises(InputError, match="nifti or dicom"):
        reconstruct(tmp_path / "in", synthesiser(), tmp_path / "o", format="nrrd")


def test_members_of_a_zip_are_on_disk_only_for_as_long_as_they_are_read(tmp_path: Path) -> None:
    study(tmp_path / "in", "t1")
    (one,) = find_studies(zipped(tmp_path / "in")).studies
    series = {"t1": one.images["t1"]}
    with on_disk(series) as files:  # type: ignore[arg-type]
        assert len(files["t1"]) == len(list((tmp_path / "in").rglob("*.dcm"))) and all(
            pydicom.dcmread(f).Modality == "MR" for f in files["t1"]
        )
    assert not any(f.exists() for f in files["t1"])
