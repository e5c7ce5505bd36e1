"""BM-MAE: a masked autoencoder on any subset of a study's modalities (arXiv 2505.00568).

Tokens: one tokenizer a modality, with fixed positions; no modality embedding in the encoder. Mask: K tokens of all
modalities together stay visible, how many of each from a Dirichlet draw. Encoder: CLS and the visible tokens.
Decoder: mask tokens at every hidden place of every modality the model knows. Loss: mean squared error over hidden
patches, summed over the modalities that exist.

Only visible patches are embedded and only hidden ones predicted: the same loss as embedding and predicting all, for
a fraction of the work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from medmae.errors import MedmaeError
from medmae.masking import choose_decoded, sample_mask, split_tokens, visible_tokens
from medmae.models.base import Images, MAEOutput, MaskedAutoencoder
from medmae.models.losses import squared_error
from medmae.models.tokens import POSITION_TEMPERATURE, Positions, Tokenizer, patchify, token_grid, unpatchify
from medmae.models.vit import Block, initialise, set_recompute, take
from medmae.plan import Plan, Section, Triple


class Config(Section):
    """The plan's ``model`` section. Widths are divisible by 6 (positions) and by the number of heads.

    ``dropout`` acts in the decoder, on the attention's output and both linear layers of the MLP;
    ``attention_dropout`` on the attention weights. ``position_temperature`` spreads the frequencies of the positions
    from 1 to 1 / temperature radians a token: 10000 (the paper's) leaves neighbours on a grid of a few tokens almost
    alike, and a small model then learns late where to look.
    """

    patch: Triple = (16, 16, 16)
    width: int = Field(768, gt=0, multiple_of=6)
    depth: int = Field(12, gt=0)
    heads: int = Field(12, gt=0)
    mlp_width: int = Field(1536, gt=0)
    qkv_bias: bool = True
    position_temperature: float = Field(POSITION_TEMPERATURE, gt=1)
    decoder_width: int = Field(384, gt=0, multiple_of=6)
    decoder_depth: int = Field(3, gt=0)
    decoder_heads: int = Field(12, gt=0)
    decoder_mlp_width: int = Field(1536, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1)
    attention_dropout: float = Field(0.0, ge=0, lt=1)


class Decoder(nn.Module):
    """Fills hidden places with mask tokens, mixes, and predicts the voxels of the patches asked for."""

    def __init__(self, config: Config, modalities: Sequence[str], grid: Triple) -> None:
        super().__init__()
        width = config.decoder_width
        self.embed = nn.Linear(config.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = Positions(grid, width, temperature=config.position_temperature)
        self.modalities = tuple(modalities)
        # ParameterDict sorts its keys, so it is only ever read by name.
        self.modality_embeddings = nn.ParameterDict({m: nn.Parameter(torch.zeros(1, 1, width)) for m in modalities})
        self.blocks = nn.ModuleList(
            Block(
                width,
                config.decoder_heads,
                config.decoder_mlp_width,
                qkv_bias=config.qkv_bias,
                dropout=config.dropout,
                attention_dropout=config.attention_dropout,
            )
            for _ in range(config.decoder_depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.patch[0] * config.patch[1] * config.patch[2])
        self.apply(initialise)
        for token in (self.mask_token, *self.modality_embeddings.values()):
            nn.init.normal_(token, std=0.02)

    def forward(
        self, latent: Tensor, seen: Tensor, valid: Tensor | None, asked: Tensor, grid: Triple, alone: bool = False
    ) -> Tensor:
        """``latent`` (B, 1 + K, C) encoder tokens, ``seen`` (B, K) their places, ``asked`` (B, Q) the places to
        predict: (B, Q, voxels of a patch). Places count through the modalities in model order. ``alone``: only what
        is asked for takes part beside what is seen (none of it seen)."""
        embedded = self.embed(latent)
        cls, visible = embedded[:, :1], embedded[:, 1:]
        mask_token = self.mask_token.to(visible.dtype)
        if valid is not None:
            visible = torch.where(valid.unsqueeze(-1), visible, mask_token)
        where_each = self.positions(grid)
        offsets = torch.cat([where_each + self.modality_embeddings[m] for m in self.modalities], dim=1)
        if alone:
            rows = offsets.expand(latent.shape[0], -1, -1)
            full = torch.cat([visible + take(rows, seen), mask_token + take(rows, asked)], dim=1)
            wanted = (seen.shape[1] + 1 + torch.arange(asked.shape[1], device=asked.device)).expand_as(asked)
        else:
            full = mask_token.expand(latent.shape[0], offsets.shape[1], -1)
            full = full.scatter(1, seen.unsqueeze(-1).expand_as(visible), visible) + offsets
            wanted = asked + 1
        x = torch.cat([cls.to(full.dtype), full], dim=1)
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x)
        return self.head(self.norm(last(x, query_index=wanted)))


class BMMAE(MaskedAutoencoder):
    """See the module's docstring; the interface is :class:`MaskedAutoencoder`'s."""

    def __init__(self, plan: Plan, config: Config) -> None:
        super().__init__(plan)
        self.config = config
        self.grid_multiple = config.patch
        native = token_grid(plan.image.crop, config.patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.mlp_width, qkv_bias=config.qkv_bias) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width)
        self.apply(initialise)
        nn.init.normal_(self.cls_token, std=0.02)
        self.tokenizers = nn.ModuleDict(
            {
                m: Tokenizer(config.patch, config.width, native, temperature=config.position_temperature)
                for m in plan.modalities
            }
        )
        self.decoder = Decoder(config, plan.modalities, native)

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
        first = next(iter(images.values()))
        batch, grid = first.shape[0], token_grid(tuple(first.shape[2:]), self.config.patch)
        has = self.presence(images, present, batch)
        patches = self.patches(images)  # (B, M·N, V)
        exists = has.to(first.device, non_blocking=True)
        if mask is None:
            hidden, visible, ragged = self.draw(has, exists, grid, generator)
        else:
            hidden, visible, ragged = self.given(mask, exists, grid)
        flat = hidden.flatten(1)
        seen, valid, unseen = split_tokens(flat, visible)
        latent = self.encode_tokens(patches, seen, valid if ragged else None, grid)
        everything = torch.arange(flat.shape[1], device=first.device).expand(batch, -1)
        share = self.plan.masking.decode_share if self.training and mask is None and not return_prediction else 1.0
        if share < 1.0:
            asked = choose_decoded(unseen, share, generator)
        else:
            asked = everything if return_prediction or ragged else unseen
        predicted = self.decoder(latent, seen, valid if ragged else None, asked, grid, alone=share < 1.0)
        counted = hidden & exists.unsqueeze(-1)  # (B, M, N): the hidden patches that have a truth
        losses = self.losses(predicted, patches, asked, counted)
        return MAEOutput(
            loss=losses.sum(),
            losses={m: losses[i] for i, m in enumerate(self.modalities) if m in images},
            mask={m: hidden[:, i].view(batch, *grid) for i, m in enumerate(self.modalities)},
            prediction=self.volumes(predicted, grid) if return_prediction else None,
        )

    def encode(self, images: Images | Tensor, mask: Mapping[str, Tensor] | None = None) -> Tensor:
        """(B, 1 + visible tokens, C): CLS, then the visible tokens, modalities in model order, C order in each.

        Every study of the batch must show the same number of tokens (:class:`MedmaeError` otherwise).
        """
        images = self.checked(images)
        first = next(iter(images.values()))
        grid = token_grid(tuple(first.shape[2:]), self.config.patch)
        exists = self.presence(images, None, first.shape[0]).to(first.device)
        hidden, visible, ragged = self.given(mask or {}, exists, grid, default=False)
        if ragged:
            raise MedmaeError(
                "studies of this batch show different numbers of tokens",
                field="mask",
                remedy="Encode them one by one, or hide equally many tokens in each.",
            )
        seen, _, _ = split_tokens(hidden.flatten(1), visible)
        return self.encode_tokens(self.patches(images), seen, None, grid)

    def reconstruct(self, images: Images, targets: Sequence[str]) -> dict[str, Tensor]:
        """See :meth:`MaskedAutoencoder.reconstruct`; a target that is among ``images`` is not looked at."""
        for name in targets:
            if name not in self.modalities:
                self.checked({name: torch.empty(0)})
        images = self.checked({m: x for m, x in images.items() if m not in targets})
        first = next(iter(images.values()))
        batch, grid = first.shape[0], token_grid(tuple(first.shape[2:]), self.config.patch)
        tokens = grid[0] * grid[1] * grid[2]
        places = torch.arange(len(self.modalities) * tokens, device=first.device).view(-1, tokens)
        seen = torch.cat([places[i] for i, m in enumerate(self.modalities) if m in images]).expand(batch, -1)
        asked = torch.cat([places[self.modalities.index(m)] for m in targets]).expand(batch, -1)
        latent = self.encode_tokens(self.patches(images), seen, None, grid)
        predicted = self.decoder(latent, seen, None, asked, grid).split(tokens, dim=1)
        return {
            m: unpatchify(p.to(first.dtype), grid, self.config.patch) for m, p in zip(targets, predicted, strict=True)
        }

    def save_memory(self, enabled: bool) -> None:
        """The MLPs of all blocks: half of what is kept for backward."""
        set_recompute(self, enabled)

    def patches(self, images: Images) -> Tensor:
        """(B, M·N, V) in model order; zeros for the modalities that are not in ``images``."""
        cut = {m: patchify(x, self.config.patch) for m, x in images.items()}
        blank = torch.zeros_like(next(iter(cut.values())))
        return torch.cat([cut.get(m, blank) for m in self.modalities], dim=1)

    def draw(
        self, has: Tensor, exists: Tensor, grid: Triple, generator: torch.Generator | None
    ) -> tuple[Tensor, int, bool]:
        """A random mask, K, and whether some study may show fewer than K (known without a sync where possible)."""
        masking, modalities = self.plan.masking, len(self.modalities)
        tokens = grid[0] * grid[1] * grid[2]
        visible = visible_tokens(masking, modalities, tokens)
        fewest = int(has.sum(1).min()) if has.device.type == "cpu" else 1
        if masking.sampler == "shared":
            ragged = fewest < modalities or masking.modality_dropout > 0 or masking.ratio_to is not None
        else:
            ragged = int(fewest * tokens * masking.max_visible_share) < visible or (
                masking.modality_dropout > 0 and visible > tokens
            )
        return sample_mask(masking, exists, tokens, generator, grid), visible, ragged

    def given(
        self, mask: Mapping[str, Tensor], exists: Tensor, grid: Triple, default: bool = True
    ) -> tuple[Tensor, int, bool]:
        """A mask from outside as (B, M, N), the most tokens any study shows, and whether some show fewer."""
        batch, rows = exists.shape[0], []
        for i, name in enumerate(self.modalities):
            if name not in mask:
                rows.append(torch.full((batch, grid[0] * grid[1] * grid[2]), default, device=exists.device))
            elif tuple(mask[name].shape) != (batch, *grid):
                raise MedmaeError(
                    "a mask has one entry a token",
                    field=f"mask[{name}]",
                    found=tuple(mask[name].shape),
                    expected=(batch, *grid),
                )
            else:
                rows.append(mask[name].to(exists.device, torch.bool).flatten(1))
            rows[-1] = rows[-1] | ~exists[:, i : i + 1]
        hidden = torch.stack(rows, dim=1)
        shown = (~hidden).flatten(1).sum(1)
        fewest, most = int(shown.min()), int(shown.max())
        if fewest == 0:
            raise MedmaeError("a study of this batch shows no token at all", field="mask")
        return hidden, most, fewest < most

    def encode_tokens(self, patches: Tensor, seen: Tensor, valid: Tensor | None, grid: Triple) -> Tensor:
        """``patches`` (B, places, V) of the images, ``seen`` (B, K) → (B, 1 + K, C), normed."""
        tokens = grid[0] * grid[1] * grid[2]
        modality = seen // tokens
        if patches.shape[1] == seen.shape[1]:
            rows = patches
        else:
            rows = take(patches, seen)
        x = self.embed_rows(rows, modality)
        where_each = torch.cat([t.positions(grid) for t in self.tokenizers.values()], dim=1)  # type: ignore[operator]
        x = x + take(where_each.expand(x.shape[0], -1, -1), seen)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
        key_mask = None
        if valid is not None:
            key_mask = torch.cat([torch.ones_like(valid[:, :1]), valid], dim=1)
        for block in self.blocks:
            x = block(x, key_mask=key_mask)
        return self.norm(x)

    def embed_rows(self, rows: Tensor, modality: Tensor) -> Tensor:
        """Patches (B, K, V) through the tokenizer of their ``modality`` (B, K): (B, K, C)."""
        if rows.device.type != "cpu":
            return self.embed_static(rows, modality)
        flat, which = rows.flatten(0, 1), modality.flatten()
        order = which.argsort(stable=True)
        counts = which.bincount(minlength=len(self.modalities)).tolist()
        sorted_rows = flat[order].split(counts)
        parts = [t(part) for t, part in zip(self.tokenizers.values(), sorted_rows, strict=True)]
        return torch.cat(parts)[order.argsort()].view(*rows.shape[:2], -1)

    def embed_static(self, rows: Tensor, modality: Tensor) -> Tensor:
        """:meth:`embed_rows` with static shapes: no count has to reach the host, and a graph stays one."""
        parts = torch.stack([t(rows) for t in self.tokenizers.values()])
        return parts.gather(0, modality[None, :, :, None].expand(1, *parts.shape[1:])).squeeze(0)

    def losses(self, predicted: Tensor, patches: Tensor, asked: Tensor, counted: Tensor) -> Tensor:
        """(M,) mean squared error of each modality over the patches ``counted`` (B, M, N), in fp32."""
        truth = patches if asked.shape[1] == patches.shape[1] else take(patches, asked)
        error = squared_error(predicted.float(), truth.float())  # (B, Q)
        modalities, tokens = counted.shape[1:]
        weight = counted.flatten(1).gather(1, asked)
        share = (asked // tokens).unsqueeze(-1) == torch.arange(modalities, device=asked.device)
        weights = (share & weight.unsqueeze(-1)).float()
        return (error.unsqueeze(-1) * weights).sum((0, 1)) / weights.sum((0, 1)).clamp(min=1.0)

    def volumes(self, predicted: Tensor, grid: Triple) -> dict[str, Tensor]:
        parts = predicted.chunk(len(self.modalities), dim=1)
        return {m: unpatchify(p.float(), grid, self.config.patch) for m, p in zip(self.modalities, parts, strict=True)}


def build(plan: Plan) -> BMMAE:
    """The model of a plan, with random weights."""
    from medmae.models.zoo import config_of

    return BMMAE(plan, config_of(plan, Config))
