"""What a segmenter loses on syntheses: nothing on perfect ones, everything that a bad one hides, all combinations."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import medmae
from medmae.errors import InputError
from medmae.imaging.nifti import write_nifti
from medmae.imaging.volume import Volume
from medmae.synthesis import downstream
from medmae.synthesis.downstream import dice_of, evaluate_downstream
from tests.synthesis.fakes import Linear, plan

AFFINE = np.diag([-1.5, 1.5, 1.5, 1.0])


def scans(folder: Path) -> Path:
    """T1, T2 and FLAIR are the same head; a box is twice as bright in each and is the label."""
    for case in range(2):
        rng = np.random.default_rng(case)
        array = np.pad(rng.uniform(90, 110, (24, 26, 28)), 4).astype(np.float32)
        label = np.zeros(array.shape, np.uint8)
        label[10:18, 10:16, 12 + case : 20] = 1
        array[label > 0] *= 2
        for name in ("t1", "t2", "flair"):
            (folder / f"case{case}").mkdir(parents=True, exist_ok=True)
            write_nifti(Volume(array, AFFINE), folder / f"case{case}" / f"{name}.nii.gz")
        write_nifti(Volume(label, AFFINE), folder / f"case{case}" / "seg.nii.gz", dtype=np.uint8)
    return folder


@pytest.fixture
def thresholds(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """A segmenter that calls bright what is bright in the mean of its images; which images it got."""
    seen: list[tuple[str, ...]] = []

    def segment(predictor: Any, images: dict[str, Volume], channels: tuple[str, ...]) -> np.ndarray:
        seen.append(tuple(images))
        heads = [v.array / np.median(v.array[v.array != 0]) for v in images.values()]
        return (np.mean(heads, axis=0) > 1.5).astype(np.uint8)

    predictor = SimpleNamespace(dataset_json={"labels": {"background": 0, "lesion": 1}})
    monkeypatch.setattr(downstream, "segment", segment)
    monkeypatch.setattr(
        "medmae.nnunet.predict.load_predictor", lambda *_, **__: (predictor, ("t1", "t2", "flair"), True)
    )
    return seen


def model(weight: float) -> Linear:
    """Every target is ``weight`` times the mean of what is given, in the units of the images."""
    metadata = {"intensity": {m: {"mean": 110.0, "std": 30.0} for m in ("t1", "t2", "flair")}}
    names = ("t1", "t2", "flair")
    return Linear(plan(names, crop=(16, 16, 16)), dict.fromkeys(names, weight), metadata=metadata)


def test_a_good_synthesis_costs_nothing_and_a_flat_one_does(tmp_path: Path, thresholds: list[tuple[str, ...]]) -> None:
    data = scans(tmp_path / "scans")
    good = evaluate_downstream(data, model(1.0), "MODEL", tmp_path, device="cpu")
    flat = evaluate_downstream(data, model(0.0), "MODEL", tmp_path / "flat", device="cpu")
    assert [(r["given"], r["synthesised"]) for r in good.summary()] == [
        ("t2+flair", "t1"),
        ("t1+flair", "t2"),
        ("t1+t2", "flair"),
        ("flair", "t1+t2"),
        ("t2", "t1+flair"),
        ("t1", "t2+flair"),
    ]
    assert all(r["dice_real"] == 1 and r["lost"] < 0.02 and r["studies"] == 2 for r in good.summary())
    assert all(r["lost"] > 0.9 for r in flat.summary() if "+" in r["synthesised"])
    assert all(r["dice_without"] == 1 for r in flat.summary())
    assert ("flair",) in thresholds and ("t1", "t2", "flair") in thresholds
    with (tmp_path / "downstream.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == 12


def test_the_command_tells_it_beside_the_scores(tmp_path: Path, thresholds: list[tuple[str, ...]]) -> None:
    found = medmae.evaluate_synthesis(
        scans(tmp_path / "scans"), model(1.0), tmp_path / "o", targets=["flair"], segmenter="MODEL", device="cpu"
    )
    assert found.downstream is not None and found.to_json()["downstream"]["label"] == "seg"
    assert "t1+t2 -> flair" in str(found) and (tmp_path / "o" / "downstream.json").exists()


def test_studies_that_lack_a_channel_or_the_label_are_not_scored(tmp_path: Path, thresholds: object) -> None:
    data = scans(tmp_path / "scans")
    (data / "case0" / "t2.nii.gz").unlink()
    (data / "case1" / "seg.nii.gz").unlink()
    with pytest.raises(InputError, match="no study for the segmenter"):
        evaluate_downstream(data, model(1.0), "MODEL", tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("predicted", "truth", "values", "expected"),
    [
        ([1, 1, 2, 0], [1, 0, 2, 2], [1, 2, 3], (2 / 3 + 2 / 3) / 2),
        ([1, 1, 0, 0], [4, 0, 4, 0], [1, 2], 0.5),  # labels that the model does not know: foreground alone
        ([0, 0], [0, 0], [1, 2], 1.0),
        ([0, 3], [0, 0], [1, 2, 3], 0.0),
    ],
)
def test_dice_by_hand(predicted: list[int], truth: list[int], values: list[int], expected: float) -> None:
    assert dice_of(np.array(predicted), np.array(truth), values) == pytest.approx(expected)
