"""Studies in a DICOM tree or ZIP: series by their headers, one for each modality.

**Names.** Folders, descriptions and ids of DICOM often hold a patient's name, so a study is called by a hash of its
StudyInstanceUID (``study-3fa9c2d1e0``) and its subject by a hash of PatientID and its issuer: the same in every run and
on every machine, so that splits by subject hold. A subject's hash is made slowly (scrypt), because ids are few enough
to be tried; it is a pseudonym all the same, and who has the list of ids can find it again. A study without a
PatientID is a subject of its own.

**Which series.** A modality is taken from the series that is recognised as such with enough confidence. Of several:
surely recognised before by timing alone, original before derived, 3-D before 2-D, finer (first its largest
spacing, then its voxels' volume), then the one with the higher number, because a scan is repeated when the first was
bad. The choice is told in a warning. A synthesised series is never taken by itself.

**What stops a study.** A damaged series (slices missing, unevenly spaced, truncated) of a modality that no other series
has: to take that modality for one that was not acquired would be a lie. Damage elsewhere is a warning.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from medmae.cohort.naming import in_order
from medmae.cohort.study import Study
from medmae.errors import Problem
from medmae.imaging.dicom.contrast import ENOUGH, TIMED
from medmae.imaging.dicom.finding import scan
from medmae.imaging.dicom.series import Series
from medmae.imaging.dicom.sorting import Refusal
from medmae.imaging.source import Source

_DIGITS: Final = 10  # hex digits of a name: two of 50 000 studies share one in a thousand archives


def find_in_dicom(path: Path, numbers: Mapping[str, int] | None = None) -> tuple[str, list[Study], list[Problem]]:
    """("dicom", studies, problems) of a folder tree, a ZIP or a file. ``numbers`` {modality: SeriesNumber} overrides
    what is recognised, in every study."""
    found = scan(path)
    series: dict[str, list[Series]] = defaultdict(list)
    refused: dict[str, list[Refusal]] = defaultdict(list)
    for one in found.series:
        series[one.study_uid].append(one)
    for refusal in found.refused:
        if refusal.study is not None:
            refused[refusal.study].append(refusal)
    problems = [refusal.problem for refusal in found.refused if refusal.study is None]
    studies = []
    for uid in dict.fromkeys([*series, *refused]):
        study, told = study_of(uid, series[uid], refused[uid], numbers or {})
        problems += told
        if study is not None:
            studies.append(study)
    return "dicom", studies, problems


def study_name(uid: str) -> str:
    """The name of a study: no part of its UID, which may hold a date or a serial number, can be read from it."""
    return "study-" + hashlib.sha256(b"medmae study " + uid.encode()).hexdigest()[:_DIGITS]


def subject_name(patient: tuple[str, str], study: str) -> str:
    """The name of a subject, from (PatientID, IssuerOfPatientID); that of the ``study`` where there is no id."""
    if not patient[0]:
        return "subject-" + study.removeprefix("study-")
    secret = "\0".join(patient).encode()
    return "subject-" + hashlib.scrypt(secret, salt=b"medmae subject", n=1 << 13, r=8, p=1).hex()[:_DIGITS]


def study_of(
    uid: str, series: Sequence[Series], refused: Sequence[Refusal], numbers: Mapping[str, int]
) -> tuple[Study | None, list[Problem]]:
    """One study's images, or None, and what is to be told."""
    name = study_name(uid)

    def told(problem: Problem, *, fatal: bool | None = None) -> Problem:
        where = f"{name}: {problem.where}" if problem.where else name
        return replace(problem, where=where, fatal=problem.fatal if fatal is None else fatal)

    if whole := [told(refusal.problem) for refusal in refused if refusal.whole]:
        return None, whole
    images, problems = chosen(series, numbers)
    problems = [told(problem) for problem in problems]
    for refusal in refused:
        harmless = bool(images) and (refusal.modality is None or refusal.modality in images)
        problems.append(told(refusal.problem, fatal=False if harmless else None))
    if not images and not any(problem.fatal for problem in problems):
        problems.append(nothing_usable(name, series, refused))
    if any(problem.fatal for problem in problems):
        return None, problems
    sources: dict[str, Source] = {modality: images[modality] for modality in in_order(images)}
    subject = subject_name(next(iter(images.values())).patient, name)
    return Study(name, subject, sources), problems


def nothing_usable(name: str, series: Sequence[Series], refused: Sequence[Refusal]) -> Problem:
    """Why a study has no image although nothing in it is damaged."""
    if not series and refused and all("localiser" in refusal.problem.what for refusal in refused):
        return Problem(
            "a study of localisers only",
            name,
            found=f"{len(refused)} series",
            expected="a volume",
            remedy="Send the images that were planned on them.",
        )
    return Problem(
        "no series of this study is an image that is recognised",
        name,
        found=f"{len(series)} volumes, {len(refused)} series left out",
        remedy="Say what a series is: --image MOD=SERIES of `medmae reconstruct`.",
    )


def chosen(series: Sequence[Series], numbers: Mapping[str, int]) -> tuple[dict[str, Series], list[Problem]]:
    """{modality: series} by the rule above, and what is to be told."""
    images: dict[str, Series] = {}
    problems: list[Problem] = []
    for modality, number in numbers.items():
        found, problem = by_number(series, modality, number)
        problems += [problem] if problem else []
        if found is not None:
            images[modality] = found
    taken = list(images.values())
    known: dict[str, list[Series]] = defaultdict(list)
    for one in series:
        if one in taken or one.modality in images:
            continue
        if reason := unsure(one):
            problems.append(reason)
        elif one.modality is not None:
            known[one.modality].append(one)
    for modality, candidates in known.items():
        best = min(candidates, key=preference)
        images[modality] = best
        if len(candidates) > 1:
            problems.append(choice(modality, best, candidates))
    return images, problems


def by_number(series: Sequence[Series], modality: str, number: int) -> tuple[Series | None, Problem | None]:
    """The volume of a study with this series number; of several, the one that is recognised as the modality."""
    found = [one for one in series if one.number == number]
    if len(found) > 1:
        found = [one for one in found if one.modality == modality] or found
    if len(found) == 1:
        return found[0], None
    there = ", ".join(dict.fromkeys(str(one.number) for one in series)) or "none that can be used"
    return None, Problem(
        "no series of this number" if not found else f"{len(found)} volumes in the series of this number",
        None,
        "--image",
        found=f"{modality}={number}; there are {there}",
        expected="a number, a folder or a file of one series",
    )


def unsure(series: Series) -> Problem | None:
    """Why a series is not taken by itself; None when it is."""
    remedy = (
        f"Use it with --image MOD={series.number}." if series.number is not None else "Use it with --image MOD=FILE."
    )
    if series.synthetic:
        what = "this series is synthesised, not acquired: left out"
        return Problem(what, str(series), found=series.modality, remedy=remedy, fatal=False)
    if series.modality is None:
        what = "the modality is not recognised: left out"
        return Problem(what, str(series), found=series.reason, remedy=remedy, fatal=False)
    if series.confidence < ENOUGH:
        what = f"not sure that this is {series.modality}: left out"
        found = f"{series.confidence:.0%}: {series.reason}"
        return Problem(what, str(series), found=found, remedy=remedy, fatal=False)
    return None


def preference(series: Series) -> tuple[bool, bool, bool, float, float, int, str]:
    """What is smaller is taken first; see the module's docstring."""
    spacing = series.grid.spacing
    volume = spacing[0] * spacing[1] * spacing[2]
    return (
        series.confidence <= TIMED,
        not series.original,
        not series.three_d,
        round(max(spacing), 2),
        round(volume, 3),
        -(series.number or 0),
        series.part,
    )


def choice(modality: str, best: Series, candidates: Sequence[Series]) -> Problem:
    """Which of several series was taken, and from what."""
    others = [describe(one) for one in candidates if one is not best]
    more = f" and {len(others) - 4} more" if len(others) > 4 else ""
    return Problem(
        f"{len(candidates)} series are {modality}: one is taken",
        str(best),
        found=f"taken {describe(best)}; left out {', '.join(others[:4])}{more}",
        remedy=f"For another one: --image {modality}=SERIES.",
        fatal=False,
    )


def describe(series: Series) -> str:
    spacing = " x ".join(f"{size:.2g}" for size in series.grid.spacing)
    kinds = [*(["derived"] if not series.original else []), "3-D" if series.three_d else "2-D or not stated"]
    part = f" volume {series.part}" if series.part else ""
    return f"series {series.number}{part} ({spacing} mm, {', '.join(kinds)})"
