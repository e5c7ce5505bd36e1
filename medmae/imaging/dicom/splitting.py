"""Slices of one series taken apart into volumes.

Slices at one position belong to several volumes: they are taken apart by stack, kind of image, echo, inversion time,
b-value, time, acquisition and gradient, in this order, by the first that helps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Final

from medmae.imaging.dicom.facts import Facts
from medmae.imaging.dicom.header import Frame
from medmae.imaging.dicom.stacking import FEWEST, NotAStack, coincide, stack

Piece = tuple[list[Frame], tuple[str, ...]]  # slices of one volume, and what they were taken apart by
_OVER_TIME: Final = ("temporal", "trigger", "gradient", "volume")

# What tells slices at one position apart, in the order in which it is tried.
_APART: Final[tuple[tuple[str, Callable[[Facts], Hashable]], ...]] = (
    ("stack", lambda f: f.stack),
    ("image type", lambda f: f.image_type),
    ("echo", lambda f: f.echo),
    ("echo time", lambda f: None if f.te is None else round(f.te, 1)),
    ("inversion time", lambda f: None if f.ti is None else round(f.ti)),
    ("b-value", lambda f: None if f.b_value is None else round(f.b_value)),
    ("temporal", lambda f: f.temporal),
    ("acquisition", lambda f: f.acquisition),
    ("gradient", lambda f: f.gradient),
    ("volume", lambda f: f.volume),
    ("trigger", lambda f: f.trigger),
)


def groups_of(frames: Sequence[Frame], alike: Callable[[Frame, Frame], bool]) -> list[list[Frame]]:
    """Frames in groups that are each ``alike`` their first."""
    groups: list[list[Frame]] = []
    for frame in frames:
        for group in groups:
            if alike(group[0], frame):
                group.append(frame)
                break
        else:
            groups.append([frame])
    return groups


def apart(frames: list[Frame]) -> list[Piece]:
    """[(slices of one volume, what they were taken apart by)] of slices of one plane."""
    return split(frames, 0, ())


def split(frames: list[Frame], first: int, by: tuple[str, ...]) -> list[Piece]:
    """Take ``frames`` apart by the first of ``_APART[first:]`` that helps, and go on with the pieces."""
    if not coincide(frames):
        return [(frames, by)] if by or is_even(frames) else by_acquisition(frames)
    for number in range(first, len(_APART)):
        name, key = _APART[number]
        groups: dict[Hashable, list[Frame]] = defaultdict(list)
        for frame in frames:
            groups[key(frame.facts)].append(frame)
        if len(groups) > 1 and min(map(len, groups.values())) >= FEWEST:
            return [piece for group in groups.values() for piece in split(group, number + 1, (*by, name))]
    return [(frames, by)]


def by_acquisition(frames: list[Frame]) -> list[Piece]:
    """Uneven slices that are several even stacks, each of an acquisition (or stack) of its own."""
    for name, key in _APART:
        if name in ("stack", "echo", "acquisition"):
            groups: dict[Hashable, list[Frame]] = defaultdict(list)
            for frame in frames:
                groups[key(frame.facts)].append(frame)
            if len(groups) > 1 and all(len(group) >= FEWEST and is_even(group) for group in groups.values()):
                return [(group, (name,)) for group in groups.values()]
    return [(frames, ())]


def is_even(frames: Sequence[Frame]) -> bool:
    try:
        stack(frames)
    except NotAStack:
        return False
    return True


def without_stray(pieces: list[Piece]) -> tuple[list[Piece], list[str]]:
    """Single images beside a volume (a reference line, a report) are left out of the series, with a word."""
    volumes = [piece for piece in pieces if len(piece[0]) >= FEWEST]
    stray = sum(len(piece[0]) for piece in pieces if len(piece[0]) < FEWEST)
    if not volumes or not stray:
        return pieces, []
    return volumes, [f"{stray} images of other size or direction than the volume: left out of it"]


def over_time(pieces: list[Piece]) -> list[Piece]:
    """Without the volumes of a time series, or of single gradient directions: none of them alone is the modality."""
    families: dict[Hashable, list[Piece]] = defaultdict(list)
    for piece in pieces:
        facts = piece[0][0].facts
        families[facts.image_type, facts.echo, facts.b_value, facts.stack, facts.ti].append(piece)
    return [
        piece
        for family in families.values()
        for piece in family
        if len(family) == 1 or not any(name in _OVER_TIME for name in piece[1])
    ]
