"""``medmae inspect``: what is in DATA, and everything that is wrong with it, in one pass that changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from medmae.cohort.examine import examine
from medmae.cohort.layouts import Layout, find_studies
from medmae.cohort.naming import in_order, modality_name
from medmae.cohort.study import Study
from medmae.errors import InputError, Problem, nearest
from medmae.imaging.dicom.series import Series
from medmae.imaging.volume import Grid
from medmae.processor import usable_cores

MOST_TOLD = 20  # studies of which the text says which DICOM series is what; --json says it of all


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` saw.

    ``studies``: all that were made out, in order of id. ``failed``: the ids (or, where there is none, the places) of
    those that cannot be used. ``problems``: fatal ones and warnings, naming study and file. ``grids``: {study:
    {modality: Grid}} of the images that can be read.
    """

    data: Path
    layout: str
    studies: list[Study]
    problems: list[Problem]
    failed: list[str]
    grids: dict[str, dict[str, Grid]] = field(default_factory=dict)

    @property
    def usable(self) -> list[Study]:
        """The studies that nothing is seriously wrong with."""
        failed = set(self.failed)
        return [study for study in self.studies if study.id not in failed]

    @property
    def modalities(self) -> dict[str, int]:
        """{modality: number of studies that have it}, in canonical order."""
        counts = Counter(modality for study in self.studies for modality in study.images)
        return {modality: counts[modality] for modality in in_order(counts)}

    @property
    def labels(self) -> dict[str, int]:
        """{label: number of studies that have it}."""
        return dict(sorted(Counter(label for study in self.studies for label in study.labels).items()))

    @property
    def combinations(self) -> dict[str, int]:
        """{"t1 t2 flair": number of studies with exactly these}, the most frequent first."""
        return dict(Counter(" ".join(study.images) for study in self.studies).most_common())

    def to_json(self) -> dict[str, Any]:
        """Plain types: counts, the range of shapes and spacings, every study's files, every problem."""
        return {
            "data": str(self.data),
            "layout": self.layout,
            "counts": {
                "studies": len(self.studies),
                "usable": len(self.usable),
                "subjects": len({study.subject for study in self.studies}),
                "modalities": self.modalities,
                "labels": self.labels,
                "combinations": self.combinations,
            },
            "shape": spread(grid.shape for grids in self.grids.values() for grid in grids.values()),
            "spacing_mm": spread(grid.spacing for grids in self.grids.values() for grid in grids.values()),
            "orientations": dict(
                Counter(grid.orientation for grids in self.grids.values() for grid in grids.values()).most_common()
            ),
            "studies": [
                {
                    "id": study.id,
                    "subject": study.subject,
                    "session": study.session,
                    "usable": study.id not in self.failed,
                    "images": {name: str(path) for name, path in study.images.items()},
                    "labels": {name: str(path) for name, path in study.labels.items()},
                    **({"series": series} if (series := recognised(study)) else {}),
                    "grids": {
                        name: {"shape": list(grid.shape), "spacing_mm": list(grid.spacing)}
                        for name, grid in self.grids.get(study.id, {}).items()
                    },
                }
                for study in self.studies
            ],
            "failed": self.failed,
            "problems": [asdict(problem) for problem in self.problems],
        }

    def __str__(self) -> str:
        facts = self.to_json()
        counts = facts["counts"]
        lines = [
            f"{self.data}: layout {self.layout}, {counts['studies']} studies of {counts['subjects']} subjects, "
            f"{counts['usable']} usable",
            "modalities: " + ", ".join(f"{name} {count}" for name, count in self.modalities.items()),
            "combinations: " + "; ".join(f"{count} x {names}" for names, count in self.combinations.items()),
        ]
        if self.labels:
            lines.append("labels: " + ", ".join(f"{name} {count}" for name, count in self.labels.items()))
        for title, key in (("shape", "shape"), ("spacing (mm)", "spacing_mm")):
            if facts[key]:
                low, middle, high = (
                    "x".join(f"{value:.4g}" for value in facts[key][name]) for name in ("min", "median", "max")
                )
                lines.append(f"{title}: {low}" if low == high else f"{title}: {low} to {high}, median {middle}")
        if facts["orientations"]:
            lines.append(
                "orientation: " + ", ".join(f"{name} {count}" for name, count in facts["orientations"].items())
            )
        for study in self.studies[:MOST_TOLD]:
            lines += [
                f"{study.id}: {name} is series {one['number']} ({one['confidence']:.0%}: {one['reason']})"
                for name, one in recognised(study).items()
            ]
        return "\n".join(lines)


def recognised(study: Study) -> dict[str, dict[str, Any]]:
    """{modality: number, kind, confidence, reason} of images that are DICOM series."""
    return {
        name: {
            "number": source.number,
            "kind": source.kind,
            "confidence": source.confidence,
            "reason": source.reason,
            "tilt_degrees": round(source.tilt, 2),
        }
        for name, source in study.images.items()
        if isinstance(source, Series)
    }


def spread(triples: Iterable[Sequence[float]]) -> dict[str, list[float]]:
    """Per axis the smallest, the median and the largest of some triples; empty for none."""
    table = np.array(list(triples), dtype=float)
    if not table.size:
        return {}
    return {
        name: np.round(function(table, axis=0), 4).tolist()
        for name, function in (("min", np.min), ("median", np.median), ("max", np.max))
    }


def inspect(data: str | Path, *, modalities: Sequence[str] | None = None, jobs: int | None = None) -> Inspection:
    """Find the studies in ``data`` and judge every file of them; nothing is written.

    ``modalities`` looks at these only. ``jobs`` threads read at the same time (default: one a core). Raises
    :class:`InputError` when ``data`` holds no study at all (see :func:`medmae.cohort.layouts.find_studies`).
    """
    layout = find_studies(data)
    studies, problems = of_interest(layout, modalities, Path(data))
    failed = {problem.where.split(": ")[0] for problem in layout.problems if problem.fatal and problem.where}
    grids: dict[str, dict[str, Grid]] = {}

    def look(study: Study) -> tuple[list[Problem], dict[str, Grid]]:
        seen = examine(study, layout.label_values)
        return seen.problems, {name: volume.grid for name, volume in seen.images.items()}

    # Threads, not processes: unpacking and arithmetic on arrays let go of the interpreter, and only grids stay.
    with ThreadPoolExecutor(jobs or usable_cores()) as pool:
        for study, (wrong, places) in zip(studies, pool.map(look, studies), strict=True):
            problems += wrong
            grids[study.id] = places
            if any(problem.fatal for problem in wrong):
                failed.add(study.id)
    return Inspection(Path(data), layout.name, studies, problems, sorted(failed), grids)


def of_interest(layout: Layout, modalities: Sequence[str] | None, data: Path) -> tuple[list[Study], list[Problem]]:
    """The studies reduced to the modalities asked for, and a warning where that leaves nothing."""
    problems = list(layout.problems)
    if not modalities:
        return layout.studies, problems
    wanted = [modality_name(name) or name for name in modalities]
    known = {modality for study in layout.studies for modality in study.images}
    if not known & set(wanted):
        raise InputError(
            "no study has any of these modalities",
            where=data,
            field="modalities",
            found=", ".join(modalities),
            remedy=nearest(wanted[0], known),
        )
    studies = []
    for study in layout.studies:
        images = {name: path for name, path in study.images.items() if name in wanted}
        if images:
            studies.append(replace(study, images=images))
    missing = len(layout.studies) - len(studies)
    if missing:
        problems.append(
            Problem(f"{missing} studies have none of {', '.join(wanted)}: left out", str(data), fatal=False)
        )
    return studies, problems
