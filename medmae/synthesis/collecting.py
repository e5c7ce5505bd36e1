"""The studies that a command's arguments name: layouts, single images, DICOM series."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from medmae.cohort.layouts import find_studies
from medmae.cohort.modalities import canonical_modality
from medmae.cohort.study import Study
from medmae.errors import InputError, MedmaeError, Problem
from medmae.imaging.dicom.series import Series
from medmae.imaging.source import Source, open_source


@dataclass
class Collected:
    """``studies`` with names of their own; ``problems``: fatal ones (studies that are left out) and warnings."""

    studies: list[Study] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def failed(self) -> list[Problem]:
        return [problem for problem in self.problems if problem.fatal]

    @property
    def warnings(self) -> list[Problem]:
        return [problem for problem in self.problems if not problem.fatal]


def collect(sources: Sequence[str | Path], images: Mapping[str, str | Path] | None = None) -> Collected:
    """The studies in ``sources`` (any layout) with ``images`` {modality: file, DICOM folder or series number}.

    Raises :class:`InputError` when there is nothing to work on, and for images that cannot be placed.
    """
    result = Collected()
    files, numbers = resolve(images or {})
    if numbers and not sources:
        remedy = "Name the study's folder or ZIP as STUDY, or give a file of the series."
        raise InputError("a series number needs a study", field="--image", found=str(numbers), remedy=remedy)
    for source in sources:
        if files and not Path(source).exists():
            result.studies.append(Study(safe_name(str(source)), safe_name(str(source)), {}))  # a name for the images
            continue
        try:
            layout = find_studies(Path(source), series=numbers)
        except MedmaeError as error:
            result.problems += error.problems
            continue
        if numbers and layout.name != "dicom":
            raise InputError(
                "series numbers are for DICOM", where=source, field="--image", found=f"layout {layout.name}"
            )
        result.studies += layout.studies
        result.problems += layout.problems
    if files:
        result.studies = [with_images(result, files, named=bool(sources))]
    unique = {study.id: study for study in reversed(result.studies)}
    for study_id in {s.id for s in result.studies if result.studies.count(s) > 1 or unique[s.id] is not s}:
        remedy = "Give them different names, or reconstruct them into different folders."
        result.problems.append(Problem("several studies of one name; only the first is used", study_id, remedy=remedy))
    if not unique and not result.failed:
        raise InputError("no study to work on", field="STUDY", remedy="Name folders, or files with --image.")
    result.studies = list(reversed(unique.values()))
    return result


def resolve(images: Mapping[str, str | Path]) -> tuple[dict[str, Source], dict[str, int]]:
    """({modality: file or series}, {modality: series number}) of what ``--image`` says."""
    files: dict[str, Source] = {}
    numbers: dict[str, int] = {}
    for name, value in images.items():
        modality = canonical_modality(name)
        if modality is None:
            raise InputError("an unknown modality", field="--image", found=name, remedy="Such as t1=t1.nii.gz.")
        if str(value).isdecimal() and not Path(value).exists():
            numbers[modality] = int(str(value))
        else:
            files[modality] = open_source(Path(value))
    return files, numbers


def with_images(result: Collected, files: Mapping[str, Source], named: bool) -> Study:
    """The one study of ``result`` with ``files`` added or replaced; without a name, one named after their folder, or,
    of DICOM, after its study. A study in which no series is recognised is what its series are given for."""
    given = [source for source in files.values() if isinstance(source, Series)]
    if given and not result.studies:
        result.problems = [replace(problem, fatal=False) for problem in result.problems]
        named = False
    if not named:
        if given:
            from medmae.cohort.dicom import study_name, subject_name

            name = study_name(given[0].study_uid)
            return Study(name, subject_name(given[0].patient, name), dict(files))
        first = next(source for source in files.values() if isinstance(source, Path))
        folder = safe_name(first.resolve().parent.name)
        return Study(folder, folder, dict(files))
    if len(result.studies) != 1:
        raise InputError("images are given for one study", field="--image", found=f"{len(result.studies)} studies")
    return replace(result.studies[0], images={**result.studies[0].images, **files})


def safe_name(text: str) -> str:
    """``text`` as a file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(text).name).strip("-.") or "study"
