"""Reading crops: equal to slices of the whole, zeros beyond the edges, from many threads, errors with a remedy."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest

from medmae.cohort.store import Cohort, PreparedStudy, is_cohort, prepare
from medmae.errors import InputError
from medmae.plan import Plan

SHAPE = (70, 90, 66)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cohort of one study that is larger than a chunk along every axis."""
    import nibabel as nib

    folder = tmp_path_factory.mktemp("store")
    rng = np.random.default_rng(0)
    for modality in ("t1", "flair"):
        (folder / "scans" / "a").mkdir(parents=True, exist_ok=True)
        array = rng.integers(1, 1000, SHAPE).astype(np.int16)
        nib.save(nib.Nifti1Image(array, np.eye(4)), folder / "scans" / "a" / f"{modality}.nii.gz")
    plan = Plan.load({"name": "test", "method": "bm-mae", "modalities": ["t1", "flair"]})
    return prepare(folder / "scans", plan, folder / "out", jobs=1).cohort_path


@pytest.fixture
def study(store: Path) -> PreparedStudy:
    return Cohort.open(store).studies[0]


def padded(whole: np.ndarray, start: Any, size: Any) -> np.ndarray:
    """The crop by numpy alone."""
    margin = max(*size, *(abs(a) for a in start))
    around = np.pad(whole, margin)
    return around[tuple(slice(margin + a, margin + a + n) for a, n in zip(start, size, strict=True))]


@pytest.mark.parametrize(
    ("start", "size"),
    [
        ((0, 0, 0), SHAPE),
        ((10, 20, 30), (16, 32, 8)),
        ((60, 60, 60), (8, 8, 4)),
        ((-5, -1, -30), (32, 32, 32)),
        ((50, 80, 60), (32, 32, 32)),
        ((-10, -10, -10), (128, 128, 128)),
        ((80, 0, 0), (8, 8, 8)),
        ((-8, 0, 0), (8, 8, 8)),
    ],
)
def test_a_crop_is_the_slice_of_the_whole_with_zeros_beyond(study: PreparedStudy, start: Any, size: Any) -> None:
    crop = study.crop("t1", start, size)
    assert crop.dtype == np.float16
    np.testing.assert_array_equal(crop, padded(study.array("t1"), start, size))


def test_the_whole_array_is_stored_in_chunks_that_a_crop_need_not_all_read(study: PreparedStudy) -> None:
    stored = blosc2.open(str(study.folder / "t1.b2nd"), mode="r")
    assert stored.chunks == (64, 64, 64)
    assert stored.blocks == (32, 32, 32)
    assert stored.dtype == np.float16


def test_crops_may_be_changed_by_their_owner(study: PreparedStudy) -> None:
    study.crop("t1", (0, 0, 0), (8, 8, 8))[:] = 7
    assert not (study.crop("t1", (0, 0, 0), (8, 8, 8)) == 7).all()


def test_many_threads_read_at_once(study: PreparedStudy) -> None:
    whole = {modality: study.array(modality) for modality in study.modalities}
    rng = np.random.default_rng(1)
    jobs = [(study.modalities[n % 2], tuple(rng.integers(-10, 60, 3).tolist())) for n in range(60)]
    with ThreadPoolExecutor(8) as pool:
        crops = list(pool.map(lambda job: study.crop(*job, (24, 24, 24)), jobs))
    for (modality, start), crop in zip(jobs, crops, strict=True):
        np.testing.assert_array_equal(crop, padded(whole[modality], start, (24, 24, 24)))


def test_a_study_can_be_sent_to_another_process(study: PreparedStudy) -> None:
    copy = pickle.loads(pickle.dumps(study))
    np.testing.assert_array_equal(copy.array("t1"), study.array("t1"))
    np.testing.assert_array_equal(copy.affine, study.affine)


def test_an_unknown_modality_or_label_is_named(study: PreparedStudy) -> None:
    with pytest.raises(InputError, match="pet"):
        study.crop("pet", (0, 0, 0), (8, 8, 8))
    with pytest.raises(InputError, match="seg"):
        study.label("seg")


def damage(path: Path, kind: str) -> None:
    data = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "missing":
        path.unlink()
    elif kind == "overwritten":
        path.write_bytes(b"\0" * len(data))
    else:
        other = blosc2.asarray(np.zeros((4, 4, 4), np.float16)).to_cframe()
        path.write_bytes(other + b"\0" * (len(data) - len(other)))


@pytest.mark.parametrize("kind", ["truncated", "missing", "overwritten", "another array"])
def test_a_damaged_file_is_named_with_a_remedy(store: Path, kind: str) -> None:
    study = Cohort.open(store).studies[0]
    path = study.folder / "flair.b2nd"
    whole = path.read_bytes()
    try:
        damage(path, kind)
        with pytest.raises(InputError, match=r"flair\.b2nd") as error:
            study.crop("flair", (0, 0, 0), (8, 8, 8))
        assert "medmae prepare" in str(error.value.problem.remedy)
        assert len(study.check()) == 1
    finally:
        path.write_bytes(whole)


def test_what_is_no_cohort_is_told_so(tmp_path: Path) -> None:
    assert not is_cohort(tmp_path)
    with pytest.raises(InputError, match="medmae prepare"):
        Cohort.open(tmp_path)


def test_a_cohort_is_not_taken_for_scans(store: Path) -> None:
    from medmae.cohort.layouts import find_studies

    with pytest.raises(InputError, match="prepared cohort"):
        find_studies(store)
