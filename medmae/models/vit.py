"""Pre-norm transformer blocks with fused attention (Dosovitskiy et al. 2021).

Parameter names follow MONAI's ``TransformerBlock`` (norm1, attn.qkv, attn.out_proj, norm2, mlp.linear1,
mlp.linear2), whose numbers these blocks reproduce.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medmae.models.dropout import dropout


class Attention(nn.Module):
    """Multi-head self-attention, optionally for some of the queries only."""

    def __init__(self, width: int, heads: int, qkv_bias: bool, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.out_proj = nn.Linear(width, width)
        self.dropout = dropout
        self.attention_dropout = attention_dropout

    def split(self, x: Tensor) -> Tensor:
        """(B, L, n·width) → (n, B, heads, L, head width)."""
        b, length, channels = x.shape
        head_width = self.out_proj.in_features // self.heads
        return x.view(b, length, channels // self.out_proj.in_features, self.heads, head_width).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor, queries: Tensor | None = None, key_mask: Tensor | None = None) -> Tensor:
        """``x`` (B, L, C); ``queries`` (B, Q, C) the part of x to answer for (default: all); ``key_mask``
        (B, L) bool, False where a key must not be seen."""
        if queries is None:
            q, k, v = self.split(self.qkv(x))
        else:
            width, bias = self.out_proj.in_features, self.qkv.bias
            q = self.split(F.linear(queries, self.qkv.weight[:width], None if bias is None else bias[:width]))[0]
            k, v = self.split(F.linear(x, self.qkv.weight[width:], None if bias is None else bias[width:]))
        attended = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if key_mask is None else key_mask[:, None, None, :],
            dropout_p=self.attention_dropout if self.training else 0.0,
        )
        mixed = self.out_proj(attended.transpose(1, 2).flatten(2))
        return dropout(mixed, self.dropout, self.training)


class MLP(nn.Module):
    """Linear, GELU, Linear, each followed by dropout."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        hidden = dropout(F.gelu(self.linear1(x)), self.dropout, self.training)
        return dropout(self.linear2(hidden), self.dropout, self.training)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        *,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads, qkv_bias, dropout, attention_dropout)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, mlp_width, dropout)
        self.recompute = False

    def forward(self, x: Tensor, query_index: Tensor | None = None, key_mask: Tensor | None = None) -> Tensor:
        """(B, L, C) → (B, L, C), or (B, Q, C) for the positions ``query_index`` (B, Q): in a last block nobody
        reads the others, while all stay keys and values."""
        normed = self.norm1(x)
        if query_index is None:
            x = x + self.attn(normed, key_mask=key_mask)
        else:
            x = take(x, query_index) + self.attn(normed, queries=take(normed, query_index), key_mask=key_mask)
        if self.recompute and torch.is_grad_enabled():
            return x + checkpoint(self.expand, x, use_reentrant=False)
        return x + self.expand(x)

    def expand(self, x: Tensor) -> Tensor:
        """mlp(norm(x)): half of what a block keeps for the backward pass."""
        return self.mlp(self.norm2(x))


class CrossAttention(nn.Module):
    """Multi-head attention of one sequence to another."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """``x`` (B, Q, C) asks ``memory`` (B, L, C): (B, Q, C)."""
        b, queries, width = x.shape
        q = self.q(x).view(b, queries, self.heads, -1).transpose(1, 2)
        k, v = self.kv(memory).view(b, memory.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, queries, width))


class CrossBlock(nn.Module):
    """x + attention(norm(x)), then x + cross-attention(norm(x), memory), then x + mlp(norm(x)); the memory is taken as
    it is."""

    def __init__(self, width: int, heads: int, mlp_width: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm0 = nn.LayerNorm(width, eps=eps)
        self.self_attn = Attention(width, heads, qkv_bias=True, dropout=0.0, attention_dropout=0.0)
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.cross_attn = CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, mlp_width, dropout=0.0)
        self.recompute = False

    def forward(self, x: Tensor, memory: Tensor, query_index: Tensor | None = None) -> Tensor:
        """(B, L, C), ``memory`` (B, S, C) → (B, L, C), or (B, Q, C) for the positions ``query_index`` (B, Q)."""
        normed = self.norm0(x)
        if query_index is None:
            x = x + self.self_attn(normed)
        else:
            x = take(x, query_index) + self.self_attn(normed, queries=take(normed, query_index))
        x = x + self.cross_attn(self.norm1(x), memory)
        if self.recompute and torch.is_grad_enabled():
            return x + checkpoint(self.expand, x, use_reentrant=False)
        return x + self.expand(x)

    def expand(self, x: Tensor) -> Tensor:
        """mlp(norm(x))."""
        return self.mlp(self.norm2(x))


def set_recompute(model: nn.Module, enabled: bool) -> None:
    """Whether the blocks of ``model`` keep what their MLPs compute for the backward pass, or compute it again
    (activation checkpointing, Chen et al. 2016): same numbers, less memory."""
    for module in model.modules():
        if isinstance(module, Block | CrossBlock):
            module.recompute = enabled


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of (B, L, C) at (B, Q): (B, Q, C)."""
    return torch.gather(x, 1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def initialise(module: nn.Module) -> None:
    """Xavier-uniform linear layers with zero bias, as masked autoencoders are usually begun (He et al. 2022)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
