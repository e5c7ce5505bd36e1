"""Draws the pictures of ``docs/explanation``: one idea a method, with what trained models really do.

    python docs/images/ideas.py STUDY BM-MAE-RUN HI-END-MAE-RUN RESENC-MAE-RUN SPARK-RUN

STUDY is a study of the demonstration's cohort, the runs are trainings of the tiny plans on it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

import medmae
from medmae.cohort.prepared import Cohort
from medmae.models.sparse import Visible
from medmae.training.batches import Crops
from medmae.training.previews import slice_of

HERE = Path(__file__).parent
INK, SOFT, HIDDEN = "#1d3540", "#0b6e99", "#d9dee0"


def canvas(width: float, height: float) -> Any:
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    panel = figure.add_axes((0, 0, 1, 1))
    panel.set_xlim(0, width)
    panel.set_ylim(0, height)
    panel.axis("off")
    return figure, panel


def show(panel: Any, image: np.ndarray, x: float, y: float, size: float, title: str = "", hidden: Any = None) -> None:
    """A slice with its lower left corner at (x, y); hidden patches grey."""
    low, high = np.percentile(image, (1, 99.5))
    grey = np.clip((image - low) / max(high - low, 1e-6), 0, 1)
    colour = np.repeat(grey[..., None], 3, axis=2)
    if hidden is not None:
        times = image.shape[0] // hidden.shape[0]
        colour[np.kron(hidden, np.ones((times, times))) > 0] = tuple(
            int(HIDDEN[i : i + 2], 16) / 255 for i in (1, 3, 5)
        )
    colour = np.rot90(colour)
    panel.imshow(colour, extent=(x, x + size, y, y + size), interpolation="nearest", zorder=2)
    if title:
        panel.text(x + size / 2, y + size + 0.07, title, ha="center", va="bottom", fontsize=9, color=INK)


def box(panel: Any, x: float, y: float, width: float, height: float, text: str = "", face: str = "#e8f1f5") -> None:
    style = "round,pad=0,rounding_size=0.06"
    panel.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=face, edgecolor=SOFT, linewidth=1))
    panel.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8.5, color=INK, zorder=3)


def arrow(panel: Any, start: tuple[float, float], end: tuple[float, float], **more: Any) -> None:
    look = {"arrowstyle": "-|>", "mutation_scale": 11, "color": SOFT, "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0}
    panel.add_patch(FancyArrowPatch(start, end, **{**look, **more}))


def crop_of(study: Path, model: Any) -> dict[str, torch.Tensor]:
    """The middle of a study, as the model sees it in training."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        prepared = medmae.prepare(study, model.plan, Path(folder) / "cohort", jobs=1)
        first = Cohort.open(prepared.cohort_path).studies[0]
        size = model.plan.image.crop
        corner = tuple((n - s) // 2 for n, s in zip(first.shape, size, strict=True))
        names = [m for m in model.modalities if m in first.modalities]
        return {m: torch.from_numpy(first.crop(m, corner, size).astype(np.float32))[None, None] for m in names}


def mosaic_of(study: Path, model: Any) -> tuple[dict[str, torch.Tensor], tuple[int, int]]:
    """Training crops side by side, for a model whose crops are small."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        prepared = medmae.prepare(study, model.plan, Path(folder) / "cohort", jobs=1)
        batch, layout = Crops(Cohort.open(prepared.cohort_path).studies, model.plan, 0).mosaic()
        return {m: x.float() for m, x in batch.images.items()}, layout


def middle(x: torch.Tensor) -> np.ndarray:
    """The middle axial slice."""
    volume = x.float().reshape(x.shape[-3:]) if x.ndim > 3 else x
    return volume[..., volume.shape[-1] // 2].numpy()


def bm_mae(study: Path, run: Path) -> None:
    model = medmae.load(run)
    images, layout = mosaic_of(study, model)
    torch.manual_seed(2)
    with torch.no_grad():
        out = model(images, return_prediction=True)
    patch = model.config.patch[0]
    figure, panel = canvas(10, 4.9)
    for row, m in enumerate(images):
        y = 3.55 - 1.15 * row
        voxels = out.mask[m].float().unsqueeze(1)
        for axis in (2, 3, 4):
            voxels = voxels.repeat_interleave(patch, axis)
        image, hidden = slice_of(images[m], layout).T, slice_of(voxels, layout).T
        show(panel, image, 0.55, y, 1, "study" if row == 0 else "")
        show(panel, image, 1.95, y, 1, "visible" if row == 0 else "", hidden)
        panel.text(0.45, y + 0.5, m, ha="right", va="center", fontsize=9, color=INK)
        arrow(panel, (3.0, y + 0.5), (3.55, 2.4 + (y - 1.9) * 0.25))
        filled = np.where(hidden > 0, slice_of(out.prediction[m], layout).T, image)
        arrow(panel, (7.55, 2.4 + (y - 1.9) * 0.25), (8.1, y + 0.5))
        show(panel, filled, 8.2, y, 1, "filled in" if row == 0 else "")
    box(panel, 3.65, 1.5, 1.55, 1.8, "encoder\n\nCLS and the\nvisible tokens\nof all modalities")
    arrow(panel, (5.25, 2.4), (5.8, 2.4))
    box(panel, 5.9, 1.5, 1.55, 1.8, "decoder\n\nall places of all\nmodalities, hidden\nones as mask tokens")
    figure.savefig(HERE / "idea-bm-mae.png", dpi=110, facecolor="white")


def hi_end_mae(study: Path, run: Path) -> None:
    model = medmae.load(run)
    images = crop_of(study, model)
    torch.manual_seed(0)
    with torch.no_grad():
        out = model(images, return_prediction=True)
    (name,) = out.mask
    hidden = middle(out.mask[name].float())
    figure, panel = canvas(10, 3.6)
    show(panel, middle(images[name]), 0.2, 1.1, 1.4, "visible: a quarter", hidden)
    arrow(panel, (1.65, 1.8), (2.1, 1.8))
    for block in range(12):
        x = 2.2 + 0.3 * block
        asked = block in (3, 6, 9)
        box(panel, x, 1.2, 0.22, 1.2, str(block + 1), "#f3d9ae" if asked else "#e8f1f5")
    panel.text(3.95, 2.55, "encoder: 12 blocks, CLS and visible tokens", ha="center", fontsize=9, color=INK)
    arrow(panel, (5.75, 1.8), (6.15, 1.8))
    box(panel, 6.2, 1.2, 0.5, 1.2, "self\n× 2")
    for i, block in enumerate((9, 6, 3)):
        x = 6.8 + 0.55 * i
        box(panel, x, 1.2, 0.48, 1.2, f"cross\nto\n{block + 1}", "#f3d9ae")
        curve = f"arc3,rad={0.18 + 0.05 * i}"
        arrow(panel, (2.31 + 0.3 * block, 1.17), (x + 0.24, 1.17), connectionstyle=curve, linestyle="--", linewidth=1)
    panel.text(7.35, 2.55, "decoder: deep layers first", ha="center", fontsize=9, color=INK)
    filled = np.where(np.kron(hidden, np.ones((8, 8))) > 0, middle(out.prediction[name]), middle(images[name]))
    show(panel, filled, 8.55, 1.1, 1.4, "filled in")
    figure.savefig(HERE / "idea-hi-end-mae.png", dpi=110, facecolor="white")


def u_shape(panel: Any, x: float, y: float) -> None:
    """A U-Net with its skips, 3 wide and 1.9 high."""
    for level in range(4):
        height = (1.1, 0.8, 0.55, 0.35)[level]
        low = y + (0.5, 0.28, 0.12, 0.0)[level]
        box(panel, x + 0.36 * level, low, 0.26, height)
        box(panel, x + 2.75 - 0.36 * level, low, 0.26, height)
        start, end = (x + 0.36 * level + 0.3, low + height / 2), (x + 2.72 - 0.36 * level, low + height / 2)
        arrow(panel, start, end, linestyle="--", linewidth=0.9)


def resenc_mae(study: Path, run: Path) -> None:
    model = medmae.load(run)
    images = crop_of(study, model)
    torch.manual_seed(1)
    with torch.no_grad():
        out = model(images, return_prediction=True)
    name = next(iter(images))
    hidden = middle(out.mask[name].float())
    figure, panel = canvas(10, 2.9)
    show(panel, middle(images[name]), 0.2, 0.6, 1.6, "study")
    show(panel, middle(images[name]), 2.1, 0.6, 1.6, "cubes set to 0", hidden)
    arrow(panel, (3.75, 1.4), (4.2, 1.4))
    u_shape(panel, 4.3, 0.6)
    panel.text(5.8, 2.27, "nnU-Net's own network, skips and all", ha="center", fontsize=9, color=INK)
    arrow(panel, (7.4, 1.4), (7.85, 1.4))
    shown = np.where(np.kron(hidden, np.ones((8, 8))) > 0, middle(out.prediction[name]), middle(images[name]))
    show(panel, shown, 7.95, 0.6, 1.6, "filled in")
    figure.savefig(HERE / "idea-resenc-mae.png", dpi=110, facecolor="white")


def spark(study: Path, run: Path) -> None:
    """What a dense and a sparse encoder compute at each scale of the same masked image: where the mask goes."""
    model = medmae.load(run)
    images = crop_of(study, model)
    torch.manual_seed(5)
    with torch.no_grad():
        out = model(images)
        names = list(images)
        hidden = torch.stack([out.mask[m] for m in model.modalities], dim=1)
        hidden[:] = hidden[:, :1]
        x = model.stacked(images)
        sparse = model.sparse(model.network.encoder, model.visible_part(x, hidden), Visible(~hidden[:, :1]))
        dense = model.network.encoder(model.visible_part(x, hidden))
    figure, panel = canvas(10, 4.4)
    seen = middle(hidden[:, 0].float())
    show(panel, middle(images[names[0]]), 0.2, 1.3, 1.6, "visible", seen)
    for row, (features, title) in enumerate(((dense, "dense"), (sparse, "sparse"))):
        y = 2.35 - 2.1 * row
        panel.text(2.35, y + 0.8, title, ha="center", va="center", fontsize=10, color=INK, rotation=90)
        for scale, feature in enumerate(features):
            energy = feature[0].abs().mean(0)
            size = middle(energy)
            where = np.argwhere(size == 0)
            low, high = 0.0, np.percentile(size, 99)
            picture = np.clip(size / max(high - low, 1e-6), 0, 1)
            colour = np.stack([1 - 0.96 * picture, 1 - 0.57 * picture, 1 - 0.40 * picture], axis=-1)
            for i, j in where:
                colour[i, j] = tuple(int(HIDDEN[k : k + 2], 16) / 255 for k in (1, 3, 5))
            x0 = 2.6 + 1.85 * scale
            panel.imshow(np.rot90(colour), extent=(x0, x0 + 1.6, y, y + 1.6), interpolation="nearest", zorder=2)
            if row == 0:
                panel.text(x0 + 0.8, y + 1.67, f"scale 1/{2**scale}", ha="center", fontsize=9, color=INK)
    figure.savefig(HERE / "idea-spark.png", dpi=110, facecolor="white")


if __name__ == "__main__":
    given, *runs = map(Path, sys.argv[1:])
    for draw, trained in zip((bm_mae, hi_end_mae, resenc_mae, spark), runs, strict=True):
        draw(given, trained)
