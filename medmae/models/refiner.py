"""The refiner: a light convolutional network that sharpens what a masked autoencoder synthesises.

It sees a whole study at once: the modalities that are there as they are, in the place of the others what the
pre-trained decoder says of them, and which is which. It begins with the best linear blend of the two, a handful of
numbers for each set of given modalities that least squares finds, adds a correction, and says how far off it expects to
be: the scale of a Laplace distribution, voxel by voxel. Without normalisation layers, so that a crop and a whole volume
are treated alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmae.plan import Refining

_LEAST = 1e-2  # smallest scale, in standard deviations: a likelihood has no bound without
_START = 0.3  # what the scale begins with
RANGE = 6.0  # of z-scored intensities, for SSIM: the stabilising constants are its share


class Refiner(nn.Module):
    """(values, shown, spread) → (refined, scale), each (B, M, D, H, W) over ``modalities``.

    ``values``: images where a modality is given, coarse predictions elsewhere. ``shown`` (B, M) bool: which is which.
    ``spread``: of the coarse predictions over placements of the patch grid, 0 where given. A given modality comes back
    as it was. Any size.

    ``blend`` (2^M, M, M + 1), by :func:`pattern` of what is shown: the weights of all M values, and a constant, in each
    modality that is absent. A new refiner's blend is the coarse prediction itself.
    """

    blend: Tensor

    def __init__(self, modalities: Sequence[str], settings: Refining) -> None:
        super().__init__()
        self.modalities, self.settings = tuple(modalities), settings
        count, widths = len(self.modalities), [settings.width * 2**level for level in range(settings.levels)]
        self.register_buffer("blend", torch.eye(count, count + 1).repeat(2**count, 1, 1))
        self.stem = nn.Conv3d(count, widths[0], 3, padding=1)
        self.told = nn.ModuleList(nn.Linear(count, width) for width in widths)
        self.down = nn.ModuleList(Residual(width) for width in widths)
        self.shrink = nn.ModuleList(
            nn.Conv3d(fine, coarse, 2, stride=2) for fine, coarse in zip(widths, widths[1:], strict=False)
        )
        self.grow = nn.ModuleList(nn.Conv3d(coarse, fine, 1) for fine, coarse in zip(widths, widths[1:], strict=False))
        self.up = nn.ModuleList(Residual(width) for width in widths[:-1])
        self.correction = nn.Conv3d(widths[0], count, 3, padding=1)
        self.doubt = nn.Sequential(
            nn.Conv3d(widths[0] + count, widths[0], 1), nn.LeakyReLU(0.1, True), nn.Conv3d(widths[0], count, 1)
        )
        nn.init.zeros_(self.correction.weight)  # begins as the coarse prediction itself
        nn.init.zeros_(self.correction.bias)  # type: ignore[arg-type]
        last = self.doubt[-1]
        nn.init.zeros_(last.weight)  # type: ignore[arg-type]
        nn.init.constant_(last.bias, float(torch.tensor(_START).expm1().log()))  # type: ignore[arg-type]

    @property
    def multiple(self) -> int:
        """Sizes are padded to multiples of this."""
        return int(2 ** (self.settings.levels - 1))

    def forward(self, values: Tensor, shown: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
        given = shown[:, :, None, None, None]
        values = torch.where(given, values, self.blended(values, shown))
        size = values.shape[2:]
        missing = [(-n) % self.multiple for n in reversed(size)]
        around = [v for n in missing for v in (0, n)]
        padded = F.pad(values, around)
        x = self.stem(padded)
        flags = shown.to(x.dtype)
        fine: list[Tensor] = []
        for level, (block, told) in enumerate(zip(self.down, self.told, strict=True)):
            x = block(x + told(flags)[:, :, None, None, None])
            if level + 1 < len(self.down):
                fine.append(x)
                x = self.shrink[level](x)
        for level in reversed(range(len(fine))):
            x = F.interpolate(self.grow[level](x), scale_factor=2, mode="trilinear", align_corners=False)
            x = self.up[level](x + fine[level])
        x = x[:, :, : size[0], : size[1], : size[2]]
        refined = torch.where(given, values, values + self.correction(x))
        # How large the error is must not change what is predicted, so nothing flows back from here.
        scale = F.softplus(self.doubt(torch.cat([x.detach(), spread], dim=1))) + _LEAST
        return refined, scale

    def blended(self, values: Tensor, shown: Tensor) -> Tensor:
        """(B, M, D, H, W) float32, in full precision: the given images pass through it."""
        with torch.autocast(values.device.type, enabled=False):
            weights = self.blend[pattern(shown)]
            mixed = torch.einsum("bmk,bk...->bm...", weights[..., :-1], values.float())
            return mixed + weights[..., -1][:, :, None, None, None]


def pattern(shown: Tensor) -> Tensor:
    """(B,) long: the set of the modalities ``shown`` (B, M) as a number, the first modality its lowest bit."""
    return (shown.long() << torch.arange(shown.shape[1], device=shown.device)).sum(1)


class Residual(nn.Module):
    """Two 3³ convolutions beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv3d(width, width, 3, padding=1)
        self.second = nn.Conv3d(width, width, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(F.leaky_relu(self.first(F.leaky_relu(x, 0.1)), 0.1))
        return x + y


def refining_loss(
    refined: Tensor, scale: Tensor, truth: Tensor, counted: Tensor, inside: Tensor, ssim: float
) -> dict[str, Tensor]:
    """Losses of a batch: ``l1``, ``ssim`` (1 - SSIM), ``doubt``, and their sum ``loss``.

    ``refined``, ``scale``, ``truth`` (B, M, D, H, W); ``counted`` (B, M) bool: modalities that were synthesised and
    have a truth; ``inside`` (B, D, H, W) bool: where something is. The absolute error is the mean over these voxels;
    SSIM (Wang et al. 2004) has a Gaussian window of 1.5 voxels; ``doubt`` is the negative log-likelihood of the error
    under a Laplace distribution, log(2b) + |e| / b, and trains the scale b alone.
    """
    where = (counted[:, :, None, None, None] & inside[:, None]).float()
    voxels = where.sum().clamp(min=1)
    error = (refined - truth).abs()
    l1 = (error * where).sum() / voxels
    doubt = (((2 * scale).log() + error.detach() / scale) * where).sum() / voxels
    rows, columns = counted.nonzero(as_tuple=True)
    apart = l1.new_zeros(())
    if ssim > 0 and len(rows):
        mask = inside[rows].float()
        apart = 1 - mean_ssim((refined[rows, columns] * mask)[:, None], (truth[rows, columns] * mask)[:, None], mask)
    return {"loss": l1 + ssim * apart + doubt, "l1": l1, "ssim": apart, "doubt": doubt}


def mean_ssim(a: Tensor, b: Tensor, inside: Tensor) -> Tensor:
    """SSIM of (N, 1, D, H, W) images averaged over ``inside`` (N, D, H, W), over an intensity range of ``RANGE``."""
    c1, c2 = (0.01 * RANGE) ** 2, (0.03 * RANGE) ** 2
    stacked = torch.cat([a, b, a * a, b * b, a * b], dim=1)
    ma, mb, aa, bb, ab = blur(stacked).unbind(1)
    similar = (2 * ma * mb + c1) * (2 * (ab - ma * mb) + c2)
    similar = similar / ((ma**2 + mb**2 + c1) * (aa - ma**2 + bb - mb**2 + c2))
    return (similar * inside).sum() / inside.sum().clamp(min=1)


def blur(x: Tensor) -> Tensor:
    """(N, C, D, H, W) under a Gaussian of 1.5 voxels, seven wide, axis by axis; zeros beyond the edge."""
    at = torch.arange(-3, 4, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-(at**2) / (2 * 1.5**2))
    kernel = kernel / kernel.sum()
    channels = x.shape[1]
    for axis in range(3):
        shape = [1, 1, 1, 1, 1]
        shape[2 + axis] = 7
        padding = [3 if a == axis else 0 for a in range(3)]
        x = F.conv3d(x, kernel.view(shape).repeat(channels, 1, 1, 1, 1), padding=padding, groups=channels)
    return x
