"""Pictures of what a model sees and says, for people who would rather look than read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medmae.files import write_atomically
from medmae.models.base import MAEOutput, MaskedAutoencoder


def write_preview(
    path: Path,
    model: MaskedAutoencoder,
    images: dict[str, Tensor],
    present: dict[str, Tensor],
    output: MAEOutput,
    layout: tuple[int, int] = (1, 1),
) -> None:
    """One row a modality: image, what the model saw, what it filled in, the modality predicted from the others alone.

    Middle slices across the last axis, in the intensity range of the image (or the prediction's own). The batch is
    ``layout`` crops of one study side by side, C order.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    assert output.prediction is not None
    names = list(model.modalities)
    has = [m for m in names if bool(present[m][0])]
    titles = ["image", "visible", "filled in"] + (["from the others alone"] if len(names) > 1 else [])
    figure = Figure(figsize=(2.4 * len(titles), 2.5 * len(names)), facecolor="black", layout="compressed")
    axes = figure.subplots(len(names), len(titles), squeeze=False)
    for row, name in enumerate(names):
        image = images[name] if name in has else None
        hidden = upsample(output.mask[name], images[name].shape[2:])
        predicted = output.prediction[name]
        panels: list[Tensor | None] = [image, None, predicted]
        if image is not None:
            panels[1] = image.masked_fill(hidden, float("nan"))
            panels[2] = torch.where(hidden, predicted, image)
        if len(names) > 1:
            others = {m: images[m] for m in has if m != name}
            panels.append(model.reconstruct(others, [name])[name] if others else None)
        scale = slice_of(image if image is not None else predicted, layout)
        low, high = np.nanpercentile(scale, 1), np.nanpercentile(scale, 99.5)
        for column, panel in enumerate(panels):
            ax = axes[row, column]
            ax.set_facecolor("#333333")
            ax.set_xticks([])
            ax.set_yticks([])
            if panel is not None:
                ax.imshow(slice_of(panel, layout), cmap="gray", vmin=low, vmax=max(high, low + 1e-6), origin="lower")
            else:
                ax.text(0.5, 0.5, "not acquired", color="white", ha="center", va="center", transform=ax.transAxes)
            if row == 0:
                ax.set_title(titles[column], color="white", fontsize=9)
        axes[row, 0].set_ylabel(name, color="white", fontsize=10)
    FigureCanvasAgg(figure)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))


def upsample(mask: Tensor, size: torch.Size) -> Tensor:
    """(B, gD, gH, gW) bool → (B, 1, D, H, W) bool."""
    return F.interpolate(mask.unsqueeze(1).float(), size=tuple(size), mode="nearest").bool()


def slice_of(crops: Tensor, layout: tuple[int, int]) -> np.ndarray:
    """The middle slices across the last axis of (n0·n1, 1, D, H, W), put together (n0·D, n1·H) and turned for
    display."""
    middle = crops[:, 0, :, :, crops.shape[-1] // 2].float().cpu()
    rows = middle.view(*layout, *middle.shape[1:]).permute(0, 2, 1, 3)
    picture: np.ndarray = rows.reshape(layout[0] * middle.shape[1], -1).numpy().T
    return picture
