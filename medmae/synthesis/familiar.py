"""Is a study like those that a model was trained on? Its features against theirs, modality by modality.

An image is described by what the frozen encoder makes of it alone (:func:`medmae.features.study_features`) and by plain
statistics of its normalised intensities. How far it lies from the nearest training image, relative to how far training
images lie from their own nearest neighbours, tells the strange ones (nearest-neighbour novelty detection). A small
distance does not prove that a synthesis is right; a large one says that nobody checked it on such input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from medmae.features import study_features, study_statistics
from medmae.models.base import MaskedAutoencoder
from medmae.synthesis.floors import Case

LIMIT = 1.5  # times the largest distance between a training image and its nearest other
_MOST = 512  # training studies that are remembered
_FEWEST = 3


@dataclass(frozen=True)
class InMemory:
    """Arrays in the model's space, as the functions that describe a prepared study want them."""

    id: str
    arrays: Mapping[str, np.ndarray]
    affine: np.ndarray
    labels: tuple[str, ...] = ()

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.arrays)

    def array(self, modality: str) -> np.ndarray:
        return self.arrays[modality]

    def label(self, name: str) -> np.ndarray:
        raise KeyError(name)


def describe(model: MaskedAutoencoder, study: Case, modality: str, device: torch.device | str) -> np.ndarray:
    """(F,) of one image of a study."""
    alone = InMemory(study.id, {modality: study.array(modality)}, np.asarray(study.affine))
    features = study_features(model, alone, device=device)
    return np.concatenate([features, study_statistics(alone, (modality,))])


def remember(
    model: MaskedAutoencoder,
    studies: Sequence[Case],
    device: torch.device | str,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Tensor]:
    """What :func:`strangeness` compares with: {"<modality>.points" (n, F), ".mean", ".scale" (F,), ".reach" ()}, of
    the modalities that three studies have; evenly thinned to 512 studies."""
    chosen = studies[:: math.ceil(len(studies) / _MOST)] if studies else studies
    rows: dict[str, list[np.ndarray]] = {}
    for done, study in enumerate(chosen):
        if on_progress:
            on_progress(done, len(chosen), study.id)
        for m in model.modalities:
            if m in study.modalities:
                rows.setdefault(m, []).append(describe(model, study, m, device))
    if on_progress:
        on_progress(len(chosen), len(chosen), "")
    found: dict[str, Tensor] = {}
    for m, vectors in rows.items():
        if len(vectors) < _FEWEST:
            continue
        points = np.stack(vectors).astype(np.float64)
        mean, scale = points.mean(0), points.std(0)
        scale[scale < 1e-6 * np.abs(mean).clip(1e-3)] = 1.0  # what never varies tells nothing
        points = (points - mean) / scale
        apart = np.linalg.norm(points[:, None] - points[None], axis=2)
        np.fill_diagonal(apart, np.inf)
        parts = {"points": points, "mean": mean, "scale": scale, "reach": apart.min(1).max()}
        found |= {f"{m}.{key}": torch.tensor(value, dtype=torch.float32) for key, value in parts.items()}
    return found


def strangeness(model: MaskedAutoencoder, study: Case, device: torch.device | str) -> dict[str, float]:
    """{modality: distance to the nearest training image, 1 being the farthest that a training image is from its
    nearest other}, for the modalities that are known; a warning is due beyond :data:`LIMIT`."""
    known = model.companions.get("familiar", {})
    found = {}
    for m in study.modalities:
        if f"{m}.points" in known:
            row = torch.from_numpy(describe(model, study, m, device).astype(np.float32))
            at = (row - known[f"{m}.mean"]) / known[f"{m}.scale"]
            nearest = (known[f"{m}.points"] - at).norm(dim=1).min()
            found[m] = float(nearest / known[f"{m}.reach"].clamp(min=1e-6))
    return found
