"""What stands on a frozen or fine-tuned encoder's vector: classes, labels or hazards."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Head(nn.Module):
    """(B, C) → (B, outputs): standardised features, Linear, ReLU, Linear (BM-MAE's); without ``hidden`` one Linear.

    ``centre`` and ``spread`` (C,) standardise, so that encoders of any scale train at the same rate.
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, width: int, outputs: int, hidden: int | None = 256) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))
        self.layers = nn.Sequential(nn.Linear(width, hidden or outputs))
        if hidden:
            self.layers.extend([nn.ReLU(), nn.Linear(hidden, outputs)])

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers((x - self.centre) / self.spread)
        return logits

    def standardise(self, features: Tensor) -> None:
        """Take centre and spread from (n, C) features of the training studies."""
        self.centre.copy_(features.mean(0))
        self.spread.copy_(features.std(0, correction=0).clamp(min=1e-6) if len(features) > 1 else self.spread)
