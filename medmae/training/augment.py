"""Augmentation on the device, the same flips for all modalities of a study.

What is drawn is a function of the sample's number, so that a resumed run sees what an uninterrupted one sees. The
host draws (a few numbers a sample); the device only applies.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from medmae.plan import Augmentation


def augment(
    images: dict[str, Tensor], augmentation: Augmentation, rngs: list[np.random.Generator]
) -> dict[str, Tensor]:
    """{modality: (B, 1, D, H, W)} with one random generator a sample; background zeros stay zero."""
    batch = len(rngs)
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
