"""Everything that is wrong with a cohort is found in one pass, by study and file, and nothing is changed."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from medmae.cohort.integrity import inspect
from medmae.errors import InputError


def bad_header(path: Path, change: Callable[[Any], None]) -> None:
    """Change the NIfTI header in an uncompressed file behind nibabel's back."""
    image = nib.load(path)
    array = np.asanyarray(image.dataobj)
    header = image.header.copy()
    change(header)
    path.write_bytes(header.binaryblock + b"\0" * 4 + array.tobytes(order="F"))


def no_place(header: Any) -> None:
    header["sform_code"], header["qform_code"] = 1, 0
    header["srow_x"] = header["srow_y"] = (1, 0, 0, 0)
    header["srow_z"] = (0, 0, 1, 0)


def absurd(header: Any) -> None:
    header["sform_code"], header["qform_code"] = 1, 0
    header["srow_x"], header["srow_y"], header["srow_z"] = (900, 0, 0, 0), (0, 900, 0, 0), (0, 0, 900, 0)


@pytest.fixture
def zoo(tmp_path: Path, scan: Any) -> Path:
    """One study of each kind of trouble, and two good ones."""
    root = tmp_path / "zoo"
    base = np.asanyarray(nib.load(scan(tmp_path / "base.nii.gz")).dataobj).astype(np.float32)
    for name in ("good1", "good2"):
        scan(root / name / "t1.nii.gz")
        scan(root / name / "flair.nii.gz", seed=1)
    whole = (root / "good1" / "t1.nii.gz").read_bytes()
    (root / "truncated").mkdir()
    (root / "truncated" / "t1.nii.gz").write_bytes(whole[: len(whole) // 2])
    (root / "text").mkdir()
    (root / "text" / "t1.nii.gz").write_text("no scan at all")
    (root / "text" / "t2.nii").write_text("nor this, though it is long enough to hold a header. " * 20)
    (root / "zero_bytes").mkdir()
    (root / "zero_bytes" / "t1.nii.gz").touch()
    nan, inf = base.copy(), base.copy()
    nan[3, 3, 3] = np.nan
    inf[3, 3, 3] = np.inf
    scan(root / "nan" / "t1.nii.gz", nan)
    scan(root / "inf" / "t1.nii.gz", inf)
    scan(root / "all_zero" / "t1.nii.gz", np.zeros((8, 8, 8), np.int16))
    scan(root / "many_volumes" / "t1.nii.gz", np.stack([base, base, base], axis=-1))
    scan(root / "singular" / "t1.nii", nan)
    bad_header(root / "singular" / "t1.nii", no_place)
    scan(root / "absurd" / "t1.nii")
    bad_header(root / "absurd" / "t1.nii", absurd)
    scan(root / "elsewhere" / "t1.nii.gz")
    scan(root / "elsewhere" / "flair.nii.gz", affine=np.array(nib.affines.from_matvec(np.eye(3), [500, 0, 0])))
    scan(root / "coarser" / "t1.nii.gz")
    scan(root / "coarser" / "flair.nii.gz", affine=np.diag([2.0, 2, 2, 1]), shape=(7, 8, 6))
    scan(root / "rounded" / "t1.nii.gz")
    scan(root / "rounded" / "flair.nii.gz", affine=np.array(nib.affines.from_matvec(np.eye(3) * 1.0001, [1e-3, 0, 0])))
    (root / "dangling").mkdir()
    (root / "dangling" / "t1.nii.gz").symlink_to(root / "nowhere.nii.gz")
    scan(root / "fuzzy_label" / "t1.nii.gz")
    scan(root / "fuzzy_label" / "seg.nii.gz", base / 700)
    return root


FATAL = {
    "truncated": "truncated",
    "text": "NIfTI",
    "zero_bytes": "empty",
    "nan": "not finite",
    "inf": "not finite",
    "all_zero": "every voxel is 0",
    "many_volumes": "3",
    "singular": "singular",
    "absurd": "spacing",
    "elsewhere": "do not show the same place",
    "dangling": "nowhere",
}


def test_every_bad_study_is_found_in_one_pass_with_study_file_and_reason(zoo: Path) -> None:
    result = inspect(zoo, jobs=2)
    assert result.failed == sorted(FATAL)
    for study, reason in FATAL.items():
        told = [problem for problem in result.problems if (problem.where or "").startswith(f"{study}: ")]
        fatal = [problem for problem in told if problem.fatal]
        assert any(reason in str(problem) for problem in fatal), (study, [str(problem) for problem in told])
        assert all(str(zoo / study) in str(problem.where) for problem in fatal), study
        assert all(problem.remedy for problem in fatal), study
    assert {study.id for study in result.usable} == {"good1", "good2", "coarser", "rounded", "fuzzy_label"}


def test_both_files_of_a_study_and_both_faults_of_a_file_are_told(zoo: Path) -> None:
    told = [problem for problem in inspect(zoo).problems if problem.fatal]
    assert {Path(str(p.where)).name for p in told if str(p.where).startswith("text: ")} == {"t1.nii.gz", "t2.nii"}
    assert {p.field for p in told if str(p.where).startswith("singular: ")} >= {"voxels"}
    assert len([p for p in told if str(p.where).startswith("singular: ")]) == 2


def test_a_grid_of_its_own_in_the_same_place_is_a_warning_and_rounding_is_nothing(zoo: Path) -> None:
    problems = inspect(zoo).problems
    coarser = [problem for problem in problems if str(problem.where).startswith("coarser: ")]
    assert [(p.fatal, p.field) for p in coarser] == [(False, "grid")]
    assert "resampled" in coarser[0].what
    assert not [problem for problem in problems if str(problem.where).startswith("rounded: ")]


def test_a_bad_label_leaves_its_study_usable(zoo: Path) -> None:
    told = [p for p in inspect(zoo).problems if str(p.where).startswith("fuzzy_label: ")]
    assert [p.fatal for p in told] == [False]
    assert "whole numbers" in told[0].what
    assert "seg.nii.gz" in str(told[0].where)


def test_inspect_changes_nothing(zoo: Path) -> None:
    def state() -> dict[str, tuple[int, int]]:
        return {str(p): (p.lstat().st_mtime_ns, p.lstat().st_size) for p in sorted(zoo.rglob("*"))}

    before = state()
    inspect(zoo)
    assert state() == before


def test_the_summary_counts_what_is_there(zoo: Path) -> None:
    result = inspect(zoo)
    facts = json.loads(json.dumps(result.to_json()))
    assert facts["counts"]["studies"] == len(FATAL) + 5
    assert facts["counts"]["usable"] == 5
    assert facts["counts"]["modalities"] == {"t1": len(FATAL) + 5, "t2": 1, "flair": 5}
    assert facts["counts"]["labels"] == {"seg": 1}
    assert facts["shape"]["max"] == [14, 16, 12]
    assert facts["spacing_mm"]["max"] == [2, 2, 2]
    assert {study["id"] for study in facts["studies"] if not study["usable"]} == set(FATAL)
    assert "usable" in str(result)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may read everything")
def test_a_file_that_may_not_be_read_is_told_of(tmp_path: Path, scan: Any) -> None:
    scan(tmp_path / "a" / "t1.nii.gz").chmod(0)
    scan(tmp_path / "b" / "t1.nii.gz")
    (problem,) = inspect(tmp_path).problems
    assert "permission" in problem.what


def test_label_values_that_dataset_json_does_not_name_are_told(tmp_path: Path, scan: Any) -> None:
    label = np.zeros((14, 16, 12), np.uint8)
    label[4:6] = 1
    scan(tmp_path / "imagesTr" / "a_0000.nii.gz")
    scan(tmp_path / "labelsTr" / "a.nii.gz", label)
    scan(tmp_path / "imagesTr" / "b_0000.nii.gz")
    scan(tmp_path / "labelsTr" / "b.nii.gz", label * 7)
    (tmp_path / "dataset.json").write_text(
        json.dumps({"channel_names": {"0": "T1"}, "labels": {"background": 0, "x": 1}, "file_ending": ".nii.gz"})
    )
    (problem,) = inspect(tmp_path).problems
    assert str(problem.where).startswith("b: ")
    assert (problem.found, problem.expected) == ("7", "0, 1")


def test_a_label_in_another_place_is_suspicious(tmp_path: Path, scan: Any) -> None:
    scan(tmp_path / "a" / "t1.nii.gz")
    away = np.array(nib.affines.from_matvec(np.eye(3), [300, 0, 0]))
    scan(tmp_path / "a" / "seg.nii.gz", np.ones((14, 16, 12), np.uint8), away)
    (problem,) = inspect(tmp_path).problems
    assert "does not lie where the images are" in problem.what


def test_a_synthesised_image_is_told_of(tmp_path: Path, scan: Any) -> None:
    scan(tmp_path / "a_t1.nii.gz")
    scan(tmp_path / "a_flair.nii.gz")
    (tmp_path / "a_flair.json").write_text('{"synthetic": true}')
    (problem,) = inspect(tmp_path).problems
    assert "synthesised" in problem.what
    assert "a_flair" in str(problem.where)


def test_only_the_modalities_asked_for_are_looked_at(zoo: Path) -> None:
    result = inspect(zoo, modalities=["FLAIR"])
    assert result.modalities == {"flair": 5}
    assert result.failed == []
    with pytest.raises(InputError, match="pet"):
        inspect(zoo, modalities=["pet"])


def test_nothing_of_a_header_s_text_reaches_the_result(tmp_path: Path, scan: Any) -> None:
    path = scan(tmp_path / "a" / "t1.nii")
    data = bytearray(path.read_bytes())
    data[148:156] = b"DOE^JANE"  # the description field
    data[264:276] = np.zeros(3, np.float32).tobytes()  # and an sform that is wrong, so that there is a problem
    (tmp_path / "a" / "t1.nii").write_bytes(data)
    (tmp_path / "a" / "t2.nii.gz").write_bytes(gzip.compress(bytes(data))[:100])
    result = inspect(tmp_path)
    assert result.problems
    assert "DOE" not in json.dumps(result.to_json()) + str(result)


def test_real_scans_have_no_problem_but_the_ones_they_have(real_data: Callable[[str], Path]) -> None:
    assert inspect(real_data("brain_mr_open")).problems == []
    stroke = inspect(real_data("isles22_stroke_0009"))
    assert stroke.failed == []
    assert {problem.field for problem in stroke.problems} == {"grid"}  # DWI and ADC have a grid of their own
