"""Whole volumes through a model of fixed crop size: overlapping windows, smooth blending, shifted patch grids.

A patch-wise decoder leaves a faint grid at the borders of its patches. Every voxel is therefore predicted under
several placements of the patch grid, spread evenly over one patch cell, and the predictions are averaged.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from medmae.errors import InputError, MedmaeError
from medmae.plan import Plan, Triple

SIGMA = 0.125  # of the window's edge: the blending Gaussian of MONAI and nnU-Net
_CPU_VOXELS = 2**18  # voxels of the windows that run together on a CPU: small windows alone are all overhead
_CUDA_VOXELS = 2**24  # the same on a GPU, halved as long as memory runs out
FLOOR = 1e-3  # smallest blending weight, so that no covered voxel is divided by nothing


class Synthesiser(Protocol):
    """What this folder asks of a model (see :class:`medmae.models.base.MaskedAutoencoder`)."""

    plan: Plan
    metadata: dict[str, Any]
    grid_multiple: Triple

    @property
    def modalities(self) -> tuple[str, ...]: ...

    def reconstruct(self, images: Mapping[str, Tensor], targets: Sequence[str]) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Windowed:
    """Predictions of a whole volume and how they came about: ``arrays`` {target: (D, H, W) float32}, their ``spread``
    (standard deviation over the placements of the patch grid, the same shapes), the window's size, how many windows
    were run, and the offsets of the patch grid (voxels)."""

    arrays: dict[str, np.ndarray]
    spread: dict[str, np.ndarray]
    window: Triple
    windows: int
    shifts: tuple[Triple, ...]


def patch_shifts(patch: Triple, count: int) -> tuple[Triple, ...]:
    """``count`` offsets (voxels) of a grid of ``patch`` cells, the first (0, 0, 0), evenly spread over the cell.

    A rank-1 lattice, i·(1, a, b) / count modulo 1: along each axis the offsets are equally spaced, so averaging
    removes every harmonic of the patch frequency but the multiples of ``count``; a and b are those whose worst
    aliased diagonal wave is finest (the spectral test, Coveyou & MacPherson 1967). Offsets lie in [-p/2, p/2).
    """
    units = [a for a in range(1, count + 1) if math.gcd(a, count) == 1]

    def coarsest_alias(a: int, b: int) -> tuple[int, int]:
        waves = itertools.product(range(-3, 4), repeat=3)
        aliased = sorted(x * x + y * y + z * z for x, y, z in waves if (x + a * y + b * z) % count == 0)
        return aliased[1] if len(aliased) > 1 else 99, -aliased.count(aliased[1]) if len(aliased) > 1 else 0

    a, b = max(itertools.product(units, units), key=lambda ab: coarsest_alias(*ab))
    steps = [[(i * z % count) / count for z in (1, a, b)] for i in range(count)]
    cells = [tuple(round(f * p) % p for f, p in zip(step, patch, strict=True)) for step in steps]
    return tuple(tuple(c - p if c >= (p + 1) // 2 else c for c, p in zip(cell, patch, strict=True)) for cell in cells)  # type: ignore[misc]


def window_starts(size: int, window: int, overlap: float, reach: int = 0) -> list[int]:
    """First voxels of the windows along an axis, evenly spread; neighbours share at least about ``overlap``.

    An axis no longer than the window has one window, centred on it, as in training. A longer one is covered with
    ``reach`` voxels to spare at both ends, so that it stays covered when all windows move by up to ``reach``.
    """
    if size <= window:
        return [-((window - size) // 2)]
    stride = max(1, int(window * (1 - overlap)))
    first, last = -reach, size - window + reach
    return [round(s) for s in np.linspace(first, last, math.ceil((last - first) / stride) + 1)]


def window_layout(
    shape: Sequence[int], window: Triple, overlap: float, reach: Sequence[int] = (0, 0, 0)
) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """The windows' first voxels along each axis, and the voxels (before, after) to pad a volume of ``shape`` with, so
    that all of them lie within however they are moved by up to ``reach``. The starts count in the padded volume."""
    starts = [window_starts(n, w, overlap, r) for n, w, r in zip(shape, window, reach, strict=True)]
    low = [max(0, r - s[0]) for s, r in zip(starts, reach, strict=True)]
    high = [max(0, s[-1] + r + w - n) for s, r, w, n in zip(starts, reach, window, shape, strict=True)]
    moved = [[start + before for start in s] for s, before in zip(starts, low, strict=True)]
    return moved, list(zip(low, high, strict=True))


def blending_weight(window: Triple) -> Tensor:
    """(D, H, W) float32: a separable Gaussian with its peak at the window's centre, nowhere below ``FLOOR``."""
    axes = []
    for size in window:
        x = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
        axes.append(torch.exp(-(x**2) / (2 * (SIGMA * size) ** 2)))
    weight = axes[0][:, None, None] * axes[1][None, :, None] * axes[2][None, None, :]
    return weight.clamp(min=max(float(weight.min()), FLOOR))


def corners_inside(
    starts: Sequence[Sequence[int]], shift: Triple, window: Triple, foreground: np.ndarray
) -> np.ndarray:
    """(n, 3) first voxels of the windows at ``starts`` (one list an axis) + ``shift`` that hold a voxel of
    ``foreground``, a bool array that all of them lie within. C order."""
    axes = [np.asarray(s) + d for s, d in zip(starts, shift, strict=True)]
    # A summed-area table (Crow 1984) counts the voxels of any box from its eight corners.
    table = np.pad(foreground.astype(np.int64).cumsum(0).cumsum(1).cumsum(2), ((1, 0), (1, 0), (1, 0)))
    count = np.zeros([len(a) for a in axes], np.int64)
    for ends in itertools.product((0, 1), repeat=3):
        box = np.ix_(*(a + e * w for a, e, w in zip(axes, ends, window, strict=True)))
        count += (-1) ** (3 - sum(ends)) * table[box]
    chosen = np.argwhere(count > 0)
    return np.stack([a[i] for a, i in zip(axes, chosen.T, strict=True)], axis=1)


def window_size(model: Synthesiser) -> Triple:
    """The plan's training crop, rounded up to what the model takes."""
    crop = zip(model.plan.image.crop, model.grid_multiple, strict=True)
    return tuple(math.ceil(c / m) * m for c, m in crop)  # type: ignore[return-value]


def predict_volume(
    model: Synthesiser,
    images: Mapping[str, np.ndarray],
    targets: Sequence[str],
    *,
    foreground: np.ndarray | None = None,
    overlap: float | None = None,
    shifts: int | None = None,
    device: str | torch.device = "cpu",
    precision: str = "32",
    batch: int | None = None,
) -> Windowed:
    """Each target over the whole volume.

    ``images`` {modality: (D, H, W)} normalised as in training, of any one size; what lies beyond the edge is 0, the
    background of training crops. ``foreground`` (D, H, W) bool: windows without any are not run, and voxels no
    window covers are 0. ``overlap`` and ``shifts`` default to the plan's; ``batch`` windows run together (default:
    by their size; halved on a GPU as long as memory runs out). ``precision`` "bf16" autocasts; sums are float32 on
    the CPU. Raises :class:`MedmaeError` when the model gives something that is not finite.
    """
    shapes = {m: tuple(a.shape) for m, a in images.items()}
    shape: Triple = next(iter(shapes.values()), ())
    if len(shape) != 3 or len(set(shapes.values())) > 1:
        raise InputError("the modalities of a study must share one grid", field="images", found=shapes)
    settings = model.plan.reconstruction
    overlap = settings.overlap if overlap is None else overlap
    offsets = patch_shifts(model.grid_multiple, settings.shifts if shifts is None else shifts)
    window, device = window_size(model), torch.device(device)
    reach = [max(abs(offset[axis]) for offset in offsets) for axis in range(3)]
    starts, around = window_layout(shape, window, overlap, reach)
    occupied = np.pad(np.ones(shape, bool) if foreground is None else foreground, around)
    padded = {m: torch.from_numpy(np.pad(np.asarray(a, np.float32), around)) for m, a in images.items()}
    weight = blending_weight(window)
    batch = batch or max(1, (_CPU_VOXELS if device.type == "cpu" else _CUDA_VOXELS) // math.prod(window))
    means, squares = ({m: torch.zeros(occupied.shape) for m in targets} for _ in range(2))
    placements, run = torch.zeros(occupied.shape), 0
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        for offset in offsets:
            corners = corners_inside(starts, offset, window, occupied)
            total, batch = blend(model, padded, means, squares, torch.from_numpy(corners), weight, batch, device)
            placements += total > 0
            run += len(corners)
    within = tuple(slice(before, before + n) for (before, _), n in zip(around, shape, strict=True))
    count = placements.clamp(min=1)
    arrays = {m: (mean / count)[within].numpy() for m, mean in means.items()}
    spread = {m: spread_of(squares[m][within] / count[within], arrays[m]) for m in means}
    for m, array in arrays.items():
        if not np.isfinite(array).all():
            raise MedmaeError(
                "the model gave values that are not finite",
                field=m,
                remedy="Try --precision 32; if it stays, the checkpoint is damaged or its training diverged.",
            )
    return Windowed(arrays, spread, window, run, offsets)


def spread_of(mean_square: Tensor, mean: np.ndarray) -> np.ndarray:
    """Standard deviation from the mean of squares; rounding may leave a little less than nothing."""
    variance: np.ndarray = mean_square.numpy() - mean.astype(np.float32) ** 2
    return np.sqrt(np.maximum(variance, 0, dtype=np.float32))


def blend(
    model: Synthesiser,
    images: Mapping[str, Tensor],
    means: Mapping[str, Tensor],
    squares: Mapping[str, Tensor],
    corners: Tensor,
    weight: Tensor,
    batch: int,
    device: torch.device,
) -> tuple[Tensor, int]:
    """Run one placement of the windows and add its blended prediction to ``means`` {target: (D, H, W)}, its square to
    ``squares``.

    ``corners`` (n, 3): the windows' first voxels in ``images`` {modality: (D, H, W)}. Each placement is normalised
    by itself and counts alike at every voxel: a sum over all placements would favour the one whose window happens to
    be centred there, and the grid would stay. Returns the blending weights' sum and the batch that fitted into memory.
    """
    window: Triple = tuple(weight.shape)  # type: ignore[assignment]
    total = torch.zeros_like(next(iter(means.values())))
    sums = {m: torch.zeros_like(mean) for m, mean in means.items()}
    strides = torch.tensor(total.stride())
    within = (torch.cartesian_prod(*(torch.arange(w) for w in window)) * strides).sum(1)  # a window's voxels, flat
    first = (corners * strides).sum(1)
    done = 0
    while done < len(first):
        index = first[done : done + batch, None] + within
        shown = {m: array.view(-1)[index].view(-1, 1, *window).to(device) for m, array in images.items()}
        try:
            predicted = {m: p.float().cpu() for m, p in model.reconstruct(shown, list(means)).items()}
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2
            continue
        flat = index.flatten()
        total.view(-1).index_add_(0, flat, weight.flatten().repeat(len(index)))
        for m, sum_ in sums.items():
            sum_.view(-1).index_add_(0, flat, (predicted[m][:, 0] * weight).flatten())
        done += len(index)
    for m, sum_ in sums.items():
        placed = sum_ / torch.where(total > 0, total, 1.0)
        means[m] += placed
        squares[m] += placed * placed
    return total, batch
