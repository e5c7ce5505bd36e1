"""Dropout against its definition: independent zeros at the asked rate, mean kept, gradient that of the mask."""

from __future__ import annotations

import math

import pytest
import torch

from medmae.models.dropout import dropout


@pytest.mark.parametrize("chance", [0.1, 0.5])
def test_rate_scale_and_gradient(chance: float) -> None:
    torch.manual_seed(0)
    x = (torch.rand(101, 997) + 1).requires_grad_()
    y = dropout(x, chance, True)
    dropped = y == 0
    spread = math.sqrt(chance * (1 - chance) / x.numel())
    assert abs(dropped.float().mean().item() - chance) < 4 * spread
    assert abs((dropped[:, 1:] & dropped[:, :-1]).float().mean().item() - chance**2) < 4 * spread  # independent
    torch.testing.assert_close(y[~dropped], (x / (1 - chance))[~dropped], rtol=1e-4, atol=0)
    y.sum().backward()
    torch.testing.assert_close(x.grad, (~dropped) / (1 - chance), rtol=1e-4, atol=0)


def test_seeded_and_off_in_evaluation() -> None:
    x = torch.randn(7, 3)
    torch.manual_seed(3)
    first = dropout(x, 0.3, True)
    torch.manual_seed(3)
    assert torch.equal(first, dropout(x, 0.3, True))
    assert dropout(x, 0.3, False) is x and dropout(x, 0.0, True) is x
    bf16 = dropout(x.bfloat16(), 0.3, True)
    assert bf16.dtype == torch.bfloat16
