"""What a segmenter loses when some of its images are synthesised: the check that counts in a pipeline.

A segmentation model, which never learnt from syntheses, gets each held-out study as it was acquired, and then with
every combination of its channels replaced by what the checkpoint makes of the others.
"""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from medmae.cohort.layouts import find_studies
from medmae.cohort.prepared import is_cohort
from medmae.cohort.study import Study
from medmae.errors import InputError, MedmaeError, Problem
from medmae.files import strict, write_text
from medmae.imaging.geometry import grids_agree, resample_labels
from medmae.imaging.nifti import write_nifti
from medmae.imaging.source import read_source
from medmae.imaging.volume import Volume
from medmae.synthesis.volumes import pick_device, reconstruct_volumes
from medmae.synthesis.windows import Synthesiser

COLUMNS = ("dice_real", "dice", "lost", "dice_without")


@dataclass
class DownstreamScores:
    """``rows``: one dict a study and combination: ``given`` and ``synthesised`` modalities, ``dice_real`` with all
    images as acquired, ``dice`` with the syntheses, ``lost`` their difference, ``dice_without`` with the absent ones
    left out, if the segmenter practised that."""

    segmenter: str
    label: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def summary(self) -> list[dict[str, Any]]:
        """One dict a combination: means over the studies."""
        found = []
        for given in dict.fromkeys(row["given"] for row in self.rows):
            rows = [row for row in self.rows if row["given"] == given]
            means = {c: mean([row[c] for row in rows]) for c in COLUMNS}
            found.append({"given": given, "synthesised": rows[0]["synthesised"], "studies": len(rows), **means})
        return found

    def to_json(self) -> dict[str, Any]:
        return {"segmenter": self.segmenter, "label": self.label, "summary": self.summary()}

    def __str__(self) -> str:
        lines = [f"Dice of {self.label} by {self.segmenter}: as acquired, synthesised, lost, left out"]
        for row in self.summary():
            told = "  ".join("-" if row[c] is None else f"{row[c]:.3f}" for c in COLUMNS)
            lines.append(f"{row['given']} -> {row['synthesised']} (n {row['studies']}): {told}")
        return "\n".join(lines)

    def write(self, out: Path) -> None:
        """``downstream.csv`` and ``downstream.json`` in ``out``."""
        stream = io.StringIO()
        writer = csv.DictWriter(stream, ["study", "given", "synthesised", *COLUMNS], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(out / "downstream.csv", stream.getvalue())
        write_text(out / "downstream.json", json.dumps(strict(self.to_json()), indent=2) + "\n")


def mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def evaluate_downstream(
    data: str | Path,
    model: Synthesiser,
    segmenter: str | Path,
    out: Path,
    *,
    label: str = "seg",
    device: str = "auto",
    on_progress: Callable[[int, int, str], None] | None = None,
) -> DownstreamScores:
    """Score ``segmenter``, the results folder of any nnU-Net model with one fold or more, on the studies of ``data``
    (scans in any layout, not a prepared cohort) that have all its channels and the label map ``label``.

    Dice is the mean over the model's labels that occur, where the label map holds no others, else that of all that is
    not background. Channels that ``model`` does not know are always given as acquired. Writes ``downstream.csv`` and
    ``downstream.json`` to ``out``. Raises :class:`InputError` when no study can be scored.
    """
    from medmae.nnunet.predict import load_predictor

    if is_cohort(data):
        what = "a segmenter works on scans, and this is a prepared cohort"
        raise InputError(what, where=data, field="DATA", remedy="Give the scans that it was prepared from.")
    chosen = pick_device(device)
    predictor, channels, practised = load_predictor(Path(segmenter), None, chosen, mirror=False, any_model=True)
    result = DownstreamScores(Path(segmenter).name, label)
    studies = find_studies(data).studies
    usable = [s for s in studies if label in s.labels and all(c in s.images for c in channels)]
    for done, study in enumerate(usable):
        if on_progress:
            on_progress(done, len(usable), study.id)
        try:
            result.rows += score(study, model, predictor, channels, practised, label, str(chosen))
        except (MedmaeError, OSError, RuntimeError) as error:
            result.problems.append(Problem("could not be segmented", study.id, found=str(error)))
    if on_progress:
        on_progress(len(usable), len(usable), "")
    if not result.rows:
        raise InputError(
            "no study for the segmenter",
            where=data,
            found=f"{len(studies)} studies",
            expected=f"studies with {', '.join(channels)} and the label map {label}",
            problems=result.problems,
        )
    result.write(out)
    return result


def score(
    study: Study,
    model: Synthesiser,
    predictor: Any,
    channels: Sequence[str],
    practised: bool,
    label: str,
    device: str,
) -> list[dict[str, Any]]:
    """Rows of one study."""
    volumes = {c: read_source(study.images[c]) for c in channels}
    first = volumes[channels[0]]
    truth = read_source(study.labels[label])
    truth = truth if grids_agree(truth.grid, first.grid) else resample_labels(truth, first.grid)
    values = sorted(int(v) for k, v in predictor.dataset_json["labels"].items() if k != "background" and v)

    def dice(images: Mapping[str, Volume]) -> float:
        return dice_of(segment(predictor, images, channels), truth.array, values)

    real, rows = dice(volumes), []
    replaceable = [c for c in channels if c in model.modalities]
    for count in range(1, len(replaceable) + 1):
        for absent in combinations(replaceable, count):
            given = {c: v for c, v in volumes.items() if c not in absent}
            if not any(c in model.modalities for c in given):
                continue
            made = reconstruct_volumes(model, given, absent, device=device)
            whole = {**given, **{t: on_grid_of(first, s.volume) for t, s in made.items()}}
            found = dice({c: whole[c] for c in channels})
            rows.append(
                {
                    "study": study.id,
                    "given": "+".join(given),
                    "synthesised": "+".join(absent),
                    "dice_real": real,
                    "dice": found,
                    "lost": real - found,
                    "dice_without": dice(given) if practised else None,
                }
            )
    return rows


def on_grid_of(first: Volume, volume: Volume) -> Volume:
    """A synthesis lies on the grid of one of its sources, which may not be the segmenter's first channel."""
    from medmae.imaging.geometry import resample

    return volume if grids_agree(first.grid, volume.grid) else resample(volume, first.grid, 1)


def segment(predictor: Any, images: Mapping[str, Volume], channels: Sequence[str]) -> np.ndarray:
    """Labels of a study from ``images``, some of the channels, on the grid of the first of them."""
    from medmae.nnunet.predict import segment_one

    with tempfile.TemporaryDirectory(prefix="medmae-") as folder:
        files = {}
        for name, volume in images.items():
            files[name] = Path(folder) / f"{name}.nii.gz"
            write_nifti(volume, files[name])
        file = segment_one(predictor, Study("study", "study", {}), files, channels, Path(folder))
        return read_source(file).array


def dice_of(predicted: np.ndarray, truth: np.ndarray, values: Sequence[int]) -> float:
    """See :func:`evaluate_downstream`; 1 where both are empty."""
    there = {int(v) for v in np.unique(truth)} - {0}
    if len(values) > 1 and there <= set(values):
        wanted = [v for v in values if v in there or (predicted == v).any()]
        return float(np.mean([overlap(predicted == v, truth == v) for v in wanted])) if wanted else 1.0
    return overlap(predicted > 0, truth > 0)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    total = int(a.sum() + b.sum())
    return float(2 * (a & b).sum() / total) if total else 1.0
