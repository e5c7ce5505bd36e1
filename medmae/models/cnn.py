"""What the convolutional methods share: a U-Net of dynamic-network-architectures, one channel a modality, masked in
cubes of voxels.

A modality that a study lacks, or that is dropped, is a channel of zeros; the loss counts those that exist. The mask has
one entry a cube (``mask_unit``), True = hidden.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from medmae.errors import MedmaeError, PlanError
from medmae.masking import sample_mask
from medmae.models.base import Images, MAEOutput, MaskedAutoencoder, own_names
from medmae.models.losses import hidden_squares
from medmae.models.tokens import token_grid
from medmae.plan import Plan, Section, Triple


class CnnConfig(Section):
    """The plan's ``model`` section: ``features`` and ``blocks`` of each encoder stage (residual blocks for ``resenc``,
    convolutions for ``plain``), each stage after the first at half the resolution; ``decoder_convs`` a decoder stage;
    ``mask_unit`` voxels. ``normalise_target``: each cube to zero mean and unit (unbiased) variance."""

    network: Literal["resenc", "plain"] = "resenc"
    features: tuple[int, ...] = (32, 64, 128, 256, 320, 320)
    blocks: tuple[int, ...] = (1, 3, 4, 6, 6, 6)
    decoder_convs: int = Field(1, gt=0)
    mask_unit: Triple = (16, 16, 16)
    normalise_target: bool = False

    @model_validator(mode="after")
    def _stages_agree(self) -> CnnConfig:
        if len(self.features) != len(self.blocks) or len(self.features) < 2 or min(*self.features, *self.blocks) < 1:
            raise ValueError("features and blocks name the same two or more stages")
        if min(self.mask_unit) < 1:
            raise ValueError("mask_unit must be positive")
        return self


def make_unet(config: CnnConfig, channels_in: int, channels_out: int) -> nn.Module:
    """``ResidualEncoderUNet`` or ``PlainConvUNet`` as nnU-Net configures them: 3³ kernels, instance norm, leaky ReLU,
    bias, no deep supervision."""
    from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet

    stages = len(config.features)
    family = ResidualEncoderUNet if config.network == "resenc" else PlainConvUNet
    blocks = "n_blocks_per_stage" if config.network == "resenc" else "n_conv_per_stage"
    network: nn.Module = family(
        **unet_arguments(config),
        **{blocks: list(config.blocks)},
        input_channels=channels_in,
        num_classes=channels_out,
        n_conv_per_stage_decoder=[config.decoder_convs] * (stages - 1),
    )
    network.apply(network.initialize)  # type: ignore[arg-type]
    for unused in list(network.decoder.seg_layers)[:-1]:  # type: ignore[union-attr, arg-type]
        unused.requires_grad_(False)  # for deep supervision alone
    return network


def unet_arguments(config: CnnConfig) -> dict[str, Any]:
    """The arguments that both families share."""
    stages = len(config.features)
    return {
        "n_stages": stages,
        "features_per_stage": list(config.features),
        "conv_op": nn.Conv3d,
        "kernel_sizes": [[3, 3, 3]] * stages,
        "strides": [[1, 1, 1]] + [[2, 2, 2]] * (stages - 1),
        "conv_bias": True,
        "norm_op": nn.InstanceNorm3d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
        "deep_supervision": False,
    }


def named_arguments(config: CnnConfig) -> dict[str, Any]:
    """The arguments of ``ResidualEncoderUNet`` as nnU-Net's files write them: classes by their import path."""
    arguments = {
        **unet_arguments(config),
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "nonlin": "torch.nn.LeakyReLU",
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "n_blocks_per_stage": list(config.blocks),
        "n_conv_per_stage_decoder": [config.decoder_convs] * (len(config.features) - 1),
    }
    arguments.pop("deep_supervision")  # the trainer's to decide
    return arguments


IMPORTED = ("conv_op", "norm_op", "dropout_op", "nonlin")  # of them, those that are import paths


STEM = "encoder.stem.convs.0.conv.weight"  # of the first layer, which alone knows the channels


def stem_names(network: nn.Module) -> list[str]:
    """Every name under which the first layer's weight stands in the state dict."""
    return [name for name, own in own_names(network).items() if own == STEM]


def fit_channels(weight: Tensor, known: Sequence[str], channels: Sequence[str]) -> tuple[Tensor, str]:
    """(out, in, ...) for ``channels`` instead of ``known``, and what was done."""
    mean = weight.mean(1) * (len(known) / len(channels))
    named = [c for c in channels if c in known]
    columns = [weight[:, list(known).index(c)] if c in known else mean for c in channels]
    how = f"{', '.join(named)} by name" if named else ""
    if rest := [c for c in channels if c not in known]:
        how += f"{'; ' if how else ''}{', '.join(rest)} from the mean of {', '.join(known)}"
    return torch.stack(columns, dim=1), how


class ConvolutionalMAE(MaskedAutoencoder):
    """Masks, loss and synthesis around a U-Net; a method says how the network meets the mask (:meth:`predict`)."""

    def __init__(self, plan: Plan, config: CnnConfig) -> None:
        super().__init__(plan)
        self.config = config
        stride = 2 ** (len(config.features) - 1)
        if math.prod(size // stride for size in plan.image.crop) < 2:
            raise PlanError(
                "the crop is too small for a network of so many stages",
                where=plan.name,
                field="image.crop",
                found=plan.image.crop,
                expected=f"multiples of {stride}, more than one of them",
                remedy="Use a larger crop, or fewer stages in model.features and model.blocks.",
            )
        self.grid_multiple = tuple(math.lcm(stride, unit) for unit in config.mask_unit)  # type: ignore[assignment]
        self.network = make_unet(config, len(plan.modalities), len(plan.modalities))

    @property
    def mask_unit(self) -> Triple:
        return self.config.mask_unit

    @abstractmethod
    def features(self, x: Tensor, hidden: Tensor) -> list[Tensor]:
        """The encoder's outputs, shallow to deep, for ``x`` (B, M, D, H, W) and a mask (B, M, gD, gH, gW)."""

    @abstractmethod
    def predict(self, x: Tensor, hidden: Tensor) -> Tensor:
        """(B, M, D, H, W) from what is visible of ``x``."""

    def forward(
        self,
        images: Images | Tensor,
        mask: Mapping[str, Tensor] | None = None,
        return_prediction: bool = False,
        present: Mapping[str, Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> MAEOutput:
        """See :meth:`MaskedAutoencoder.forward`."""
        images = self.checked(images)
        x = self.stacked(images)
        exists = self.presence(images, present, x.shape[0]).to(x.device, non_blocking=True)
        hidden = self.hidden(x, exists, mask, generator)
        predicted = self.predict(x, hidden)
        losses = self.losses(predicted, x, hidden & exists[:, :, None, None, None])
        names = self.modalities
        prediction = None
        if return_prediction:
            shown = predicted.float()
            if self.config.normalise_target:
                mean, deviation = self.statistics(x)
                shown = self.units(self.units(shown) * deviation + mean, back=True)
            prediction = {m: shown[:, i : i + 1] for i, m in enumerate(names)}
        return MAEOutput(
            loss=losses.sum(),
            losses={m: losses[i] for i, m in enumerate(names) if m in images},
            mask={m: hidden[:, i] for i, m in enumerate(names)},
            prediction=prediction,
        )

    def encode(self, images: Images | Tensor, mask: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """The encoder's feature maps, shallow to deep: [(B, C, D, H, W)]."""
        images = self.checked(images)
        x = self.stacked(images)
        exists = self.presence(images, None, x.shape[0]).to(x.device)
        return self.features(x, self.hidden(x, exists, mask or {}, None, default=False))

    def reconstruct(self, images: Images, targets: Sequence[str]) -> dict[str, Tensor]:
        """See :meth:`MaskedAutoencoder.reconstruct`; a target that is among ``images`` is not looked at."""
        if len(self.modalities) == 1 or self.config.normalise_target:
            return super().reconstruct(images, targets)
        for name in targets:
            if name not in self.modalities:
                self.checked({name: torch.empty(0)})
        images = self.checked({m: x for m, x in images.items() if m not in targets})
        x = self.stacked(images)
        exists = self.presence(images, None, x.shape[0]).to(x.device)
        predicted = self.predict(x, self.hidden(x, exists, {}, None, default=False)).float()
        return {m: predicted[:, i : i + 1] for i, m in enumerate(self.modalities) if m in targets}

    def stacked(self, images: Images) -> Tensor:
        """(B, M, D, H, W) in model order, zeros for the modalities that are not in ``images``."""
        if len(self.modalities) == 1:
            return images[self.modalities[0]]
        blank = torch.zeros_like(next(iter(images.values())))
        return torch.cat([images.get(m, blank) for m in self.modalities], dim=1)

    def hidden(
        self,
        x: Tensor,
        exists: Tensor,
        mask: Mapping[str, Tensor] | None,
        generator: torch.Generator | None,
        default: bool = True,
    ) -> Tensor:
        """(B, M, gD, gH, gW), True = hidden: random, or as given (``default`` for modalities that are not)."""
        batch, grid = x.shape[0], token_grid(tuple(x.shape[2:]), self.config.mask_unit)
        if mask is None:
            drawn = sample_mask(self.plan.masking, exists, grid[0] * grid[1] * grid[2], generator, grid)
            return drawn.view(batch, -1, *grid)
        rows = []
        for i, name in enumerate(self.modalities):
            if name in mask and tuple(mask[name].shape) != (batch, *grid):
                raise MedmaeError(
                    "a mask has one entry a cube",
                    field=f"mask[{name}]",
                    found=tuple(mask[name].shape),
                    expected=(batch, *grid),
                )
            blank = torch.full((batch, *grid), default, dtype=torch.bool, device=x.device)
            given = mask[name].to(x.device, torch.bool) if name in mask else blank
            rows.append(given | ~exists[:, i, None, None, None])
        return torch.stack(rows, dim=1)

    def units(self, x: Tensor, back: bool = False) -> Tensor:
        """(B, M, D, H, W) seen as (B, M, gD, u0, gH, u1, gW, u2), or back: no copy."""
        if back:
            b, m, g0, u0, g1, u1, g2, u2 = x.shape
            return x.reshape(b, m, g0 * u0, g1 * u1, g2 * u2)
        u0, u1, u2 = self.config.mask_unit
        return x.unflatten(4, (-1, u2)).unflatten(3, (-1, u1)).unflatten(2, (-1, u0))

    def visible_part(self, x: Tensor, hidden: Tensor) -> Tensor:
        """``x`` with zeros where it is hidden."""
        shown = (~hidden).to(x.dtype)[:, :, :, None, :, None, :, None]
        return self.units(self.units(x) * shown, back=True)

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and √(unbiased variance + 1e-6) of each cube, in the form of :meth:`units`."""
        values = self.units(x.float())
        mean = values.mean((3, 5, 7), keepdim=True)
        return mean, (values.var((3, 5, 7), unbiased=True, keepdim=True) + 1e-6).sqrt()

    def losses(self, predicted: Tensor, truth: Tensor, counted: Tensor) -> Tensor:
        """(M,) mean squared error over the voxels of the cubes ``counted`` (B, M, gD, gH, gW), in fp32."""
        target = self.units(truth.float())
        if self.config.normalise_target:
            mean, deviation = self.statistics(truth)
            target = (target - mean) / deviation
        weight = counted.float()
        squares = hidden_squares(self.units(predicted), target, weight[:, :, :, None, :, None, :, None])
        return squares / (weight.sum((0, 2, 3, 4)) * math.prod(self.config.mask_unit)).clamp(min=1.0)
