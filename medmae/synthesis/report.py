"""One HTML page a study: inputs, synthesis and, where the truth exists, the difference, in three planes.

The page needs nothing but itself: images are embedded, its policy forbids any request. It shows the study's name as
the user wrote it, modalities and hashes; nothing from a header.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from medmae.files import write_text
from medmae.imaging.geometry import cropped_grid, foreground_box, reoriented_grid, resample, spacing_grid
from medmae.imaging.intensity import normalise
from medmae.imaging.registration import Coregistered
from medmae.imaging.volume import Grid, Volume
from medmae.plan import Intensity
from medmae.synthesis.metrics import Score, Truth
from medmae.synthesis.volumes import Synthesis

FINEST, LONGEST = 1.0, 192  # of what is shown: mm a voxel, voxels an axis
QUALITY = 86  # JPEG
RANGE = 2.0  # standard deviations at the ends of the difference's colours
PERCENTILES = (0.5, 99.5)  # of the foreground: black and white


@dataclass(frozen=True)
class Picture:
    """A column of the page: ``grey`` (X, Y, Z) uint8 on the shown grid, axes towards right, anterior, superior."""

    title: str
    note: str
    grey: np.ndarray
    synthetic: bool = False
    signed: bool = False


def write_report(
    path: Path,
    name: str,
    volumes: Mapping[str, Volume],
    syntheses: Mapping[str, Synthesis],
    provenance: Mapping[str, Any],
    intensity: Intensity,
    hashes: Mapping[str, str],
    registered: Coregistered | None = None,
) -> dict[str, Score]:
    """Write the page of one study to ``path``.

    ``volumes``: what was acquired, {modality: Volume}; a target among them is the truth and shown with the
    difference. ``syntheses``: what :func:`medmae.synthesis.volumes.reconstruct_volumes` gave for it. ``intensity``:
    the plan's, by which truth and synthesis become comparable. ``registered``: how the volumes were brought to one
    another, if they were. Returns the scores of the targets that have a truth.
    """
    grid = shown_grid(volumes)
    inputs = [m for m in volumes if any(m in s.sources for s in syntheses.values())]
    pictures = []
    for modality in inputs:
        values = resample(volumes[modality], grid).array
        pictures.append(Picture(modality.upper(), "acquired, input", _grey(values, *_window(values))))
    scores = {}
    for target, synthesis in syntheses.items():
        pictures += _target_pictures(synthesis, volumes.get(target), grid, intensity, shown=target in inputs)
        if target in volumes:
            scores[target] = compare(synthesis, volumes[target], intensity)
    page = (resources.files("medmae.synthesis") / "report.html").read_text(encoding="utf-8")
    made = ", ".join(f"{t.upper()} from {' + '.join(m.upper() for m in s.sources)}" for t, s in syntheses.items())
    tables = _score_table(scores) + _provenance_table(syntheses, provenance, hashes, registered)
    lead = f"{made}. Predicted by a model; structures may be missing or wrong."
    # The images last, so that nothing in them is taken for a place to fill.
    for key, text in (("title", html.escape(name)), ("lead", html.escape(lead)), ("tables", tables)):
        page = page.replace("{{" + key + "}}", text)
    write_text(path, page.replace("{{data}}", json.dumps(_data(pictures, grid)).replace("</", "<\\/")))
    return scores


def compare(synthesis: Synthesis, truth: Volume, intensity: Intensity) -> Score:
    """PSNR, SSIM and MAE in the model's space, as :func:`medmae.evaluate_synthesis` takes them, in the foreground."""
    array, _ = normalise(resample(truth, synthesis.study.grid).array, intensity)
    (score,) = Truth(array, synthesis.foreground).scores(synthesis.array)
    assert score is not None  # the foreground is not empty: it is that of the inputs
    return score


def shown_grid(volumes: Mapping[str, Volume]) -> Grid:
    """RAS, isotropic, around the first volume's foreground; no finer than ``FINEST``, no longer than ``LONGEST``."""
    first = next(iter(volumes.values()))
    box = foreground_box([first.array])
    margin = [max(2, round(0.03 * n)) for n in first.shape]
    wide = tuple((max(0, a - m), min(n, b + m)) for (a, b), m, n in zip(box, margin, first.shape, strict=True))
    cut = reoriented_grid(cropped_grid(first.grid, wide), "RAS")  # type: ignore[arg-type]
    extent = [n * s for n, s in zip(cut.shape, cut.spacing, strict=True)]
    step = max(FINEST, min(cut.spacing), max(extent) / LONGEST)
    return spacing_grid(cut, (step, step, step))


def _target_pictures(
    synthesis: Synthesis, truth: Volume | None, grid: Grid, intensity: Intensity, shown: bool
) -> list[Picture]:
    name = synthesis.target.upper()
    made = resample(synthesis.volume, grid).array
    note = "from " + " + ".join(m.upper() for m in synthesis.sources)
    if truth is None:
        return [Picture(f"{name} synthetic", note, _grey(made, *_window(made)), synthetic=True)]
    # Both normalised, each as the plan has it: the patient's scanner need not have the training cohort's units.
    actual, _ = normalise(resample(truth, grid).array, intensity)
    inside = resample(Volume(synthesis.volume.array != 0, synthesis.volume.affine), grid).array
    guess = made
    if synthesis.mean is not None and synthesis.std is not None:
        guess = (made - synthesis.mean) / synthesis.std
    guess = np.where(inside, guess, 0)
    low, high = _window(actual)
    background = -math.inf if intensity.scheme == "zscore-nonzero" else None

    def grey(values: np.ndarray) -> np.ndarray:
        return _grey(values if background is None else np.where(values == 0, background, values), low, high)

    pictures = [Picture(f"{name} synthetic", note, grey(guess), synthetic=True)]
    pictures.append(
        Picture(f"{name} truth", "acquired, input of others" if shown else "acquired, not shown to it", grey(actual))
    )
    difference = np.clip(128 + np.where(inside, guess - actual, 0) * 127 / RANGE, 1, 255)
    pictures.append(
        Picture(f"{name} difference", "synthetic - truth", difference.round().astype(np.uint8), signed=True)
    )
    return pictures


def _window(values: np.ndarray) -> tuple[float, float]:
    inside = values[values != 0]
    if inside.size == 0:
        return 0.0, 1.0
    low, high = np.percentile(inside, PERCENTILES)
    return float(low), float(high)


def _grey(values: np.ndarray, low: float, high: float) -> np.ndarray:
    scaled: np.ndarray = np.clip((values - low) / max(high - low, 1e-6), 0, 1) * 255
    return scaled.round().astype(np.uint8)


def sprite(grey: np.ndarray) -> tuple[str, int, tuple[int, int]]:
    """The axial slices of (X, Y, Z) side by side in one JPEG, as a data URL, with the number of columns and the size
    of a tile. Tiles are padded to JPEG's blocks of 8, so that no slice bleeds into the next."""
    from PIL import Image

    nx, ny, nz = grey.shape
    tile = (math.ceil(nx / 8) * 8, math.ceil(ny / 8) * 8)
    columns = max(1, round(math.sqrt(nz * tile[1] / tile[0])))
    rows = math.ceil(nz / columns)
    sheet = np.zeros((rows * tile[1], columns * tile[0]), np.uint8)
    for z in range(nz):
        top, left = z // columns * tile[1], z % columns * tile[0]
        padded = np.pad(grey[:, :, z].T, ((0, tile[1] - ny), (0, tile[0] - nx)), mode="edge")
        sheet[top : top + tile[1], left : left + tile[0]] = padded
    stream = io.BytesIO()
    Image.fromarray(sheet).save(stream, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode(), columns, tile


def _data(pictures: Sequence[Picture], grid: Grid) -> dict[str, Any]:
    images, columns, tile = [], 1, (1, 1)
    for picture in pictures:
        url, columns, tile = sprite(picture.grey)
        facts = {"title": picture.title, "note": picture.note, "synthetic": picture.synthetic, "signed": picture.signed}
        images.append({**facts, "sprite": url})
    return {
        "shape": list(grid.shape),
        "spacing": grid.spacing[0],
        "columns": columns,
        "tile": list(tile),
        "images": images,
        "differenceLow": f"-{RANGE:g} sd",
        "differenceHigh": f"+{RANGE:g} sd",
    }


def _score_table(scores: Mapping[str, Score]) -> str:
    if not scores:
        return ""
    rows = "".join(
        f"<tr><td>{html.escape(t.upper())}</td>"
        + "".join(f'<td class="number">{v}</td>' for v in (f"{s.psnr:.2f} dB", f"{s.ssim:.3f}", f"{s.mae:.3f} sd"))
        + f'<td class="number">{s.voxels}</td></tr>'
        for t, s in scores.items()
    )
    heads = "".join(f"<th>{h}</th>" for h in ("target", "PSNR", "SSIM", "MAE", "voxels"))
    return (
        f"<h2>Against the truth</h2><table><tr>{heads}</tr>{rows}</table>"
        "<p>On normalised intensities (sd: standard deviations of the truth), inside the foreground.</p>"
    )


def _provenance_table(
    syntheses: Mapping[str, Synthesis],
    provenance: Mapping[str, Any],
    hashes: Mapping[str, str],
    registered: Coregistered | None,
) -> str:
    first = next(iter(syntheses.values()))
    checkpoint = provenance["checkpoint"]
    used = dict.fromkeys(m for s in syntheses.values() for m in s.sources)
    facts = {
        "made by": provenance["version"],
        "checkpoint": f"{checkpoint['method']}, plan {checkpoint['plan']}, weights {checkpoint['hash'] or 'unknown'}",
        **{f"{m.upper()} file": f"sha256 {hashes[m]}" for m in used if m in hashes},
        **{f"{m.upper()} place": str(found) for m, found in (registered.registrations if registered else {}).items()},
        "windows": f"{first.windows} of {' x '.join(map(str, first.window))} voxels, "
        f"{len(first.shifts)} placements of the patch grid",
        **{f"{t.upper()} intensities": s.units for t, s in syntheses.items()},
    }
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(str(v))}</td></tr>" for k, v in facts.items())
    return f"<h2>Provenance</h2><table>{rows}</table>"
