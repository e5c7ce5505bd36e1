"""One study opened and judged: its images, its labels, and everything that is wrong with them.

What :mod:`medmae.cohort.integrity` tells and what :mod:`medmae.cohort.store` refuses is decided here, once. A bad
image makes its study unusable; a bad label only itself, because neither pre-training nor synthesis needs it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import nibabel as nib
import numpy as np

from medmae.cohort.naming import image_stem
from medmae.cohort.study import Study
from medmae.errors import InputError, Problem
from medmae.imaging.dicom.series import Series
from medmae.imaging.geometry import corner_distance_mm, grids_agree, overlap_share
from medmae.imaging.nifti import check_voxels, read_image
from medmae.imaging.source import Source, read_source
from medmae.imaging.space import MIN_OVERLAP, other_places
from medmae.imaging.volume import Grid, Volume

MOST_LABEL_VALUES = 1 << 16  # a label map with a wider range is not one (FreeSurfer's go to 14 175)


@dataclass
class Examined:
    """``images`` and ``labels`` are those that can be used; ``problems`` name study and file."""

    images: dict[str, Volume] = field(default_factory=dict)
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    label_grids: dict[str, Grid] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    @property
    def usable(self) -> bool:
        return not any(problem.fatal for problem in self.problems)


def examine(study: Study, label_values: frozenset[int] | None = None, *, coregister: bool = False) -> Examined:
    """Read every file of ``study`` and judge it; nothing is raised for what a user can mend.

    With ``coregister`` the images will be registered to one another: where their headers put them is no matter.
    """
    result = Examined()
    for modality, path in study.images.items():
        volume, problems = examine_image(path)
        result.problems += [in_study(study, path, problem) for problem in problems]
        if volume is not None:
            result.images[modality] = volume
    if not coregister:
        result.problems += compare_grids(study, result.images)
    for name, path in study.labels.items():
        label, problems = examine_label(path, label_values)
        if label is not None:
            problems += place_of_label(label.grid, result.images)
            result.labels[name], result.label_grids[name] = label.array, label.grid
        result.problems += [in_study(study, path, replace(problem, fatal=False)) for problem in problems]
    return result


def in_study(study: Study, path: Source, problem: Problem) -> Problem:
    """``problem`` of a file, told as one of ``study``."""
    return replace(problem, where=f"{study.id}: {path}")


def examine_image(path: Source) -> tuple[Volume | None, list[Problem]]:
    """A usable image, or None, and what is wrong with it."""
    problems: list[Problem] = []
    if isinstance(path, Path) and (refused := unopenable(path)):
        return None, [refused]
    try:
        volume = read_source(path, problems)
    except InputError as error:
        more = voxels_all_the_same(path) if isinstance(path, Path) else []
        return None, [*problems, *error.problems, *more]
    problems = [replace(problem, fatal=False) for problem in problems]
    wrong = check_voxels(volume, str(path))
    if is_synthetic(path):
        problems.append(
            Problem(
                "this image is synthesised, not acquired",
                str(path),
                remedy="Leave it out of what models learn from or are judged by.",
                fatal=False,
            )
        )
    return (None if wrong else volume), [*problems, *wrong]


def unopenable(path: Path) -> Problem | None:
    """Why a file cannot even be opened: missing, a folder, empty, no permission."""
    where = str(path)
    try:
        if path.is_file() and path.stat().st_size == 0:
            return Problem("the file is empty", where, "size", "0 bytes", remedy="Copy or convert it again.")
        with open(path, "rb"):
            return None
    except FileNotFoundError:
        broken = path.is_symlink()
        return Problem("a link that leads nowhere" if broken else "no such file", where, remedy="Check the path.")
    except PermissionError:
        return Problem("no permission to read this file", where, remedy="Change its permissions.")
    except OSError as error:
        return Problem("the file cannot be opened", where, found=error.strerror, remedy="Check the path and the disk.")


def voxels_all_the_same(path: Path) -> list[Problem]:
    """What is wrong with the voxels of a file whose header was refused, so that one pass finds both."""
    try:
        values = np.asanyarray(nib.load(path).dataobj)
        if values.dtype.kind not in "biuf" or values.size == 0:
            return []
        volume = Volume(values.reshape(values.shape[0], -1, 1).astype(np.float32), np.eye(4))
        return check_voxels(volume, path)
    except Exception:  # the refusal already says why this file is unreadable; nibabel's reasons are of every kind
        return []


def is_synthetic(path: Source) -> bool:
    """Whether an image says that it was made by a model: a series by itself, a file by the side-car beside it."""
    if isinstance(path, Series):
        return path.synthetic
    sidecar = path.with_name(f"{image_stem(path)}.json")
    try:
        data = json.loads(sidecar.read_text(encoding="utf-8")) if sidecar.is_file() else None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return False
    return isinstance(data, dict) and data.get("synthetic") is True


def compare_grids(study: Study, volumes: Mapping[str, Volume]) -> list[Problem]:
    """Images of one study on other grids than the first: resampled where they show one place, refused where not."""
    refused = {problem.where or "": problem for problem in other_places(volumes)}
    problems = []
    first = next(iter(volumes), "")
    for modality, volume in volumes.items():
        grid, reference = volume.grid, volumes[first].grid
        where = f"{study.id}: {study.images[modality]}"
        if modality in refused:
            problems.append(replace(refused[modality], where=where))
        elif not grids_agree(reference, grid):
            problems.append(
                Problem(
                    f"{modality} is on another grid than {first}: it will be resampled",
                    where,
                    "grid",
                    f"{describe(grid)}{apart(grid, reference)}",
                    describe(reference),
                    "Nothing to do if they were acquired so; if they were not registered, use --coregister.",
                    fatal=False,
                )
            )
    return problems


def apart(grid: Grid, reference: Grid) -> str:
    distance = corner_distance_mm(grid, reference)
    return f", corners {distance:.2f} mm apart" if np.isfinite(distance) else ""


def describe(grid: Grid) -> str:
    """A grid in a few words: ``240x240x155 voxels of 1x1x1 mm, RAS``."""
    shape = "x".join(str(n) for n in grid.shape)
    spacing = "x".join(f"{size:.3g}" for size in grid.spacing)
    return f"{shape} voxels of {spacing} mm, {grid.orientation}"


def examine_label(path: Path, allowed: frozenset[int] | None) -> tuple[Volume | None, list[Problem]]:
    """A label map as integers (uint8, int16 or int32), or None, and what is wrong with it."""
    problems: list[Problem] = []
    if refused := unopenable(path):
        return None, [left_out(refused)]
    try:
        volume = read_image(path, problems)
    except InputError as error:
        return None, [*problems, *(left_out(problem) for problem in error.problems)]
    array = volume.array
    whole = np.rint(array)
    wrong = int(np.count_nonzero(~(array == whole)))  # NaN is not equal to itself
    if wrong:
        example = array[~(array == whole)][0]
        found = f"{wrong} voxels such as {example:g}"
        return None, [
            *problems,
            label_problem(path, "a label map holds other than whole numbers", found, "0, 1, 2, ..."),
        ]
    low, high = int(whole.min()), int(whole.max())
    if high - low >= MOST_LABEL_VALUES:
        return None, [
            *problems,
            label_problem(path, "this is an image, not a label map", f"values {low} to {high}", None),
        ]
    if allowed is not None:
        values = np.flatnonzero(np.bincount((whole - low).astype(np.int32).ravel())) + low
        unknown = sorted(set(values.tolist()) - allowed)
        if unknown:
            found, expected = ", ".join(map(str, unknown[:10])), ", ".join(map(str, sorted(allowed)))
            problems.append(label_problem(path, "values that dataset.json does not name", found, expected))
            return None, problems
    dtype = next(t for t in (np.uint8, np.int16, np.int32) if np.iinfo(t).min <= low and high <= np.iinfo(t).max)
    return volume.with_array(whole.astype(dtype)), problems


def label_problem(path: Path, what: str, found: str, expected: str | None) -> Problem:
    problem = Problem(what, str(path), "voxels", found, expected, "Correct the label map or dataset.json.")
    return left_out(problem)


def left_out(problem: Problem) -> Problem:
    return replace(problem, what=f"{problem.what}: the label is left out", fatal=False)


def place_of_label(grid: Grid, images: Mapping[str, Volume]) -> list[Problem]:
    """A label on the grid of no image will be resampled; one elsewhere is suspicious."""
    grids = [volume.grid for volume in images.values()]
    if not grids or any(grids_agree(grid, other) for other in grids):
        return []
    share = max(overlap_share(grid, other) for other in grids)
    what = "the label does not lie where the images are" if share < MIN_OVERLAP else "the label has a grid of its own"
    found = f"{describe(grid)}; {share:.0%} overlap"
    remedy = "Check its header." if share < MIN_OVERLAP else "It will be resampled; nothing to do if that is meant."
    return [Problem(what, None, "grid", found, describe(grids[0]), remedy, fatal=False)]
