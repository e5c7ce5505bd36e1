"""Losses over patches, frugal with memory: what is predicted is the largest array of a masked autoencoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _SquaredError(torch.autograd.Function):
    """Keeps the difference alone; autograd's own would hold three arrays of its size at once."""

    @staticmethod
    def forward(ctx: Any, predicted: Tensor, truth: Tensor) -> Tensor:
        difference = predicted - truth
        ctx.save_for_backward(difference)
        return torch.linalg.vector_norm(difference, dim=-1).square_().div_(difference.shape[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        return difference * (gradient * (2.0 / difference.shape[-1])).unsqueeze(-1), None


def squared_error(predicted: Tensor, truth: Tensor) -> Tensor:
    """Mean squared error over the last axis: (..., V) → (...). ``truth`` gets no gradient."""
    error: Tensor = _SquaredError.apply(predicted, truth)
    return error
