"""A labelled data set of nnU-Net's and small checkpoints of every method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

import medmae

VIT = {
    "patch": [4, 4, 4],
    "width": 24,
    "depth": 3,
    "heads": 2,
    "mlp_width": 48,
    "decoder_width": 12,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "decoder_mlp_width": 24,
}
CNN = {"features": [4, 8, 12], "blocks": [1, 1, 1], "mask_unit": [4, 4, 4]}
MODELS: dict[str, dict[str, Any]] = {
    "bm-mae": {"modalities": ["t1", "t2", "flair"], "model": VIT},
    "hi-end-mae": {"modalities": ["t1"], "model": {**VIT, "skips": [2, 1, 0]}, "masking": {"sampler": "uniform"}},
    "resenc-mae": {"modalities": ["t1", "t2", "flair"], "model": CNN, "masking": {"sampler": "shared"}},
    "spark": {"modalities": ["t1"], "model": CNN, "masking": {"sampler": "shared"}},
}


def model_of(method: str, seed: int = 0, **more: Any) -> medmae.models.base.MaskedAutoencoder:  # type: ignore[name-defined]
    torch.manual_seed(seed)
    tuning = {"optimizer": "adamw", "lr": 0.003, "epochs": 2, "feature_size": 4}
    plan = {"name": f"small-{method}", "method": method, "image": {"crop": [16, 16, 16]}, "finetuning": tuning}
    return medmae.create({**plan, **MODELS[method], **more}).eval()


def write_raw(folder: Path, cases: int = 6, channels: tuple[str, ...] = ("T1", "FLAIR")) -> Path:
    """Ellipsoids with a bright box whose place decides its label; stored with turned axes, so that order matters."""
    raw = folder / "Dataset901_Boxes"
    for name in ("imagesTr", "labelsTr"):
        (raw / name).mkdir(parents=True)
    for case in range(cases):
        rng = np.random.default_rng(case)
        shape = (18, 22, 26)  # stored axes: P, S, L
        grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
        head = (grid**2).sum(0) < 0.95
        label = np.zeros(shape, np.uint8)
        corner = rng.integers(5, 9, 3)
        label[tuple(slice(c, c + 5) for c in corner)] = 1 + case % 2
        label *= head
        affine = np.array([[0, 0, -1, 10], [-1, 0, 0, 20], [0, 1, 0, -5], [0, 0, 0, 1.0]])
        for number in range(len(channels)):
            array = (200 + 40 * grid[number % 3] + 150 * (label > 0) + 10 * rng.standard_normal(shape)) * head
            image = nib.Nifti1Image(array.astype(np.float32), affine)
            nib.save(image, raw / "imagesTr" / f"case_{case}_{number:04}.nii.gz")
        nib.save(nib.Nifti1Image(label, affine), raw / "labelsTr" / f"case_{case}.nii.gz")
    description = {
        "channel_names": {str(i): c for i, c in enumerate(channels)},
        "labels": {"background": 0, "left": 1, "right": 2},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(description))
    return raw


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_raw(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one checkpoint a method, by its name."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for method in MODELS:
        model_of(method).save_pretrained(folder / method)
    return folder
