"""Preparing a cohort: right values, only what is new, whole after every kind of interruption."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from medmae.cohort import building
from medmae.cohort.store import Cohort, Prepared, is_cohort, prepare
from medmae.errors import InputError, MedmaeError
from medmae.plan import Plan

ROOT = Path(__file__).parents[2]


@pytest.fixture
def plan() -> Plan:
    return Plan.load({"name": "test", "method": "bm-mae", "modalities": ["t1", "t1c", "t2", "flair"]})


@pytest.fixture
def scans(tmp_path: Path, scan: Any) -> Path:
    """Three studies, one without flair, one with a label."""
    root = tmp_path / "scans"
    for number, name in enumerate(("a", "b", "c")):
        scan(root / name / "t1.nii.gz", seed=number)
        if name != "b":
            scan(root / name / "flair.nii.gz", seed=number + 10)
    label = np.zeros((14, 16, 12), np.uint8)
    label[5:8, 6:9, 4:6] = 2
    scan(root / "a" / "seg.nii.gz", label)
    return root


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_ino)
        for path in sorted(folder.rglob("*"))
        if path.name != ".lock"
    }


def usable(cohort: Path) -> dict[str, tuple[str, ...]]:
    """Open a cohort and read every voxel of it."""
    opened = Cohort.open(cohort)
    for study in opened.studies:
        assert study.check() == []
    return {study.id: study.modalities for study in opened.studies}


def test_prepared_values_are_the_scan_s_normalised_over_its_non_zero_voxels(
    scans: Path, tmp_path: Path, plan: Plan
) -> None:
    prepare(scans, plan, tmp_path / "out", jobs=1)
    study = next(s for s in Cohort.open(tmp_path / "out").studies if s.id == "a")
    raw = np.asanyarray(nib.load(scans / "a" / "t1.nii.gz").dataobj).astype(np.float64)
    where = np.argwhere(raw != 0)
    low, high = where.min(axis=0), where.max(axis=0) + 1
    raw = raw[tuple(slice(x, y) for x, y in zip(low, high, strict=True))]  # an ellipsoid: the same box in all images
    expected = np.where(raw != 0, (raw - raw[raw != 0].mean()) / raw[raw != 0].std(), 0)
    np.testing.assert_allclose(study.array("t1"), expected, atol=2e-3)
    np.testing.assert_allclose(study.affine[:3, 3], low)
    assert study.scales["t1"].mean == pytest.approx(raw[raw != 0].mean())
    assert study.native["t1"].shape == (14, 16, 12)
    label = np.asanyarray(nib.load(scans / "a" / "seg.nii.gz").dataobj)
    np.testing.assert_array_equal(study.label("seg"), label[tuple(slice(x, y) for x, y in zip(low, high, strict=True))])


def test_labels_and_images_stay_together_on_another_spacing_and_orientation(
    tmp_path: Path, scan: Any, plan: Plan
) -> None:
    image = np.zeros((20, 24, 16), np.float32)
    image[4:16, 6:18, 4:12] = np.random.default_rng(0).uniform(100, 120, (12, 12, 8))
    image[8:12, 8:14, 6:10] = 400
    affine = np.diag([-2.0, -2.0, 2.0, 1.0])  # LPS, 2 mm
    scan(tmp_path / "scans" / "x" / "t1.nii.gz", image, affine)
    scan(tmp_path / "scans" / "x" / "seg.nii.gz", (image == 400).astype(np.uint8), affine)
    prepare(tmp_path / "scans", plan, tmp_path / "out", jobs=1)
    (study,) = Cohort.open(tmp_path / "out").studies
    assert study.grid.spacing == pytest.approx((1, 1, 1))
    assert study.grid.orientation == "RAS"
    bright, label = study.array("t1") > 1.2, study.label("seg") == 1
    assert 2 * (bright & label).sum() / (bright.sum() + label.sum()) > 0.95
    assert label.sum() == pytest.approx((image == 400).sum() * 8, rel=0.05)


def test_the_result_and_the_cohort_say_what_was_done(scans: Path, tmp_path: Path, plan: Plan) -> None:
    calls: list[tuple[int, int, str]] = []
    result = prepare(scans, plan, tmp_path / "out", jobs=1, on_progress=lambda *facts: calls.append(facts))
    assert (result.done, result.skipped, result.failed) == (["a", "b", "c"], [], [])
    assert sorted(calls) == [(1, 3, "a"), (2, 3, "b"), (3, 3, "c")]
    assert is_cohort(tmp_path / "out")
    cohort = Cohort.open(tmp_path / "out")
    assert cohort.complete
    assert cohort.modalities == ("t1", "flair")
    assert cohort.image == plan.image
    means = [study.scales["t1"].mean for study in cohort.studies]
    assert cohort.typical_scales()["t1"]["mean"] == pytest.approx(np.median(means))
    json.dumps(result.to_json())


def test_processes_give_what_one_process_gives(scans: Path, tmp_path: Path, plan: Plan) -> None:
    prepare(scans, plan, tmp_path / "one", jobs=1)
    prepare(scans, plan, tmp_path / "two", jobs=2)
    one, two = Cohort.open(tmp_path / "one"), Cohort.open(tmp_path / "two")
    assert one.fingerprint == two.fingerprint
    for left, right in zip(one.studies, two.studies, strict=True):
        assert (left.id, left.modalities, left.labels) == (right.id, right.modalities, right.labels)
        for modality in left.modalities:
            np.testing.assert_array_equal(left.array(modality), right.array(modality))


# --- again and again -----------------------------------------------------------------------------------------------


def test_a_second_run_writes_nothing(scans: Path, tmp_path: Path, plan: Plan) -> None:
    prepare(scans, plan, tmp_path / "out", jobs=1)
    before = state(tmp_path / "out")
    result = prepare(scans, plan, tmp_path / "out", jobs=1)
    assert (result.done, result.skipped) == ([], ["a", "b", "c"])
    assert state(tmp_path / "out") == before


def test_another_crop_size_in_the_plan_prepares_nothing_anew(scans: Path, tmp_path: Path, plan: Plan) -> None:
    prepare(scans, plan, tmp_path / "out", jobs=1)
    other = Plan.load(plan, ["image.crop=[64,64,64]"])
    assert prepare(scans, other, tmp_path / "out", jobs=1).done == []


def test_a_file_that_was_only_touched_or_copied_counts_as_unchanged(scans: Path, tmp_path: Path, plan: Plan) -> None:
    prepare(scans, plan, tmp_path / "out", jobs=1)
    os.utime(scans / "a" / "t1.nii.gz", (1, 1))
    shutil.copytree(scans, tmp_path / "moved")
    before = state(tmp_path / "out" / "studies" / "a")
    assert prepare(tmp_path / "moved", plan, tmp_path / "out", jobs=1).skipped == ["a", "b", "c"]
    after = state(tmp_path / "out" / "studies" / "a")
    assert {name for name in after if after[name] != before[name]} == {"study.json"}  # the new times, no voxels
    noted = state(tmp_path / "out")
    prepare(tmp_path / "moved", plan, tmp_path / "out", jobs=1)
    assert state(tmp_path / "out") == noted


def test_only_new_and_changed_studies_are_prepared(scans: Path, tmp_path: Path, plan: Plan, scan: Any) -> None:
    prepare(scans, plan, tmp_path / "out", jobs=1)
    first = Cohort.open(tmp_path / "out").fingerprint
    scan(scans / "a" / "t1.nii.gz", seed=99)
    scan(scans / "b" / "flair.nii.gz", seed=98)
    scan(scans / "d" / "t1.nii.gz", seed=97)
    before = state(tmp_path / "out" / "studies" / "c")
    result = prepare(scans, plan, tmp_path / "out", jobs=1)
    assert (result.done, result.skipped) == (["a", "b", "d"], ["c"])
    assert state(tmp_path / "out" / "studies" / "c") == before
    assert usable(tmp_path / "out")["b"] == ("t1", "flair")
    assert Cohort.open(tmp_path / "out").fingerprint != first


def test_studies_that_are_gone_leave_the_list_but_not_the_disk_and_come_back_for_free(
    scans: Path, tmp_path: Path, plan: Plan
) -> None:
    prepare(scans, plan, tmp_path / "out", jobs=1)
    (scans / "b").rename(tmp_path / "b")
    result = prepare(scans, plan, tmp_path / "out", jobs=1)
    assert result.removed == ["b"]
    assert any("not in DATA any more" in problem.what for problem in result.warnings)
    assert set(usable(tmp_path / "out")) == {"a", "c"}
    (tmp_path / "b").rename(scans / "b")
    assert prepare(scans, plan, tmp_path / "out", jobs=1).done == []
    assert set(usable(tmp_path / "out")) == {"a", "b", "c"}


def test_plans_of_different_modalities_share_a_cohort_without_taking_turns(
    scans: Path, tmp_path: Path, plan: Plan
) -> None:
    only_t1 = Plan.load(plan, ['modalities=["t1"]'])
    result = prepare(scans, only_t1, tmp_path / "out", jobs=1)
    assert Cohort.open(tmp_path / "out").modalities == ("t1",)
    assert any("2 studies have flair" in problem.what for problem in result.warnings)
    assert prepare(scans, plan, tmp_path / "out", jobs=1).done == ["a", "c"]
    assert prepare(scans, only_t1, tmp_path / "out", jobs=1).done == []
    assert Cohort.open(tmp_path / "out").modalities == ("t1", "flair")


def test_another_image_space_is_refused_with_what_differs(scans: Path, tmp_path: Path, plan: Plan) -> None:
    prepare(scans, plan, tmp_path / "out", jobs=1)
    before = state(tmp_path / "out")
    with pytest.raises(InputError) as error:
        prepare(scans, Plan.load(plan, ["image.spacing=[2,2,2]"]), tmp_path / "out", jobs=1)
    assert error.value.problem.field == "image.spacing"
    assert "-o" in str(error.value.problem.remedy)
    assert state(tmp_path / "out") == before


def test_a_folder_with_other_things_in_it_is_left_alone(scans: Path, tmp_path: Path, plan: Plan) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"thesis\.tex"):
        prepare(scans, plan, tmp_path / "mine", jobs=1)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


# --- bad studies ---------------------------------------------------------------------------------------------------


def broken(scans: Path, scan: Any) -> None:
    nan = np.ones((8, 8, 8), np.float32)
    nan[0] = np.nan
    scan(scans / "bad_nan" / "t1.nii.gz", nan)
    whole = (scans / "a" / "t1.nii.gz").read_bytes()
    (scans / "bad_gzip").mkdir()
    (scans / "bad_gzip" / "t1.nii.gz").write_bytes(whole[:-200])
    scan(scans / "bad_grid" / "t1.nii.gz")
    scan(scans / "bad_grid" / "flair.nii.gz", affine=np.array(nib.affines.from_matvec(np.eye(3), [400, 0, 0])))
    scan(scans / "bad_modality" / "ct.nii.gz")
    scan(scans / "bad_double" / "t1.nii.gz")
    scan(scans / "bad_double" / "T1w.nii.gz")


@pytest.mark.parametrize("jobs", [1, 2])
def test_bad_studies_are_named_with_their_reasons_and_stop_nobody(
    scans: Path, tmp_path: Path, plan: Plan, scan: Any, jobs: int
) -> None:
    broken(scans, scan)
    result = prepare(scans, plan, tmp_path / "out", jobs=jobs)
    assert result.done == ["a", "b", "c"]
    assert result.failed_ids == ["bad_double", "bad_grid", "bad_gzip", "bad_modality", "bad_nan"]
    told = {str(problem.where).split(": ")[0]: str(problem) for problem in result.failed}
    assert "not finite" in told["bad_nan"]
    assert "truncated" in told["bad_gzip"]
    assert "same place" in told["bad_grid"]
    assert "none of its modalities" in told["bad_modality"]
    assert "T1w.nii.gz" in told["bad_double"]
    assert set(usable(tmp_path / "out")) == {"a", "b", "c"}


def test_a_plan_that_knows_none_of_the_modalities_is_refused_before_anything_is_written(
    scans: Path, tmp_path: Path, plan: Plan
) -> None:
    with pytest.raises(InputError, match="modalities") as error:
        prepare(scans, Plan.load(plan, ['modalities=["pet"]']), tmp_path / "out", jobs=1)
    assert {problem.where for problem in error.value.problems} == {"a", "b", "c"}
    assert not (tmp_path / "out").exists()


def test_a_study_that_turned_bad_is_no_longer_listed_until_it_is_mended(
    scans: Path, tmp_path: Path, plan: Plan, scan: Any
) -> None:
    prepare(scans, plan, tmp_path / "out", jobs=1)
    good = (scans / "a" / "t1.nii.gz").read_bytes()
    (scans / "a" / "t1.nii.gz").write_bytes(good[:100])
    assert prepare(scans, plan, tmp_path / "out", jobs=1).failed_ids == ["a"]
    assert set(usable(tmp_path / "out")) == {"b", "c"}
    (scans / "a" / "t1.nii.gz").write_bytes(good)
    prepare(scans, plan, tmp_path / "out", jobs=1)
    assert set(usable(tmp_path / "out")) == {"a", "b", "c"}


def test_a_bad_label_is_left_out_with_a_warning_and_tried_again_when_it_changes(
    scans: Path, tmp_path: Path, plan: Plan, scan: Any
) -> None:
    scan(scans / "b" / "seg.nii.gz", np.full((14, 16, 12), 0.5, np.float32))
    (scans / "c" / "seg.nii.gz").touch()
    result = prepare(scans, plan, tmp_path / "out", jobs=1)
    assert any("whole numbers" in problem.what for problem in result.warnings)
    assert prepare(scans, plan, tmp_path / "out", jobs=1).done == []
    scan(scans / "b" / "seg.nii.gz", np.ones((14, 16, 12), np.uint8))
    assert prepare(scans, plan, tmp_path / "out", jobs=1).done == ["b"]
    assert next(s for s in Cohort.open(tmp_path / "out").studies if s.id == "b").labels == ("seg",)


def test_values_that_float16_cannot_hold_are_refused_rather_than_stored_as_infinity(
    tmp_path: Path, scan: Any, plan: Plan
) -> None:
    scan(tmp_path / "s" / "big" / "t1.nii.gz", np.full((8, 8, 8), 1e6, np.float32) * np.linspace(0, 1, 8))
    raw = Plan.load(plan, ["image.intensity.scheme=none"])
    (problem,) = prepare(tmp_path / "s", raw, tmp_path / "out", jobs=1).failed
    assert "float16" in problem.what
    assert "zscore" in str(problem.remedy)


# --- interruptions -------------------------------------------------------------------------------------------------

SLOW = """
import sys, time
from pathlib import Path
from medmae.cohort import building, store
from medmae.plan import Plan

def slowly(path, data, write=building.write_bytes):
    write(path, data)
    time.sleep(0.15)

building.write_bytes = slowly
plan = Plan.load({"name": "test", "method": "bm-mae", "modalities": ["t1", "t1c", "t2", "flair"]})
store.prepare(sys.argv[1], plan, sys.argv[2], jobs=1, on_progress=lambda *facts: print(*facts, flush=True))
"""


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Callable[[Path, Path], subprocess.Popen[str]]]:
    """Start a prepare that takes its time in a process of its own."""
    started = []

    def start(scans: Path, out: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", SLOW, str(scans), str(out)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("moment", [0.05, 0.2, 0.4])
def test_kill_9_leaves_whole_studies_only_and_the_next_run_continues(
    scans: Path, tmp_path: Path, plan: Plan, running: Any, moment: float
) -> None:
    out = tmp_path / "out"
    process = running(scans, out)
    assert process.stdout.readline().startswith("1 3 a")
    time.sleep(moment)  # somewhere inside the second or third study
    process.send_signal(signal.SIGKILL)
    process.wait()
    between = usable(out)
    assert "a" in between
    assert not Cohort.open(out).complete
    kept = state(out / "studies" / "a")
    result = prepare(scans, plan, out, jobs=1)
    assert "a" in result.skipped
    assert state(out / "studies" / "a") == kept
    assert sorted(result.done + result.skipped) == ["a", "b", "c"]
    assert set(usable(out)) == {"a", "b", "c"}
    assert Cohort.open(out).complete
    assert not (out / ".building").exists()


def test_two_runs_at_once_do_not_touch_each_other(scans: Path, tmp_path: Path, plan: Plan, running: Any) -> None:
    out = tmp_path / "out"
    process = running(scans, out)
    assert process.stdout.readline().startswith("1 3 a")
    with pytest.raises(InputError, match="another"):
        prepare(scans, plan, out, jobs=1)
    assert process.wait(timeout=60) == 0
    assert set(usable(out)) == {"a", "b", "c"}


def test_a_full_disk_says_so_and_what_was_prepared_stays(
    scans: Path, tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, write, files = tmp_path / "out", building.write_bytes, []

    def fills_up(path: Path, data: bytes) -> None:
        files.append(path)
        if len(files) > 4:  # inside the second study
            path.write_bytes(data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    monkeypatch.setattr(building, "write_bytes", fills_up)
    with pytest.raises(MedmaeError, match="disk is full"):
        prepare(scans, plan, out, jobs=1)
    monkeypatch.undo()
    assert "a" in usable(out)
    assert prepare(scans, plan, out, jobs=1).skipped == list(dict.fromkeys(["a", *usable(out)]))[:2]
    assert set(usable(out)) == {"a", "b", "c"}


def test_a_file_in_the_way_and_a_missing_permission_are_told(scans: Path, tmp_path: Path, plan: Plan) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(MedmaeError) as error:
            prepare(scans, plan, out, jobs=1)
        assert error.value.problem.remedy


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write everywhere")
def test_no_permission_to_write_is_told(scans: Path, tmp_path: Path, plan: Plan) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(MedmaeError, match="permission"):
        prepare(scans, plan, tmp_path / "closed" / "out", jobs=1)


def test_a_script_without_a_main_guard_is_told_what_to_do(scans: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from medmae.cohort.store import prepare\n"
        "from medmae.plan import Plan\n"
        'plan = Plan.load({"name": "test", "method": "bm-mae", "modalities": ["t1"]})\n'
        f"result = prepare({str(scans)!r}, plan, {str(tmp_path / 'out')!r}, jobs=2)\n"
        "print(*result.failed, sep=chr(10))\n"
    )
    ran = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert "__main__" in ran.stdout


def test_a_damaged_store_is_mended_by_the_next_run(scans: Path, tmp_path: Path, plan: Plan) -> None:
    out = tmp_path / "out"
    prepare(scans, plan, out, jobs=1)
    stored = out / "studies" / "a" / "t1.b2nd"
    stored.write_bytes(stored.read_bytes()[:50])
    (out / "studies" / "b" / "study.json").write_text("{")
    (out / "studies" / "c" / "flair.b2nd").unlink()
    assert prepare(scans, plan, out, jobs=1).done == ["a", "b", "c"]
    assert set(usable(out)) == {"a", "b", "c"}


def test_a_damaged_list_says_how_to_mend_it_and_the_remedy_works(scans: Path, tmp_path: Path, plan: Plan) -> None:
    out = tmp_path / "out"
    prepare(scans, plan, out, jobs=1)
    (out / "cohort.json").write_text("{")
    for call in (lambda: Cohort.open(out), lambda: prepare(scans, plan, out, jobs=1)):
        with pytest.raises(InputError, match=r"cohort\.json") as error:
            call()
        assert "elete" in str(error.value.problem.remedy)
    (out / "cohort.json").unlink()
    assert prepare(scans, plan, out, jobs=1).skipped == ["a", "b", "c"]


def test_neither_paths_nor_header_texts_are_in_the_store(scans: Path, tmp_path: Path, plan: Plan) -> None:
    image = nib.load(scans / "a" / "t1.nii.gz")
    image.header["descrip"] = b"DOE^JANE"
    nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), image.affine, image.header), scans / "a" / "t1.nii.gz")
    prepare(scans, plan, tmp_path / "out", jobs=1)
    for path in (tmp_path / "out").rglob("*.json"):
        assert "DOE" not in path.read_text()
        assert str(tmp_path) not in path.read_text()


@pytest.mark.slow
def test_real_scans_are_prepared_with_their_labels(
    real_data: Callable[[str], Path], tmp_path: Path, plan: Plan
) -> None:
    result: Prepared = prepare(real_data("brain_mr_open"), plan, tmp_path / "out")
    assert len(result.done) == 8
    assert result.failed == []
    cohort = Cohort.open(tmp_path / "out")
    for study in cohort.studies:
        brain = study.label("brainmask") > 0
        for modality in study.modalities:
            values = study.array(modality).astype(np.float32)
            inside = values != 0
            assert 2 * (inside & brain).sum() / (inside.sum() + brain.sum()) > 0.97
            assert abs(values[inside].mean()) < 0.02
            assert values[inside].std() == pytest.approx(1, abs=0.02)
