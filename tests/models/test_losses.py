"""The frugal loss against autograd's own."""

from __future__ import annotations

import torch

from medmae.models.losses import squared_error


def test_value_and_gradient_are_those_of_mse() -> None:
    torch.manual_seed(0)
    predicted = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    truth = torch.randn(2, 5, 7, dtype=torch.float64)
    weight = torch.rand(2, 5, dtype=torch.float64)
    found = squared_error(predicted, truth)
    expected = torch.nn.functional.mse_loss(predicted, truth, reduction="none").mean(-1)
    torch.testing.assert_close(found, expected)
    (found * weight).sum().backward()
    gradient = predicted.grad.clone()
    predicted.grad = None
    (expected * weight).sum().backward()
    torch.testing.assert_close(gradient, predicted.grad)
    assert torch.autograd.gradcheck(lambda p: squared_error(p, truth), (predicted,))
