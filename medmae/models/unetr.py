"""Segmentation on a pre-trained ViT: UNETR (Hatamizadeh et al. 2022), for any patch size, grid and set of channels.

The encoder is a method's own (BM-MAE, Hi-End-MAE), all patches visible. Its tokens after evenly spaced blocks become
feature maps at the patch grid, each brought to its level by as many doublings as it needs; of several modalities they
are averaged first. Blocks of the decoder are MONAI's.

A channel that was not acquired (:func:`absent_channels`) is none: BM-MAE leaves its tokens out, Hi-End-MAE, whose
patches hold all channels, scales up what the others give.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmae.errors import PlanError
from medmae.models.bm_mae import BMMAE
from medmae.models.hi_end_mae import HiEndMAE
from medmae.models.tokens import patchify, token_grid
from medmae.models.zoo import create
from medmae.plan import Plan


class ViTSegmenter(nn.Module):
    """(B, channels, D, H, W) → (B, classes, D, H, W) logits.

    ``plan`` (a dict, as nnU-Net's plans keep it): the pre-training plan with ``modalities`` named after the input
    channels. ``deep_supervision`` is nnU-Net's to pass and must be off. Image sizes are multiples of the patch.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        plan: Mapping[str, Any],
        feature_size: int = 32,
        drop_path: float = 0.0,
        deep_supervision: bool = False,
        **_: Any,
    ) -> None:
        super().__init__()
        if deep_supervision:
            raise ValueError("this network has one output: switch deep supervision off")
        resolved = Plan.load(plan)
        if len(resolved.modalities) != input_channels:
            raise PlanError(
                "one modality a channel",
                field="modalities",
                found=resolved.modalities,
                expected=f"{input_channels} names",
            )
        self.several = resolved.method == "bm-mae"
        if not self.several:
            resolved = resolved.model_copy(update={"modalities": resolved.modalities[:1]})
        vit = create(resolved)
        if not isinstance(vit, BMMAE | HiEndMAE):
            raise PlanError("not a transformer", field="method", found=resolved.method, expected="bm-mae or hi-end-mae")
        vit.decoder = nn.Identity()  # type: ignore[assignment]
        patch, width = vit.config.patch, vit.config.width
        if not self.several:
            tokenizer: Any = vit.tokenizer
            tokenizer.proj = nn.Conv3d(input_channels, width, kernel_size=patch, stride=patch)
        self.vit = vit
        self.patch, self.drop_path = patch, drop_path
        levels = max(1, math.ceil(math.log2(max(patch))))
        self.taps = [round(k * len(vit.blocks) / levels) for k in range(1, levels)]  # counted from 0
        self.taps = [min(tap, len(vit.blocks) - 1) for tap in self.taps]
        self.image_block = residual(input_channels, feature_size)
        self.skips = nn.ModuleList(
            rising(width, feature_size * 2**level, level, levels) for level in range(1, levels)
        )  # from fine to coarse
        widths = [feature_size * 2**level for level in range(levels)]
        self.ups = nn.ModuleList()
        below = width
        for level in reversed(range(levels)):
            self.ups.append(Up(below, widths[level], last=level == 0))
            below = widths[level]
        self.head = nn.Conv3d(feature_size, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        absent = absent_channels(x)
        x = torch.where(absent[:, :, None, None, None], torch.zeros_like(x), x)
        grid = token_grid(tuple(x.shape[2:]), self.patch)
        maps = [volume.transpose(1, 2).unflatten(2, grid) for volume in self.tokens(x, absent, grid)]
        *tapped, deepest = maps
        y = deepest
        skips = [self.image_block(x), *(lift(m) for lift, m in zip(self.skips, tapped, strict=True))]
        for up, skip in zip(self.ups, reversed(skips), strict=True):
            y = up(y, skip)
        logits: Tensor = self.head(y)
        return logits

    def tokens(self, x: Tensor, absent: Tensor, grid: tuple[int, int, int]) -> list[Tensor]:
        """(B, N, C) after each tap and, normed, at the end; averaged over the modalities that are there."""
        vit = self.vit
        names = vit.modalities if self.several else ("all",)
        there = ~absent if self.several else torch.ones_like(absent[:, :1])
        rows = []
        for i, name in enumerate(names):
            tokenizer: Any = vit.tokenizers[name] if isinstance(vit, BMMAE) else vit.tokenizer
            if isinstance(vit, BMMAE):
                embedded = tokenizer(patchify(x[:, i : i + 1], self.patch))
            else:
                present = (~absent).sum(1).clamp(min=1).view(-1, 1, 1)
                bias = tokenizer.proj.bias
                embedded = F.conv3d(x, tokenizer.proj.weight, stride=self.patch).flatten(2).transpose(1, 2)
                embedded = embedded * (absent.shape[1] / present) + bias
            rows.append(embedded + tokenizer.positions(grid).to(embedded.dtype))
        keep = [i for i in range(len(names)) if bool(there[:, i].any())]
        mixed = not bool(there[:, keep].all())
        tokens = grid[0] * grid[1] * grid[2]
        y = torch.cat([vit.cls_token.expand(len(x), -1, -1).to(rows[0].dtype), *(rows[i] for i in keep)], dim=1)
        key_mask = None
        if mixed:  # studies of one batch lack different channels
            shown = there[:, keep].repeat_interleave(tokens, 1)
            key_mask = torch.cat([torch.ones_like(shown[:, :1]), shown], dim=1)
        weight = there[:, keep].to(y.dtype)
        weight = weight / weight.sum(1, keepdim=True).clamp(min=1)

        def averaged(y: Tensor) -> Tensor:
            parts = y[:, 1:].unflatten(1, (len(keep), tokens))
            return torch.einsum("bmnc,bm->bnc", parts, weight.to(y.dtype))

        found = []
        for i, block in enumerate(vit.blocks):
            if not self.dropped(i):
                y = block(y, key_mask=key_mask)
            found += [averaged(y)] * self.taps.count(i)
        return [*found, averaged(vit.norm(y))]

    def dropped(self, block: int) -> bool:
        """Whether a training step leaves this block out."""
        chance = self.drop_path * block / max(1, len(self.vit.blocks) - 1)
        return self.training and chance > 0 and bool(torch.rand(()) < chance)

    def layers(self) -> list[Sequence[nn.Parameter]]:
        """Parameters by depth, for layer-wise rates: embedding, each block, and what is new."""
        vit = self.vit
        embedding = [vit.cls_token, *(vit.tokenizers if isinstance(vit, BMMAE) else vit.tokenizer).parameters()]
        blocks = [list(block.parameters()) for block in vit.blocks]
        blocks[-1] += list(vit.norm.parameters())
        mine = {id(p) for p in vit.parameters()}
        return [embedding, *blocks, [p for p in self.parameters() if id(p) not in mine]]


def absent_channels(x: Tensor) -> Tensor:
    """(B, C) bool: the channels of (B, C, D, H, W) that were not acquired. They hold NaN, or nothing but 0 where
    another channel holds something: so an incomplete study can stand in nnU-Net's folders."""
    flat = x.flatten(2)
    empty = (flat == 0).all(2)
    return torch.isnan(flat).any(2) | (empty & ~empty.all(1, keepdim=True))


def residual(channels: int, out: int) -> nn.Module:
    """Two 3³ convolutions with instance norm and a residual connection."""
    from monai.networks.blocks.dynunet_block import UnetResBlock

    block: nn.Module = UnetResBlock(3, channels, out, kernel_size=3, stride=1, norm_name="instance")
    return block


def rising(width: int, out: int, level: int, levels: int) -> nn.Module:
    """Tokens to their level: ``levels - level`` doublings above the patch grid."""
    from monai.networks.blocks import UnetrPrUpBlock

    block: nn.Module = UnetrPrUpBlock(
        3,
        width,
        out,
        num_layer=levels - level - 1,
        kernel_size=3,
        stride=1,
        upsample_kernel_size=2,
        norm_name="instance",
        conv_block=True,
        res_block=True,
    )
    return block


class Up(nn.Module):
    """Twice the resolution, joined with a skip; resized where the skip is not twice as large (patches of 12³)."""

    def __init__(self, channels: int, out: int, last: bool) -> None:
        super().__init__()
        self.last = last
        self.up = nn.ConvTranspose3d(channels, out, 2, stride=2, bias=False)
        self.block = residual(2 * out, out)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        y = self.up(x)
        if y.shape[2:] != skip.shape[2:]:
            y = F.interpolate(y, size=skip.shape[2:], mode="trilinear", align_corners=False)
        joined: Tensor = self.block(torch.cat([y, skip], dim=1))
        return joined
