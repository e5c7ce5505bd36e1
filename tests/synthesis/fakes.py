"""Models whose output is known in closed form, behind the interface of the real ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medmae.plan import Plan, Triple


def plan(
    modalities: Sequence[str] = ("t1", "t1c", "t2", "flair"),
    crop: Triple = (32, 32, 32),
    shifts: int = 1,
    overlap: float = 0.5,
    **image: Any,
) -> Plan:
    return Plan.load(
        {
            "name": "fake",
            "method": "fake",
            "modalities": list(modalities),
            "image": {"crop": list(crop), "spacing": [1.5, 1.5, 1.5], **image},
            "reconstruction": {"overlap": overlap, "shifts": shifts},
        }
    )


@dataclass
class Linear:
    """Every target is ``intercept`` + the sum of ``weights[input]`` x input, plus ``pattern`` repeated in every patch
    of the window: the grid that patch-wise decoders leave. ``calls`` counts the windows."""

    plan: Plan = field(default_factory=plan)
    weights: Mapping[str, float] = field(default_factory=dict)
    intercept: float = 0.0
    pattern: np.ndarray | None = None
    grid_multiple: Triple = (8, 8, 8)
    metadata: dict[str, Any] = field(default_factory=dict)
    calls: int = 0

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.plan.modalities

    def reconstruct(self, images: Mapping[str, Tensor], targets: Sequence[str]) -> dict[str, Tensor]:
        assert not set(targets) & set(images), "a target must not be shown"
        first = next(iter(images.values()))
        assert all(size % step == 0 for size, step in zip(first.shape[2:], self.grid_multiple, strict=True))
        self.calls += first.shape[0]
        total = torch.full_like(first, self.intercept)
        for name, image in images.items():
            total = total + self.weights.get(name, 0.0) * image
        if self.pattern is not None:
            repeats = [size // step for size, step in zip(first.shape[2:], self.pattern.shape, strict=True)]
            total = total + torch.from_numpy(np.tile(self.pattern, repeats)).to(total)
        return {target: total.clone() for target in targets}
