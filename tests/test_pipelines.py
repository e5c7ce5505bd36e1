"""The recipes run, on few studies and steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]


def recipe(name: str, out: Path, *arguments: object) -> str:
    command = [sys.executable, str(ROOT / "pipelines" / name), str(out), "--quick", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def test_classification(tmp_path: Path) -> None:
    assert "auc" in recipe("classify.py", tmp_path)
    assert (tmp_path / "head" / "curves.png").exists()


def test_an_inbox_of_dicom_gets_its_missing_modality(tmp_path: Path) -> None:
    from tests.cohort.test_dicom import study
    from tests.nnunet.conftest import model_of

    model_of("bm-mae").save_pretrained(tmp_path / "run")
    study(tmp_path / "inbox" / "DOE_JANE", "t1", "t2")
    study(tmp_path / "inbox" / "ROE_RICHARD", "t1", "t2", "flair", patient="X")
    (tmp_path / "inbox" / "STILES_JOHN").mkdir()
    (tmp_path / "inbox" / "STILES_JOHN" / "notes.txt").write_text("no image")
    script = [sys.executable, str(ROOT / "pipelines" / "clinical_missing_modality.py"), str(tmp_path / "out")]
    script += ["--checkpoint", str(tmp_path / "run"), "--folder", str(tmp_path / "inbox")]
    first = subprocess.run(script, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == ["done", "nothing to do", "failed"], first.stderr
    assert first.returncode == 1 and len(lines[0]["series"]) == 1 and lines[2]["problems"]
    made = tmp_path / "out" / "made" / lines[0]["study"]
    assert len(list(made.glob("study-*_flair/*.dcm"))) > 3 and list(made.glob("study-*.html"))
    logged = (tmp_path / "out" / "log.jsonl").read_text() + first.stdout
    assert not any(word in logged.upper() for word in ("DOE", "JANE", "ROE", "STILES", "4711"))
    again = subprocess.run(script, capture_output=True, text=True, check=False)
    assert [json.loads(line)["status"] for line in again.stdout.splitlines()] == ["failed"]


@pytest.mark.slow
def test_segmentation_with_few_labels(tmp_path: Path) -> None:
    recipe("segment_with_few_labels.py", tmp_path)
    frame = pd.read_csv(tmp_path / "learning-curve.csv")
    assert frame.labels.tolist() == [4, 4] and frame.from_scratch.tolist() == [False, True]


@pytest.mark.slow
def test_segmentation_with_missing_modalities(tmp_path: Path) -> None:
    recipe("segment_missing_modalities.py", tmp_path)
    frame = pd.read_csv(tmp_path / "combinations.csv")
    assert frame.modalities.tolist() == ["t1c+t2+flair", "t1+t1c+t2+flair", "t1+t1c+t2+flair"]
    assert frame.dropout.tolist() == [0.35, 0.35, 0] and frame.dice.between(0, 1).all()
