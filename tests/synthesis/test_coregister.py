"""Studies whose images disagree about where the head is: registered on request, refused otherwise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import medmae
from medmae.cohort.prepared import Cohort
from medmae.errors import InputError
from medmae.imaging.geometry import resample
from medmae.imaging.nifti import read_nifti, write_nifti
from medmae.imaging.volume import Volume
from medmae.synthesis.reconstruct import reconstruct, reconstruct_volumes
from tests.phantom import corners_of, made_up_head, motion, rescanned
from tests.synthesis.fakes import Linear, plan

MODEL = Linear(plan(("t1", "t2", "flair"), spacing=[4.0, 4.0, 4.0]), {"t2": 1.0})  # FLAIR is T2, normalised


@pytest.fixture(scope="module")
def head() -> dict[str, Volume]:
    return made_up_head()


@pytest.fixture(scope="module")
def study(head: dict[str, Volume], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """T1 as it was, T2 after the head was moved by 12 degrees and 18 mm."""
    folder = tmp_path_factory.mktemp("scans") / "patient"
    move = motion(12, 18, 5, corners_of(head["t1"]).mean(axis=0))
    write_nifti(head["t1"], folder / "t1.nii.gz")
    write_nifti(rescanned(head["t2"], move, (2.0, 2.0, 4.0), 3), folder / "t2.nii.gz")
    return folder


def likeness(made: Volume, truth: Volume) -> float:
    """Correlation inside the head, on the grid of what was made."""
    true = resample(truth, made.grid).array
    inside = true > 30
    return float(np.corrcoef(made.array[inside], true[inside])[0, 1])


def test_a_synthesis_from_moved_images_lies_where_the_reference_has_the_head(head, study, tmp_path):
    done = reconstruct(study, MODEL, tmp_path / "with", coregister=True, report=True, device="cpu")
    assert not done.failed
    made = read_nifti(done.written[0])
    np.testing.assert_allclose(made.affine, head["t1"].affine, atol=1e-5)
    plain = read_nifti(reconstruct(study, MODEL, tmp_path / "without", device="cpu").written[0])
    assert likeness(made, head["t2"]) > 0.8 > 0.6 > likeness(plain, head["t2"])  # a model of 4 mm blurs
    car = json.loads((tmp_path / "with" / "patient_flair.json").read_text())
    facts = car["sources"]["t2"]["registration"]
    assert abs(facts["rotation_deg"] - 12) < 1 and abs(facts["translation_mm"] - 18) < 2
    assert facts["reference"] == "t1" and facts["moved"] and facts["information"] > facts["information_before"]
    assert "registration" not in car["sources"]["t1"]
    assert (car["geometry"]["grid_of"], car["geometry"]["coregistered"]) == ("t1", True)
    assert "registered: " in (tmp_path / "with" / "patient.html").read_text()


def test_the_synthesis_is_on_the_grid_of_the_chosen_image(head, study, tmp_path):
    for options in ({}, {"coregister": True}):
        done = reconstruct(study, MODEL, tmp_path, reference="T2w", device="cpu", **options)
        made, t2 = read_nifti(done.written[0]), read_nifti(study / "t2.nii.gz")
        np.testing.assert_allclose(made.affine, t2.affine, atol=1e-5)
        assert made.shape == t2.shape
        assert likeness(made, t2) > 0.9
        assert json.loads(done.written[0].with_name("patient_flair.json").read_text())["geometry"]["grid_of"] == "t2"


def test_a_study_without_the_reference_or_that_cannot_be_registered_is_named_and_the_others_are_written(
    head, study, tmp_path
):
    bad = tmp_path / "scans" / "bad"
    write_nifti(head["t1"], bad / "t1.nii.gz")
    write_nifti(head["t2"].with_array(np.zeros_like(head["t2"].array)), bad / "t2.nii.gz")
    done = reconstruct([bad, study], MODEL, tmp_path / "out", coregister=True, device="cpu")
    assert [path.name for path in done.written] == ["patient_flair.nii.gz"]
    assert [problem.where for problem in done.failed] == ["bad: t2"]
    with pytest.raises(InputError) as error:
        reconstruct(study, MODEL, tmp_path / "out", reference="pd", device="cpu")
    assert error.value.problems[0].what == "the study lacks the reference"


def test_other_frames_of_reference_are_refused_with_the_remedy_and_without_their_uids(head):
    volumes = {"t1": replace(head["t1"], frame="1.2.840.1"), "t2": replace(head["t2"], frame="1.2.840.2")}
    with pytest.raises(InputError, match="different frames of reference") as error:
        reconstruct_volumes(MODEL, volumes, ["flair"], device="cpu")
    assert "--coregister" in str(error.value.problems[0])
    assert "1.2.840" not in str(error.value.problems[0])
    both = {"t1": volumes["t1"], "flair": replace(head["flair"], frame="1.2.840.2")}
    with pytest.raises(InputError, match="different frames of reference"):  # a grid in another world is no place either
        reconstruct_volumes(MODEL, both, ["flair"], reference="flair", device="cpu")
    done = medmae.coregister(volumes)
    made = reconstruct_volumes(MODEL, done.volumes, ["flair"], reference="t2", device="cpu")["flair"]
    assert made.volume.frame == "1.2.840.1" and made.like == "t2"


def test_prepare_registers_on_request_and_labels_move_along(head, study, tmp_path):
    data = tmp_path / "data" / "patient"
    t2 = read_nifti(study / "t2.nii.gz")
    lesion = Volume((t2.array > 940).astype(np.uint8), t2.affine)
    write_nifti(head["t1"], data / "t1.nii.gz")
    write_nifti(t2, data / "t2.nii.gz")
    write_nifti(lesion, data / "seg.nii.gz")
    own = Volume(np.ones((9, 9, 9), np.uint8), np.diag([9.0, 9, 9, 1]))
    write_nifti(own, data / "brainmask.nii.gz")
    options = {"jobs": 1}
    done = medmae.prepare(tmp_path / "data", MODEL.plan, tmp_path / "cohort", coregister=True, **options)
    assert done.done == ["patient"]
    assert any("brainmask is on the grid of no image" in str(problem) for problem in done.warnings)
    (prepared,) = Cohort.open(done.cohort_path).studies
    made = Volume(prepared.array("t2").astype(np.float32), prepared.affine)
    truth = resample(head["t2"], prepared.grid).array
    inside = truth > 30
    assert np.corrcoef(made.array[inside], truth[inside])[0, 1] > 0.9
    csf = prepared.label("seg") != 0
    assert prepared.labels == ("seg",)
    assert truth[csf].mean() > 1.5 * truth[inside & ~csf].mean()
    assert prepared.record["registration"]["registrations"]["t2"]["moved"]
    again = medmae.prepare(tmp_path / "data", MODEL.plan, tmp_path / "cohort", coregister=True, **options)
    assert again.skipped == ["patient"]
    plain = medmae.prepare(tmp_path / "data", MODEL.plan, tmp_path / "cohort", **options)
    assert plain.done == ["patient"]  # a cohort is what was asked for last


def test_training_on_a_prepared_cohort_cannot_register_it_any_more(tmp_path):
    (tmp_path / "studies").mkdir()
    (tmp_path / "cohort.json").write_text("{}")
    with pytest.raises(InputError, match="on one grid already"):
        medmae.pretrain(tmp_path, "bm-mae-tiny", tmp_path / "run", coregister=True, device="cpu", progress=False)
