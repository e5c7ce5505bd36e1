"""From studies in any supported layout to an nnU-Net raw data set."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medmae.cohort.layouts import find_studies
from medmae.cohort.modalities import canonical_modality
from medmae.cohort.study import Study
from medmae.errors import InputError, MedmaeError, Problem
from medmae.files import explained, write_text
from medmae.imaging.geometry import grids_agree, resample_labels
from medmae.imaging.nifti import read_image, write_nifti
from medmae.imaging.source import read_source


@dataclass
class MadeDataset:
    """An nnU-Net raw data set: ``folder``, its ``channels``, the ``labels`` {name: value}, ``studies`` in it, and what
    was left out."""

    folder: Path
    channels: tuple[str, ...]
    labels: dict[str, int]
    studies: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "channels": list(self.channels),
            "labels": self.labels,
            "studies": self.studies,
            "problems": [vars(problem) for problem in self.problems],
        }

    def __str__(self) -> str:
        labels = ", ".join(f"{name} {value}" for name, value in self.labels.items())
        return f"{self.folder}: {len(self.studies)} studies, channels {', '.join(self.channels)}, labels {labels}"


def make_dataset(
    data: str | Path,
    out: str | Path,
    *,
    label: str = "seg",
    modalities: Sequence[str] = (),
    incomplete: bool = False,
) -> MadeDataset:
    """Write the studies of ``data`` that have the label map ``label`` and all ``modalities`` as nnU-Net raw data.

    ``out``: a folder named ``DatasetXXX_Name``. ``modalities`` left out: those that at least half of the labelled
    studies have. nnU-Net wants complete studies; those that lack something are named in ``problems``, or, with
    ``incomplete``, get an image of zeros, which our networks take for a channel that is not there. Images are copied
    voxel by voxel, label maps brought to their study's grid and to values 0, 1, 2 ... in the order of what they hold.
    Raises :class:`InputError` when nothing is left.
    """
    out = Path(out)
    if not re.fullmatch(r"Dataset\d{3}_\w+", out.name):
        expected = "DatasetXXX_Name, such as Dataset101_Brain"
        raise InputError("nnU-Net wants another name of the folder", where=out, expected=expected)
    found = find_studies(Path(data))
    problems = [p for p in found.problems if p.fatal]
    labelled = [s for s in found.studies if label in s.labels]
    problems += [
        Problem(f"has no label map {label}", s.id, fatal=False) for s in found.studies if label not in s.labels
    ]
    wanted = [canonical_modality(m) or m for m in modalities]
    if not wanted and labelled:
        counts = Counter(m for s in labelled for m in s.images)
        wanted = [m for m, n in counts.items() if 2 * n >= len(labelled)]
        if not wanted:
            raise InputError(
                "no modality that at least half of the labelled studies have",
                where=data,
                field="--modality",
                found=", ".join(f"{m} in {n} of {len(labelled)}" for m, n in sorted(counts.items())),
                remedy="Name those to use with --modality, and keep studies that lack some with --incomplete.",
                problems=problems,
            )
    needed = any if incomplete else all
    complete = [s for s in labelled if needed(m in s.images for m in wanted)]
    for study in labelled:
        if study not in complete:
            lacks = ", ".join(m for m in wanted if m not in study.images)
            remedy = "Name fewer with --modality, or keep it with --incomplete."
            problems.append(Problem(f"left out: lacks {lacks}", study.id, remedy=remedy, fatal=False))
    if not complete:
        known = sorted({name for s in found.studies for name in s.labels})
        raise InputError(
            "no study with a label map and all modalities",
            where=data,
            field="--label",
            found=f"{label}; there are {', '.join(known) or 'none'}",
            problems=problems,
        )
    with explained(out):
        for folder in ("imagesTr", "labelsTr"):
            (out / folder).mkdir(parents=True, exist_ok=True)
    values = sorted({int(v) for s in complete for v in np.unique(read_image(s.labels[label]).array) if v != 0})
    result = MadeDataset(out, tuple(wanted), {"background": 0, **{f"{label}_{v}": i for i, v in enumerate(values, 1)}})
    result.problems = problems
    for study in complete:
        try:
            write_case(study, out, wanted, label, values)
            result.studies.append(study.id)
        except MedmaeError as error:
            result.problems += error.problems
    description = {
        "channel_names": {str(i): m for i, m in enumerate(wanted)},
        "labels": result.labels,
        "numTraining": len(result.studies),
        "file_ending": ".nii.gz",
    }
    write_text(out / "dataset.json", json.dumps(description, indent=2) + "\n")
    return result


def write_case(study: Study, out: Path, modalities: Sequence[str], label: str, values: Sequence[int]) -> None:
    """One study's images and labels under nnU-Net's names."""
    images = {m: read_source(study.images[m]) for m in modalities if m in study.images}
    first = next(iter(images.values()))
    for modality, image in images.items():
        if not grids_agree(image.grid, first.grid):
            raise InputError(
                "modalities on different grids", where=study.id, field=modality, remedy="Resample them onto one grid."
            )
    labels = read_image(study.labels[label])
    if not grids_agree(labels.grid, first.grid):
        labels = resample_labels(labels, first.grid)
    mapped = np.zeros(labels.array.shape, np.uint8)
    for number, value in enumerate(values, 1):
        mapped[np.round(labels.array) == value] = number
    for number, modality in enumerate(modalities):
        array = images[modality].array if modality in images else np.zeros_like(first.array)
        write_nifti(first.with_array(array), out / "imagesTr" / f"{study.id}_{number:04}.nii.gz")
    write_nifti(first.with_array(mapped), out / "labelsTr" / f"{study.id}.nii.gz", dtype=np.uint8)
