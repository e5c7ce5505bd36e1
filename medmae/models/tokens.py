"""Volumes as tokens: patches, tokenizers and fixed positions, for any patch size and any grid.

Token order is C order over the array axes (axis 0 slowest), and so is the order of voxels within a patch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmae.plan import Triple

POSITION_TEMPERATURE = 10000.0  # of Vaswani et al. 2017; MONAI's too


def token_grid(size: tuple[int, ...], patch: Triple) -> Triple:
    """Tokens along each axis of a volume of ``size`` (D, H, W) voxels."""
    return tuple(s // p for s, p in zip(size, patch, strict=True))  # type: ignore[return-value]


def patchify(volume: Tensor, patch: Triple) -> Tensor:
    """(B, 1, D, H, W) → (B, N, p0·p1·p2), N = gD·gH·gW."""
    b = volume.shape[0]
    (g0, g1, g2), (p0, p1, p2) = token_grid(tuple(volume.shape[2:]), patch), patch
    split = volume.reshape(b, g0, p0, g1, p1, g2, p2)
    return split.permute(0, 1, 3, 5, 2, 4, 6).reshape(b, g0 * g1 * g2, p0 * p1 * p2)


def unpatchify(tokens: Tensor, grid: Triple, patch: Triple) -> Tensor:
    """(B, N, p0·p1·p2) → (B, 1, D, H, W): the inverse of :func:`patchify`."""
    b, (g0, g1, g2), (p0, p1, p2) = tokens.shape[0], grid, patch
    split = tokens.reshape(b, g0, g1, g2, p0, p1, p2).permute(0, 1, 4, 2, 5, 3, 6)
    return split.reshape(b, 1, g0 * p0, g1 * p1, g2 * p2)


def sincos_positions(
    grid: Triple, width: int, axes: Triple = (1, 0, 2), temperature: float = POSITION_TEMPERATURE
) -> Tensor:
    """Fixed 3D sin-cos position embedding, (1, N, width) float32.

    Each axis takes width / 3 channels, sines then cosines of ``index / temperature^(i / (width / 6))`` (the
    transformer's encoding, Vaswani et al. 2017, per axis). ``axes`` is the order in which the array axes are laid
    out: (1, 0, 2) is that of MONAI's ``build_sincos_position_embedding``, which BM-MAE uses.
    """
    if width % 6:
        raise ValueError(f"a 3D sin-cos embedding needs a width divisible by 6, got {width}")
    rate = 1.0 / temperature ** (torch.arange(width // 6, dtype=torch.float32) / (width // 6))
    index = torch.meshgrid(*(torch.arange(g, dtype=torch.float32) for g in grid), indexing="ij")
    angles = [index[axis].reshape(-1, 1) * rate for axis in axes]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1).unsqueeze(0)


class Positions(nn.Module):
    """A table of fixed positions for the plan's grid, and the right ones for any other grid.

    The table is sin-cos unless a published file brings another one; then other grids are served by trilinear
    interpolation of it, as is usual for position embeddings.
    """

    table: Tensor

    def __init__(
        self, grid: Triple, width: int, axes: Triple = (1, 0, 2), temperature: float = POSITION_TEMPERATURE
    ) -> None:
        super().__init__()
        self.grid, self.width, self.axes, self.temperature = grid, width, axes, temperature
        self.register_buffer("table", self.computed(grid))

    def forward(self, grid: Triple) -> Tensor:
        """(1, N, width) for ``grid``."""
        if grid == self.grid:
            return self.table
        if torch.allclose(self.table.cpu(), self.computed(self.grid), atol=1e-5):
            return self.computed(grid).to(self.table)
        known = self.table.transpose(1, 2).reshape(1, self.width, *self.grid)
        return F.interpolate(known, size=grid, mode="trilinear").flatten(2).transpose(1, 2)

    def computed(self, grid: Triple) -> Tensor:
        return sincos_positions(grid, self.width, self.axes, self.temperature)


class Tokenizer(nn.Module):
    """One modality's patch embedding: a Conv3d whose kernel is its stride, applied to patches already cut out.

    The weight keeps the convolution's shape (width, 1, p0, p1, p2), so that published weights fit; it is
    initialised Xavier-uniform over the flattened kernel.
    """

    def __init__(
        self,
        patch: Triple,
        width: int,
        grid: Triple,
        axes: Triple = (1, 0, 2),
        temperature: float = POSITION_TEMPERATURE,
    ) -> None:
        super().__init__()
        self.proj = nn.Conv3d(1, width, kernel_size=patch, stride=patch)
        nn.init.xavier_uniform_(self.proj.weight.view(width, -1))
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]
        self.positions = Positions(grid, width, axes, temperature)

    def forward(self, patches: Tensor) -> Tensor:
        """(..., p0·p1·p2) → (..., width), without position."""
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)
