"""nnU-Net's residual-encoder U-Net for studies that may lack channels."""

from __future__ import annotations

from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from torch import Tensor, nn

from medmae.models.unetr import absent_channels


class MissingChannelsUNet(ResidualEncoderUNet):
    """``ResidualEncoderUNet`` with one learned value a channel (``fill``, begun at 0), which stands for a channel that
    was not acquired (:func:`medmae.models.unetr.absent_channels`). Those that are there are scaled up by their share,
    so that the first convolution gets as much as it is used to. All other weights have the names of nnU-Net's."""

    def __init__(self, input_channels: int, **arguments: Any) -> None:
        super().__init__(input_channels=input_channels, **arguments)
        self.fill = nn.Parameter(torch.zeros(input_channels))

    def forward(self, x: Tensor) -> Any:
        """(B, C, D, H, W) → what ``ResidualEncoderUNet`` gives."""
        absent = absent_channels(x)[:, :, None, None, None]
        share = (~absent).float().mean(1, keepdim=True).clamp(min=1.0 / x.shape[1])
        filled = torch.where(absent, self.fill.view(1, -1, 1, 1, 1).to(x.dtype), x / share.to(x.dtype))
        return super().forward(filled)
