"""SparK-style CNN MAE: a CNN that cannot see through its mask (arXiv 2301.03580; Spark3D for the 3D network).

Every layer of the encoder acts as if only visible positions existed (:mod:`medmae.models.sparse`). At every scale the
hidden positions are then filled with that scale's mask token (densify: norm, token, projection), and the decoder of
the U-Net predicts. With ``leaky`` it behaves as Spark3D does, whose first convolution sees the whole image and which
hides nothing below the mask's resolution: for its checkpoints only.
"""

from __future__ import annotations

import torch
from pydantic import model_validator
from torch import Tensor, nn

from medmae.models.cnn import CnnConfig, ConvolutionalMAE
from medmae.models.sparse import SparseEncoder, Visible, masked_norm
from medmae.plan import Plan

_TOKEN_SPREAD = 0.02


class Config(CnnConfig):
    """:class:`medmae.models.cnn.CnnConfig`, and ``leaky`` (see the module's docstring)."""

    leaky: bool = False

    @model_validator(mode="after")
    def _grids_nest(self) -> Config:
        if any(unit & (unit - 1) for unit in self.mask_unit):
            raise ValueError("mask_unit must be a power of two, so that every scale of the network fits its grid")
        return self


class SparK(ConvolutionalMAE):
    """See the module's docstring; the interface is :class:`MaskedAutoencoder`'s."""

    def __init__(self, plan: Plan, config: Config) -> None:
        super().__init__(plan, config)
        self.leaky = config.leaky
        self.sparse = SparseEncoder(self.network.encoder)  # type: ignore[arg-type]
        widths = config.features[::-1]  # deep to shallow, as the published weights count
        self.densify_norms = nn.ModuleList(nn.InstanceNorm3d(c, affine=True) for c in widths)
        self.mask_tokens = nn.ParameterList(
            nn.Parameter(nn.init.trunc_normal_(torch.zeros(1, c, 1, 1, 1), std=_TOKEN_SPREAD)) for c in widths
        )
        projections: list[nn.Module] = [nn.Identity()]
        projections += [nn.Conv3d(c, c, 3, padding=1) for c in widths[1:]]
        self.densify_projs = nn.ModuleList(projections)

    def features(self, x: Tensor, hidden: Tensor) -> list[Tensor]:
        """The encoder's outputs, shallow to deep, zero where nothing is visible."""
        return self.encoded(x, hidden)[0]

    def predict(self, x: Tensor, hidden: Tensor) -> Tensor:
        """The decoder on the densified scales."""
        found, visible = self.encoded(x, hidden)
        dense = []
        for i, feature in enumerate(reversed(found)):
            mask = visible.at(feature.shape[2:])
            normed = masked_norm(self.densify_norms[i], feature, mask)
            filled = normed + (1.0 - mask).to(normed.dtype) * self.mask_tokens[i].to(normed.dtype)
            dense.append(self.densify_projs[i](filled))
        predicted: Tensor = self.network.decoder(dense[::-1])  # type: ignore[operator]
        return predicted

    def encoded(self, x: Tensor, hidden: Tensor) -> tuple[list[Tensor], Visible]:
        """Feature maps and where they are visible: wherever any modality is."""
        visible = Visible((~hidden).any(1, keepdim=True), self.leaky)
        seen = x if self.leaky else self.visible_part(x, hidden)
        if not self.training and bool(
            visible.shown.all()
        ):  # the same, faster; in training it would wait for the device
            return self.network.encoder(seen), visible  # type: ignore[operator]
        found: list[Tensor] = self.sparse(self.network.encoder, seen, visible)  # type: ignore[arg-type]
        return found, visible


def build(plan: Plan) -> SparK:
    """The model of a plan, with random weights."""
    from medmae.models.zoo import config_of

    return SparK(plan, config_of(plan, Config))
