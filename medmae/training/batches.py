"""Batches of crops from a prepared cohort: which study and where is a function of the seed and the sample's number.

Crops come straight from the blosc2 store (only the chunks they touch) on a few background threads, or, with
``cohort_on_device``, from copies of the whole cohort in the device's memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medmae.cohort.store import PreparedStudy
from medmae.plan import Plan, Triple

_AHEAD = 3  # batches read while one is trained on
_READERS = 2
_CELL = 8  # voxels along the edge of a cell of the map of foreground
_VALIDATION_CROPS = 16  # at most, of a study
_PICTURE = 96  # voxels along the edge of a preview, where a crop is smaller


@dataclass
class Batch:
    """``images`` {modality: (B, 1, D, H, W)}, zeros where a study lacks it; ``present`` {modality: (B,) bool, CPU};
    ``numbers`` the samples' numbers since the start of training, from which their randomness derives."""

    studies: list[str]
    images: dict[str, Tensor]
    present: dict[str, Tensor]
    numbers: list[int]


def sample_rng(seed: int, purpose: int, number: int) -> np.random.Generator:
    """The random generator of one sample for one purpose (crop, augmentation, ...)."""
    return np.random.default_rng([seed, purpose, number])


class Crops:
    """Training crops of ``studies`` by number, identical however training is interrupted or distributed."""

    def __init__(self, studies: Sequence[PreparedStudy], plan: Plan, seed: int) -> None:
        self.studies, self.plan, self.seed = list(studies), plan, seed
        self._on_device: dict[str, dict[str, Tensor]] = {}
        self._cells: dict[str, np.ndarray] = {}  # of foreground

    def study_of(self, number: int) -> PreparedStudy:
        """Every study once an epoch, in an order drawn anew for each, ``crops_per_volume`` samples at a time."""
        epoch, place = divmod(number // self.plan.sampling.crops_per_volume, len(self.studies))
        order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.studies))
        return self.studies[order[place]]

    def corner(self, study: PreparedStudy, number: int | None) -> Triple:
        """The crop's first voxel. A volume smaller than the crop lies anywhere within it (negative corner);
        ``number`` None asks for the centre."""
        slack = np.array(study.shape) - np.array(self.plan.image.crop)
        if number is None or self.plan.sampling.crop == "center":
            corner = np.floor_divide(slack, 2)
        else:
            rng = sample_rng(self.seed, 1, number)
            corner = rng.integers(np.minimum(slack, 0), np.maximum(slack, 0), endpoint=True)
            if self.plan.sampling.crop == "foreground" and rng.random() < self.plan.sampling.foreground_share:
                cells = self.foreground(study)
                if len(cells):
                    middle = cells[rng.integers(len(cells))] * _CELL + rng.integers(_CELL, size=3)
                    around = middle - np.array(self.plan.image.crop) // 2
                    corner = np.clip(around, np.minimum(slack, 0), np.maximum(slack, 0))
        return int(corner[0]), int(corner[1]), int(corner[2])

    def foreground(self, study: PreparedStudy) -> np.ndarray:
        """(n, 3) the cells of 8³ voxels of ``study`` that hold foreground in a modality of the plan: voxels that are
        not 0 where zero is background, else not the smallest value. From one look at the whole volume."""
        if study.id not in self._cells:
            found: np.ndarray | None = None
            for m in study.modalities:
                if m not in self.plan.modalities:
                    continue
                whole = study.array(m)
                masked = self.plan.image.intensity.has_background
                above = whole != 0 if masked else whole > whole.min()
                for axis in range(3):
                    above = np.logical_or.reduceat(above, np.arange(0, above.shape[axis], _CELL), axis=axis)
                found = above if found is None else found | above
            self._cells[study.id] = np.argwhere(np.zeros((0, 0, 0), bool) if found is None else found)
        return self._cells[study.id]

    def load_to(self, device: torch.device) -> None:
        """Keep every study in the memory of ``device`` from now on."""
        for study in self.studies:
            self._on_device[study.id] = {
                m: torch.from_numpy(study.array(m)).to(device) for m in study.modalities if m in self.plan.modalities
            }

    def crop(self, study: PreparedStudy, modality: str, corner: Triple) -> Tensor:
        """(D, H, W) float16, zeros beyond the volume."""
        size = self.plan.image.crop
        if study.id not in self._on_device:
            return torch.from_numpy(study.crop(modality, corner, size))
        whole = self._on_device[study.id][modality]
        low = [max(0, c) for c in corner]
        high = [min(n, c + s) for n, c, s in zip(whole.shape, corner, size, strict=True)]
        if any(a >= b for a, b in zip(low, high, strict=True)):
            return torch.zeros(size, dtype=whole.dtype, device=whole.device)
        inside = whole[low[0] : high[0], low[1] : high[1], low[2] : high[2]]
        before = [lo - c for lo, c in zip(low, corner, strict=True)]
        after = [c + s - hi for hi, c, s in zip(high, corner, size, strict=True)]
        margins = [m for axis in (2, 1, 0) for m in (before[axis], after[axis])]
        return F.pad(inside, margins) if any(margins) else inside

    def batch(self, samples: Sequence[tuple[PreparedStudy, Triple]], numbers: Sequence[int]) -> Batch:
        """The crops of ``samples`` as one batch of all the plan's modalities."""
        names = self.plan.modalities
        present = {m: torch.tensor([m in s.modalities for s, _ in samples]) for m in names}
        images = {}
        for m in names:
            found = [self.crop(s, m, c) if m in s.modalities else None for s, c in samples]
            blank = next((torch.zeros_like(x) for x in found if x is not None), None)
            if blank is None:
                home = next(iter(self._on_device[samples[0][0].id].values())).device if self._on_device else "cpu"
                blank = torch.zeros(self.plan.image.crop, dtype=torch.float16, device=home)
            images[m] = torch.stack([blank if x is None else x for x in found]).unsqueeze(1)
        return Batch([s.id for s, _ in samples], images, present, list(numbers))

    def training_batch(self, first: int, size: int) -> Batch:
        """Samples ``first`` to ``first + size`` of the training's sequence."""
        numbers = range(first, first + size)
        studies = [self.study_of(n) for n in numbers]
        return self.batch([(s, self.corner(s, n)) for s, n in zip(studies, numbers, strict=True)], numbers)

    def fixed(self) -> list[tuple[PreparedStudy, Triple]]:
        """The samples of validation, the same ones every time: the centre of every study, or, where training crops
        at random, about as many crops as would fill it."""
        samples = []
        for place, study in enumerate(self.studies):
            if self.plan.sampling.crop == "center":
                samples.append((study, self.corner(study, None)))
                continue
            fill = np.prod(np.maximum(np.array(study.shape) / np.array(self.plan.image.crop), 1))
            count = min(round(float(fill)), _VALIDATION_CROPS)
            samples += [(study, self.corner(study, place * _VALIDATION_CROPS + i)) for i in range(count)]
        return samples

    def fixed_batches(self, size: int, part: int = 0, parts: int = 1) -> Iterator[tuple[Batch, bool]]:
        """Every ``parts``-th sample of validation. All parts give equally many batches, because distributed processes
        must run the model equally often; False marks one that only fills up."""
        numbered = list(enumerate(self.fixed()))
        mine = numbered[part::parts]
        rounds = -(-len(numbered[::parts]) // size)
        for start in range(0, rounds * size, size):
            counts = start < len(mine)
            chosen = mine[start : start + size] if counts else numbered[:1]
            yield self.batch([sample for _, sample in chosen], [i for i, _ in chosen]), counts

    def mosaic(self) -> tuple[Batch, tuple[int, int]]:
        """Crops of the first study side by side in its middle axial slices, and how many along axes 0 and 1: one
        for crops of 96 voxels and more, of smaller ones as many as make a picture."""
        study, size = self.studies[0], self.plan.image.crop
        layout = max(1, _PICTURE // size[0]), max(1, _PICTURE // size[1])
        whole = np.array([layout[0] * size[0], layout[1] * size[1], size[2]])
        first = np.floor_divide(np.array(study.shape) - whole, 2)
        corners = [first + np.array([i * size[0], j * size[1], 0]) for i in range(layout[0]) for j in range(layout[1])]
        samples = [(study, (int(c[0]), int(c[1]), int(c[2]))) for c in corners]
        return self.batch(samples, range(len(samples))), layout


def prefetch(crops: Crops, starts: Sequence[int], size: int) -> Iterator[Batch]:
    """Training batches beginning at each of ``starts``, read ahead on background threads."""
    if crops._on_device:
        yield from (crops.training_batch(start, size) for start in starts)
        return
    pool = ThreadPoolExecutor(_READERS, thread_name_prefix="medmae-reader")
    waiting: deque[Future[Batch]] = deque()
    try:
        for start in starts:
            waiting.append(pool.submit(crops.training_batch, start, size))
            if len(waiting) > _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def to_device(images: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """float32 on ``device``; half precision travels."""
    if device.type == "cuda":
        images = {m: x if x.is_cuda else x.pin_memory() for m, x in images.items()}
    return {m: x.to(device, non_blocking=True).float() for m, x in images.items()}
