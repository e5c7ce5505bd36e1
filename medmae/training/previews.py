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
    path: Path, model: MaskedAutoencoder, images: dict[str, Tensor], present: dict[str, Tensor], output: MAEOutput
) -> None:
    """One row a modality of the first study: image, what the model saw, what it filled in, the modality predicted
    from the others alone. Axial middle slices, the intensity range of the image (or the prediction's own)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    assert output.prediction is not None
    names = list(model.modalities)
    has = [m for m in names if bool(present[m][0])]
    titles = ["image", "visible", "filled in"] + (["from the others alone"] if len(names) > 1 else [])
    figure = Figure(figsize=(2.4 * len(titles), 2.5 * len(names)), facecolor="black", layout="compressed")
    axes = figure.subplots(len(names), len(titles), squeeze=False)
    for row, name in enumerate(names):
        image = images[name][:1] if name in has else None
        hidden = upsample(output.mask[name][:1], images[name].shape[2:])
        predicted = output.prediction[name][:1]
        panels: list[Tensor | None] = [image, None, predicted]
        if image is not None:
            panels[1] = image.masked_fill(hidden, float("nan"))
            panels[2] = torch.where(hidden, predicted, image)
        if len(names) > 1:
            others = {m: images[m][:1] for m in has if m != name}
            panels.append(model.reconstruct(others, [name])[name] if others else None)
        scale = slice_of(image if image is not None else predicted)
        low, high = np.nanpercentile(scale, 1), np.nanpercentile(scale, 99.5)
        for column, panel in enumerate(panels):
            ax = axes[row, column]
            ax.set_facecolor("#333333")
            ax.set_xticks([])
            ax.set_yticks([])
            if panel is not None:
                ax.imshow(slice_of(panel), cmap="gray", vmin=low, vmax=max(high, low + 1e-6), origin="lower")
            else:
                ax.text(0.5, 0.5, "not acquired", color="white", ha="center", va="center", transform=ax.transAxes)
            if row == 0:
                ax.set_title(titles[column], color="white", fontsize=9)
        axes[row, 0].set_ylabel(name, color="white", fontsize=10)
    FigureCanvasAgg(figure)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))


def upsample(mask: Tensor, size: torch.Size) -> Tensor:
    """(1, gD, gH, gW) bool → (1, 1, D, H, W) bool."""
    return F.interpolate(mask.unsqueeze(1).float(), size=tuple(size), mode="nearest").bool()


def slice_of(volume: Tensor) -> np.ndarray:
    """The middle slice across the last axis of (1, 1, D, H, W), turned for display."""
    middle: np.ndarray = volume[0, 0, :, :, volume.shape[-1] // 2].float().cpu().numpy().T
    return middle
