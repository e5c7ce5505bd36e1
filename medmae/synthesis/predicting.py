"""From a study's arrays to its absent modalities: the masked autoencoder, the refiner where a checkpoint has one, and
how far the prediction moves when its input does.

Everything here is in the model's space. Calibrated intervals are :mod:`medmae.synthesis.trust`'s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medmae.models.refiner import Refiner
from medmae.models.tokens import token_grid
from medmae.synthesis.floors import foreground
from medmae.synthesis.windows import Synthesiser, Windowed, predict_volume

HIDDEN = 0.25  # share of the given patches that one of the passes does without
_TILE = 128  # voxels along the edge of what the refiner sees at once, at most
_OVERLAP = 0.25  # of neighbouring tiles: at its edge one knows less of its surroundings
_SEED = 5


@dataclass(frozen=True)
class Predicted:
    """``arrays`` {target: (D, H, W) float32}, ``doubt`` the same shapes: how far off each voxel may be, in no unit yet
    (None when it was not asked for). ``coarse``: before refining, and how it was made."""

    arrays: dict[str, np.ndarray]
    doubt: dict[str, np.ndarray] | None
    coarse: Windowed


def inside(arrays: Mapping[str, np.ndarray], model: Synthesiser) -> np.ndarray:
    """(D, H, W) bool, what is worth predicting: not the background, where zero is one."""
    if model.plan.image.intensity.has_background:
        return foreground(arrays)
    return np.ones(next(iter(arrays.values())).shape, bool)


def refiner_of(model: Synthesiser) -> Refiner | None:
    """The refiner that came with a checkpoint."""
    found = getattr(model, "companions", {}).get("refiner")
    return found if isinstance(found, Refiner) else None


def predict_study(
    model: Synthesiser,
    arrays: Mapping[str, np.ndarray],
    targets: Sequence[str],
    *,
    foreground: np.ndarray | None = None,
    device: str | torch.device = "cpu",
    precision: str = "32",
    doubt: bool = False,
) -> Predicted:
    """``targets`` from ``arrays`` {modality: (D, H, W)}, all other modalities of a study.

    ``doubt`` combines, as the root of the sum of squares: the spread over placements of the patch grid; the change
    when each given modality in turn is left out (of several), and when a quarter of the patches given are hidden; and,
    with a refiner, the scale of the error that it expects.
    """
    refiner = refiner_of(model)
    absent = [m for m in model.modalities if m not in arrays] if refiner else list(targets)
    options: dict[str, Any] = {"foreground": foreground, "device": device, "precision": precision}
    coarse = predict_volume(model, arrays, absent, **options)
    found = {m: coarse.arrays[m] for m in targets}
    squares = {m: coarse.spread[m] ** 2 for m in targets} if doubt else {}
    if doubt:
        for change in moved(model, arrays, targets, coarse.arrays, options):
            for m in targets:
                squares[m] += change[m] ** 2
    if refiner is not None:
        refined, scale = refine(refiner, arrays, coarse, device, precision)
        found = {m: refined[m] for m in targets}
        for m in squares:
            squares[m] += scale[m] ** 2
    return Predicted(found, {m: np.sqrt(s) for m, s in squares.items()} if doubt else None, coarse)


def moved(
    model: Synthesiser,
    arrays: Mapping[str, np.ndarray],
    targets: Sequence[str],
    whole: Mapping[str, np.ndarray],
    options: Mapping[str, Any],
) -> list[dict[str, np.ndarray]]:
    """How far each target moves: root mean square over the modalities left out in turn, and with patches hidden."""
    changes = []
    if len(arrays) > 1:
        total = {m: np.zeros_like(whole[m]) for m in targets}
        for left_out in arrays:
            fewer = {m: a for m, a in arrays.items() if m != left_out}
            again = predict_volume(model, fewer, targets, shifts=1, **options).arrays
            for m in targets:
                total[m] += (again[m] - whole[m]) ** 2 / len(arrays)
        changes.append({m: np.sqrt(t) for m, t in total.items()})
    thinned = predict_volume(Thinned(model), arrays, targets, shifts=1, **options).arrays
    changes.append({m: thinned[m] - whole[m] for m in targets})
    return changes


class Wrapped:
    """What a model that is shown its images in another way has in common with the model itself."""

    def __init__(self, model: Synthesiser) -> None:
        self.model = model
        self.plan, self.metadata, self.grid_multiple = model.plan, model.metadata, model.grid_multiple

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.model.modalities


class Thinned(Wrapped):
    """A model that sees only some of the patches it is given, drawn anew for every batch from a seed."""

    def __init__(self, model: Synthesiser, share: float = HIDDEN) -> None:
        super().__init__(model)
        self.share = share
        self.generator = torch.Generator().manual_seed(_SEED)

    def reconstruct(self, images: Mapping[str, Tensor], targets: Sequence[str]) -> dict[str, Tensor]:
        """{target: (B, 1, D, H, W)} from what stays of ``images``."""
        first = next(iter(images.values()))
        model: Any = self.model
        grid = token_grid(tuple(first.shape[2:]), model.mask_unit)
        count = grid[0] * grid[1] * grid[2]
        order = torch.rand(len(first), count, generator=self.generator).argsort(1)
        hidden = (order < int(self.share * count)).view(-1, *grid).to(first.device)  # equally many in each window
        output = model(dict(images), mask=dict.fromkeys(images, hidden), return_prediction=True)
        return {m: output.prediction[m] for m in targets}


def refine(
    refiner: Refiner,
    arrays: Mapping[str, np.ndarray],
    coarse: Windowed,
    device: str | torch.device = "cpu",
    precision: str = "32",
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """{modality: (D, H, W)} refined, and the scale of the error expected, of every modality in ``coarse``.

    In overlapping tiles on ``device``, blended on the CPU (MONAI's sliding window).
    """
    from monai.inferers import sliding_window_inference

    device = torch.device(device)
    names = refiner.modalities
    values, spread = as_input(names, arrays, coarse.arrays, coarse.spread)
    shown = torch.tensor([[m in arrays for m in names]], device=device)
    count = len(names)
    refiner = refiner.to(device).eval()

    def run(tile: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            refined, scale = refiner(tile[:, :count], shown.expand(len(tile), -1), tile[:, count:])
        return torch.cat([refined, scale], dim=1).float()

    whole = torch.from_numpy(np.concatenate([values, spread]))[None]
    with torch.inference_mode():
        size = [tile(n) for n in whole.shape[2:]]
        made: Any = sliding_window_inference(
            whole, size, 1, run, overlap=_OVERLAP, mode="gaussian", sw_device=device, device=torch.device("cpu")
        )
    refined, scale = made[0].numpy().reshape(2, count, *whole.shape[2:])
    rows = {m: i for i, m in enumerate(names) if m in coarse.arrays}
    return {m: refined[i] for m, i in rows.items()}, {m: scale[i] for m, i in rows.items()}


def tile(size: int) -> int:
    """The smallest edge with which as few tiles cover ``size`` voxels as with the largest one allowed."""
    apart = 1 - _OVERLAP
    count = max(1, math.ceil((size - _OVERLAP * _TILE) / (apart * _TILE)))
    return min(size, _TILE, 4 * math.ceil(size / (count * apart + _OVERLAP) / 4))  # whole voxels apart


def as_input(
    names: Sequence[str],
    given: Mapping[str, np.ndarray],
    coarse: Mapping[str, np.ndarray],
    spread: Mapping[str, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """The refiner's values and spread, each (M, D, H, W) float32: 0 where nothing is known."""
    shape = next(iter(given.values())).shape
    values, spreads = (np.zeros((len(names), *shape), np.float32) for _ in range(2))
    for i, m in enumerate(names):
        if m in given:
            values[i] = given[m]
        elif m in coarse:
            values[i], spreads[i] = coarse[m], spread[m]
    return values, spreads
