"""The pages of an evaluation: the cohort's table of all scores, and a page a study if asked for.

A page shows every target as synthesised from all the other modalities a study has, beside the truth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medmae.imaging.geometry import resample
from medmae.imaging.volume import Grid, Volume
from medmae.plan import Intensity
from medmae.synthesis.floors import Case
from medmae.synthesis.layers import data_url, grey, middle, picture, shown_grid
from medmae.synthesis.metrics import Score
from medmae.synthesis.report import Target, model_facts, normalised_unit, panels_of
from medmae.synthesis.report_cohort import INDEX, Row, page_name, write_cohort
from medmae.synthesis.report_page import write_page

THUMBNAIL = 72  # pixels high


@dataclass
class ScorePages:
    """Collects rows study by study, writes their pages into ``out`` if ``studies``, and ``index.html`` at the end."""

    out: Path
    provenance: Mapping[str, Any]
    intensity: Intensity
    studies: bool = False
    rows: list[Row] = field(default_factory=list)

    def add(self, study: Case, made: Mapping[str, np.ndarray], scored: Sequence[Mapping[str, Any]]) -> None:
        """A study: ``made`` {target: synthesis from all the other modalities, (D, H, W) as the study's arrays},
        ``scored``: its rows of ``scores.csv``."""
        known = {m for row in scored for m in (row["target"], *row["inputs"].split("+"))}  # what the model knows
        names = [m for m in study.modalities if m in known]
        volumes = {m: Volume(study.array(m).astype(np.float32), study.affine) for m in names}
        grid = shown_grid(next(iter(volumes.values())))
        shown = {m: resample(v, grid).array for m, v in volumes.items()}
        models = {(row["target"], row["inputs"]): row for row in scored if row["predictor"] == "model"}
        targets = []
        for name in [m for m in names if m in made]:
            inputs = next(i for t, i in models if t == name and i.count("+") == len(volumes) - 2)
            targets.append(self._target(name, inputs, made[name], shown[name], study, grid, models[name, inputs]))
        page = self._page(study.id, shown, targets, grid) if self.studies and targets else None
        thumbnails = {(t.name, "+".join(t.sources)): _thumbnails(t) for t in targets}
        for (target, inputs), row in models.items():
            floors = {
                f"{other['predictor']}_psnr": other["psnr"]
                for other in scored
                if (other["target"], other["inputs"]) == (target, inputs) and other["predictor"] != "model"
            }
            pictures = thumbnails.get((target, inputs), ())
            self.rows.append(Row(study.id, target, inputs, {**row, **floors}, page=page, thumbnails=pictures))

    def write(self, warnings: Sequence[str] = ()) -> Path:
        """``index.html``: a row a study, target and combination of inputs."""
        return write_cohort(self.out / INDEX, "Synthesis on held-out studies", self.rows, self._facts(), warnings)

    def _facts(self) -> dict[str, str]:
        return model_facts(self.provenance)

    def _target(
        self,
        name: str,
        inputs: str,
        array: np.ndarray,
        truth: np.ndarray,
        study: Case,
        grid: Grid,
        row: Mapping[str, Any],
    ) -> Target:
        made = resample(Volume(array.astype(np.float32), study.affine), grid).array
        known = array != 0 if self.intensity.has_background else np.ones(array.shape, bool)
        inside = resample(Volume(known, study.affine), grid).array
        score = Score(row["psnr"], row["ssim"], row["mae"], row["voxels"])
        unit, values = normalised_unit(self.intensity), np.where(inside, made, 0)
        return Target(name, tuple(inputs.split("+")), values, inside, unit, truth, score=score)

    def _page(self, name: str, shown: Mapping[str, np.ndarray], targets: Sequence[Target], grid: Grid) -> str:
        used = {source for target in targets for source in target.sources}
        inputs = {m: values for m, values in shown.items() if m in used}
        file = page_name(name)
        unit, background = normalised_unit(self.intensity), self.intensity.has_background
        panels = panels_of(inputs, unit, targets, {}, background)
        write_page(self.out / file, name, panels, targets, grid, self._facts(), ())
        return file


def _thumbnails(target: Target) -> tuple[str, ...]:
    made = grey("", "", "", target.made, inside=target.inside, like=target.truth, synthetic=True)
    layers = [made]
    if target.truth is not None:
        layers.append(grey("", "", "", target.truth, like=target.truth))
    at = middle(made.codes)
    return tuple(data_url(picture(layer, at, THUMBNAIL, levels=False)) for layer in layers)
