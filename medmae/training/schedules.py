"""Learning-rate factors and parameter groups. All of it is a function of the step: nothing to save or restore."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import nn

from medmae.plan import Training

POLY = 0.9  # nnU-Net's exponent


def lr_factor(training: Training, step: int, steps_per_epoch: int) -> float:
    """Factor on ``training.lr`` for the optimiser step number ``step`` (from 0).

    ``min-warmup-cosine`` is BM-MAE's, constant within an epoch e: min((e+1)/warm-up, ½(cos(πe/period)+1)).
    ``warmup-cosine`` rises linearly, then falls to 0 at the last epoch. ``poly``: (1 − e/epochs)^0.9 (nnU-Net).
    """
    epoch = step // steps_per_epoch
    if training.schedule == "constant":
        return 1.0
    if training.schedule == "poly":
        return float(max(0.0, 1.0 - epoch / training.epochs) ** POLY)
    if training.schedule == "min-warmup-cosine":
        rise = (epoch + 1) / training.warmup_epochs if training.warmup_epochs else 1.0
        return min(rise, 0.5 * (math.cos(math.pi * epoch / (training.cosine_epochs or training.epochs)) + 1.0))
    warmup = training.warmup_epochs * steps_per_epoch
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(training.epochs * steps_per_epoch - warmup, 1))
    return 0.5 * (math.cos(math.pi * done) + 1.0)


def warmed(epoch: float, epochs: int, warmup: float, decay: Literal["poly", "cosine"] = "cosine") -> float:
    """Factor on the rate in ``epoch`` (from 0) of a fine-tuning: linear over the share ``warmup`` of all, then
    ``poly``, (1 − t)^0.9 as nnU-Net has it, or a cosine to 0."""
    warm = warmup * epochs
    if epoch < warm:
        return (epoch + 1) / (warm + 1)
    share = (epoch - warm) / max(epochs - warm, 1)
    return float((1 - share) ** POLY) if decay == "poly" else 0.5 * (1 + math.cos(math.pi * share))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices and kernels decay; what is 1-D or a single token (biases, norms, CLS, mask and modality
    tokens) does not."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_vector = sum(size > 1 for size in parameter.shape) <= 1
            (kept if is_vector else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def make_optimizer(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    """The plan's optimiser over :func:`parameter_groups`."""
    if training.optimizer == "sgd":
        return torch.optim.SGD(
            model.parameters(),
            lr=training.lr,
            momentum=training.momentum,
            nesterov=training.momentum > 0,
            weight_decay=training.weight_decay,
        )
    groups = parameter_groups(model, training.weight_decay)
    return torch.optim.AdamW(groups, lr=training.lr, betas=training.betas, fused=True)
