"""Rigid motions between two images, and the search for the best one by mutual information.

A motion maps points of the ``fixed`` image's world to the ``moving`` image's, in RAS+ mm.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from medmae.imaging.alignment import COARSE, STAGES, Subject

BINS = 32
MIN_OVERLAP = 0.3  # share of one image's foreground in the other's field of view
STEP_BACK = np.array([0.12, -0.12, 0.10, 5.0, -5.0, 5.0])  # radians and mm: where the second search starts

Motion = np.ndarray  # (6,): rotation about x, y and z in radians (y first, then x, then z), translation in mm
Found = tuple[Motion, float]  # a motion and its mutual information


def matrix_of(motion: Motion, centre: np.ndarray) -> np.ndarray:
    """4x4, RAS+ mm: x -> rotation(x - centre) + centre + translation."""
    transform = _euler(motion, centre)
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(transform.GetMatrix()).reshape(3, 3)
    matrix[:3, 3] = transform.TransformPoint((0.0, 0.0, 0.0))
    return matrix


def apart(a: Motion, b: Motion, fixed: Subject) -> float:
    """How far two motions bring a corner of the foreground's box apart at most, mm."""
    return float(
        np.linalg.norm(
            moved(matrix_of(a, fixed.centre), fixed.corners) - moved(matrix_of(b, fixed.centre), fixed.corners), axis=1
        ).max()
    )


def moved(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def overlap(motion: Motion, fixed: Subject, moving: Subject) -> float:
    """How much of either foreground lies in the other's field of view: the larger share of the two."""
    there = matrix_of(motion, fixed.centre)
    shares = []
    for matrix, points, grid in (
        (there, fixed.points, moving.seen),
        (np.linalg.inv(there), moving.points, fixed.seen),
    ):
        index = grid.mm_to_voxel(moved(matrix, points))
        shares.append(((index >= -0.5) & (index <= np.array(grid.shape) - 0.5)).all(axis=1).mean())
    return float(max(shares))


def _euler(motion: Motion, centre: np.ndarray) -> Any:
    import SimpleITK as sitk

    return sitk.Euler3DTransform(centre.tolist(), *motion[:3].tolist(), motion[3:].tolist())


def search(fixed: Subject, moving: Subject, seed: int) -> tuple[Motion, Motion] | None:
    """Many short climbs, the best three taken further, the winner finished; and once more from a place beside it. None
    when the images have nothing in common at any position that was tried."""
    coarse = _distinct(fixed, moving, [climb(fixed, moving, start, 0, seed + 1) for start in _starts(fixed, moving)])
    middle = [found for start in coarse[:3] if (found := climb(fixed, moving, start[0], 1, seed + 1)) is not None]
    if not middle:
        return None
    winner = max(middle, key=lambda found: found[1])[0]
    one = climb(fixed, moving, winner, 2, seed + 1)
    other: Found | None = (winner + STEP_BACK * ([1.0] * 3 + [fixed.scale] * 3), 0.0)
    for stage in range(len(STAGES)):
        other = None if other is None else climb(fixed, moving, other[0], stage, seed + 2)
    return None if one is None or other is None else (one[0], other[0])


def _starts(fixed: Subject, moving: Subject) -> list[Motion]:
    """As the headers have it; the centres upon each other; those turned by 15 and 35 degrees and shifted by 30 mm."""
    centred = np.array([0.0, 0.0, 0.0, *(moving.centre - fixed.centre)])
    changes = [(axis, np.radians(angle)) for axis in range(3) for angle in (-35, -15, 15, 35)]
    changes += [(axis, 30 * fixed.scale * sign) for axis in range(3, 6) for sign in (-1, 1)]
    return [np.zeros(6), centred] + [centred + np.eye(6)[axis] * by for axis, by in changes]


def _distinct(fixed: Subject, moving: Subject, found: list[Found | None]) -> list[Found]:
    """The best of each group of results that mean one place, best first; none where too little overlaps to mean
    anything (information grows as the overlap shrinks)."""
    kept: list[Found] = []
    for result in sorted((one for one in found if one is not None), key=lambda one: -one[1]):
        new = all(apart(result[0], other[0], fixed) > COARSE.spacing * fixed.scale for other in kept)
        if new and overlap(result[0], fixed, moving) >= MIN_OVERLAP:
            kept.append(result)
    return kept


def climb(fixed: Subject, moving: Subject, start: Motion, stage: int, seed: int = 1) -> Found | None:
    """The motion near ``start`` that brings ``fixed`` onto ``moving`` with most mutual information (in nats; D. Mattes
    et al., IEEE TMI 22, 2003), at one resolution. None when the images do not meet there."""
    search = _method(fixed, moving, start, stage, seed)
    there, here = fixed.levels[stage], moving.levels[stage]
    try:
        found = search.Execute(there.image, here.image)
    except RuntimeError:  # all samples fell outside of the moving image
        return None
    return np.array(found.GetParameters()), -float(search.GetMetricValue())


def information(fixed: Subject, moving: Subject, motion: Motion, stage: int, seed: int = 1) -> float:
    """Mutual information (nats) at a motion; 0 when the images do not meet there."""
    method = _method(fixed, moving, motion, stage, seed)
    try:
        return -float(method.MetricEvaluate(fixed.levels[stage].image, moving.levels[stage].image))
    except RuntimeError:
        return 0.0


def _method(fixed: Subject, moving: Subject, start: Motion, number: int, seed: int) -> Any:
    import SimpleITK as sitk

    stage, level = STAGES[number], fixed.levels[number]
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(BINS)
    method.SetMetricFixedMask(level.around)
    method.SetMetricSamplingStrategy(method.RANDOM)  # off the grid: on it, mutual information has a false peak
    method.SetMetricSamplingPercentage(min(1.0, stage.samples / level.looked), seed)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(
        stage.first * fixed.scale, stage.last * fixed.scale, stage.iterations, 0.5, 1e-9
    )
    method.SetOptimizerScales([fixed.radius**2] * 3 + [1.0] * 3)  # a radian moves a point at the radius by as much
    method.SetInitialTransform(_euler(start, fixed.centre), inPlace=False)
    return method


@contextmanager
def one_thread() -> Iterator[None]:
    """SimpleITK on one thread, so that sums are taken in one order and results are the same bit for bit."""
    import SimpleITK as sitk

    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)
