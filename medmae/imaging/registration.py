"""The images of one study brought to one place: rigid registration by mutual information, checked.

A patient moves between series and lies differently in another scanner; headers do not know. Only affines change here:
no voxel is interpolated, so whatever resamples afterwards does it once. How a motion is searched for:
:mod:`medmae.imaging.motions`; here is when the result is believed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from medmae.errors import InputError, Problem, nearest
from medmae.imaging.alignment import Subject, subject
from medmae.imaging.motions import MIN_OVERLAP, Motion, apart, information, matrix_of, one_thread, overlap, search
from medmae.imaging.nifti import check_voxels
from medmae.imaging.volume import Volume

# Lengths are for a head; those of a smaller thing shrink with it. The values lie between what was measured on pairs
# that belong together (spread up to 0.3 mm, peak from 1.3, overlap 1) and on pairs that do not (from 7 mm, up to 1.1).
TOLERANCE_MM = 2.0  # two searches that end further apart have not found one place
MIN_PEAK = 1.15  # information at the result, over the most that is found a finger's breadth away
MAX_ROTATION = 45.0  # degrees; nobody lies more obliquely, and the search would not have found it reliably
MIN_THICKNESS = 0.08  # of the longest side; thinner slabs slip along their own plane's normal
STILL_MM = 1.0  # the method's own error: a smaller motion than this is not corrected

AWAY = ((0, 0.2), (1, 0.2), (2, 0.2), (3, 12.0), (4, 12.0), (5, 12.0))  # a finger's breadth, for the peak


@dataclass(frozen=True)
class Registration:
    """How one image was brought to the ``reference``.

    ``matrix``: 4x4, from the image's own RAS+ mm to the reference's; the identity when the image did not lie more than
    the method's own error away (``moved`` False). ``rotation_deg``, ``translation_mm`` (of the centre of what is
    shown): what was found. ``information``, ``information_before``: mutual information in nats, with and without the
    motion. ``spread_mm``: how far apart two searches from different places put a corner of the head; the measure of
    confidence. ``peak``: information over the most there is 12 mm or 11 degrees away. ``overlap``: share of one image's
    foreground in the other's field of view.
    """

    reference: str
    matrix: np.ndarray
    moved: bool
    rotation_deg: float
    translation_mm: float
    information: float
    information_before: float
    spread_mm: float
    peak: float
    overlap: float

    def to_json(self) -> dict[str, Any]:
        """Numbers only: nothing that names anybody."""
        numbers = {
            name: round(float(getattr(self, name)), 4)
            for name in ("rotation_deg", "translation_mm", "information", "information_before")
            + ("spread_mm", "peak", "overlap")
        }
        return {
            "reference": self.reference,
            "moved": self.moved,
            **numbers,
            "matrix": [[round(float(v), 9) for v in row] for row in self.matrix],
        }

    def __str__(self) -> str:
        done = "registered" if self.moved else "left in place"
        return (
            f"{done}: {self.translation_mm:.1f} mm and {self.rotation_deg:.1f} degrees from {self.reference}, "
            f"two searches {self.spread_mm:.2f} mm apart"
        )


@dataclass(frozen=True)
class Coregistered:
    """``volumes``: all in the world and frame of the ``reference``, voxels untouched. ``registrations``: how each but
    the reference came there."""

    volumes: dict[str, Volume]
    reference: str
    registrations: dict[str, Registration]

    def to_json(self) -> dict[str, Any]:
        return {
            "reference": self.reference,
            "registrations": {name: found.to_json() for name, found in self.registrations.items()},
        }


def coregister(
    volumes: Mapping[str, Volume],
    reference: str | None = None,
    *,
    tolerance_mm: float = TOLERANCE_MM,
    seed: int = 0,
) -> Coregistered:
    """Bring the images of one study, {modality: Volume}, to where the ``reference`` (default: the first) has them.

    Grids, contrasts, spacings and frames of reference may differ; the same head, or a part of it, must be shown. Each
    image's affine is multiplied by the rigid motion found; arrays are the very same. Images that lie right to within
    the method's error (:data:`STILL_MM`) keep their affine. Same ``seed``, same result, bit for bit.

    Raises :class:`InputError` for an unknown reference, and when images could not be registered: all of them are named,
    each with the reason. ``tolerance_mm``: how far two independent searches may end apart.
    """
    if not volumes:
        raise InputError("a study needs at least one image", field="images", found="none")
    reference = next(iter(volumes)) if reference is None else reference
    if reference not in volumes:
        remedy = nearest(reference, volumes)
        raise InputError("the study has no such image", field="reference", found=reference, remedy=remedy)
    subjects: dict[str, Subject] = {}
    registrations: dict[str, Registration] = {}
    problems: list[Problem] = []
    for name, volume in volumes.items() if len(volumes) > 1 else ():
        try:
            subjects[name] = _subject(volume, name)
        except InputError as error:
            problems += error.problems
    fixed = subjects.pop(reference, None)
    for name, moving in subjects.items():
        if fixed is None:
            break
        try:
            with one_thread():
                registrations[name] = _register(fixed, moving, name, reference, tolerance_mm, seed)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError("images of this study cannot be registered to one another", problems=problems)
    frame = volumes[reference].frame
    moved = {
        name: Volume(volume.array, registrations[name].matrix @ volume.affine, frame)
        if name in registrations
        else volume
        for name, volume in volumes.items()
    }
    return Coregistered(moved, reference, registrations)


def _subject(volume: Volume, name: str) -> Subject:
    wrong = check_voxels(volume, name)
    if wrong:
        raise InputError(wrong[0].what, problems=wrong)
    prepared = subject(volume)
    if prepared is None:
        what, found = "nothing to register: no head stands out from the background", "one even brightness, or specks"
        raise _refusal(name, what, found)
    extents = [n * size for n, size in zip(volume.shape, volume.spacing, strict=True)]
    least = MIN_THICKNESS * max(extents)
    if min(extents) < least:
        raise _refusal(name, "too thin to be registered", f"{min(extents):.1f} mm", f"at least {least:.1f} mm")
    return prepared


def _register(
    fixed: Subject, moving: Subject, name: str, reference: str, tolerance_mm: float, seed: int
) -> Registration:
    what = f"{name} cannot be registered to {reference}"
    ends = search(fixed, moving, seed)
    if ends is None:
        raise _refusal(name, what, "the images have nothing in common at any position that was tried")
    result = _judged(fixed, moving, (ends[0] + ends[1]) / 2, apart(*ends, fixed), reference, seed)
    _refuse_unlikely(result, name, what, tolerance_mm * fixed.scale)
    return result


def _judged(fixed: Subject, moving: Subject, motion: Motion, spread: float, reference: str, seed: int) -> Registration:
    still = np.zeros(6)
    here = information(fixed, moving, motion, 1, seed + 1)
    away = []
    for axis, by in AWAY:
        for sign in (-1, 1):
            other = motion.copy()
            other[axis] += sign * by * (fixed.scale if axis > 2 else 1)
            away.append(information(fixed, moving, other, 1, seed + 1))
    matrix = matrix_of(motion, fixed.centre)
    moves = apart(motion, still, fixed) > STILL_MM * fixed.scale
    angle = np.degrees(np.arccos(np.clip((np.trace(matrix[:3, :3]) - 1) / 2, -1, 1)))
    return Registration(
        reference=reference,
        matrix=np.linalg.inv(matrix) if moves else np.eye(4),
        moved=moves,
        rotation_deg=float(angle),
        translation_mm=float(np.linalg.norm(motion[3:])),
        information=here,
        information_before=information(fixed, moving, still, 1, seed + 1),
        spread_mm=spread,
        peak=here / max(*away, 1e-6),
        overlap=overlap(motion, fixed, moving),
    )


def _refuse_unlikely(result: Registration, name: str, what: str, tolerance_mm: float) -> None:
    """Raise with everything that speaks against the result."""
    before = result.information_before
    checks = (
        (
            result.spread_mm <= tolerance_mm,
            f"two searches ended {result.spread_mm:.1f} mm apart",
            f"at most {tolerance_mm:.1f} mm",
        ),
        (
            result.peak >= MIN_PEAK,
            f"the place found is {result.peak:.2f} times as good as those around it",
            f"at least {MIN_PEAK} times",
        ),
        (
            result.overlap >= MIN_OVERLAP,
            f"{result.overlap:.0%} of one lies in the other's field of view",
            f"at least {MIN_OVERLAP:.0%}",
        ),
        (
            result.rotation_deg <= MAX_ROTATION,
            f"turned by {result.rotation_deg:.0f} degrees",
            f"at most {MAX_ROTATION:.0f} degrees",
        ),
        (
            result.information >= 0.98 * before or not result.moved,
            f"mutual information {result.information:.3f} after, {before:.3f} before",
            "more than before",
        ),
    )
    wrong = [(found, expected) for fine, found, expected in checks if not fine]
    if wrong:
        raise _refusal(name, what, "; ".join(found for found, _ in wrong), "; ".join(due for _, due in wrong))


def _refusal(name: str, what: str, found: str, expected: str | None = None) -> InputError:
    return InputError(
        what,
        where=name,
        field="coregister",
        found=found,
        expected=expected,
        remedy="Look at the images: of one patient and one place? Leave this one out, or register it otherwise.",
    )
