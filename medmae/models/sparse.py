"""A dense 3D CNN run as if only visible positions existed (SparK, Tian et al. 2023), without changing the CNN.

The network is traced once (torch.fx); then its graph is run with a mask at hand: convolutions give zero where nothing
is visible, norms and pools take their statistics over visible positions. The mask is an argument, the network stays as
it was, with its own parameters and state dict.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from medmae.errors import MedmaeError

_CONVOLUTIONS = (nn.Conv3d, nn.Conv2d)
_NORMS = (_InstanceNorm, _BatchNorm)
_POINTWISE = (nn.LeakyReLU, nn.ReLU, nn.GELU, nn.SiLU, nn.ELU, nn.Dropout, nn.Dropout3d, nn.Identity)  # f(0) = 0


class Visible:
    """A mask of visible positions (B, 1, gD, gH, gW) at any resolution of the network.

    Finer than its grid, a position is as visible as the cube it lies in; coarser, if any cube in it is visible, or,
    ``leaky``, always (as Spark3D has it).
    """

    def __init__(self, shown: Tensor, leaky: bool = False) -> None:
        self.shown, self.leaky = shown.float(), leaky
        self._at: dict[tuple[int, ...], Tensor] = {}

    def at(self, size: torch.Size) -> Tensor:
        """(B, 1, D, H, W) float, 1 = visible, for feature maps of ``size`` (D, H, W)."""
        key = tuple(size)
        if key not in self._at:
            mask = self.shown
            for axis, (wanted, there) in enumerate(zip(key, self.shown.shape[2:], strict=True), start=2):
                if wanted % there == 0:
                    mask = mask.repeat_interleave(wanted // there, axis)
                elif there % wanted == 0:
                    mask = mask.unflatten(axis, (wanted, there // wanted)).amax(axis + 1)
                else:
                    raise MedmaeError("the mask does not fit this resolution", found=key, expected=self.shown.shape[2:])
            coarser = any(wanted < there for wanted, there in zip(key, self.shown.shape[2:], strict=True))
            self._at[key] = torch.ones_like(mask) if coarser and self.leaky else mask
        return self._at[key]


class _MaskedNorm(torch.autograd.Function):
    """Normalisation over visible positions, zero elsewhere. Keeps its input and two numbers a channel."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mask: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, per_sample: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        dims = [2, 3, 4] if per_sample else [0, 2, 3, 4]
        count = mask.sum(dims, keepdim=True).clamp(min=1.0)
        wide = torch.promote_types(x.dtype, torch.float32)
        shown = x.to(wide) * mask
        mean = shown.sum(dims, keepdim=True) / count
        centred = shown.sub_(mean).mul_(mask)
        variance = torch.linalg.vector_norm(centred, dim=dims, keepdim=True).square_().div_(count)
        scale = (variance + eps).rsqrt()
        shape = (1, -1, 1, 1, 1)
        y = centred.mul_(scale if weight is None else scale * weight.view(shape))
        if bias is not None:
            y.addcmul_(mask, bias.view(shape))
        ctx.save_for_backward(x, mask, weight, mean, scale, count)
        ctx.dims, ctx.has_bias = dims, bias is not None
        ctx.mark_non_differentiable(mean, variance)
        return y.to(x.dtype), mean, variance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, weight, mean, scale, count = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        g = gradient.to(wide) * mask
        normed = (x.to(wide) - mean).mul_(mask).mul_(scale)
        sum_g = g.sum(ctx.dims, keepdim=True)
        sum_gn = torch.einsum("bcdhw,bcdhw->bc", g, normed)[:, :, None, None, None]
        if 0 in ctx.dims:
            sum_gn = sum_gn.sum(0, keepdim=True)
        grad_weight = None if weight is None else sum_gn.sum(0).flatten()
        grad_bias = sum_g.sum(0).flatten() if ctx.has_bias else None
        inner = g.sub_(normed.mul_(sum_gn / count)).sub_(sum_g / count).mul_(mask)
        inner.mul_(scale if weight is None else scale * weight.view(1, -1, 1, 1, 1))
        return inner.to(x.dtype), None, grad_weight, grad_bias, None, None


def masked_norm(norm: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """``norm`` (instance or batch norm) of ``x`` (B, C, D, H, W) with statistics over visible positions; hidden
    positions give 0."""
    assert isinstance(norm, _InstanceNorm | _BatchNorm)
    weight, bias = norm.weight, norm.bias
    per_sample = isinstance(norm, _InstanceNorm)
    if not per_sample and not norm.training and norm.running_mean is not None and norm.running_var is not None:
        return F.batch_norm(x, norm.running_mean, norm.running_var, weight, bias, False, 0.0, norm.eps) * mask.to(
            x.dtype
        )
    y, mean, variance = _MaskedNorm.apply(x, mask, weight, bias, norm.eps, per_sample)
    if not per_sample and norm.training and norm.running_mean is not None and norm.running_var is not None:
        with torch.no_grad():
            momentum, n = norm.momentum or 0.1, mask.sum()
            norm.running_mean.lerp_(mean.flatten(), momentum)
            norm.running_var.lerp_(variance.flatten() * n / (n - 1).clamp(min=1), momentum)
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
    normed: Tensor = y
    return normed


class SparseEncoder:
    """Runs ``encoder`` with a mask. It holds the encoder's graph, no parameters."""

    def __init__(self, encoder: nn.Module) -> None:
        self.graph = fx.Tracer().trace(encoder)
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        self.last_use: dict[fx.Node, list[fx.Node]] = {}
        for node in self.graph.nodes:
            if node.users:
                self.last_use.setdefault(max(node.users, key=order.__getitem__), []).append(node)
        modules = dict(encoder.named_modules())
        # A norm masks what it reads, so a convolution that only norms read need not.
        self.bare = {
            node
            for node in self.graph.nodes
            if node.op == "call_module"
            and isinstance(modules[node.target], _CONVOLUTIONS)
            and all(u.op == "call_module" and isinstance(modules[u.target], _NORMS) for u in node.users)
        }

    def __call__(self, encoder: nn.Module, x: Tensor, visible: Visible) -> Any:
        """The encoder's output for ``x`` (B, C, D, H, W), which is zero where hidden (unless ``visible`` is leaky)."""
        values: dict[fx.Node, Any] = {}

        def look(argument: Any) -> Any:
            return fx.node.map_arg(argument, lambda node: values[node])

        for node in self.graph.nodes:
            if node.op == "placeholder":
                values[node] = x
            elif node.op == "output":
                return look(node.args[0])
            elif node.op == "call_module":
                module = encoder.get_submodule(node.target)
                values[node] = sparse_module(module, look(node.args[0]), visible, node in self.bare)
            elif node.op == "call_function":
                values[node] = node.target(*look(node.args), **look(node.kwargs))
            else:
                raise MedmaeError(
                    "this encoder cannot be run sparsely",
                    found=f"{node.op} {node.target}",
                    expected="convolutions, norms, pools, activations and sums",
                )
            for done in self.last_use.get(node, ()):
                values.pop(done, None)
        raise AssertionError("a graph ends with its output")


def sparse_module(module: nn.Module, x: Tensor, visible: Visible, bare: bool = False) -> Tensor:
    """One layer of an encoder as if only visible positions existed; ``bare``: its reader masks."""
    if isinstance(module, _CONVOLUTIONS):
        y = module(x)
        return y if bare else y * visible.at(y.shape[2:]).to(y.dtype)
    if isinstance(module, _NORMS):
        return masked_norm(module, x, visible.at(x.shape[2:]))
    if isinstance(module, nn.AvgPool3d):
        y, before = module(x), visible.at(x.shape[2:])
        after = visible.at(y.shape[2:])
        if visible.leaky:
            return y * after.to(y.dtype)  # as published: hidden neighbours count as zeros
        share = module(before)
        return y * (after / share.clamp(min=1e-6)).to(y.dtype)
    if isinstance(module, nn.MaxPool3d):
        mask = visible.at(x.shape[2:]) > 0
        y = module(x.masked_fill(~mask, -torch.inf))
        return y.masked_fill(visible.at(y.shape[2:]) == 0, 0.0)
    if isinstance(module, _POINTWISE):
        result: Tensor = module(x)
        return result
    raise MedmaeError(
        "this encoder cannot be run sparsely",
        found=type(module).__name__,
        expected="convolutions, norms, pools and activations that keep 0",
    )
