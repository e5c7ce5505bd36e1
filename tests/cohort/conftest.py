"""Scans for the tests of cohorts: small, made here, written with nibabel and not with the code under test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

Write = Callable[..., Path]
DATA = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture
def scan() -> Write:
    """Write a NIfTI file: an ellipsoid of noise in zeros by default. Returns its path."""

    def write(
        path: Path,
        array: np.ndarray | None = None,
        affine: np.ndarray | None = None,
        *,
        shape: tuple[int, ...] = (14, 16, 12),
        seed: int = 0,
    ) -> Path:
        if array is None:
            grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
            inside = sum(axis**2 for axis in grid) < 0.9
            array = np.where(inside, np.random.default_rng(seed).integers(50, 500, shape), 0).astype(np.int16)
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
        return path

    return write


@pytest.fixture
def touch() -> Write:
    """An empty file, for what only looks at names."""

    def make(*paths: Path) -> None:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    return make  # type: ignore[return-value]


@pytest.fixture
def real_data() -> Callable[[str], Path]:
    """A folder of the real scans, or a skip."""

    def find(name: str) -> Path:
        folder = DATA / name
        if not folder.exists():
            pytest.skip(f"no real scans here: {name}")
        return folder

    return find
