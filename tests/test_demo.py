"""The demonstration and its script, cut short: every step runs and leaves what it says."""

from __future__ import annotations

import csv
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import medmae
from medmae.plan import Plan

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_demo_pipeline_runs_every_step(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "pipelines" / "demo.py"), str(tmp_path), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    acquired = nib.load(tmp_path / "scans/held_out/held-001/flair.nii.gz")
    synthesised = nib.load(tmp_path / "synthesis/held-001_flair.nii.gz")
    assert synthesised.shape == acquired.shape and np.allclose(synthesised.affine, acquired.affine)
    rows = list(csv.DictReader((tmp_path / "scores/summary.csv").open()))
    assert {row["inputs"] for row in rows} >= {"t1", "t2", "t1+t1c+t2"}
    assert {row["predictor"] for row in rows} == {"model", "mean", "regression"}


@pytest.mark.slow
def test_demo_command_says_where_to_look_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = Plan.load("bm-mae-tiny", ["training.epochs=1", "training.steps_per_epoch=10", "reconstruction.shifts=1"])
    cohort = medmae.make_demo_cohort
    monkeypatch.setattr(import_module("medmae.demo"), "PLAN", short)  # its dotted name gives the function
    monkeypatch.setattr(medmae, "make_demo_cohort", lambda out, **more: cohort(out, studies=3, held_out=1, **more))
    result = medmae.demo(tmp_path / "demo", device="cpu")
    assert result.picture.stat().st_size > 10_000 and result.reports[0].exists()
    assert str(result.picture) in str(result) and "every combination" in str(result)
    before = (tmp_path / "demo/run/checkpoint/model.safetensors").stat().st_mtime_ns
    medmae.demo(tmp_path / "demo", device="cpu")  # again: nothing is trained anew
    assert (tmp_path / "demo/run/checkpoint/model.safetensors").stat().st_mtime_ns == before
