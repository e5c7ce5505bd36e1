"""The result of an evaluation: rows, their summary, how the model stands beside the floors, and the files of it."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medmae.errors import Problem
from medmae.files import strict, write_atomically, write_text

if TYPE_CHECKING:
    from rich.table import Table

    from medmae.synthesis.downstream import DownstreamScores

METRICS = ("psnr", "ssim", "mae")
LESION_METRICS = tuple(f"lesion_{m}" for m in METRICS)
GRID = ("grid", "grid_residual")
TRUST = ("coverage", "width", "lesion_width")
HEADINGS = {"psnr": "PSNR, dB", "ssim": "SSIM", "mae": "MAE, sd", "lesion_mae": "MAE in lesions, sd"}
PREDICTORS = ("model", "mean", "regression")
LABELS = {"model": "model", "mean": "mean of training", "regression": "linear regression"}
UNITS = {
    "psnr": "dB, over the truth's 0.1 to 99.9 percentile range in the brain",
    "ssim": "3-D, Gaussian window of 1.5 voxels, averaged over brain voxels",
    "mae": "standard deviations of the normalised truth",
    "grid": "energy at the patch frequency relative to neighbouring frequencies; about 1 without a grid",
    "grid_residual": "the same of prediction minus truth",
    "coverage": "share of brain voxels whose truth lies in the model's 90 % interval; none without a calibration",
    "width": "half of that interval's width, in standard deviations, averaged over the brain (lesion_width: lesions)",
}


@dataclass
class SynthesisScores:
    """``rows``: one dict a study, target, combination of inputs and predictor. ``floors``: how they were made, or
    why they are missing and the remedy. ``lesion_label``: which label counts as lesion, where a study has it."""

    out: Path
    model: dict[str, Any]
    lesion_label: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    floors: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    downstream: DownstreamScores | None = None

    @property
    def files(self) -> dict[str, Path]:
        names = {"scores": "scores.csv", "summary": "summary.csv", "json": "scores.json", "plot": "plot.png"}
        names["page"] = "index.html"
        return {key: self.out / name for key, name in names.items()}

    def grouped(self) -> dict[tuple[str, str], dict[str, list[dict[str, Any]]]]:
        """{(target, inputs): {predictor: rows}}, few inputs first."""
        groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
        for row in self.rows:
            groups[row["target"], row["inputs"]][row["predictor"]].append(row)
        targets = list(dict.fromkeys(row["target"] for row in self.rows))
        return dict(sorted(groups.items(), key=lambda g: (targets.index(g[0][0]), g[0][1].count("+"))))

    def summary(self) -> list[dict[str, Any]]:
        """One dict a target, combination and predictor: ``studies``, and mean and standard deviation (over studies)
        of every metric."""
        result = []
        for (target, inputs), predictors in self.grouped().items():
            for predictor in PREDICTORS:
                if predictor not in predictors:
                    continue
                rows = predictors[predictor]
                entry = {"target": target, "inputs": inputs, "predictor": predictor, "studies": len(rows)}
                entry["lesion_studies"] = sum(row["lesion_voxels"] is not None for row in rows)
                for metric in (*METRICS, *LESION_METRICS, *GRID, *TRUST):
                    values = [row[metric] for row in rows if _usable(row[metric])]
                    entry[metric] = float(np.mean(values)) if values else None
                    entry[f"{metric}_std"] = float(np.std(values)) if values else None
                result.append(entry)
        return result

    def beats(self) -> list[dict[str, Any]]:
        """How the model stands beside each floor, one dict a target, combination and floor: for every metric whether
        its mean over the studies is better (``better``) and in how many of ``studies`` it is (``wins``)."""
        result = []
        for (target, inputs), predictors in self.grouped().items():
            models = {row["study"]: row for row in predictors["model"]}
            for floor in PREDICTORS[1:]:
                others = {row["study"]: row for row in predictors.get(floor, [])}
                if not others:
                    continue
                entry: dict[str, Any] = {"target": target, "inputs": inputs, "floor": floor, "studies": len(others)}
                for metric in (*METRICS, *LESION_METRICS):
                    pairs = [(models[s][metric], others[s][metric]) for s in others]
                    gains = [(b - a if metric.endswith("mae") else a - b) for a, b in pairs if None not in (a, b)]
                    gains = [gain for gain in gains if not math.isnan(gain)]
                    entry[metric] = {
                        "better": bool(np.mean(gains) > 0) if gains else None,
                        "wins": sum(gain > 0 for gain in gains),
                        "of": len(gains),
                    }
                result.append(entry)
        return result

    def beats_everywhere(self, floor: str, metrics: tuple[str, ...] = ("psnr", "ssim")) -> bool | None:
        """Whether the model is better than ``floor`` for every target and combination in all ``metrics``; None when
        that floor is missing."""
        entries = [entry for entry in self.beats() if entry["floor"] == floor]
        return all(entry[m]["better"] for entry in entries for m in metrics) if entries else None

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "units": UNITS,
            "lesion_label": self.lesion_label,
            "floors": self.floors,
            "beats_everywhere": {f: self.beats_everywhere(f) for f in PREDICTORS[1:]},
            "beats": self.beats(),
            "summary": self.summary(),
            "downstream": None if self.downstream is None else self.downstream.to_json(),
            "problems": [vars(problem) for problem in self.problems],
            "files": {name: str(path) for name, path in self.files.items()},
        }

    def table(self) -> Table:
        """A rich table: a row a target and combination; each metric as model / mean / regression, a star where the
        model is better than both floors there are."""
        from rich.box import SIMPLE
        from rich.table import Table

        table = Table(title="model / " + " / ".join(LABELS[p] for p in PREDICTORS[1:]), box=SIMPLE)
        lesions = any(row["lesion_voxels"] is not None for row in self.rows)
        columns = (*METRICS, *(LESION_METRICS[-1:] if lesions else ()))
        for heading in ("target", "from", "n", *(HEADINGS[c] for c in columns)):
            table.add_column(heading, justify="left" if heading in ("target", "from") else "right", no_wrap=True)
        summary = {(e["target"], e["inputs"], e["predictor"]): e for e in self.summary()}
        for target, inputs in self.grouped():
            own = [summary.get((target, inputs, p)) for p in PREDICTORS]
            cells = [_cell(metric, [None if e is None else e[metric] for e in own]) for metric in columns]
            studies = own[0]["studies"] if own[0] else 0
            table.add_row(target, inputs.replace("+", " "), str(studies), *cells)
        return table

    def __str__(self) -> str:
        from rich.console import Console

        stream = io.StringIO()
        Console(file=stream, width=160, color_system=None).print(self.table())
        lines = [line.rstrip() for line in stream.getvalue().splitlines()]
        if "missing" in self.floors:
            lines.append(f"No floors: {self.floors['missing']}. {self.floors['remedy']}")
        for floor in PREDICTORS[1:]:
            entries = [entry for entry in self.beats() if entry["floor"] == floor]
            won = {m: sum(bool(entry[m]["better"]) for entry in entries) for m in METRICS}
            if entries:
                counts = ", ".join(f"{metric.upper()} {count}" for metric, count in won.items())
                lines.append(f"Better than {LABELS[floor]}, of {len(entries)} combinations: {counts}")
        if self.downstream is not None:
            lines += str(self.downstream).splitlines()
        grids = [row["grid"] for row in self.rows if row["predictor"] == "model" and _usable(row["grid"])]
        if grids:
            text = "above 1, blocks of the patches show" if np.median(grids) > 1.2 else "about 1 or less: no blocks"
            lines.append(f"Energy at the patch grid's frequency, median: {np.median(grids):.2f} ({text})")
        return "\n".join([*lines, *(f"{name}: {path}" for name, path in self.files.items())])

    def write(self) -> None:
        """``scores.csv``, ``summary.csv``, ``scores.json`` and ``plot.png`` in ``out``."""
        from medmae.synthesis.plots import plot_scores

        files = self.files
        write_text(files["scores"], _csv(self.rows))
        write_text(files["summary"], _csv(self.summary()))
        write_text(files["json"], json.dumps(strict({**self.to_json(), "rows": self.rows}), indent=2) + "\n")
        write_atomically(files["plot"], lambda temporary: plot_scores(self, temporary))


def _usable(value: float | None) -> bool:
    return value is not None and not math.isnan(value)


def _cell(metric: str, values: list[float | None]) -> str:
    digits = 1 if metric.endswith("psnr") else 3
    text = " / ".join("-" if v is None else f"{v:.{digits}f}" for v in values)
    first, *floors = values
    known = [v for v in floors if v is not None]
    if first is None or not known:
        return text
    better = all(first < v if metric.endswith("mae") else first > v for v in known)
    return f"{text} {'*' if better else ' '}"


def _csv(rows: list[dict[str, Any]]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    return stream.getvalue()
