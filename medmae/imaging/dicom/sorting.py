"""From the instances of one series to its volumes, and what cannot be one.

A series may hold several volumes. Slices of another matrix, spacing, orientation or frame of reference never share one;
those that lie at the same positions are taken apart (``splitting``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, cast

import numpy as np

from medmae.errors import Problem
from medmae.imaging.dicom.contrast import Recognition, recognise
from medmae.imaging.dicom.header import Frame, Instance
from medmae.imaging.dicom.opening import File
from medmae.imaging.dicom.series import Series, place
from medmae.imaging.dicom.splitting import apart, groups_of, over_time, without_stray
from medmae.imaging.dicom.stacking import NotAStack, Stack, same_plane, stack

_SCOUT: Final = re.compile(
    r"(?<![a-z])(locali[sz]ers?|loc|scouts?|surveys?|topogram|surview|3[ -]?_?planes?|3[ -]?pl"
    r"|aahead_scout\w*|smart ?prep)(?![a-z])"
)
_FEW: Final = 15  # slices a direction, at most, of a localiser that is known by its several directions only
VOLUMES: Final = ("MR", "CT", "PT")


@dataclass(frozen=True)
class Refusal:
    """A series (or, ``whole``, a study) that is not used. ``problem`` is fatal when it is damaged, a warning when it
    merely is no volume. ``modality``: what it would have been; ``study``: its UID, None when not even that is known."""

    problem: Problem
    study: str | None = field(repr=False)
    modality: str | None = None
    whole: bool = False


@dataclass
class Sorted:
    """The volumes of some instances, and what was refused."""

    series: list[Series] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)


def sort_series(instances: Sequence[Instance]) -> Sorted:
    """The volumes in the instances of one series."""
    head = instances[0]
    known = recognise(head.frames[0].facts).modality if head.frames else None

    def refuse(what: str, *, found: str | None = None, remedy: str | None = None, fatal: bool = True) -> Sorted:
        problem = Problem(what, place(head.file, head.number), found=found, remedy=remedy, fatal=fatal)
        return Sorted(refused=[Refusal(problem, head.study, known)])

    if head.modality not in VOLUMES:
        what = "no MR, CT or PET images, such as screenshots, plain radiographs or segmentations: left out"
        return refuse(what, found=f"{len(instances)} images", fatal=False)
    images = [instance for instance in instances if not planned_on(instance)]
    if not images or is_localiser(images):
        return refuse("a localiser: left out", found=f"{len(instances)} images", fatal=False)
    instances, head = images, images[0]
    if broken := fault_of(instances):
        return Sorted(refused=[Refusal(broken, head.study, known)])
    frames = [frame for instance in instances for frame in instance.frames]
    placed = [frame for frame in frames if frame.placed]
    if not placed:
        what = "images without a position, such as screenshots or reports: left out"
        return refuse(what, found=f"{len(frames)} images", fatal=False)
    if len(placed) < len(frames):
        return refuse(
            "some slices have no position, orientation or spacing",
            found=f"{len(frames) - len(placed)} of {len(frames)}",
            remedy="Export the series again.",
        )
    return volumes_of(instances, placed)


def is_localiser(instances: Sequence[Instance]) -> bool:
    """Whether these are the few slices that the others were planned on: by name, or because there are few
    slices in several directions."""
    facts = [frame.facts for instance in instances for frame in instance.frames]
    if facts and _SCOUT.search(facts[0].text):
        return True
    placed = [frame for instance in instances for frame in instance.frames if frame.placed]
    directions = groups_of(placed, lambda a, b: same_plane_direction(a, b))
    return len(directions) > 1 and all(len(group) <= _FEW for group in directions)


def planned_on(instance: Instance) -> bool:
    """Whether ImageType says localiser; a topogram may stand in one series with the slices that were planned on it."""
    return any("LOCALIZER" in frame.facts.image_type for frame in instance.frames)


def same_plane_direction(a: Frame, b: Frame) -> bool:
    return all(abs(x - y) < 0.1 for x, y in zip(a.orientation, b.orientation, strict=True))


def fault_of(instances: Sequence[Instance]) -> Problem | None:
    """What makes the pixels of a series unreadable, by its headers."""
    from medmae.imaging.dicom.reading import undecodable

    where = place(instances[0].file, instances[0].number)
    count = len(instances)
    if unread := sorted({i.problem for i in instances if i.problem}):
        return Problem("an object that cannot be taken apart into slices", where, found="; ".join(unread))
    if bare := sum(not i.has_pixels for i in instances):
        return Problem("objects without pixels", where, found=f"{bare} of {count}", remedy="Export the series again.")
    if coloured := sum(i.samples != 1 or not i.photometric.startswith("MONOCHROME") for i in instances):
        what = "colour images: left out"
        return Problem(what, where, "SamplesPerPixel", f"{coloured} of {count}", "one sample, MONOCHROME", fatal=False)
    if short := [i for i in instances if i.missing]:
        return Problem(
            "the pixel data are truncated",
            where,
            found=f"{len(short)} of {count} files, {max(i.missing for i in short)} bytes short at most",
            remedy="Copy or export the series again.",
        )
    for syntax in sorted({i.syntax for i in instances}):
        if why := undecodable(syntax):
            return Problem(why.what, where, "TransferSyntaxUID", why.found, why.expected, why.remedy)
    if wrong := sum(frame.rescale is None for i in instances for frame in i.frames):
        found = f"{wrong} slices"
        return Problem("RescaleSlope or RescaleIntercept is 0 or no number", where, found=found)
    return None


def volumes_of(instances: Sequence[Instance], frames: Sequence[Frame]) -> Sorted:
    """The volumes that the placed ``frames`` of one series make."""
    result = Sorted()
    owner = {instance.file: instance for instance in instances}
    head = instances[0]
    frame_uids = {i.file: i.frame_of_reference for i in instances}
    planes = groups_of(frames, lambda a, b: same_plane(a, b) and frame_uids[a.file] == frame_uids[b.file])
    pieces = [piece for plane in planes for piece in apart(plane)]
    pieces, dropped = without_stray(pieces)
    result.refused += [warning(head, text) for text in dropped]
    kept = over_time(pieces)
    if len(kept) < len(pieces):
        text = "a series of volumes over time or over gradient directions: left out"
        result.refused.append(warning(head, text, f"{len(pieces) - len(kept)} volumes"))
    for number, (piece, _) in enumerate(kept, 1):
        part = f"{number} of {len(kept)}" if len(kept) > 1 else ""
        known = recognise(piece[0].facts)
        try:
            placed = stack(piece)
        except NotAStack as error:
            problem = Problem(
                error.what,
                place(head.file, head.number, part),
                found=error.found,
                expected="evenly spaced slices, one a position",
                remedy="Send the series again, whole; slices are never interpolated here.",
            )
            result.refused.append(Refusal(problem, head.study, known.modality))
            continue
        result.series.append(series_of(placed, owner, known, part))
        result.refused += [warning(head, *text) for text in doubts(placed, owner[piece[0].file])]
    return result


def doubts(placed: Stack, head: Instance) -> list[tuple[str, str]]:
    """What is suspicious about a stack that is even: slices as far apart as several of the steps that are stated."""
    step = float(np.linalg.norm(np.diff([frame.position for frame in placed.frames[:2]], axis=0)))
    if head.between is None or head.between <= 0 or head.kind == "mosaic":
        return []
    times = step / head.between
    if round(times) < 2 or abs(times - round(times)) > 0.05:
        return []
    found = f"{step:.2f} mm apart, SpacingBetweenSlices {head.between:.2f} mm"
    return [(f"only every {round(times)}th slice of what was acquired, by the header: used as it is", found)]


def warning(head: Instance, what: str, found: str | None = None) -> Refusal:
    return Refusal(Problem(what, place(head.file, head.number), found=found, fatal=False), head.study)


def series_of(placed: Stack, owner: dict[File, Instance], known: Recognition, part: str) -> Series:
    """A stack with what its instances say of it."""
    files = tuple(dict.fromkeys(frame.file for frame in placed.frames))
    rank = {file: number for number, file in enumerate(files)}
    head = owner[files[0]]
    facts = placed.frames[0].facts
    return Series(
        files=files,
        slices=tuple((rank[frame.file], frame.index) for frame in placed.frames),
        rescale=tuple(frame.rescale or (1.0, 0.0) for frame in placed.frames),
        grid=placed.grid,
        kind=cast(Literal["classic", "enhanced", "mosaic"], head.kind),
        modality=known.modality,
        confidence=known.confidence,
        reason=known.reason,
        number=head.number,
        study_uid=head.study,
        series_uid=head.series,
        frame_uid=head.frame_of_reference or None,
        patient=head.patient[:2],
        part=part,
        tilt=placed.tilt,
        three_d=facts.three_d,
        original=facts.image_type[:1] != ("DERIVED",) and "MPR" not in facts.image_type,
        synthetic=facts.synthetic,
    )
