"""One vector a study: what a frozen encoder makes of it, averaged over the study's foreground."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medmae.errors import InputError
from medmae.models.base import MaskedAutoencoder
from medmae.models.tokens import token_grid
from medmae.plan import Triple
from medmae.synthesis.floors import Case, foreground
from medmae.synthesis.windows import corners_inside, window_layout, window_size

Pool = Literal["mean", "cls"]
_VOXELS = {"cpu": 2**20, "cuda": 2**24}  # of the windows that run together


def study_features(
    model: MaskedAutoencoder,
    study: Case,
    *,
    pool: Pool = "mean",
    device: torch.device | str = "cpu",
    precision: Literal["32", "bf16"] = "32",
) -> np.ndarray:
    """(C,) float32 of a study in the model's space, from the modalities that it has.

    Windows of the training crop's size, side by side over the whole volume, all visible. ``mean``: the mean of the
    tokens, or of the deepest feature map, each place weighted by its share of foreground. ``cls``: of the windows'
    CLS tokens, each weighted by the window's foreground (transformers only). Raises :class:`InputError` for a study
    with none of the model's modalities and for ``cls`` of a network that has no such token.
    """
    device = torch.device(device)
    names = [m for m in model.modalities if m in study.modalities]
    if not names:
        raise InputError(
            "none of its modalities is the model's",
            where=study.id,
            found=", ".join(study.modalities),
            expected=", ".join(model.modalities),
        )
    arrays = {m: study.array(m).astype(np.float32) for m in names}
    seen = inside(arrays, model.plan.image.intensity.scheme)
    corners, padded, occupied = layout_of(model, arrays, seen)
    if not len(corners):
        raise InputError("nothing but background", where=study.id)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        found: np.ndarray = mean_of(model, padded, occupied, corners, device, pool).cpu().numpy()
    return found


def inside(arrays: Mapping[str, np.ndarray], scheme: str) -> np.ndarray:
    """(D, H, W) bool, what is not background: not 0 where zero is background, else above the smallest value."""
    if scheme == "zscore-nonzero":
        return foreground(arrays)
    return foreground({m: a - a.min() for m, a in arrays.items()})


def layout_of(
    model: MaskedAutoencoder, arrays: Mapping[str, np.ndarray], seen: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """Windows side by side over a study: (n, 3) first voxels of those that hold foreground, and the images and the
    foreground padded so that all of them lie within."""
    window = window_size(model)
    starts, around = window_layout(seen.shape, window, overlap=0.0)
    occupied = np.pad(seen, around)
    corners = corners_inside(starts, (0, 0, 0), window, occupied)
    return corners, {m: np.pad(a, around) for m, a in arrays.items()}, occupied


def mean_of(
    model: MaskedAutoencoder,
    arrays: Mapping[str, np.ndarray],
    occupied: np.ndarray,
    corners: np.ndarray,
    device: torch.device,
    pool: Pool,
) -> Tensor:
    """(C,) the foreground's mean over the windows at ``corners``; gradients flow where they are asked for."""
    window = window_size(model)
    batch = max(1, _VOXELS.get(device.type, 2**20) // int(np.prod(window)))

    def cut(array: np.ndarray, some: np.ndarray) -> Tensor:
        pieces = [array[tuple(slice(c, c + w) for c, w in zip(corner, window, strict=True))] for corner in some]
        return torch.from_numpy(np.stack(pieces)[:, None].astype(np.float32)).to(device)

    sums: list[Tensor] = []
    weight = torch.zeros((), device=device)
    for first in range(0, len(corners), batch):
        some = corners[first : first + batch]
        images, share = {m: cut(a, some) for m, a in arrays.items()}, cut(occupied, some)
        values, weights = pooled(model, model.encode(images), images, share, pool)
        sums.append((values.float() * weights.unsqueeze(-1)).sum(0))
        weight = weight + weights.sum()
    return torch.stack(sums).sum(0) / weight


def pooled(
    model: MaskedAutoencoder, encoded: Any, images: Mapping[str, Tensor], share: Tensor, pool: Pool
) -> tuple[Tensor, Tensor]:
    """(n, C) values and (n,) weights: the rows of a batch of windows that go into the mean."""
    if isinstance(encoded, Tensor):  # (B, 1 + tokens, C), CLS first, modalities in model order
        if pool == "cls":
            return encoded[:, 0].float(), share.sum((1, 2, 3, 4))
        patch: Triple = model.grid_multiple
        grid = token_grid(tuple(share.shape[2:]), patch)
        of_token = F.avg_pool3d(share, patch).view(len(share), -1).repeat(1, len(images))
        assert of_token.shape[1] == encoded.shape[1] - 1 == len(images) * grid[0] * grid[1] * grid[2]
        return encoded[:, 1:].float().flatten(0, 1), of_token.flatten()
    if pool == "cls":
        raise InputError("a convolutional network has no CLS token", field="pool", found="cls", expected="mean")
    deepest = encoded[-1]
    of_place = F.adaptive_avg_pool3d(share, deepest.shape[2:]).flatten()
    return deepest.float().permute(0, 2, 3, 4, 1).flatten(0, 3), of_place


def study_statistics(study: Case, modalities: tuple[str, ...]) -> np.ndarray:
    """What needs no network: the foreground's volume (mm³) and extent (mm) and, of each modality, mean, deviation and
    five percentiles of the normalised intensities in it (0 where it is absent)."""
    arrays = {m: study.array(m).astype(np.float32) for m in modalities if m in study.modalities}
    seen = inside(arrays, "zscore-nonzero" if all((a == 0).any() for a in arrays.values()) else "zscore")
    spacing = np.sqrt((study.affine[:3, :3] ** 2).sum(0))
    extent = [np.ptp(np.flatnonzero(seen.any(tuple(a for a in range(3) if a != axis)))) + 1 for axis in range(3)]
    found = [float(seen.sum() * spacing.prod()), *(float(e * s) for e, s in zip(extent, spacing, strict=True))]
    for m in modalities:
        if m not in arrays:
            found += [0.0] * 7
            continue
        values = arrays[m][seen]
        found += [float(values.mean()), float(values.std()), *map(float, np.percentile(values, (5, 25, 50, 75, 95)))]
    return np.array(found, np.float32)
