"""A small study with a known synthesis, and a reader of pages, for the tests of the reports."""

from __future__ import annotations

import base64
import gzip
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from medmae.imaging.volume import Volume
from medmae.synthesis.report import StudyPage, write_report
from medmae.synthesis.volumes import Synthesis, reconstruct_volumes
from tests.synthesis.fakes import Linear, plan

PROVENANCE = {
    "version": "medmae 9.9",
    "checkpoint": {"hash": "c0ffee" * 8, "plan": "fake", "plan_hash": "x", "method": "fake"},
}
HASHES = {"t1": "1" * 64, "t2": "2" * 64, "flair": "f" * 64}
SPACING = 2.0


def model() -> Linear:
    """FLAIR is half of T1 and half of T2, normalised; the training cohort had mean 200 and sd 50."""
    typical = {"flair": {"mean": 200.0, "std": 50.0}}
    return Linear(
        plan(("t1", "t2", "flair"), spacing=[SPACING] * 3),
        {"t1": 0.5, "t2": 0.5, "flair": 1.0},
        metadata={"intensity": typical},
    )


def study(shape: tuple[int, int, int] = (36, 44, 40), right: float = 0.0) -> dict[str, Volume]:
    """An ellipsoid with structure in three contrasts, axes towards right, anterior, superior; ``right`` brightens the
    patient's right half of T1."""
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    inside = sum((a / 0.8) ** 2 for a in axes) < 1
    affine = np.diag([SPACING, SPACING, SPACING, 1.0])
    affine[:3, 3] = -30.0, -40.0, -20.0
    values = {
        "t1": 500 + 100 * np.sin(5 * axes[0]) + right * (axes[0] > 0),
        "t2": 300 + 80 * np.cos(4 * axes[1]),
        "flair": 700 + 120 * np.sin(4 * axes[2] + axes[0]),
    }
    return {m: Volume((v * inside).astype(np.float32), affine) for m, v in values.items()}


def synthesise(volumes: dict[str, Volume], target: str = "flair") -> dict[str, Synthesis]:
    return reconstruct_volumes(model(), volumes, [target], device="cpu")


def write(path: Path, volumes: dict[str, Volume] | None = None, name: str = "case", **options: Any) -> StudyPage:
    volumes = study() if volumes is None else volumes
    made = synthesise(volumes)
    return write_report(path, name, volumes, made, PROVENANCE, model().plan.image.intensity, HASHES, **options)


class Page(HTMLParser):
    """The elements of a page, with their attributes and text."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.raw = path.read_text(encoding="utf-8")
        self.feed(self.raw)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def data(self) -> dict[str, Any]:
        found = re.search(r'<script type="application/json" id="data">(.*?)</script>', self.raw, re.DOTALL)
        assert found
        result: dict[str, Any] = json.loads(found[1])
        return result

    def image(self, title: str) -> tuple[dict[str, Any], nib.Nifti1Image]:
        (entry,) = [entry for entry in self.data["images"] if entry["title"] == title]
        return entry, nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(entry["nifti"])))
