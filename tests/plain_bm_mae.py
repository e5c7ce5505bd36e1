"""BM-MAE written plainly with MONAI's blocks: every token embedded, every patch predicted, plain attention.

An independent yardstick for numbers (tests) and speed (tests/benchmarks). Its state dict has the published format's
keys, because MONAI's blocks are what that format is made of.
"""

from __future__ import annotations

import torch
from einops import rearrange
from monai.networks.blocks import PatchEmbeddingBlock, TransformerBlock
from monai.networks.blocks.pos_embed_utils import build_sincos_position_embedding
from torch import Tensor, nn


class PlainTokenizer(nn.Module):
    def __init__(self, size: int, patch: int, width: int, heads: int) -> None:
        super().__init__()
        self.patch_embedding = PatchEmbeddingBlock(
            1, size, patch, width, heads, proj_type="conv", pos_embed_type="sincos", spatial_dims=3
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.patch_embedding(image)


class PlainDecoder(nn.Module):
    def __init__(
        self,
        names,
        grid: int,
        patch: int,
        width: int,
        decoder_width: int,
        depth: int,
        heads: int,
        mlp: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.mask_tokens = nn.Parameter(torch.randn(1, 1, decoder_width) * 0.02)
        self.position_embeddings = build_sincos_position_embedding([grid] * 3, decoder_width, 3)
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.decoder_blocks = nn.ModuleList(
            TransformerBlock(decoder_width, mlp, heads, dropout_rate=dropout, qkv_bias=True) for _ in range(depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_width)
        self.decoder_pred = nn.Linear(decoder_width, patch**3)
        self.modality_embeddings = nn.ParameterDict(
            {name: nn.Parameter(torch.randn(1, 1, decoder_width) * 0.02) for name in names}
        )


class PlainBMMAE(nn.Module):
    """``sizes`` default to the published ones."""

    def __init__(
        self,
        names=("t1", "t1ce", "t2", "flair"),
        size=128,
        patch=16,
        width=768,
        depth=12,
        heads=12,
        mlp=1536,
        decoder_width=384,
        decoder_depth=3,
        decoder_heads=12,
        decoder_mlp=1536,
        dropout=0.1,
    ) -> None:
        super().__init__()
        self.names, self.patch = tuple(names), patch
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.tokenizers = nn.ModuleDict({name: PlainTokenizer(size, patch, width, heads) for name in names})
        self.blocks = nn.ModuleList(TransformerBlock(width, mlp, heads, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.decoder = PlainDecoder(
            names, size // patch, patch, width, decoder_width, decoder_depth, decoder_heads, decoder_mlp, dropout
        )

    def encode(self, images: dict[str, Tensor], hidden: dict[str, Tensor]) -> Tensor:
        """``hidden`` {name: (N,) bool}, the same for the whole batch: (B, 1 + visible, C)."""
        tokens = [self.tokenizers[name](image)[:, ~hidden[name]] for name, image in images.items()]
        x = torch.cat([self.cls_token.expand(tokens[0].shape[0], -1, -1), *tokens], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def decode(self, latent: Tensor, images: dict[str, Tensor], hidden: dict[str, Tensor]) -> dict[str, Tensor]:
        """{name: (B, N, patch³)} for every modality, absent ones from mask tokens alone."""
        d = self.decoder
        x, at = d.decoder_embed(latent), 1
        parts = [x[:, :1]]
        for name in self.names:
            tokens = d.mask_tokens.repeat(x.shape[0], d.position_embeddings.shape[1], 1)
            if name in images:
                shown = int((~hidden[name]).sum())
                tokens[:, ~hidden[name]] = x[:, at : at + shown]
                at += shown
            parts.append(tokens + d.position_embeddings + d.modality_embeddings[name])
        x = torch.cat(parts, dim=1)
        for block in d.decoder_blocks:
            x = block(x)
        predicted = d.decoder_pred(d.decoder_norm(x))[:, 1:]
        return dict(zip(self.names, predicted.chunk(len(self.names), dim=1), strict=True))

    def patches(self, image: Tensor) -> Tensor:
        p = self.patch
        return rearrange(image, "b c (d i) (h j) (w k) -> b (d h w) (i j k c)", i=p, j=p, k=p)

    def forward(self, images: dict[str, Tensor], hidden: dict[str, Tensor]) -> Tensor:
        """The loss."""
        predicted = self.decode(self.encode(images, hidden), images, hidden)
        loss = torch.zeros(())
        for name, image in images.items():
            error = (predicted[name] - self.patches(image)).square().mean(-1)
            loss = loss + error[:, hidden[name]].mean()
        return loss

    def volume(self, tokens: Tensor, grid: int) -> Tensor:
        p = self.patch
        return rearrange(tokens, "b (d h w) (i j k) -> b 1 (d i) (h j) (w k)", d=grid, h=grid, w=grid, i=p, j=p, k=p)
