"""The frugal loss against autograd's own."""

from __future__ import annotations

import torch

from medmae.models.losses import hidden_squares, squared_error


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


def test_hidden_squares_are_those_of_the_gathered_voxels() -> None:
    torch.manual_seed(0)
    predicted = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    truth, counted = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64), torch.rand(2, 3, 4, 1, 6) < 0.5
    found = hidden_squares(predicted, truth, counted)
    error, every = predicted - truth, counted.expand(2, 3, 4, 5, 6)
    expected = torch.stack([error[:, c][every[:, c]].square().sum() for c in range(3)])
    torch.testing.assert_close(found, expected)
    assert torch.autograd.gradcheck(lambda p: hidden_squares(p, truth, counted), (predicted,))
    half = hidden_squares(predicted.detach().bfloat16().requires_grad_(), truth.float(), counted)
    assert half.dtype == torch.float32
