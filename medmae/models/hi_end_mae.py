"""Hi-End-MAE: a masked autoencoder whose decoder asks the encoder's layers, deep to shallow (arXiv 2502.08347).

Tokens of one modality, a random quarter visible. Encoder: CLS and the visible tokens. Decoder: self-attention over
all places, then blocks that also attend to what earlier encoder blocks gave (10th, 7th, 4th), visible tokens and CLS
only. Loss: mean squared error over hidden patches, each normalised to zero mean and unit variance.

Only visible patches are embedded, and only hidden ones go through the last cross-attention and are predicted.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from medmae.errors import MedmaeError, PlanError
from medmae.masking import choose_decoded, sample_mask, split_tokens, visible_tokens
from medmae.models.base import Images, MAEOutput, MaskedAutoencoder
from medmae.models.losses import squared_error
from medmae.models.tokens import POSITION_TEMPERATURE, Positions, Tokenizer, patchify, token_grid, unpatchify
from medmae.models.vit import Block, CrossBlock, initialise, set_recompute, take
from medmae.plan import Plan, Section, Triple

_EPS = 1e-6  # of layer norms and of the target's variance
_AXES = (0, 1, 2)  # order in which the positions of the axes are laid out


class Config(Section):
    """The plan's ``model`` section. Widths are divisible by 6 (positions) and by the number of heads.

    ``skips``: encoder blocks (counted from 0) whose outputs the cross-attention blocks see, in the decoder's order.
    """

    patch: Triple = (16, 16, 16)
    width: int = Field(768, gt=0, multiple_of=6)
    depth: int = Field(12, gt=0)
    heads: int = Field(12, gt=0)
    mlp_width: int = Field(3072, gt=0)
    position_temperature: float = Field(POSITION_TEMPERATURE, gt=1)
    skips: tuple[int, ...] = (9, 6, 3)
    decoder_width: int = Field(384, gt=0, multiple_of=6)
    decoder_depth: int = Field(2, gt=0)
    decoder_heads: int = Field(12, gt=0)
    decoder_mlp_width: int = Field(1536, gt=0)
    normalise_target: bool = True


class Decoder(nn.Module):
    """Self-attention blocks, then cross-attention to the encoder's skips, then the voxels of the patches asked for."""

    def __init__(self, config: Config, grid: Triple) -> None:
        super().__init__()
        width, heads, hidden = config.decoder_width, config.decoder_heads, config.decoder_mlp_width
        self.embed = nn.ModuleList(nn.Linear(config.width, width) for _ in range(len(config.skips) + 1))  # last: final
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = Positions(grid, width, _AXES, config.position_temperature)
        self.blocks = nn.ModuleList(Block(width, heads, hidden, eps=_EPS) for _ in range(config.decoder_depth))
        self.cross_blocks = nn.ModuleList(CrossBlock(width, heads, hidden, eps=_EPS) for _ in config.skips)
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.head = nn.Linear(width, config.patch[0] * config.patch[1] * config.patch[2])
        self.apply(initialise)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self, latent: Tensor, skips: list[Tensor], seen: Tensor, asked: Tensor, grid: Triple, alone: bool = False
    ) -> Tensor:
        """``latent`` (B, 1 + K, C) normed, ``skips`` un-normed encoder tokens, ``seen`` (B, K) and ``asked`` (B, Q)
        places: (B, Q, voxels of a patch). ``alone``: only what is asked for takes part beside what is seen."""
        embedded = self.embed[-1](latent)
        cls, visible = embedded[:, :1], embedded[:, 1:]
        where_each = self.positions(grid).expand(latent.shape[0], -1, -1)
        mask_token = self.mask_token.to(visible.dtype)
        if alone:
            full = torch.cat([visible + take(where_each, seen), mask_token + take(where_each, asked)], dim=1)
            wanted = (seen.shape[1] + 1 + torch.arange(asked.shape[1], device=asked.device)).expand_as(asked)
        else:
            full = mask_token.expand(*where_each.shape)
            full = full.scatter(1, seen.unsqueeze(-1).expand_as(visible), visible) + where_each
            wanted = asked + 1
        x = torch.cat([cls.to(full.dtype), full], dim=1)
        for block in self.blocks:
            x = block(x)
        for i, (block, skip) in enumerate(zip(self.cross_blocks, skips, strict=True)):
            last = i == len(self.cross_blocks) - 1
            x = block(x, self.embed[i](skip), query_index=wanted if last else None)
        return self.head(self.norm(x))


class HiEndMAE(MaskedAutoencoder):
    """See the module's docstring; the interface is :class:`MaskedAutoencoder`'s."""

    def __init__(self, plan: Plan, config: Config) -> None:
        super().__init__(plan)
        if len(plan.modalities) != 1:
            raise PlanError(
                "hi-end-mae learns from one modality",
                where=plan.name,
                field="modalities",
                found=", ".join(plan.modalities),
                remedy='Name one, for example --set modalities=["t1"].',
            )
        if not config.skips or max(config.skips) >= config.depth:
            raise PlanError("skips are blocks of the encoder", where=plan.name, field="model.skips", found=config.skips)
        self.config = config
        self.grid_multiple = config.patch
        native = token_grid(plan.image.crop, config.patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.mlp_width, eps=_EPS) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=_EPS)
        self.apply(initialise)
        nn.init.normal_(self.cls_token, std=0.02)
        self.tokenizer = Tokenizer(config.patch, config.width, native, _AXES, config.position_temperature)
        self.decoder = Decoder(config, native)

    def forward(
        self,
        images: Images | Tensor,
        mask: Mapping[str, Tensor] | None = None,
        return_prediction: bool = False,
        present: Mapping[str, Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> MAEOutput:
        """See :meth:`MaskedAutoencoder.forward`. ``prediction`` is given back in the input's intensities with each
        patch's own mean and deviation, which the model is not asked to know."""
        name, image = next(iter(self.checked(images).items()))
        grid = token_grid(tuple(image.shape[2:]), self.config.patch)
        patches = patchify(image, self.config.patch)
        hidden, visible = self.masked(name, mask, patches, grid, generator)
        seen, _, unseen = split_tokens(hidden, visible)
        latent, skips = self.encode_tokens(take(patches, seen), seen, grid)
        share = self.plan.masking.decode_share if self.training and mask is None and not return_prediction else 1.0
        everything = torch.arange(hidden.shape[1], device=image.device).expand_as(hidden)
        asked = everything if return_prediction else choose_decoded(unseen, share, generator)
        predicted = self.decoder(latent, skips, seen, asked, grid, alone=share < 1.0)
        loss = self.loss(predicted, patches, asked, hidden)
        prediction = None
        if return_prediction:
            shown = predicted.float()
            if self.config.normalise_target:
                mean, deviation = patch_statistics(patches)
                shown = shown * deviation + mean
            prediction = {name: unpatchify(shown, grid, self.config.patch)}
        return MAEOutput(loss, {name: loss}, {name: hidden.view(-1, *grid)}, prediction)

    def encode(self, images: Images | Tensor, mask: Mapping[str, Tensor] | None = None) -> Tensor:
        """(B, 1 + visible tokens, C): CLS, then the visible tokens in C order, normed."""
        name, image = next(iter(self.checked(images).items()))
        grid = token_grid(tuple(image.shape[2:]), self.config.patch)
        patches = patchify(image, self.config.patch)
        hidden, visible = self.masked(name, mask or {name: self.nothing(image, grid)}, patches, grid, None)
        seen, _, _ = split_tokens(hidden, visible)
        return self.encode_tokens(take(patches, seen), seen, grid)[0]

    def save_memory(self, enabled: bool) -> None:
        """The MLPs of all blocks."""
        set_recompute(self, enabled)

    def nothing(self, image: Tensor, grid: Triple) -> Tensor:
        return torch.zeros(image.shape[0], *grid, dtype=torch.bool, device=image.device)

    def masked(
        self,
        name: str,
        mask: Mapping[str, Tensor] | None,
        patches: Tensor,
        grid: Triple,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, int]:
        """(B, N) True = hidden, random or as given, and how many tokens every sample shows."""
        batch, tokens = patches.shape[:2]
        if mask is None:
            masking = self.plan.masking.model_copy(update={"modality_dropout": 0.0})
            there = torch.ones(batch, 1, dtype=torch.bool, device=patches.device)
            return sample_mask(masking, there, tokens, generator, grid)[:, 0], visible_tokens(masking, 1, tokens)
        if name not in mask or tuple(mask[name].shape) != (batch, *grid):
            found = tuple(mask[name].shape) if name in mask else ", ".join(mask)
            raise MedmaeError(
                "a mask has one entry a token", field=f"mask[{name}]", found=found, expected=(batch, *grid)
            )
        hidden = mask[name].to(patches.device, torch.bool).flatten(1)
        shown = (~hidden).sum(1)
        if int(shown.min()) != int(shown.max()) or int(shown.min()) == 0:
            raise MedmaeError(
                "every sample of a batch shows the same number of tokens, and at least one",
                field=f"mask[{name}]",
                found=shown.tolist(),
            )
        return hidden, int(shown[0])

    def encode_tokens(self, rows: Tensor, seen: Tensor, grid: Triple) -> tuple[Tensor, list[Tensor]]:
        """Visible patches ``rows`` (B, K, V) at ``seen`` (B, K): the normed tokens (B, 1 + K, C), and the un-normed
        outputs of the skips' blocks."""
        x = self.tokenizer(rows)
        x = x + take(self.tokenizer.positions(grid).expand(x.shape[0], -1, -1), seen)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
        outputs = {}
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.config.skips:
                outputs[i] = x
        return self.norm(x), [outputs[i] for i in self.config.skips]

    def loss(self, predicted: Tensor, patches: Tensor, asked: Tensor, hidden: Tensor) -> Tensor:
        """Mean squared error over the hidden ones of the patches ``asked`` for, in fp32."""
        truth = patches if asked.shape[1] == patches.shape[1] else take(patches, asked)
        truth = truth.float()
        if self.config.normalise_target:
            mean, deviation = patch_statistics(truth)
            truth = (truth - mean) / deviation
        error = squared_error(predicted.float(), truth)
        counted = hidden.gather(1, asked).float()
        return (error * counted).sum() / counted.sum().clamp(min=1.0)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and √(biased variance + 1e-6) of each patch: (..., 1) each."""
    values = patches.float()
    return values.mean(-1, keepdim=True), (values.var(-1, unbiased=False, keepdim=True) + _EPS).sqrt()


def build(plan: Plan) -> HiEndMAE:
    """The model of a plan, with random weights."""
    from medmae.models.zoo import config_of

    return HiEndMAE(plan, config_of(plan, Config))
