"""The demo cohort is what it says: real anatomy in four contrasts, reproducible, resumable, made without a network."""

from __future__ import annotations

import csv
import hashlib
import json
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from medmae.cohort.demo import DemoCohort, make_demo_cohort
from medmae.cohort.demo_scanner import bias_field, scan
from medmae.cohort.integrity import inspect
from medmae.errors import InputError

SPACING, SEED, TRAIN, HELD_OUT = 4.0, 3, 9, 3


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> DemoCohort:
    """Made by two threads and with every connection refused: nothing may be downloaded."""

    def refuse(*_: object) -> None:
        raise AssertionError("the demo cohort must not use the network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        out = tmp_path_factory.mktemp("demo") / "cohort"
        return make_demo_cohort(out, studies=TRAIN, held_out=HELD_OUT, seed=SEED, spacing=SPACING, jobs=2)


def folders(cohort: DemoCohort) -> list[Path]:
    return sorted([*cohort.train.iterdir(), *cohort.held_out.iterdir()])


def arrays(folder: Path) -> dict[str, np.ndarray]:
    """The study's images by name, in RAS order."""
    return {
        file.name.removesuffix(".nii.gz"): np.asarray(nib.as_closest_canonical(nib.load(file)).dataobj)
        for file in folder.iterdir()
    }


def digests(out: Path) -> dict[str, str]:
    return {
        str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(out.rglob("*"))
        if file.is_file()
    }


def rows(cohort: DemoCohort) -> list[dict[str, str]]:
    with open(cohort.table, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_inspect_finds_every_study_and_nothing_wrong(cohort: DemoCohort) -> None:
    for folder, count in ((cohort.train, TRAIN), (cohort.held_out, HELD_OUT)):
        found = inspect(folder)
        assert len(found.studies) == count
        assert not found.problems
        assert all(set(study.labels) == {"seg", "brainmask"} for study in found.studies)


def test_a_third_of_the_training_studies_lacks_one_modality_and_the_held_out_ones_none(cohort: DemoCohort) -> None:
    existing = {study.id: set(study.images) for study in inspect(cohort.train).studies}
    lacking = [{"t1", "t1c", "t2", "flair"} - names for names in existing.values()]
    assert sorted(map(len, lacking)) == [0] * (TRAIN - TRAIN // 3) + [1] * (TRAIN // 3)
    assert len(set().union(*lacking)) == 3  # not always the same one
    assert all(len(study.images) == 4 for study in inspect(cohort.held_out).studies)
    assert {row["study"]: set(row["modalities"].split()) for row in rows(cohort)}.items() >= existing.items()


def test_images_are_skull_stripped_with_zero_exactly_outside_of_the_brain(cohort: DemoCohort) -> None:
    for folder in folders(cohort):
        images = arrays(folder)
        brain, label = images.pop("brainmask") > 0, images.pop("seg")
        assert ndimage.label(brain)[1] == 1
        assert not label[~brain].any()
        for image in images.values():
            assert image.dtype == np.int16
            assert np.array_equal(image > 0, brain)
            assert not (image < 0).any()


def test_brains_are_as_large_as_brains(cohort: DemoCohort) -> None:
    for folder in folders(cohort):
        litres = (arrays(folder)["brainmask"] > 0).sum() * SPACING**3 / 1e6
        assert 1.1 < litres < 2.4  # the template's is 1.88, sulci, ventricles and meninges included


def test_the_images_of_a_study_share_one_grid_and_grids_differ_in_kind(cohort: DemoCohort) -> None:
    codes, oblique = set(), 0
    for folder in folders(cohort):
        images = [nib.load(file) for file in folder.iterdir()]
        first = images[0]
        for image in images:
            assert image.shape == first.shape
            assert np.array_equal(image.affine, first.affine)
            assert image.header.get_xyzt_units()[0] == "mm"
        assert np.allclose(np.linalg.norm(first.affine[:3, :3], axis=0), SPACING, atol=1e-4)
        codes.add("".join(nib.aff2axcodes(first.affine)))
        oblique += bool(np.degrees(nib.affines.obliquity(first.affine)).max() > 5)
    assert codes >= {"RAS", "LPS", "PIR"}
    assert 1 <= oblique < len(folders(cohort)) / 2


def test_heads_differ_in_place_tilt_and_size(cohort: DemoCohort) -> None:
    """By the moments of the brain masks in mm: poses differ, but no head lies on its side."""
    places, axes, sizes = [], [], []
    for folder in folders(cohort):
        image = nib.load(folder / "brainmask.nii.gz")
        points = nib.affines.apply_affine(image.affine, np.argwhere(np.asarray(image.dataobj)))
        values, vectors = np.linalg.eigh(np.cov(points.T))
        places.append(points.mean(0))
        axes.append(vectors[:, 2])  # the longest: front to back
        sizes.append(len(points))
        assert np.degrees(np.arccos(abs(vectors[1, 2]))) < 30
    assert all(np.linalg.norm(a - b) > 1 for a, b in combinations(places, 2))
    assert np.std(places, axis=0).min() > 2
    tilts = [np.degrees(np.arccos(min(1.0, abs(a @ b)))) for a, b in combinations(axes, 2)]
    assert np.median(tilts) > 3
    assert np.std(sizes) / np.mean(sizes) > 0.02


def test_anatomies_differ_beyond_the_pose_of_the_head(cohort: DemoCohort) -> None:
    """After the best affine overlay (whitened moments) two brains still differ, and still are much alike."""
    shapes = []
    nodes = np.stack(np.meshgrid(*[np.linspace(-2.2, 2.2, 30)] * 3, indexing="ij"), -1).reshape(-1, 3)
    for folder in folders(cohort)[:5]:
        image = nib.load(folder / "brainmask.nii.gz")
        mask = np.asarray(image.dataobj, np.float32)
        points = nib.affines.apply_affine(image.affine, np.argwhere(mask))
        whitening = np.linalg.cholesky(np.cov(points.T))
        voxels = nib.affines.apply_affine(np.linalg.inv(image.affine), nodes @ whitening.T + points.mean(0))
        shapes.append(ndimage.map_coordinates(mask, voxels.T, order=1) > 0.5)
    overlaps = [2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in combinations(shapes, 2)]
    assert 0.85 < min(overlaps) <= max(overlaps) < 0.985


def test_lesions_are_brighter_on_flair_than_the_white_matter_around_them(cohort: DemoCohort) -> None:
    labels = json.loads((cohort.out / "labels.json").read_text(encoding="utf-8"))["labels"]
    seen = set()
    for folder in folders(cohort):
        images = arrays(folder)
        if {"t1", "t2", "flair"} <= set(images):
            lesion = np.isin(images["seg"], [labels["white_matter_lesion"], labels["oedema"]])
            # White matter by T1 alone: as bright as the brightest third of the brain.
            white = images["t1"] > np.percentile(images["t1"][images["brainmask"] > 0], 65)
            around = ndimage.binary_dilation(lesion, iterations=4) & (images["seg"] == 0) & white
            assert lesion.sum() >= 5 and around.sum() > 50
            for modality in ("flair", "t2"):
                image = images[modality]
                assert np.median(image[lesion]) > 1.15 * np.median(image[around]), (folder.name, modality)
            seen.add(bool((images["seg"] == labels["oedema"]).any()))
    assert seen == {True, False}  # both kinds of lesion were looked at


def test_tumours_enhance_on_t1c_and_not_on_t1(cohort: DemoCohort) -> None:
    labels = json.loads((cohort.out / "labels.json").read_text(encoding="utf-8"))["labels"]
    looked = 0
    for row, folder in zip(rows(cohort), folders_in_order(cohort), strict=True):
        images = arrays(folder)
        rim = images["seg"] == labels["enhancing_rim"]
        assert rim.any() == (row["has_tumour"] == "1")
        if rim.any() and {"t1", "t1c"} <= set(images):
            brain = images["brainmask"] > 0
            ratio = {name: np.median(images[name][rim]) / np.median(images[name][brain]) for name in ("t1", "t1c")}
            assert ratio["t1c"] > 1.4 > 1.1 > ratio["t1"]
            looked += 1
    assert looked


def folders_in_order(cohort: DemoCohort) -> list[Path]:
    return [cohort.out / row["split"] / row["study"] for row in rows(cohort)]


def test_the_table_gives_the_volumes_of_the_labels(cohort: DemoCohort) -> None:
    table = rows(cohort)
    assert [row["split"] for row in table] == ["train"] * TRAIN + ["held_out"] * HELD_OUT
    assert sum(int(row["has_tumour"]) for row in table) == (TRAIN + HELD_OUT) // 3
    for row, folder in zip(table, folders_in_order(cohort), strict=True):
        label = arrays(folder)["seg"]
        assert float(row["lesion_ml"]) == pytest.approx((label > 0).sum() * SPACING**3 / 1000, abs=1e-3)
        assert float(row["tumour_ml"]) == pytest.approx(np.isin(label, (1, 2, 3)).sum() * SPACING**3 / 1000, abs=1e-3)
        assert 0 < float(row["lesion_ml"]) < 250


def test_the_template_is_credited_beside_the_images(cohort: DemoCohort) -> None:
    text = (cohort.out / "README.txt").read_text(encoding="utf-8")
    assert "Louis Collins, McConnell Brain Imaging Centre" in text and "Permission to use, copy, modify" in text
    assert cohort.to_json()["notes"] == text


def test_the_same_seed_gives_the_same_bytes_with_any_number_of_jobs(cohort: DemoCohort, tmp_path: Path) -> None:
    again = make_demo_cohort(tmp_path, studies=3, held_out=1, seed=SEED, spacing=SPACING, jobs=1)
    first, second = digests(cohort.out), digests(again.out)
    images = [name for name in second if name.endswith(".nii.gz")]
    assert len(images) == 4 * 6 - 1
    assert all(first[name] == second[name] for name in images)


@contextmanager
def switching_often() -> Iterator[None]:
    """Threads take turns as often as they can: what could go wrong between two lines does."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def test_a_scan_is_the_same_while_other_threads_scan() -> None:
    image = np.ones((40, 40, 40), np.float32)
    mask, coil, stop = image > 0, np.zeros(20), threading.Event()

    def scanned() -> np.ndarray:
        return scan(np.random.default_rng(3), image, mask, np.eye(4), coil)

    def others() -> None:
        while not stop.is_set():
            bias_field((8, 8, 8), coil)

    alone = scanned()
    with ThreadPoolExecutor(2) as pool, switching_often():
        running = [pool.submit(others) for _ in range(2)]
        try:
            assert all(np.array_equal(scanned(), alone) for _ in range(20))
        finally:
            stop.set()
    assert all(one.result() is None for one in running)


def test_another_seed_gives_other_heads(cohort: DemoCohort, tmp_path: Path) -> None:
    other = make_demo_cohort(tmp_path, studies=1, held_out=0, seed=SEED + 1, spacing=SPACING)
    name = "brainmask.nii.gz"
    one, two = (nib.load(folder / "train-001" / name) for folder in (cohort.train, other.train))
    assert one.shape != two.shape or not np.array_equal(one.dataobj, two.dataobj)


def test_a_stopped_run_is_taken_up_and_a_cohort_enlarged(tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []

    def make(studies: int, held_out: int) -> DemoCohort:
        calls.clear()
        return make_demo_cohort(
            tmp_path, studies=studies, held_out=held_out, seed=SEED, spacing=6, on_progress=lambda *a: calls.append(a)
        )

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_demo_cohort(tmp_path, studies=3, held_out=1, seed=SEED, spacing=6, jobs=1, on_progress=stop)
    there = [folder.name for folder in (tmp_path / "train").iterdir()]
    assert 1 <= len(there) < 3
    before = digests(tmp_path / "train")

    resumed = make(3, 1)
    assert sorted(resumed.kept) == sorted(there) and len(resumed.made) == 4 - len(there)
    assert calls[-1][:2] == (4, 4) and len(calls) == len(resumed.made)
    assert digests(tmp_path / "train").items() >= before.items()
    assert make(3, 1).made == () and calls == []
    assert make(4, 1).made == ("train-004",)
    assert len(rows(make(4, 1))) == 5


def test_another_cohort_in_the_folder_is_not_mixed_in(tmp_path: Path) -> None:
    make_demo_cohort(tmp_path, studies=2, held_out=0, seed=1, spacing=6)
    before = digests(tmp_path)
    for other in ({"seed": 2, "studies": 2}, {"seed": 1, "studies": 2, "spacing": 5}, {"seed": 1, "studies": 1}):
        with pytest.raises(InputError, match="Choose another folder"):
            make_demo_cohort(tmp_path, held_out=0, **{"spacing": 6, **other})  # type: ignore[arg-type]
    (tmp_path / "demo.json").unlink()
    with pytest.raises(InputError, match="do not belong"):
        make_demo_cohort(tmp_path, studies=2, held_out=0, seed=1, spacing=6)
    before.pop("demo.json")
    assert digests(tmp_path) == before


@pytest.mark.parametrize(
    ("field", "value"), [("spacing", 0.0), ("spacing", float("nan")), ("studies", -1), ("held_out", -1), ("seed", -1)]
)
def test_bad_arguments_are_named_before_anything_is_written(field: str, value: float, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=field):
        make_demo_cohort(tmp_path / "out", **{field: value})  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
