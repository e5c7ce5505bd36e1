"""Dropout without waiting for the CPU's random generator, which draws one number at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_LEVELS = 2**16


class _Dropout(torch.autograd.Function):
    """Keeps one byte a value for the backward pass, where torch's own keeps four on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, chance: float) -> Tensor:
        # One draw of 64 bits decides four values; chances are rounded to 1 / 65536.
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        level = round(chance * _LEVELS)
        keep = (draws.view(torch.int16)[: x.numel()] >= level - _LEVELS // 2).view(x.shape)
        ctx.scale = _LEVELS / (_LEVELS - level)
        ctx.save_for_backward(keep)
        return (x * keep).mul_(ctx.scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return (gradient * keep).mul_(ctx.scale), None


def dropout(x: Tensor, chance: float, training: bool) -> Tensor:
    """Zero each value with ``chance`` (0 ≤ chance < 1) and scale the others, as ``torch.nn.functional.dropout``."""
    if not training or chance == 0.0:
        return x
    if x.device.type != "cpu" or chance > 0.99:
        return F.dropout(x, chance)
    dropped: Tensor = _Dropout.apply(x, chance)
    return dropped
