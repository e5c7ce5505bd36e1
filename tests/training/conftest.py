"""A cohort and a plan small enough to train in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medmae.imaging.nifti import write_nifti
from medmae.imaging.volume import Volume

MODALITIES = ("t1", "t1c", "t2", "flair")
PLAN = {
    "name": "test",
    "method": "bm-mae",
    "modalities": MODALITIES,
    "image": {"spacing": [1, 1, 1], "crop": [16, 16, 16]},
    "model": {
        "patch": [4, 4, 4],
        "width": 24,
        "depth": 1,
        "heads": 2,
        "mlp_width": 48,
        "decoder_width": 24,
        "decoder_depth": 1,
        "decoder_heads": 2,
        "decoder_mlp_width": 24,
    },
    "sampling": {"crop": "random"},
    "training": {
        "lr": 0.003,
        "batch_size": 2,
        "epochs": 10,
        "warmup_epochs": 1,
        "schedule": "warmup-cosine",
        "validate_every": 2,
        "preview_every": 5,
        "checkpoint_every": 2,
        "validation_share": 0.2,
        "precision": "32",
    },
}


def write_scans(folder: Path, studies: int = 6, size: tuple[int, int, int] = (20, 24, 18)) -> Path:
    """Studies with smooth structure; every third lacks t1c, and the last has only t2."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in size), indexing="ij"))
    inside = (grid**2).sum(0) < 0.9
    for s in range(studies):
        rng = np.random.default_rng(s)
        centre = rng.uniform(-0.4, 0.4, 3)
        blob = np.exp(-((grid - centre[:, None, None, None]) ** 2).sum(0) * 6)
        for i, name in enumerate(MODALITIES):
            if (s % 3 == 1 and name == "t1c") or (s == studies - 1 and name != "t2"):
                continue
            array = (300 + 200 * (-1) ** i * blob + 30 * grid[i % 3] + 5 * rng.standard_normal(size)) * inside
            (folder / f"case{s}").mkdir(parents=True, exist_ok=True)
            write_nifti(Volume(array.astype(np.float32), np.eye(4)), folder / f"case{s}" / f"{name}.nii.gz")
    return folder


@pytest.fixture(scope="session")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scans(tmp_path_factory.mktemp("scans"))


@pytest.fixture(scope="session")
def cohort(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from medmae import Plan, prepare

    out = tmp_path_factory.mktemp("prepared") / "cohort"
    prepare(scans, Plan.load(PLAN), out, jobs=1)
    return out
