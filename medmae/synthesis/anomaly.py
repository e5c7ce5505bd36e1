"""Where a study is not what its surroundings lead to expect: a heat map for lesions.

Every modality that is there is predicted from the others and from its own surroundings: its patches are hidden a
quarter at a time, in an even lattice, the others being visible there, and what the model says of each patch while it is
hidden is put together. The residual in units of the study's own typical residual shows what the model did not expect:
lesions, artefacts, operations, and edges that it cannot place to a voxel. Nothing here was trained on lesions.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medmae.errors import InputError
from medmae.imaging.space import to_model_space
from medmae.imaging.volume import Volume
from medmae.models.tokens import token_grid
from medmae.synthesis.predicting import Wrapped, inside
from medmae.synthesis.volumes import pick_device
from medmae.synthesis.windows import Synthesiser, predict_volume

PARTS = 4  # a quarter of the patches is hidden at a time
_BLUR = 1.0  # voxels: a lesion is more than one voxel, noise is not
_NORMAL = 1.4826  # times the median absolute deviation is the standard deviation of a normal distribution


class Surrounded(Wrapped):
    """A model that predicts what it is given, each patch while that patch is hidden and the others' are not.

    Where one modality hides a quarter of its patches, each other hides another quarter (up to ``PARTS`` modalities),
    so a few passes do for all of them, and as much stays visible as in training.
    """

    def reconstruct(self, images: Mapping[str, Tensor], targets: Sequence[str]) -> dict[str, Tensor]:
        """{target: (B, 1, D, H, W)}, the targets being all of ``images``."""
        model: Any = self.model
        first = next(iter(images.values()))
        cell = model.mask_unit
        part = lattice(token_grid(tuple(first.shape[2:]), cell)).to(first.device)
        # More modalities than parts take turns, so that none of them hides the same place as another.
        groups = [list(targets)[i : i + PARTS] for i in range(0, len(targets), PARTS)]
        whole = {m: torch.zeros_like(first) for m in targets}
        shown = torch.zeros_like(part, dtype=torch.bool)
        for group, number in itertools.product(groups, range(PARTS)):
            hidden = {m: part == (number + turn) % PARTS for turn, m in enumerate(group)}
            mask = {m: hidden.get(m, shown).expand(len(first), *part.shape) for m in images}
            said = model(dict(images), mask=mask, return_prediction=True).prediction
            for m, where in hidden.items():
                for axis, size in enumerate(cell):
                    where = where.repeat_interleave(size, axis)
                whole[m] = torch.where(where, said[m].to(whole[m].dtype), whole[m])
        return whole


def lattice(grid: Sequence[int]) -> Tensor:
    """(gD, gH, gW) which of the ``PARTS`` each patch belongs to: neighbours along every axis are in different ones."""
    i, j, k = (torch.arange(n) for n in grid)
    return (i[:, None, None] + 2 * j[None, :, None] + 3 * k[None, None, :] + (j[None, :, None] // 2)) % PARTS


def residuals(
    model: Synthesiser,
    arrays: Mapping[str, np.ndarray],
    *,
    foreground: np.ndarray,
    device: str | torch.device = "cpu",
    precision: str = "32",
) -> dict[str, np.ndarray]:
    """{modality: (D, H, W) float32}, the image minus what was expected, in robust standard deviations of this residual
    over ``foreground`` (bool); 0 outside."""
    expected = predict_volume(
        Surrounded(model), arrays, list(arrays), foreground=foreground, device=device, precision=precision
    ).arrays
    return {m: in_units(np.where(foreground, arrays[m] - expected[m], 0), foreground) for m in arrays}


def in_units(residual: np.ndarray, foreground: np.ndarray) -> np.ndarray:
    """``residual`` over its robust standard deviation in ``foreground``, float32."""
    inside = residual[foreground]
    scale = _NORMAL * float(np.median(np.abs(inside - np.median(inside)))) if inside.size else 1.0
    scaled: np.ndarray = (residual / max(scale, 1e-3)).astype(np.float32)
    return scaled


def anomaly_of(
    model: Synthesiser, volumes: Mapping[str, Volume], like: str, device: str, precision: str | None = None
) -> tuple[Volume, tuple[str, ...]]:
    """The heat map of a study on the grid of its image ``like``, and the modalities it comes from. Raises
    :class:`InputError` for a study with none that the model knows."""
    known = {m: volumes[m] for m in model.modalities if m in volumes}
    if not known:
        raise InputError(
            "no modality that the model knows",
            found=", ".join(sorted(volumes)) or "nothing",
            expected=f"at least one of {', '.join(model.modalities)}",
        )
    study = to_model_space(known, model.plan.image)
    seen = inside(study.arrays, model)
    chosen = pick_device(device)
    if isinstance(model, torch.nn.Module):
        model.to(chosen).eval()
    found = residuals(model, study.arrays, foreground=seen, device=chosen, precision=precision or "32")
    first = volumes[like]
    mapped = study.to_native(heat(found, seen), first.grid, None)
    return Volume(mapped.array.astype(np.float32), first.affine, first.frame), tuple(known)


def heat(found: Mapping[str, np.ndarray], foreground: np.ndarray) -> np.ndarray:
    """(D, H, W) float32: the root mean square of the residuals over the modalities, smoothed over a voxel; 1 is
    typical of the study."""
    from scipy.ndimage import gaussian_filter

    square = np.mean([r.astype(np.float32) ** 2 for r in found.values()], axis=0)
    weight = gaussian_filter(foreground.astype(np.float32), _BLUR)
    smooth = gaussian_filter(np.where(foreground, square, 0), _BLUR) / np.maximum(weight, 1e-3)
    mapped: np.ndarray = np.where(foreground, np.sqrt(smooth), 0).astype(np.float32)
    return mapped
