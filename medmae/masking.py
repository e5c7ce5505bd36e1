"""What a model may see: samplers of masks over the tokens of a study, drawn on the device without host syncs.

A mask is (B, M, N) bool over M modalities of N tokens each, **True = hidden**. A modality that was never acquired,
one that is dropped for training and one that is asked for are all the same here: every token hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medmae.plan import Masking, Triple

_DIRICHLET_DRAWS = 32  # candidates a sample draws at once; the first that fits is taken (no data-dependent loop)


def visible_tokens(masking: Masking, modalities: int, tokens: int) -> int:
    """The most tokens a study shows. K = int(M·N·(1 − ratio)), at least 1; with the sampler ``shared`` what is left of
    int(ratio·N) hidden places in each modality."""
    if masking.sampler == "shared":
        return modalities * (tokens - min(max(int(masking.ratio * tokens + 1e-9), 1), tokens - 1))
    return max(1, int(modalities * tokens * (1.0 - masking.ratio) + 1e-9))


def sample_mask(
    masking: Masking,
    present: Tensor,
    tokens: int,
    generator: torch.Generator | None = None,
    grid: Triple | None = None,
) -> Tensor:
    """Draw (B, M, N) bool, True = hidden, for studies that have the modalities ``present`` (B, M) bool.

    ``dirichlet`` and ``uniform``: each study shows K tokens (:func:`visible_tokens`), unless its modalities hold too
    few: never more than ``max_visible_share`` of what it has. How many each modality gives is a symmetric Dirichlet
    draw (MultiMAE, Bachmann et al. 2022); draws that ask more of a modality than it has are redrawn. Within a modality
    the choice is uniform. ``shared``: int(ratio·N) places, the same in every modality, are hidden. ``grid`` (of the N
    tokens) is needed where the plan hides blocks.
    """
    device, (batch, modalities) = present.device, present.shape
    existing = present.sum(1)
    seen = drop_modalities(present, masking.modality_dropout, generator)
    if masking.sampler == "shared":
        order = rank(block_noise(batch, 1, tokens, masking.block, grid, device, generator))
        hidden = order < hidden_places(masking, batch, tokens, device, generator).view(-1, 1, 1)
        return hidden | ~seen.unsqueeze(-1)
    largest = max(masking.max_visible_share, 1.0 - masking.ratio) if modalities == 1 else masking.max_visible_share
    budget = torch.full_like(existing, visible_tokens(masking, modalities, tokens))
    budget = torch.minimum(budget, (existing * tokens * largest + 1e-6).long())
    budget = torch.minimum(budget, seen.sum(1) * tokens).clamp(min=1)
    noise = block_noise(batch, modalities, tokens, masking.block, grid, device, generator)
    if masking.sampler == "uniform":
        flat = noise.masked_fill(~seen.unsqueeze(-1), torch.inf).flatten(1)
        return (rank(flat) >= budget.unsqueeze(1)).view(batch, modalities, tokens)
    counts = dirichlet_counts(seen, budget, tokens, masking.alpha, generator)
    return rank(noise) >= counts.unsqueeze(-1)


def hidden_places(
    masking: Masking, batch: int, tokens: int, device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """(B,) or (1,) places that the sampler ``shared`` hides: int(ratio·N), at least 1 and never all."""
    if masking.ratio_to is None:
        return torch.full((1,), min(max(int(masking.ratio * tokens + 1e-9), 1), tokens - 1), device=device)
    draw = torch.rand(batch, device=device, generator=generator)
    ratio = masking.ratio + draw * (masking.ratio_to - masking.ratio)
    return (ratio * tokens).long().clamp(1, tokens - 1)


def block_noise(
    batch: int,
    rows: int,
    tokens: int,
    block: int,
    grid: Triple | None,
    device: torch.device,
    generator: torch.Generator | None,
) -> Tensor:
    """(B, rows, N) random numbers whose order decides; tokens of one block stand together in it.

    Blocks lie on a grid that begins at the first token; those at the far border may be cut. Which block is split when
    the number of tokens asked for is no multiple of its size is random, so that counts stay exact.
    """
    noise = torch.rand(batch, rows, tokens, device=device, generator=generator)
    if block == 1:
        return noise
    if grid is None:
        raise ValueError("blocks need the grid of the tokens")
    coarse = [-(-g // block) for g in grid]
    cells = rank(torch.rand(batch, rows, coarse[0] * coarse[1] * coarse[2], device=device, generator=generator))
    spread = cells.view(batch, rows, *coarse)
    for axis, size in enumerate(grid):
        spread = spread.repeat_interleave(block, axis + 2).narrow(axis + 2, 0, size)
    return spread.flatten(2) + noise


def choose_decoded(unseen: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    """A random ``share`` of the hidden tokens ``unseen`` (B, Q), in ascending order: at least one."""
    if share == 1.0:
        return unseen
    count = max(1, round(unseen.shape[1] * share))
    noise = torch.rand(unseen.shape, device=unseen.device, generator=generator)
    return unseen.gather(1, noise.argsort(1)[:, :count].sort(1).values)


def drop_modalities(present: Tensor, chance: float, generator: torch.Generator | None = None) -> Tensor:
    """(B, M) bool: with ``chance``, a study keeps a random number (1 to all but one) of its modalities."""
    if chance == 0:
        return present
    batch, _ = present.shape
    device, existing = present.device, present.sum(1)
    draw = torch.rand(batch, 2, device=device, generator=generator)
    kept = 1 + (draw[:, 1] * (existing - 1)).long()
    kept = torch.where((draw[:, 0] < chance) & (existing > 1), kept, existing)
    order = torch.rand(present.shape, device=device, generator=generator).masked_fill(~present, 2.0)
    return present & (rank(order) < kept.unsqueeze(1))


def dirichlet_counts(
    seen: Tensor, budget: Tensor, tokens: int, alpha: float, generator: torch.Generator | None = None
) -> Tensor:
    """(B, M) tokens each modality shows: sums to ``budget`` (B,), 0 where not ``seen``, at most ``tokens``."""
    batch, modalities = seen.shape
    shape = torch.full((batch, _DIRICHLET_DRAWS, modalities), alpha, device=seen.device)
    gamma = torch._standard_gamma(shape, generator=generator).clamp(min=1e-30) * seen.unsqueeze(1)
    upto = (gamma.cumsum(-1) / gamma.sum(-1, keepdim=True) * budget.view(-1, 1, 1)).round().long()
    counts = torch.diff(upto, dim=-1, prepend=torch.zeros_like(upto[..., :1]))
    fits = (counts <= tokens).all(-1)
    first = fits.to(torch.uint8).argmax(1)
    chosen = counts.gather(1, first.view(-1, 1, 1).expand(-1, 1, modalities)).squeeze(1)
    # No draw fitted (a budget close to all there is): what is too much goes to the modalities with room.
    room_capped = chosen.clamp(max=tokens)
    room = (tokens - room_capped) * seen
    lacking = (budget - room_capped.sum(1)).unsqueeze(1)
    return room_capped + torch.minimum((lacking - (room.cumsum(1) - room)).clamp(min=0), room)


def rank(x: Tensor) -> Tensor:
    """Position of each entry in ascending order along the last axis."""
    return x.argsort(-1).argsort(-1)


def split_tokens(hidden: Tensor, visible: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of what is seen and what is not, from a flat mask (B, L).

    Returns ``seen`` (B, visible) ascending, ``valid`` (B, visible) bool, False where a study shows fewer tokens than
    ``visible`` (those entries point at hidden tokens and must be ignored), and ``unseen`` (B, L − visible).
    """
    order = hidden.to(torch.uint8).argsort(dim=1, stable=True)
    shown = hidden.shape[1] - hidden.sum(1, keepdim=True)
    valid = torch.arange(visible, device=hidden.device) < shown
    return order[:, :visible], valid, order[:, visible:]
