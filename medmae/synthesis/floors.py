"""What a synthesis has to beat: the mean of the training subjects, and per-voxel linear regression.

Both are fitted on the training cohort in the model's space (normalised intensities), and both know only what the
model may know of a held-out study: the modalities that are shown to it.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from scipy import ndimage

ALIGNMENTS = ("world", "box", "moments")
MARGIN = 1.15  # the template's half edge, in half extents of the average head


class Case(Protocol):
    """A prepared study (see :class:`medmae.cohort.store.PreparedStudy`)."""

    @property
    def id(self) -> str: ...
    @property
    def modalities(self) -> tuple[str, ...]: ...
    @property
    def affine(self) -> np.ndarray: ...
    @property
    def labels(self) -> tuple[str, ...]: ...
    def array(self, modality: str) -> np.ndarray: ...
    def label(self, name: str) -> np.ndarray: ...


def foreground(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """(D, H, W) bool: where any of the modalities is not background (0), holes filled."""
    union = np.logical_or.reduce([a != 0 for a in arrays.values()])
    filled: np.ndarray = ndimage.binary_fill_holes(union)
    return filled


def frame(alignment: str, mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """4x4: from the common frame to the voxels of a study with this foreground and (model grid) affine.

    ``world``: the common frame is the scanner's or the atlas's, in mm, as it is. ``box``: it is the foreground's
    bounding box (0.5 % trimmed at each side), -1 to 1 along each axis. ``moments``: the centroid is 0 and one
    standard deviation of the foreground 1, along each axis.
    """
    if alignment == "world":
        return np.linalg.inv(affine)
    centre, extent = [], []
    for axis in range(3):
        counts = mask.sum(axis=tuple(a for a in range(3) if a != axis)).astype(float)
        if alignment == "box":
            cumulated = np.cumsum(counts) / counts.sum()
            low, high = np.searchsorted(cumulated, (0.005, 0.995))
            centre.append((low + high) / 2)
            extent.append(max((high - low) / 2, 1.0))
        else:
            index = np.arange(len(counts))
            middle = (index * counts).sum() / counts.sum()
            centre.append(middle)
            extent.append(max(np.sqrt(((index - middle) ** 2 * counts).sum() / counts.sum()), 1.0))
    result = np.diag([*extent, 1.0])
    result[:3, 3] = centre
    return result


def pull(array: np.ndarray, matrix: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """``array`` on a grid of ``shape``: linear interpolation at ``matrix`` (4x4, its voxels to array's), else 0."""
    linear, offset = matrix[:3, :3], matrix[:3, 3]
    diagonal = np.diag(linear)
    if np.allclose(linear, np.diag(diagonal), atol=1e-6):
        linear = diagonal  # scipy's fast path
    result: np.ndarray = ndimage.affine_transform(
        array.astype(np.float32), linear, offset, tuple(shape), order=1, mode="constant", cval=0.0
    )
    return result


@dataclass
class Template:
    """The sum and the count of studies on a common grid; ``to_frame`` maps its voxels into the common frame."""

    alignment: str
    to_frame: np.ndarray
    shape: tuple[int, ...]
    sums: dict[str, np.ndarray] = field(default_factory=dict)
    counts: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def fit(cls, alignment: str, frames: Sequence[tuple[np.ndarray, tuple[int, ...]]], step: float = 1.0) -> Template:
        """An empty template that holds the training studies, given their (frame, shape); its voxels are ``step``
        times the studies' own on average."""
        corners = []
        for to_voxel, shape in frames:
            ends = np.array(list(itertools.product(*((0, n - 1) for n in shape))), float)
            back = np.linalg.inv(to_voxel)
            corners.append(ends @ back[:3, :3].T + back[:3, 3])
        low, high = np.min(corners, axis=(0, 1)), np.max(corners, axis=(0, 1))
        voxel = np.mean([np.linalg.norm(np.linalg.inv(m)[:3, :3], axis=1) for m, _ in frames], axis=0) * step
        middle, half = (low + high) / 2, (high - low) / 2 * MARGIN
        size = tuple(int(n) for n in np.minimum(np.ceil(2 * half / voxel) + 1, 320))
        to_frame = np.diag([*voxel, 1.0])
        to_frame[:3, 3] = middle - voxel * (np.array(size) - 1) / 2
        return cls(alignment, to_frame, size)

    def pulled(self, array: np.ndarray, mask: np.ndarray, to_voxel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A study's volume, and the share of its foreground, in the template's voxels."""
        matrix = to_voxel @ self.to_frame
        return pull(np.where(mask, array, 0), matrix, self.shape), pull(mask, matrix, self.shape)

    def add(self, modality: str, part: tuple[np.ndarray, np.ndarray], sign: int = 1) -> None:
        """One study's volume as :meth:`pulled` gives it; ``sign`` -1 takes it out again."""
        for store, values in zip((self.sums, self.counts), part, strict=True):
            if modality not in store:
                store[modality] = np.zeros(self.shape, np.float32)
            store[modality] += sign * values

    def mean(self, modality: str, to_voxel: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """The subjects' mean in a study's own voxels, over the subjects whose foreground reaches there; else 0."""
        counts = self.counts[modality]
        average = np.where(counts > 0.25, self.sums[modality] / np.maximum(counts, 0.25), 0)
        return pull(average, np.linalg.inv(to_voxel @ self.to_frame), shape)


class Regression:
    """Least squares of a target on the modalities shown, with an intercept, over all training brain voxels.

    One set of coefficients a combination, from the studies that have all of its modalities and the target. The sums
    of products are exact and kept per set of modalities, so every combination is solved without a second pass.
    """

    def __init__(self) -> None:
        self._gram: dict[tuple[str, ...], np.ndarray] = defaultdict(lambda: np.zeros(()))
        self._studies: dict[tuple[str, ...], int] = defaultdict(int)

    def add(self, arrays: Mapping[str, np.ndarray], brain: np.ndarray) -> None:
        """One training study: {modality: (D, H, W)} and its brain voxels."""
        names = tuple(sorted(arrays))
        columns = np.stack([np.ones(int(brain.sum())), *(arrays[m][brain].astype(np.float64) for m in names)])
        self._gram[names] = self._gram[names] + columns @ columns.T
        self._studies[names] += 1

    def coefficients(self, inputs: Sequence[str], target: str) -> tuple[np.ndarray, int] | None:
        """(intercept, one per input) and the number of studies behind them, or None when there is no such study."""
        wanted = (*inputs, target)
        gram, studies = np.zeros((len(wanted) + 1, len(wanted) + 1)), 0
        for names, products in self._gram.items():
            if set(wanted) <= set(names):
                index = [0, *(names.index(m) + 1 for m in wanted)]
                gram += products[np.ix_(index, index)]
                studies += self._studies[names]
        if studies == 0:
            return None
        solution = np.linalg.lstsq(gram[:-1, :-1], gram[:-1, -1], rcond=None)[0]
        return solution, studies

    def predict(self, arrays: Mapping[str, np.ndarray], inputs: Sequence[str], target: str) -> np.ndarray | None:
        """The target's (D, H, W) float32 from ``inputs``, or None (see :meth:`coefficients`)."""
        found = self.coefficients(inputs, target)
        if found is None:
            return None
        (intercept, *slopes), _ = found
        total = np.full(arrays[inputs[0]].shape, intercept, np.float32)
        for slope, name in zip(slopes, inputs, strict=True):
            total += np.float32(slope) * arrays[name].astype(np.float32)
        return total


@dataclass
class Floors:
    """Both floors, fitted. ``alignment_errors``: mean squared error of each alignment's leave-one-out mean on
    training studies, by which the best was chosen."""

    template: Template
    regression: Regression
    studies: int
    alignment_errors: dict[str, float]

    def mean(self, target: str, seen: np.ndarray, affine: np.ndarray) -> np.ndarray | None:
        """The training mean of ``target`` placed on a study whose foreground is ``seen``."""
        if target not in self.template.counts:
            return None
        return self.template.mean(target, frame(self.template.alignment, seen, affine), seen.shape)


def fit_floors(
    studies: Sequence[Case], modalities: Sequence[str], on_progress: Callable[[int, int, str], None] | None = None
) -> Floors:
    """Fit both floors on training studies.

    The mean is taken after the alignment (see :func:`frame`) whose leave-one-out mean has the smallest error on up to
    12 of the training studies: atlas-registered cohorts keep their millimetres, others are aligned by their brains.
    """
    tried = studies[:: max(1, len(studies) // 12)][:12]
    errors = {a: _leave_one_out(a, tried, modalities) for a in ALIGNMENTS}
    best = min(errors, key=lambda a: errors[a])
    regression, frames, masks = Regression(), [], []
    for done, study in enumerate(studies):
        arrays = {m: study.array(m).astype(np.float32) for m in study.modalities if m in modalities}
        mask = foreground(arrays)
        regression.add(arrays, brain_of(study, mask))
        masks.append(np.packbits(mask))  # an eighth of the memory: cohorts are large
        frames.append((frame(best, mask, study.affine), mask.shape))
        if on_progress:
            on_progress(done + 1, 2 * len(studies), study.id)
    template = Template.fit(best, frames)
    for done, (study, packed, (to_voxel, shape)) in enumerate(zip(studies, masks, frames, strict=True)):
        mask = np.unpackbits(packed, count=int(np.prod(shape))).reshape(shape).astype(bool)
        for m in study.modalities:
            if m in modalities:
                template.add(m, template.pulled(study.array(m), mask, to_voxel))
        if on_progress:
            on_progress(len(studies) + done + 1, 2 * len(studies), study.id)
    return Floors(template, regression, len(studies), errors)


def brain_of(study: Case, mask: np.ndarray) -> np.ndarray:
    """The study's brain mask where it has one that is not empty, else its foreground."""
    if "brainmask" in study.labels:
        brain: np.ndarray = study.label("brainmask") > 0
        if brain.any():
            return brain
    return mask


def _leave_one_out(alignment: str, studies: Sequence[Case], modalities: Sequence[str]) -> float:
    """Mean squared error inside the foreground of the others' mean, on every second voxel; inf for one study."""
    if len(studies) < 2:
        return float("inf") if alignment != "box" else 0.0
    loaded = []
    for study in studies:
        arrays = {m: study.array(m)[::2, ::2, ::2].astype(np.float32) for m in study.modalities if m in modalities}
        mask = foreground(arrays)
        coarse = np.asarray(study.affine) @ np.diag([2.0, 2.0, 2.0, 1.0])
        loaded.append((arrays, mask, frame(alignment, mask, coarse)))
    template = Template.fit(alignment, [(f, mask.shape) for _, mask, f in loaded])
    parts = [{m: template.pulled(a, mask, to_voxel) for m, a in arrays.items()} for arrays, mask, to_voxel in loaded]
    for own in parts:
        for m, part in own.items():
            template.add(m, part)
    errors = []
    for (arrays, mask, to_voxel), own in zip(loaded, parts, strict=True):
        for m, part in own.items():
            template.add(m, part, sign=-1)
            if template.counts[m].max() > 0.5:
                errors.append(float(np.mean((template.mean(m, to_voxel, mask.shape) - arrays[m])[mask] ** 2)))
            template.add(m, part)
    return float(np.mean(errors)) if errors else float("inf")
