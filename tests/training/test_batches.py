"""Crops for training: the same from memory as from the store, and side by side for previews."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from medmae import Cohort, Plan, prepare
from medmae.imaging.nifti import write_nifti
from medmae.imaging.volume import Volume
from medmae.training.batches import Crops
from medmae.training.previews import slice_of
from tests.training.conftest import PLAN, write_scans


@pytest.mark.parametrize("start", [(0, 0, 0), (-3, 5, -20), (90, 0, 0), (-16, -16, -16), (-40, -5, 2), (7, 300, 1)])
def test_a_crop_from_memory_is_the_crop_from_the_store(cohort: Path, start: tuple[int, int, int]) -> None:
    plan = Plan.load(PLAN)
    studies = Cohort.open(cohort).studies
    stored, held = Crops(studies, plan, 0), Crops(studies, plan, 0)
    held.load_to(torch.device("cpu"))
    modality = studies[0].modalities[0]
    assert torch.equal(stored.crop(studies[0], modality, start), held.crop(studies[0], modality, start))


def test_a_mosaic_of_crops_is_the_study_itself(cohort: Path) -> None:
    plan = Plan.load(PLAN, ["image.crop=[16,8,8]"])
    crops = Crops(Cohort.open(cohort).studies, plan, 0)
    batch, layout = crops.mosaic()
    assert layout == (6, 12) and len(set(batch.studies)) == 1
    study = crops.studies[0]
    modality = next(m for m in study.modalities if m in plan.modalities)
    corner = [(n - w) // 2 for n, w in zip(study.shape, (96, 96, 8), strict=True)]
    expected = study.crop(modality, corner, (96, 96, 8))[:, :, 4].astype(np.float32).T
    np.testing.assert_array_equal(slice_of(batch.images[modality], layout), expected)


def test_large_crops_stand_alone(cohort: Path) -> None:
    plan = Plan.load(PLAN, ["image.crop=[96,128,96]"])
    batch, layout = Crops(Cohort.open(cohort).studies, plan, 0).mosaic()
    assert layout == (1, 1) and len(batch.studies) == 1


def test_validation_samples_are_the_same_every_time_and_shared_out_evenly(cohort: Path) -> None:
    studies = Cohort.open(cohort).studies
    centre = Crops(studies, Plan.load(PLAN, ["sampling.crop=center"]), 0)
    assert [s.id for s, _ in centre.fixed()] == [s.id for s in studies]
    plan = Plan.load(PLAN, ["image.crop=[16,16,16]", "sampling.crop=random"])
    samples = Crops(studies, plan, 0).fixed()
    assert samples == Crops(studies, plan, 0).fixed() and len(samples) > len(studies)
    assert all(0 <= c <= n - 16 for s, corner in samples for c, n in zip(corner, s.shape, strict=True))
    parts = [list(Crops(studies, plan, 0).fixed_batches(3, part, 2)) for part in range(2)]
    assert len(parts[0]) == len(parts[1])
    counted = sorted(n for part in parts for batch, counts in part if counts for n in batch.numbers)
    assert counted == list(range(len(samples)))


def test_crops_of_the_foreground_have_it_in_their_middle(tmp_path: Path) -> None:
    """A study that is background but for one corner: chance alone would rarely crop there."""
    write_scans(tmp_path / "scans", 1, (8, 8, 8))
    array = np.zeros((64, 64, 64), np.float32)
    array[50:60, 4:14, 30:40] = np.random.default_rng(0).uniform(100, 200, (10, 10, 10))
    for file in (tmp_path / "scans" / "case0").iterdir():
        write_nifti(Volume(array, np.eye(4)), file)
    plan = Plan.load(
        PLAN, ["sampling.crop=foreground", "sampling.foreground_share=0.75", "image.foreground_crop=false"]
    )
    prepare(tmp_path / "scans", plan, tmp_path / "cohort", jobs=1)
    crops = Crops(Cohort.open(tmp_path / "cohort").studies, plan, 0)
    study = crops.studies[0]
    inside = [crops.crop(study, "t2", crops.corner(study, n)).any().item() for n in range(400)]
    assert 0.75 - 0.06 < np.mean(inside) < 0.9
    cells = crops.foreground(study) * 8
    assert len(cells) and ((cells >= [48, 0, 24]) & (cells <= [56, 8, 39])).all()


def test_several_crops_of_a_study_come_in_a_row(cohort: Path) -> None:
    plan = Plan.load(PLAN, ["sampling.crops_per_volume=3"])
    crops = Crops(Cohort.open(cohort).studies, plan, 0)
    count = len(crops.studies)
    order = [crops.study_of(n).id for n in range(3 * count)]
    assert all(order[3 * i] == order[3 * i + 1] == order[3 * i + 2] for i in range(count))
    assert len(set(order)) == count
    assert len({crops.corner(crops.study_of(0), n) for n in range(3)}) > 1
