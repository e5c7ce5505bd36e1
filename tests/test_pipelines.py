"""The recipes run, on few studies and steps."""

from __future__ import annotations

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
