"""Hi-End-MAE written plainly with timm's blocks: every patch embedded, every patch predicted.

An independent yardstick for numbers (tests) and speed (tests/benchmarks). Its names are those of the published file.
"""

from __future__ import annotations

import torch
from einops import rearrange
from timm.layers import Mlp
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn


def positions(grid: int, width: int) -> Tensor:
    """(1, grid³, width): sine and cosine of each axis in turn, width / 6 frequencies, temperature 10000."""
    rate = 10000.0 ** -(torch.arange(width // 6, dtype=torch.float64) / (width // 6))
    at = torch.arange(grid, dtype=torch.float64)
    waves = torch.cat([torch.sin(at[:, None] * rate), torch.cos(at[:, None] * rate)], dim=1)  # (grid, width / 3)
    third = width // 3
    table = torch.empty(grid, grid, grid, width, dtype=torch.float64)
    table[..., :third] = waves[:, None, None]
    table[..., third : 2 * third] = waves[None, :, None]
    table[..., 2 * third :] = waves[None, None, :]
    return table.reshape(1, grid**3, width).float()


class CrossAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q = rearrange(self.q(x), "b q (h c) -> b h q c", h=self.heads)
        k, v = rearrange(self.kv(memory), "b k (two h c) -> two b h k c", two=2, h=self.heads)
        weights = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1)
        return self.proj(rearrange(weights @ v, "b h q c -> b q (h c)"))


class CrossBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm0 = nn.LayerNorm(width, eps=1e-6)
        self.self_attn = Attention(width, heads, qkv_bias=True)
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.cross_attn = CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm0(x))
        x = x + self.cross_attn(self.norm1(x), memory)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(1, width, patch, patch)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image).flatten(2).transpose(1, 2)


def norm(width: int, **where: object) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6, **where)


class Encoder(nn.Module):
    def __init__(self, patch: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(patch, width)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads, 4, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        self.norm = norm(width)


class Decoder(nn.Module):
    def __init__(self, patch: int, width: int, heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, 4, qkv_bias=True, norm_layer=norm) for _ in range(2))
        self.cross_attention_blocks = nn.ModuleList(CrossBlock(width, heads) for _ in range(3))
        self.norm = norm(width)
        self.head = nn.Linear(width, patch**3)


class PlainHiEndMAE(nn.Module):
    """``base`` P 16 by default; ``skips`` counted from 0, in the decoder's order."""

    def __init__(self, size=96, patch=16, width=768, depth=12, heads=12, decoder_width=384, decoder_heads=12) -> None:
        super().__init__()
        grid = size // patch
        self.patch = patch
        self.encoder = Encoder(patch, width, depth, heads)
        self.encoder_pos_embed = nn.Parameter(positions(grid, width), requires_grad=False)
        self.decoder_pos_embed = nn.Parameter(positions(grid, decoder_width), requires_grad=False)
        self.mask_token = nn.Parameter(torch.randn(1, 1, decoder_width) * 0.02)
        self.encoder_to_decoder = nn.ModuleList(nn.Linear(width, decoder_width) for _ in range(4))
        self.decoder = Decoder(patch, decoder_width, decoder_heads)

    def encode(self, image: Tensor, hidden: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """``hidden`` (N,) bool for the whole batch."""
        tokens = (self.encoder.patch_embed(image) + self.encoder_pos_embed)[:, ~hidden]
        x = torch.cat([self.encoder.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        outputs = {}
        for i, block in enumerate(self.encoder.blocks):
            outputs[i] = x = block(x)
        return self.encoder.norm(x), outputs

    def decode(self, latent: Tensor, outputs: dict[int, Tensor], hidden: Tensor) -> Tensor:
        """(B, N, patch³)."""
        embedded = self.encoder_to_decoder[3](latent)
        tokens = self.mask_token.repeat(len(latent), len(hidden), 1)
        tokens[:, ~hidden] = embedded[:, 1:].to(tokens.dtype)
        x = torch.cat([embedded[:, :1].to(tokens.dtype), tokens + self.decoder_pos_embed], dim=1)
        for block in self.decoder.blocks:
            x = block(x)
        for block, index, link in zip(self.decoder.cross_attention_blocks, (9, 6, 3), (2, 1, 0), strict=True):
            x = block(x, self.encoder_to_decoder[link](outputs[index]))
        return self.decoder.head(self.decoder.norm(x))[:, 1:]

    def target(self, image: Tensor) -> Tensor:
        p = self.patch
        rows = rearrange(image, "b c (d i) (h j) (w k) -> b (d h w) (i j k c)", i=p, j=p, k=p)
        return (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()

    def forward(self, image: Tensor, hidden: Tensor) -> Tensor:
        """The loss."""
        predicted = self.decode(*self.encode(image, hidden), hidden)
        return (predicted - self.target(image)).square().mean(-1)[:, hidden].mean()
