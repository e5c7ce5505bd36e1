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


class _HiddenSquares(torch.autograd.Function):
    """Keeps the difference where it counts alone."""

    @staticmethod
    def forward(ctx: Any, predicted: Tensor, truth: Tensor, counted: Tensor) -> Tensor:
        difference = (predicted.to(torch.promote_types(predicted.dtype, torch.float32)) - truth).mul_(counted)
        ctx.save_for_backward(difference)
        ctx.kind = predicted.dtype
        flat = difference.flatten(2)
        return torch.linalg.vecdot(flat, flat).sum(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (difference,) = ctx.saved_tensors
        factor = (2.0 * gradient).view(1, -1, *[1] * (difference.ndim - 2))
        return (difference * factor).to(ctx.kind), None, None


def hidden_squares(predicted: Tensor, truth: Tensor, counted: Tensor) -> Tensor:
    """(C,) sums of the squared error, in fp32, of (B, C, ...) where ``counted``, 0 or 1 and broadcast, is 1. Neither
    ``truth`` nor ``counted`` gets a gradient."""
    squares: Tensor = _HiddenSquares.apply(predicted, truth, counted)
    return squares
