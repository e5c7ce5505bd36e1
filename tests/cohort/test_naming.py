"""What users may call their files."""

from __future__ import annotations

from pathlib import Path

import pytest

from medmae.cohort.modalities import canonical_modality
from medmae.cohort.naming import label_name, own_name, read_name, safe_id


@pytest.mark.parametrize(
    ("name", "prefix", "modality"),
    [
        ("t1.nii.gz", "", "t1"),
        ("T1w+ce.nii.gz", "", "t1c"),
        ("BraTS2021_00000_t1ce.nii.gz", "BraTS2021_00000", "t1c"),
        ("BraTS-GLI-00000-000-t2f.nii.gz", "BraTS-GLI-00000-000", "flair"),
        ("BraTS20_Training_001_flair.nii", "BraTS20_Training_001", "flair"),
        ("UPENN-GBM-00001_11_T1GD.nii.gz", "UPENN-GBM-00001_11", "t1c"),
        ("IXI002-Guys-0828-T2.nii.gz", "IXI002-Guys-0828", "t2"),
        ("case 7_T2_FLAIR.NII.GZ", "case 7", "flair"),
        ("7_ADC.nii", "7", "adc"),
        ("a_ct.nii.gz", "a", "ct"),
    ],
)
def test_a_name_that_ends_in_a_modality_is_that_modality(name: str, prefix: str, modality: str) -> None:
    read = read_name(Path(name))
    assert (read.prefix, read.modality, read.label) == (prefix, modality, None)


@pytest.mark.parametrize(
    ("name", "prefix", "label"),
    [
        ("seg.nii.gz", "", "seg"),
        ("BraTS2021_00000_seg.nii.gz", "BraTS2021_00000", "seg"),
        ("brainmask.nii.gz", "", "brainmask"),
        ("change_mask.nii.gz", "", "change_mask"),
        ("p1_brain_mask.nii.gz", "p1", "brainmask"),
        ("UCSF-PDGM-0004_tumor_segmentation.nii.gz", "UCSF-PDGM-0004", "tumor_segmentation"),
        ("sub-spleen2_seg-manual.nii.gz", "sub-spleen2", "seg_manual"),
        ("msk.nii.gz", "", "mask"),
        ("case1_lesion.nii.gz", "case1", "lesion"),
        ("case1_flair_seg.nii.gz", "case1", "flair_seg"),
        ("case1_ground_truth.nii.gz", "case1", "seg"),
    ],
)
def test_segmentations_and_masks_are_labels_and_never_modalities(name: str, prefix: str, label: str) -> None:
    read = read_name(Path(name))
    assert (read.prefix, read.modality, read.label) == (prefix, None, label)


@pytest.mark.parametrize("name", ["t1_brain.nii.gz", "scan.nii.gz", "case_0000.nii.gz", "t1_to_mni.nii.gz"])
def test_a_name_that_ends_in_anything_else_is_not_guessed_at(name: str) -> None:
    read = read_name(Path(name))
    assert read.modality is None
    assert read.label is None


@pytest.mark.parametrize(
    ("name", "modality"),
    [
        ("T2*", None),
        ("T2*w", None),
        ("T2star", None),
        ("T1+", "t1c"),
        ("T1 + Gd", "t1c"),
        ("T1-weighted", "t1"),
        ("T1 post-contrast", "t1c"),
        ("PT", "pet"),
        ("MRI", None),
        ("noNorm", None),
    ],
)
def test_channel_names_are_taken_at_their_word_and_no_further(name: str, modality: str | None) -> None:
    assert canonical_modality(name) == modality


def test_ids_are_safe_as_file_names() -> None:
    assert safe_id("a/b c:ü") == "a_b_c"
    assert safe_id("../../etc") == "etc"
    assert safe_id("???") != safe_id("!!!")
    assert len(safe_id("x" * 300)) <= 101
    assert safe_id("x" * 300) != safe_id("x" * 301)


def test_names_of_their_own_are_spelt_safely() -> None:
    assert own_name("T2* (GRE)") == "t2_gre"
    assert label_name("Lesion Mask") == "lesion"
