"""Every layout is recognised by what it contains; nothing in it is dropped in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medmae.cohort.layouts import Layout, find_studies
from medmae.errors import InputError


def seen(layout: Layout) -> dict[str, tuple[str, str | None, set[str], set[str]]]:
    return {s.id: (s.subject, s.session, set(s.images), set(s.labels)) for s in layout.studies}


def warned(layout: Layout, text: str) -> bool:
    return any(text in str(problem) for problem in layout.problems)


# --- folders -----------------------------------------------------------------------------------------------------


def test_subject_and_session_folders_keep_sessions_of_one_subject_together(tmp_path: Path, touch: Any) -> None:
    touch(
        tmp_path / "a" / "ses-1" / "t1.nii.gz",
        tmp_path / "a" / "ses-1" / "seg.nii.gz",
        tmp_path / "a" / "ses-2" / "flair.nii.gz",
        tmp_path / "b" / "ses-1" / "t2.nii",
    )
    layout = find_studies(tmp_path)
    assert layout.name == "folders"
    assert seen(layout) == {
        "a_ses-1": ("a", "ses-1", {"t1"}, {"seg"}),
        "a_ses-2": ("a", "ses-2", {"flair"}, set()),
        "b_ses-1": ("b", "ses-1", {"t2"}, set()),
    }


def test_a_study_has_one_id_whether_its_cohort_its_subject_or_itself_is_given(tmp_path: Path, touch: Any) -> None:
    touch(tmp_path / "a" / "ses-1" / "t1.nii.gz", tmp_path / "b" / "ses-1" / "t1.nii.gz")
    for given in (tmp_path, tmp_path / "a", tmp_path / "a" / "ses-1"):
        study = find_studies(given).studies[0]
        assert (study.id, study.subject, study.session) == ("a_ses-1", "a", "ses-1")


def test_group_folders_are_neither_subjects_nor_sessions(tmp_path: Path, touch: Any) -> None:
    for group, case in (("HGG", "TCIA01"), ("HGG", "TCIA02"), ("LGG", "TCIA09")):
        touch(tmp_path / group / case / "t1.nii.gz")
    assert {s.id: s.subject for s in find_studies(tmp_path).studies} == {
        name: name for name in ("TCIA01", "TCIA02", "TCIA09")
    }


def test_subjects_of_two_sites_with_one_number_are_two_subjects(tmp_path: Path, touch: Any) -> None:
    touch(tmp_path / "siteA" / "sub-01" / "t1.nii.gz", tmp_path / "siteB" / "sub-01" / "t1.nii.gz")
    assert {s.subject for s in find_studies(tmp_path).studies} == {"siteA_sub-01", "siteB_sub-01"}


def test_visits_that_repeat_under_subjects_are_sessions(tmp_path: Path, touch: Any) -> None:
    for person in ("p", "q"):
        for visit in ("before", "after"):
            touch(tmp_path / person / visit / "anat" / "t1.nii.gz")
    assert {s.id: s.subject for s in find_studies(tmp_path).studies} == {
        "p_after": "p",
        "p_before": "p",
        "q_after": "q",
        "q_before": "q",
    }


def test_a_flat_folder_of_study_and_modality(tmp_path: Path, touch: Any) -> None:
    touch(
        *(tmp_path / f"{name}.nii.gz" for name in ("c1_t1", "c1_flair", "c1_seg", "c2_t1", "c10_t1", "c10_brain_mask"))
    )
    assert seen(find_studies(tmp_path)) == {
        "c1": ("c1", None, {"t1", "flair"}, {"seg"}),
        "c2": ("c2", None, {"t1"}, set()),
        "c10": ("c10", None, {"t1"}, {"brainmask"}),
    }


def test_what_this_package_writes_is_found_again_with_subject_and_session(tmp_path: Path, touch: Any) -> None:
    touch(
        tmp_path / "lg01_ses-1_flair.nii.gz", tmp_path / "lg01_ses-2_flair.nii.gz", tmp_path / "lg01_ses-1_flair.json"
    )
    assert {(s.id, s.subject, s.session) for s in find_studies(tmp_path).studies} == {
        ("lg01_ses-1", "lg01", "ses-1"),
        ("lg01_ses-2", "lg01", "ses-2"),
    }


def test_one_study_whose_files_share_no_prefix_stays_one_study(tmp_path: Path, touch: Any) -> None:
    folder = tmp_path / "patient7"
    touch(folder / "MPRAGE_t1.nii.gz", folder / "axial_flair.nii.gz", folder / "ax_t2.nii.gz")
    assert seen(find_studies(folder)) == {"patient7": ("patient7", None, {"t1", "t2", "flair"}, set())}


def test_images_come_in_canonical_order(tmp_path: Path, touch: Any) -> None:
    touch(*(tmp_path / "s1" / f"{name}.nii.gz" for name in ("flair", "adc", "t2", "t1", "t1c")))
    assert list(find_studies(tmp_path).studies[0].images) == ["t1", "t1c", "t2", "flair", "adc"]


def test_a_single_image_is_a_study(tmp_path: Path, touch: Any) -> None:
    touch(tmp_path / "c1_flair.nii.gz")
    layout = find_studies(tmp_path / "c1_flair.nii.gz")
    assert layout.name == "file"
    assert seen(layout) == {"c1": ("c1", None, {"flair"}, set())}


def test_files_that_say_nothing_are_named_in_warnings(tmp_path: Path, touch: Any) -> None:
    touch(*(tmp_path / "s1" / name for name in ("t1.nii.gz", "mystery.nii.gz", "t2.nrrd", "notes.txt")))
    layout = find_studies(tmp_path)
    told = {Path(problem.where or "").name: problem for problem in layout.problems}
    assert set(told) == {"mystery.nii.gz", "t2.nrrd"}
    assert not any(problem.fatal for problem in told.values())
    assert all(problem.remedy for problem in told.values())


def test_two_files_for_one_modality_are_refused_by_name(tmp_path: Path, touch: Any) -> None:
    touch(*(tmp_path / "s1" / name for name in ("t1.nii.gz", "T1w.nii.gz")), tmp_path / "s2" / "t1.nii.gz")
    layout = find_studies(tmp_path)
    assert [study.id for study in layout.studies] == ["s2"]
    (problem,) = layout.problems
    assert problem.fatal
    assert problem.where == "s1"
    assert "T1w.nii.gz" in str(problem)
    assert "t1.nii.gz" in str(problem.found)


def test_ids_that_differ_in_punctuation_or_capitals_only_are_reported(tmp_path: Path, touch: Any) -> None:
    touch(*(tmp_path / name / "t1.nii.gz" for name in ("a b", "A_b", "c")))
    layout = find_studies(tmp_path)
    assert [study.id for study in layout.studies] == ["c"]
    assert any(p.fatal and "a b" in str(p.found) and "A_b" in str(p.found) for p in layout.problems)


def test_links_in_a_circle_end(tmp_path: Path, touch: Any) -> None:
    touch(tmp_path / "s1" / "t1.nii.gz")
    (tmp_path / "s1" / "again").symlink_to(tmp_path)
    assert [study.id for study in find_studies(tmp_path).studies] == ["s1"]


def test_many_alike_warnings_are_told_fifty_times_and_then_counted(tmp_path: Path, touch: Any) -> None:
    touch(tmp_path / "t1.nii.gz", *(tmp_path / f"x{number}x.nii.gz" for number in range(80)))
    layout = find_studies(tmp_path)
    assert len(layout.problems) == 51
    assert "30 more" in layout.problems[-1].what


# --- BraTS ---------------------------------------------------------------------------------------------------------


def test_brats_2021_folders(tmp_path: Path, touch: Any) -> None:
    for case in ("BraTS2021_00000", "BraTS2021_00002"):
        touch(*(tmp_path / case / f"{case}_{kind}.nii.gz" for kind in ("flair", "t1", "t1ce", "t2", "seg")))
    layout = find_studies(tmp_path)
    assert layout.name == "brats"
    assert seen(layout)["BraTS2021_00002"] == ("BraTS2021_00002", None, {"t1", "t1c", "t2", "flair"}, {"seg"})


def test_brats_2023_folders_keep_timepoints_of_one_subject_together(tmp_path: Path, touch: Any) -> None:
    for case in ("BraTS-GLI-00000-000", "BraTS-GLI-00000-001", "BraTS-GLI-00003-000"):
        touch(*(tmp_path / case / f"{case}-{kind}.nii.gz" for kind in ("t2f", "t1n", "t1c", "t2w", "seg")))
    layout = find_studies(tmp_path)
    assert layout.name == "brats"
    assert seen(layout)["BraTS-GLI-00000-001"] == ("BraTS-GLI-00000", "001", {"t1", "t1c", "t2", "flair"}, {"seg"})
    assert len({study.subject for study in layout.studies}) == 2


def test_one_brats_folder_given_directly(tmp_path: Path, touch: Any) -> None:
    folder = tmp_path / "BraTS2021_00000"
    touch(*(folder / f"BraTS2021_00000_{kind}.nii.gz" for kind in ("flair", "t1")))
    assert list(seen(find_studies(folder))) == ["BraTS2021_00000"]


# --- nnU-Net -------------------------------------------------------------------------------------------------------


def nnunet(root: Path, touch: Any, cases: dict[str, int], **facts: Any) -> Path:
    channels = facts.setdefault("channel_names", {"0": "T1", "1": "FLAIR"})
    facts.setdefault("labels", {"background": 0, "lesion": 1, "whole": [1, 2]})
    facts.setdefault("file_ending", ".nii.gz")
    for case, count in cases.items():
        touch(*(root / "imagesTr" / f"{case}_{number:04d}.nii.gz" for number in range(min(count, len(channels)))))
        touch(root / "labelsTr" / f"{case}.nii.gz")
    (root / "dataset.json").write_text(json.dumps(facts))
    return root


def test_an_nnunet_dataset_takes_modalities_from_channel_names(tmp_path: Path, touch: Any) -> None:
    root = nnunet(tmp_path / "Dataset001_X", touch, {"c_01": 2, "c_02": 1})
    layout = find_studies(root)
    assert layout.name == "nnunet"
    assert layout.label_values == {0, 1, 2}
    assert seen(layout) == {
        "c_01": ("c_01", None, {"t1", "flair"}, {"seg"}),
        "c_02": ("c_02", None, {"t1"}, {"seg"}),
    }


def test_nnunet_test_images_are_used_only_when_asked_for(tmp_path: Path, touch: Any) -> None:
    root = nnunet(tmp_path / "Dataset001_X", touch, {"c_01": 2})
    touch(root / "imagesTs" / "t_01_0000.nii.gz", root / "imagesTs" / "t_01_0001.nii.gz")
    layout = find_studies(root)
    assert list(seen(layout)) == ["c_01"]
    assert warned(layout, "1 cases")
    assert seen(find_studies(root / "imagesTs")) == {"t_01": ("t_01", None, {"t1", "flair"}, set())}


def test_a_channel_that_is_no_known_modality_keeps_its_own_name_and_is_told_of(tmp_path: Path, touch: Any) -> None:
    root = nnunet(tmp_path / "Dataset001_X", touch, {"c": 1}, channel_names={"0": "MRI"})
    layout = find_studies(root)
    assert set(layout.studies[0].images) == {"mri"}
    assert warned(layout, "'MRI'")
    assert warned(layout, "--set")


def test_two_channels_of_one_modality_are_refused_by_name(tmp_path: Path, touch: Any) -> None:
    root = nnunet(tmp_path / "Dataset001_X", touch, {"c": 2}, channel_names={"0": "T1ce", "1": "T1gd"})
    with pytest.raises(InputError, match="T1ce.*") as error:
        find_studies(root)
    assert "T1gd" in str(error.value)


def test_the_folder_of_raw_datasets_is_followed_when_there_is_one_and_refused_when_several(
    tmp_path: Path, touch: Any
) -> None:
    nnunet(tmp_path / "Dataset001_X", touch, {"c": 2})
    assert find_studies(tmp_path).name == "nnunet"
    nnunet(tmp_path / "Dataset002_Y", touch, {"c": 2})
    with pytest.raises(InputError, match="Dataset002_Y"):
        find_studies(tmp_path)


def test_nnunet_files_that_do_not_fit_are_named(tmp_path: Path, touch: Any) -> None:
    root = nnunet(tmp_path / "Dataset001_X", touch, {"c": 2})
    touch(root / "imagesTr" / "c_0007.nii.gz", root / "imagesTr" / "plain.nii.gz", root / "imagesTr" / "d_0000.mha")
    touch(root / "labelsTr" / "nobody.nii.gz")
    layout = find_studies(root)
    names = {Path(problem.where or "").name for problem in layout.problems}
    assert names == {"c_0007.nii.gz", "plain.nii.gz", "d_0000.mha", "nobody.nii.gz"}


def test_the_file_list_of_dataset_json_is_followed(tmp_path: Path, touch: Any) -> None:
    root = nnunet(
        tmp_path / "Dataset001_X",
        touch,
        {"c": 2},
        dataset={"k": {"images": ["far/k_a.nii.gz", "far/k_b.nii.gz"], "label": "far/k.nii.gz"}},
    )
    layout = find_studies(root)
    assert seen(layout) == {"k": ("k", None, {"t1", "flair"}, {"seg"})}
    assert layout.studies[0].images["flair"] == root.resolve() / "far/k_b.nii.gz"


def test_a_decathlon_dataset_of_one_channel(tmp_path: Path, touch: Any) -> None:
    touch(tmp_path / "imagesTr" / "spleen_1.nii.gz", tmp_path / "imagesTr" / "._spleen_1.nii.gz")
    touch(tmp_path / "labelsTr" / "spleen_1.nii.gz")
    (tmp_path / "dataset.json").write_text(
        json.dumps({"modality": {"0": "CT"}, "labels": {"0": "background", "1": "spleen"}})
    )
    layout = find_studies(tmp_path)
    assert seen(layout) == {"spleen_1": ("spleen_1", None, {"ct"}, {"seg"})}
    assert layout.label_values == {0, 1}


@pytest.mark.parametrize("text", ["{", "[]", '{"channel_names": {}}', '{"channel_names": {"zero": "T1"}}'])
def test_a_bad_dataset_json_is_named(tmp_path: Path, touch: Any, text: str) -> None:
    root = nnunet(tmp_path / "Dataset001_X", touch, {"c": 2})
    (root / "dataset.json").write_text(text)
    with pytest.raises(InputError, match=r"dataset\.json"):
        find_studies(root)


# --- BIDS ----------------------------------------------------------------------------------------------------------


def bids(root: Path, touch: Any) -> Path:
    touch(
        root / "dataset_description.json",
        root / "sub-01" / "ses-a" / "anat" / "sub-01_ses-a_T1w.nii.gz",
        root / "sub-01" / "ses-a" / "anat" / "sub-01_ses-a_ce-gadolinium_T1w.nii.gz",
        root / "sub-01" / "ses-a" / "anat" / "sub-01_ses-a_label-lesion_mask.nii.gz",
        root / "sub-01" / "ses-a" / "anat" / "sub-01_ses-a_T2starw.nii.gz",
        root / "sub-01" / "ses-a" / "dwi" / "sub-01_ses-a_dwi.nii.gz",
        root / "sub-01" / "ses-a" / "dwi" / "sub-01_ses-a_dwi.bval",
        root / "sub-01" / "ses-a" / "func" / "sub-01_ses-a_task-rest_bold.nii.gz",
        root / "sub-01" / "ses-b" / "anat" / "sub-01_ses-b_FLAIR.nii.gz",
        root / "sub-02" / "anat" / "sub-02_T2w.nii",
        root / "sub-02" / "anat" / "sub-02_part-phase_T1w.nii.gz",
        root / "derivatives" / "pipe" / "sub-01" / "anat" / "sub-01_desc-brain_T1w.nii.gz",
        root / "derivatives" / "pipe" / "sub-01" / "anat" / "sub-01_desc-brain_mask.nii.gz",
    )
    return root


def test_bids_suffixes_and_contrast_agents(tmp_path: Path, touch: Any) -> None:
    layout = find_studies(bids(tmp_path, touch))
    assert layout.name == "bids"
    assert seen(layout) == {
        "sub-01_ses-a": ("sub-01", "ses-a", {"t1", "t1c"}, {"lesion"}),
        "sub-01_ses-b": ("sub-01", "ses-b", {"flair"}, set()),
        "sub-02": ("sub-02", None, {"t2"}, set()),
    }
    assert {Path(p.where or "").name for p in layout.problems} == {
        "sub-01_ses-a_T2starw.nii.gz",
        "sub-01_ses-a_dwi.nii.gz",
        "sub-02_part-phase_T1w.nii.gz",
    }


def test_bids_derivatives_are_read_when_given_themselves(tmp_path: Path, touch: Any) -> None:
    root = bids(tmp_path, touch)
    for given in (root / "derivatives" / "pipe", root / "derivatives"):
        assert seen(find_studies(given)) == {"sub-01": ("sub-01", None, {"t1"}, {"brainmask"})}


def test_one_bids_subject_or_session_given_directly(tmp_path: Path, touch: Any) -> None:
    root = bids(tmp_path, touch)
    assert list(seen(find_studies(root / "sub-02"))) == ["sub-02"]
    assert list(seen(find_studies(root / "sub-01" / "ses-b"))) == ["sub-01_ses-b"]


def test_two_bids_runs_of_one_modality_are_refused_by_name(tmp_path: Path, touch: Any) -> None:
    root = bids(tmp_path, touch)
    touch(root / "sub-02" / "anat" / "sub-02_run-2_T2w.nii.gz")
    layout = find_studies(root)
    assert "sub-02" not in seen(layout)
    assert any(p.fatal and p.where == "sub-02" and "run-2" in str(p.found) for p in layout.problems)


# --- tables --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_table_with_paths_relative_to_itself(tmp_path: Path, touch: Any, separator: str) -> None:
    rows = [
        ("case", "patient", "visit", "T1w", "t1ce", "lesion_mask", "age"),
        ("a", "P1", "1", "x/one.nii.gz", "", "x/m.nii.gz", "50"),
        ("b", "P1", "2", str(tmp_path / "abs.nii.gz"), "c.nii", "", "51"),
    ]
    table = tmp_path / "table.csv"
    table.write_text("\ufeff" + "\n".join(separator.join(row) for row in rows), encoding="utf-8")
    layout = find_studies(table)
    assert layout.name == "table"
    assert layout.problems == []
    assert seen(layout) == {"a": ("P1", "1", {"t1"}, {"lesion"}), "b": ("P1", "2", {"t1", "t1c"}, set())}
    assert layout.studies[0].images["t1"] == tmp_path / "x" / "one.nii.gz"
    assert layout.studies[1].images["t1"] == tmp_path / "abs.nii.gz"


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_json_table_with_files_grouped_or_not(tmp_path: Path, wrapped: bool) -> None:
    rows = [
        {"study": "a", "subject": "P", "images": {"t1": "a.nii.gz", "mri": "b.nii.gz"}, "labels": {"seg": "s.nii.gz"}},
        {"id": "b", "flair": "f.nii.gz", "t1": None},
    ]
    table = tmp_path / "studies.json"
    table.write_text(json.dumps({"studies": rows} if wrapped else rows))
    layout = find_studies(table)
    assert seen(layout) == {"a": ("P", None, {"t1", "mri"}, {"seg"}), "b": ("b", None, {"flair"}, set())}
    assert warned(layout, "'mri'")


def test_ids_that_come_twice_in_a_table_are_reported_and_the_rest_is_kept(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("study,t1\na,1.nii.gz\na,2.nii.gz\nb,3.nii.gz\n,4.nii.gz\nc,\n")
    layout = find_studies(tmp_path / "t.csv")
    assert list(seen(layout)) == ["b"]
    fatal = [problem for problem in layout.problems if problem.fatal]
    assert {str(problem.where).split(", ")[-1] for problem in fatal} == {"a", "row 4", "row 5"}
    assert any("1.nii.gz" in str(p.found) and "2.nii.gz" in str(p.found) for p in fatal)


def test_two_columns_for_one_modality_are_refused_where_both_are_filled(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("study,t1,T1w\na,1.nii.gz,2.nii.gz\nb,,3.nii.gz\n")
    layout = find_studies(tmp_path / "t.csv")
    assert seen(layout) == {"b": ("b", None, {"t1"}, set())}
    assert any(p.fatal and p.where == "a" for p in layout.problems)


def test_a_column_of_images_with_an_unknown_name_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("study,t1,perfusion,age\na,1.nii.gz,2.nii.gz,50\n")
    layout = find_studies(tmp_path / "t.csv")
    assert [problem.field for problem in layout.problems] == ["perfusion"]
    assert "image_perfusion" in str(layout.problems[0])


@pytest.mark.parametrize(
    ("name", "text"),
    [("t.csv", "study,age\na,3\n"), ("t.csv", ""), ("t.json", "{"), ("t.json", "3"), ("t.csv", "study,t1,t1\na,b,c\n")],
)
def test_what_is_no_table_of_studies_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as error:
        find_studies(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    assert error.value.problem.remedy


# --- nothing to find -----------------------------------------------------------------------------------------------


def test_a_path_that_does_not_exist_says_how_far_it_does(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing here") as error:
        find_studies(tmp_path / "scans" / "more")
    assert str(tmp_path) in str(error.value.problem.remedy)


def test_an_empty_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="an empty folder"):
        find_studies(tmp_path)


def test_files_that_are_dicom_by_name_only_get_a_remedy_of_their_own(tmp_path: Path, touch: Any) -> None:
    touch(tmp_path / "series" / "1.dcm")
    with pytest.raises(InputError, match="Not one of the DICOM files"):
        find_studies(tmp_path)


def test_when_no_name_is_understood_every_file_is_in_the_error(tmp_path: Path, touch: Any) -> None:
    touch(tmp_path / "one.nii.gz", tmp_path / "two.nii.gz")
    with pytest.raises(InputError) as error:
        find_studies(tmp_path)
    assert {Path(p.where or "").name for p in error.value.problems} >= {"one.nii.gz", "two.nii.gz"}


# --- real scans ----------------------------------------------------------------------------------------------------


def test_real_scans_in_every_folder_are_found(real_data: Callable[[str], Path]) -> None:
    expected = {
        "brain_mr_open": ("folders", 8, 6),
        "brain_mr_noncommercial": ("folders", None, None),
        "nnunet_raw": ("nnunet", 65, 65),
        "ct": ("folders", 2, 2),
        "isles22_stroke_0009": ("folders", 1, 1),
    }
    for name, (layout_name, studies, subjects) in expected.items():
        layout = find_studies(real_data(name))
        assert layout.name == layout_name
        files = len(list(real_data(name).rglob("*.nii.gz")))
        used = sum(len(study.images) + len(study.labels) for study in layout.studies)
        left_out = sum("left out" in problem.what for problem in layout.problems)
        assert used + left_out == files, name
        if studies is not None:
            assert (len(layout.studies), len({study.subject for study in layout.studies})) == (studies, subjects)
