"""The demo cohort's scanner: on which grid a head is imaged, and what goes wrong on the way.

Artefacts are torchio's (1.x). Their parameters are drawn here from the study's own generator, not by torchio's
``Random...`` transforms: those draw from torch's global generator, which studies made side by side would share.
"""

from __future__ import annotations

from threading import Lock
from typing import Any, Final

import numpy as np
from scipy import ndimage

from medmae.cohort.demo_anatomy import Head, Template, rotation
from medmae.imaging.volume import Grid

# Directions of the voxel axes in RAS+, one column an axis. Half of the studies are plain RAS; the others are what
# else comes from scanners and converters: LPS (DICOM's and ITK's order), sagittal slices, a tilted stack.
_AXES: Final = {
    "RAS": np.eye(3),
    "LPS": np.diag([-1.0, -1.0, 1.0]),
    "PIR": np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]),
}
GEOMETRIES: Final = ("RAS", "LPS", "RAS", "oblique", "RAS", "PIR")
_POINTS_AT_ONCE: Final = 400_000
_ROUGH: Final = 3  # voxels
_TORCH_RANDOM: Final = Lock()


def image_head(
    rng: np.random.Generator, template: Template, head: Head, geometry: str, spacing: float
) -> tuple[Grid, np.ndarray]:
    """The grid of a study's images, voxels of ``spacing`` mm, and its brain mask (bool, the grid's shape).

    ``geometry`` is an orientation code of ``_AXES`` or "oblique": RAS turned by 6 to 18 degrees about an axis at
    random and by up to 5 about each other. Air of 3 to 9 mm is left on each side.
    """
    axes = _AXES.get(geometry)
    if axes is None:
        turns = rng.uniform(-5, 5, 3)
        turns[rng.integers(3)] = rng.uniform(6, 18) * rng.choice([-1, 1])
        axes = rotation(turns)
    box = np.stack([template.low - 12, template.high + 12])
    corners = np.array([[box[i, 0], box[j, 1], box[k, 2]] for i in (0, 1) for j in (0, 1) for k in (0, 1)])
    along = (corners @ head.pose[:3, :3].T + head.pose[:3, 3]) @ axes
    start, stop = along.min(0), along.max(0)
    shape = np.ceil((stop - start) / spacing).astype(int) + 1
    affine = np.eye(4)
    affine[:3, :3] = axes * spacing
    affine[:3, 3] = axes @ start

    def brain_at(ijk: np.ndarray) -> np.ndarray:
        parts = np.array_split(ijk, -(-len(ijk) // _POINTS_AT_ONCE))
        return np.concatenate(
            [template.brain.at(head.to_template(part @ affine[:3, :3].T + affine[:3, 3])) for part in parts]
        )

    # First every third voxel; then all voxels of the cells (and their neighbours) that hold some brain.
    rough = tuple(-(-shape // _ROUGH))
    seen = brain_at(np.stack(np.unravel_index(np.arange(int(np.prod(rough))), rough), axis=1) * _ROUGH) > 0
    seen = ndimage.binary_dilation(seen.reshape(rough), np.ones((3, 3, 3)))
    for axis in range(3):
        seen = seen.repeat(_ROUGH, axis)
    seen = seen[tuple(slice(n) for n in shape)]
    share = np.zeros(shape, np.float32)
    share[seen] = brain_at(np.argwhere(seen))
    mask = largest_part(share > rng.uniform(0.42, 0.58))  # no two skull strips cut alike

    inside = np.argwhere(mask)
    air = np.round(rng.uniform(3, 9, (2, 3)) / spacing).astype(int)
    low, high = inside.min(0) - air[0], inside.max(0) + 1 + air[1]
    padding = [(max(0, -a), max(0, b - n)) for a, b, n in zip(low, high, shape, strict=True)]
    mask = np.pad(mask, padding)[tuple(slice(max(0, a), max(0, a) + b - a) for a, b in zip(low, high, strict=True))]
    affine[:3, 3] += affine[:3, :3] @ low
    i, j, k = mask.shape
    return Grid((i, j, k), affine), mask


def largest_part(mask: np.ndarray) -> np.ndarray:
    """The largest connected part of ``mask``, its holes filled."""
    parts, count = ndimage.label(mask)
    if count > 1:
        mask = parts == np.bincount(parts.ravel())[1:].argmax() + 1
    return np.asarray(ndimage.binary_fill_holes(mask))


def receive_coil(rng: np.random.Generator) -> np.ndarray:
    """The part of the bias field that a study's images share: 20 coefficients of torchio's cubic polynomial."""
    return rng.uniform(-0.10, 0.10, 20)


def scan(
    rng: np.random.Generator, image: np.ndarray, mask: np.ndarray, affine: np.ndarray, coil: np.ndarray
) -> np.ndarray:
    """``image`` (1 = white matter on it, 0 outside ``mask``) as the scanner stores it: int16, 0 outside of the mask,
    at least 1 inside. About an eighth of the images show motion, as many ghosting; all show bias field and noise."""
    import torch
    import torchio

    bias, motion, ghosting, noise = rng.spawn(4)
    scanned = image * bias_field(image.shape, coil + bias.uniform(-0.05, 0.05, 20))
    steps: list[Any] = []
    if motion.random() < 0.125:
        times = np.sort(np.clip(np.array([1, 2]) / 3 + motion.uniform(-0.1, 0.1, 2), 0, 1))
        steps.append(torchio.Motion(motion.normal(0, 0.7, (2, 3)), motion.normal(0, 0.7, (2, 3)), times, "linear"))
    if ghosting.random() < 0.125:
        count, axis = int(ghosting.integers(3, 7)), int(ghosting.integers(3))
        steps.append(torchio.Ghosting(count, axis, ghosting.uniform(0.15, 0.35), ghosting.uniform(0.02, 0.05)))
    level, seed = noise.uniform(0.012, 0.03), int(noise.integers(2**31))
    tensor = torch.from_numpy(np.ascontiguousarray(scanned[None], np.float32))
    artefact = torchio.ScalarImage(tensor=tensor, affine=affine)
    for step in (*steps, torchio.Noise(0, level, seed)):
        artefact = alone(step, artefact)

    gain = 10 ** noise.uniform(2.5, 3.3)  # arbitrary units: white matter at 300 to 2000
    stored = np.clip(np.round(artefact.data[0].numpy() * gain), 1, np.iinfo(np.int16).max)
    return np.where(mask, stored, 0).astype(np.int16)


def alone(transform: Any, image: Any) -> Any:
    """``transform(image)`` while no other thread is in torchio. Noise seeds torch's global generator, draws from it,
    and puts it back; every other transform draws a number from it too, to decide whether it applies, and would take
    one of the noise's."""
    with _TORCH_RANDOM:
        return transform(image)


def bias_field(shape: tuple[int, ...], coefficients: np.ndarray) -> np.ndarray:
    """torchio's polynomial bias field, evaluated on every fourth voxel or so and interpolated: it is that smooth."""
    import torch
    import torchio

    coarse = tuple(max(2, -(-n // 4)) for n in shape)
    transform = torchio.BiasField([float(value) for value in coefficients], 3)
    field = alone(transform, torch.ones((1, *coarse)))[0].numpy()
    return np.asarray(ndimage.zoom(field, [n / m for n, m in zip(shape, coarse, strict=True)], order=1))
