"""The page of one study, as HTML: the viewer and its images, still pictures, tables.

Everything is in the one file. What the viewer is and what it is made of: ``viewer/niivue.NOTICE.txt``.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmae.files import strict, write_text
from medmae.imaging.volume import Grid
from medmae.synthesis.layers import COLOURS, MAPS, STAMP, Layer, data_url, middle, picture

if TYPE_CHECKING:
    from medmae.synthesis.metrics import Score
    from medmae.synthesis.report import Target

SUMMARY = re.compile(r'<script type="application/json" id="summary">(.*?)</script>', re.DOTALL)


@dataclass(frozen=True, eq=False)
class Panel:
    """One view: ``base``, which ``truth`` may take the place of, and what can be laid over it. Panels of one ``group``
    share black and white."""

    base: Layer
    group: str
    truth: Layer | None = None
    overlays: tuple[Layer, ...] = ()

    @property
    def layers(self) -> tuple[Layer, ...]:
        return (self.base, *([] if self.truth is None else [self.truth]), *self.overlays)


@dataclass(frozen=True)
class StudyPage:
    """A page that was written: its ``scores`` by target, the ``warnings`` it shows, and its size in ``bytes``, of
    which ``image_bytes`` are volumes."""

    path: Path
    scores: dict[str, Score]
    warnings: tuple[str, ...]
    bytes: int
    image_bytes: int


def write_page(
    path: Path,
    name: str,
    panels: Sequence[Panel],
    targets: Sequence[Target],
    grid: Grid,
    facts: Mapping[str, str],
    warnings: Sequence[str],
) -> StudyPage:
    """Write ``path``: ``panels`` on ``grid``, the ``targets``' scores, ``facts`` as a table and ``warnings``."""
    layers = list(dict.fromkeys(layer for panel in panels for layer in panel.layers))
    at = middle(panels[0].base.codes)
    niftis = [layer.nifti(grid) for layer in layers]
    made = ", ".join(f"{t.name.upper()} from {' + '.join(m.upper() for m in t.sources)}" for t in targets)
    scores = {t.name: t.score for t in targets if t.score is not None}
    image_bytes = sum(map(len, niftis))
    shown = (
        f"{' x '.join(map(str, grid.shape))} voxels of {grid.spacing[0]:.3g} mm in 255 levels, cropped to the head; "
        f"{image_bytes / 1e6:.1f} MB. The files have more."
    )
    data = {
        "shape": list(grid.shape),
        "at": list(at),
        "images": [_image(layer, nifti) for layer, nifti in zip(layers, niftis, strict=True)],
        "panels": [_panel(panel, layers) for panel in panels],
        "colours": COLOURS,
        "maps": MAPS,
        "stamp": STAMP,
    }
    thumbnails = {layer.title: data_url(picture(layer, at, 72, levels=False)) for layer in layers}
    page = fill(
        "study.html",
        {
            "title": html.escape(name),
            "stamp": html.escape(STAMP),
            "lead": html.escape(f"{made}. Predicted by a model; structures may be missing or wrong."),
            "warnings": warning_box(warnings),
            "tables": _score_table(scores) + table("Provenance", {**facts, "shown here": shown}),
            "stills": _stills(layers, at),
            "notice": html.escape(asset("niivue.NOTICE.txt")),
            "summary": embedded(summary(name, targets, thumbnails, facts, warnings)),
            "script": asset("study.js"),
            "niivue": packed(asset("niivue.min.js")),
            "data": embedded(data),
        },
    )
    write_text(path, page)
    return StudyPage(path, scores, tuple(warnings), len(page.encode()), image_bytes)


def summary(
    name: str,
    targets: Sequence[Target],
    thumbnails: Mapping[str, str],
    facts: Mapping[str, str],
    warnings: Sequence[str],
) -> dict[str, Any]:
    """What the cohort's page takes from the study's."""
    rows = []
    for target in targets:
        titles = [f"{target.name.upper()} {what}" for what in ("synthetic", "truth")]
        rows.append(
            {
                "target": target.name,
                "inputs": "+".join(target.sources),
                "metrics": {} if target.score is None else asdict(target.score),
                "thumbnails": [thumbnails[t] for t in titles if t in thumbnails],
            }
        )
    return {"study": name, "checkpoint": facts["checkpoint"], "warnings": list(warnings), "targets": rows}


def _image(layer: Layer, nifti: bytes) -> dict[str, Any]:
    known = ("title", "note", "unit", "low", "high", "window", "kind", "synthetic")
    return {**{key: getattr(layer, key) for key in known}, "nifti": base64.b64encode(nifti).decode()}


def _panel(panel: Panel, layers: Sequence[Layer]) -> dict[str, Any]:
    return {
        "base": layers.index(panel.base),
        "group": panel.group,
        "truth": None if panel.truth is None else layers.index(panel.truth),
        "overlays": {layer.kind: layers.index(layer) for layer in panel.overlays},
    }


def _stills(layers: Sequence[Layer], at: tuple[int, int, int]) -> str:
    figures = []
    for layer in layers:
        what = f"{layer.title}, {layer.note}"
        alt = f"{what}: three axial slices, a coronal and a sagittal one" + (f". {STAMP}" if layer.synthetic else "")
        kind = ' class="synthetic"' if layer.synthetic else ""
        image = f'<img src="{data_url(picture(layer, at))}" alt="{html.escape(alt)}">'
        figures.append(f"<figure{kind}>{image}<figcaption>{html.escape(what)}</figcaption></figure>")
    return "\n".join(figures)


def _score_table(scores: Mapping[str, Score]) -> str:
    if not scores:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{html.escape(t.upper())}</th>'
        + "".join(f'<td class="number">{v}</td>' for v in (f"{s.psnr:.2f} dB", f"{s.ssim:.3f}", f"{s.mae:.3f} sd"))
        + f'<td class="number">{s.voxels}</td></tr>'
        for t, s in scores.items()
    )
    heads = "".join(f'<th scope="col">{h}</th>' for h in ("target", "PSNR", "SSIM", "MAE", "voxels"))
    return (
        f"<h2>Against the truth</h2><table><tr>{heads}</tr>{rows}</table>"
        "<p>On normalised intensities (sd: standard deviations of the truth), inside the foreground.</p>"
    )


# --- pieces of both pages ------------------------------------------------------------------------------------------


def table(heading: str, facts: Mapping[str, str]) -> str:
    """``facts`` as a table of two columns."""
    rows = "".join(
        f'<tr><th scope="row">{html.escape(k)}</th><td>{html.escape(str(v))}</td></tr>' for k, v in facts.items()
    )
    return f"<h2>{html.escape(heading)}</h2><table>{rows}</table>"


def warning_box(warnings: Sequence[str]) -> str:
    """The warnings as a list that assistive software reads first; nothing when there is none."""
    if not warnings:
        return ""
    items = "".join(f"<li>{html.escape(text)}</li>" for text in warnings)
    return f'<section class="warnings" role="alert" aria-label="Warnings"><ul>{items}</ul></section>'


def embedded(data: Any) -> str:
    """JSON that can stand in a ``script`` element; what JSON has no word for becomes null."""
    return json.dumps(strict(data), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def packed(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def asset(name: str) -> str:
    """A file of ``viewer/``."""
    return (resources.files("medmae.synthesis") / "viewer" / name).read_text(encoding="utf-8")


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with ``{{key}}`` replaced in one pass: nothing in a value is taken for a place to fill. ``style``
    and ``script`` are files of their own."""
    known = {"style": asset("page.css"), **values}
    return re.sub(r"\{\{(\w+)\}\}", lambda found: known[found[1]], asset(template))
