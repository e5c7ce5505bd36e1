"""Images as the pages show them: on one grid, in 255 levels; as NIfTI for the viewer, as pictures for paper.

What is shown is not what was written: it is resampled, cropped and rounded so that a page stays small.
"""

from __future__ import annotations

import base64
import gzip
import io
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import nibabel as nib
import numpy as np

from medmae.imaging.geometry import cropped_grid, foreground_box, reoriented_grid, spacing_grid
from medmae.imaging.volume import Grid, Volume

Kind = Literal["grey", "difference", "uncertainty", "anomaly"]
FINEST, LONGEST = 1.0, 192  # of what is shown: mm a voxel, voxels an axis
LEVELS = 254  # steps between the codes 1 and 255; 0 is background
SHOWN, KEPT = (0.5, 99.5), (0.02, 99.98)  # percentiles of the foreground: black and white at first; what has a code
DIFFERENCE = 1.5  # standard deviations at the ends of the difference's colours
QUALITY = 85  # JPEG
STAMP = "SYNTHETIC \N{EN DASH} NOT ACQUIRED"
AMBER = (255, 176, 0)

# Stops (I) of 0 to 255, from 0 to white, with red, green and blue; between them all is linear. Blue against orange, and
# the rising luminance of the others, are told apart by colour-blind eyes too.
COLOURS: dict[str, dict[str, list[int]]] = {
    "above": {"I": [0, 1, 128, 255], "R": [190, 190, 235, 255], "G": [80, 80, 140, 215], "B": [10, 10, 20, 110]},
    "below": {"I": [0, 1, 128, 255], "R": [30, 30, 60, 120], "G": [90, 90, 150, 225], "B": [200, 200, 245, 255]},
    "uncertainty": {"I": [0, 1, 128, 255], "R": [90, 90, 220, 252], "G": [20, 20, 80, 250], "B": [110, 110, 60, 160]},
    "anomaly": {"I": [0, 1, 128, 255], "R": [140, 140, 250, 255], "G": [0, 0, 90, 255], "B": [0, 0, 5, 200]},
}
# {kind: colours of what is above 0, and of what is below}
MAPS: dict[str, tuple[str, ...]] = {
    "difference": ("above", "below"),
    "uncertainty": ("uncertainty",),
    "anomaly": ("anomaly",),
}


@dataclass(frozen=True, eq=False)
class Layer:
    """One image on the shown grid: ``codes`` (X, Y, Z) uint8, axes towards right, anterior, superior. Code 0 is
    background, 1 to 255 are ``low`` to ``high`` in ``unit``; ``window``: what is black and white at first."""

    title: str
    note: str
    unit: str
    codes: np.ndarray
    low: float
    high: float
    window: tuple[float, float]
    kind: Kind = "grey"
    synthetic: bool = False

    @property
    def slope(self) -> float:
        return (self.high - self.low) / LEVELS

    @cached_property
    def shades(self) -> np.ndarray:
        """``codes`` in the window, 0 to 1, background 0."""
        black, white = self.window
        values = self.low + (np.arange(256) - 1) * self.slope
        table = np.clip((values - black) / max(white - black, 1e-9), 0, 1)
        table[0] = 0.5 if self.kind == "difference" else 0.0
        result: np.ndarray = table[self.codes]
        return result

    def nifti(self, grid: Grid) -> bytes:
        """A gzipped NIfTI-1 file whose slope and intercept turn codes into values; the same bytes every time."""
        header = nib.Nifti1Header()
        header.set_data_dtype(np.uint8)
        header.set_data_shape(self.codes.shape)
        header.set_sform(grid.affine, 2)
        header.set_zooms(grid.spacing)
        header.set_xyzt_units("mm")
        header.set_slope_inter(self.slope, self.low - self.slope)
        header["vox_offset"] = 352
        header["magic"] = b"n+1"
        raw = header.binaryblock + b"\0\0\0\0" + self.codes.tobytes(order="F")
        return gzip.compress(raw, 9, mtime=0)


def shown_grid(first: Volume) -> Grid:
    """RAS, isotropic, around the volume's foreground; no finer than ``FINEST``, no longer than ``LONGEST``."""
    box = foreground_box([first.array])
    margin = [max(2, round(0.03 * n)) for n in first.shape]
    wide = tuple((max(0, a - m), min(n, b + m)) for (a, b), m, n in zip(box, margin, first.shape, strict=True))
    cut = reoriented_grid(cropped_grid(first.grid, wide), "RAS")  # type: ignore[arg-type]
    extent = [n * s for n, s in zip(cut.shape, cut.spacing, strict=True)]
    step = max(FINEST, min(cut.spacing), max(extent) / LONGEST)
    return spacing_grid(cut, (step, step, step))


def grey(
    title: str,
    note: str,
    unit: str,
    values: np.ndarray,
    *,
    inside: np.ndarray | None = None,
    like: np.ndarray | None = None,
    synthetic: bool = False,
) -> Layer:
    """A layer of ``values`` (X, Y, Z); background is outside ``inside``, else where they are 0. Black and white are
    those of ``like``, an image of the same unit, so that the two can be compared. Zeros have no say in them."""
    inside = values != 0 if inside is None else inside
    both = [values[inside & (values != 0)], *([] if like is None else [like[like != 0]])]
    window = _percentiles(both[-1], SHOWN)
    ends = [_percentiles(part, KEPT) for part in both]
    low, high = min(e[0] for e in ends), max(e[1] for e in ends)
    return Layer(title, note, unit, _coded(values, inside, low, high), low, high, window, synthetic=synthetic)


def difference(title: str, note: str, unit: str, values: np.ndarray, inside: np.ndarray) -> Layer:
    """A signed layer, 0 in the middle of its colours and outside ``inside``."""
    codes = _coded(np.where(inside, values, 0), np.ones(values.shape, bool), -DIFFERENCE, DIFFERENCE)
    return Layer(title, note, unit, codes, -DIFFERENCE, DIFFERENCE, (-DIFFERENCE, DIFFERENCE), "difference")


def heat(kind: Kind, title: str, note: str, unit: str, values: np.ndarray) -> Layer:
    """A layer of values from 0 up: uncertainty, anomaly. 0 and below (and NaN) is transparent."""
    clean = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    inside = clean > 0
    high = float(np.percentile(clean[inside], KEPT[1])) if inside.any() else 1.0
    white = float(np.percentile(clean[inside], SHOWN[1])) if inside.any() else 1.0
    return Layer(title, note, unit, _coded(clean, inside, 0.0, high), 0.0, high, (0.0, white), kind)


def _percentiles(sample: np.ndarray, ends: tuple[float, float]) -> tuple[float, float]:
    if sample.size == 0:
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(sample, ends))
    return low, high if high > low else low + 1.0


def _coded(values: np.ndarray, inside: np.ndarray, low: float, high: float) -> np.ndarray:
    steps = np.rint((np.clip(values, low, high) - low) / max(high - low, 1e-9) * LEVELS) + 1
    return np.where(inside, steps, 0).astype(np.uint8)


# --- pictures ------------------------------------------------------------------------------------------------------


def middle(codes: np.ndarray) -> tuple[int, int, int]:
    """The centre of mass of what is not background, as voxel indices; the middle of an empty layer."""
    places = np.argwhere(codes != 0)
    i, j, k = places.mean(axis=0).round().astype(int) if len(places) else (n // 2 for n in codes.shape)
    return int(i), int(j), int(k)


def picture(layer: Layer, at: tuple[int, int, int], height: int = 168, levels: bool = True) -> bytes:
    """A JPEG strip: the axial slice at ``at``, with ``levels`` two more, the coronal and the sagittal one. The
    patient's right is on the left. A synthetic layer has its mark in the picture itself."""
    from PIL import Image

    rgb = _coloured(layer)
    nz = rgb.shape[2]
    tiles = [rgb[:, :, at[2]]]
    if levels:
        tiles = [rgb[:, :, min(max(at[2] + round(part * nz), 0), nz - 1)] for part in (-0.18, 0, 0.18)]
        tiles += [rgb[:, at[1]], rgb[at[0]]]
    strips = []
    for tile in tiles:
        shown = Image.fromarray(np.ascontiguousarray(tile.swapaxes(0, 1)[::-1, ::-1]))
        width = max(1, round(shown.width * height / shown.height))
        strips.append(np.asarray(shown.resize((width, height), Image.Resampling.BILINEAR)))
        strips.append(np.zeros((height, 4, 3), np.uint8))
    sheet = Image.fromarray(np.concatenate(strips[:-1], axis=1))
    if layer.synthetic:
        sheet = _stamped(sheet)
    stream = io.BytesIO()
    sheet.save(stream, "JPEG", quality=QUALITY, optimize=True)
    return stream.getvalue()


def _coloured(layer: Layer) -> np.ndarray:
    """(X, Y, Z, 3) uint8."""
    if layer.kind == "grey":
        return np.repeat(np.rint(layer.shades * 255).astype(np.uint8)[..., None], 3, axis=3)
    signed = layer.shades * 2 - 1 if layer.kind == "difference" else layer.shades
    size = np.abs(signed)
    opaque = size**2  # as in the viewer: small values let the image through
    above, *below = (COLOURS[name] for name in MAPS[layer.kind])
    channels = []
    for name in "RGB":
        channel = np.interp(size * 255, above["I"], above[name])
        if below:
            channel = np.where(signed < 0, np.interp(size * 255, below[0]["I"], below[0][name]), channel)
        channels.append(channel * opaque)
    return np.stack(channels, axis=3).round().astype(np.uint8)


def _stamped(sheet: Any) -> Any:
    """The picture with an amber frame and, where there is room for it, the words."""
    from PIL import ImageDraw

    draw = ImageDraw.Draw(sheet)
    draw.rectangle((0, 0, sheet.width - 1, sheet.height - 1), outline=AMBER, width=2)
    words = STAMP.replace("\N{EN DASH}", "-")
    left, top, right, bottom = draw.textbbox((0, 0), words)
    if right - left + 12 <= sheet.width:
        draw.rectangle((2, sheet.height - (bottom - top) - 9, right - left + 12, sheet.height - 3), fill=(0, 0, 0))
        draw.text((6, sheet.height - (bottom - top) - 8 - top), words, fill=AMBER)
    return sheet


def data_url(content: bytes, kind: str = "image/jpeg") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
