"""Augmentation on the device, the same flips for all modalities of a study.

What is drawn is a function of the sample's number, so that a resumed run sees what an uninterrupted one sees. The
host draws (a few numbers a sample); the device only applies.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation
from torch import Tensor

from medmae.plan import Augmentation


def augment(
    images: dict[str, Tensor], augmentation: Augmentation, rngs: list[np.random.Generator]
) -> dict[str, Tensor]:
    """{modality: (B, 1, D, H, W)} with one random generator a sample; background zeros stay zero."""
    batch = len(rngs)
    images = turn(bend(images, augmentation, rngs), augmentation, rngs)
    flips = [[axis for axis in range(3) if rng.random() < augmentation.flip[axis]] for rng in rngs]
    factors, offsets = np.ones((len(images), batch), np.float32), np.zeros((len(images), batch), np.float32)
    for i, rng in enumerate(rngs):
        for m in range(len(images)):
            if rng.random() < augmentation.scale_chance:
                factors[m, i] = 1.0 + rng.uniform(-augmentation.scale, augmentation.scale)
            if rng.random() < augmentation.shift_chance:
                offsets[m, i] = rng.uniform(-augmentation.shift, augmentation.shift)
    changed = {}
    for m, (name, x) in enumerate(images.items()):
        if any(flips):
            x = torch.stack([torch.flip(x[i], [axis + 1 for axis in flips[i]]) for i in range(batch)])
        factor, offset = (
            torch.from_numpy(v[m]).to(x.device, non_blocking=True).view(batch, 1, 1, 1, 1) for v in (factors, offsets)
        )
        changed[name] = torch.where(x == 0, x, x * factor + offset)
    return changed


def bend(images: dict[str, Tensor], augmentation: Augmentation, rngs: list[np.random.Generator]) -> dict[str, Tensor]:
    """Rotation about the crop's centre and zoom of the samples that drew one; what comes from beyond the crop repeats
    its border."""
    if augmentation.rotation_chance == 0 and augmentation.zoom_chance == 0:
        return images
    chosen, matrices = [], []
    for i, rng in enumerate(rngs):
        draws = rng.random(2)
        angles = rng.uniform(-augmentation.rotation, augmentation.rotation, 3)
        factor = rng.uniform(*augmentation.zoom)
        matrix = np.eye(3)
        if draws[0] < augmentation.rotation_chance:
            matrix = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
        if draws[1] < augmentation.zoom_chance:
            matrix = matrix / factor
        if not np.array_equal(matrix, np.eye(3)):
            chosen.append(i)
            matrices.append(matrix)
    if not chosen:
        return images
    first = next(iter(images.values()))
    size = np.array(first.shape[2:], dtype=float)
    # grid_sample's coordinates run from -1 to 1 along each axis, in the order (W, H, D).
    scaled = np.stack(matrices) * size[None, None, :] / size[None, :, None]
    theta = np.concatenate([scaled[:, ::-1, ::-1], np.zeros((len(chosen), 3, 1))], axis=2).astype(np.float32)
    at = F.affine_grid(
        torch.from_numpy(theta).to(first.device), [len(chosen), 1, *first.shape[2:]], align_corners=False
    )
    bent = {}
    for name, x in images.items():
        sampled = F.grid_sample(x[chosen], at.to(x.dtype), padding_mode="border", align_corners=False)
        bent[name] = x.index_copy(0, torch.tensor(chosen, device=x.device), sampled)
    return bent


def turn(images: dict[str, Tensor], augmentation: Augmentation, rngs: list[np.random.Generator]) -> dict[str, Tensor]:
    """Quarter turns in a random square plane, for the samples that drew them."""
    size = next(iter(images.values())).shape[2:]
    planes = [(a, b) for a, b in ((0, 1), (0, 2), (1, 2)) if size[a] == size[b]]
    if augmentation.rotate90_chance == 0 or not planes:
        return images
    turned = dict(images)
    for i, rng in enumerate(rngs):
        chance, plane, times = rng.random(), planes[rng.integers(len(planes))], int(rng.integers(1, 4))
        if chance < augmentation.rotate90_chance:
            for name, x in turned.items():
                quarter = torch.rot90(x[i], times, (plane[0] + 1, plane[1] + 1))
                turned[name] = x.index_copy(0, torch.tensor([i], device=x.device), quarter.unsqueeze(0))
    return turned
