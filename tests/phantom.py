"""A made-up head in several contrasts, and how it looks after it moved and was scanned anew."""

from __future__ import annotations

from itertools import product

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from medmae.imaging.geometry import resample
from medmae.imaging.volume import Grid, Volume

SIZE = 2.0  # mm
# Air, skull, CSF, grey matter, white matter, lesion as scanners show them; CT in Hounsfield units.
CONTRASTS = {
    "t1": (0, 60, 150, 420, 600, 330),
    "t2": (0, 40, 1000, 500, 380, 800),
    "flair": (0, 50, 90, 450, 370, 700),
    "ct": (-1000, 1100, 8, 38, 28, 22),
}


def motion(degrees: float, mm: float, seed: int, centre: np.ndarray) -> np.ndarray:
    """4x4: a turn about an axis through ``centre`` and a shift, in random directions."""
    rng = np.random.default_rng(seed)
    axis, shift = (v / np.linalg.norm(v) for v in rng.standard_normal((2, 3)))
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_rotvec(axis * np.radians(degrees)).as_matrix()
    matrix[:3, 3] = centre - matrix[:3, :3] @ centre + mm * shift
    return matrix


def corners_of(volume: Volume) -> np.ndarray:
    """The eight corners of the box around the head, mm."""
    index = np.argwhere(volume.array > volume.array.min() + 0.1 * np.ptp(volume.array))
    return volume.grid.voxel_to_mm(list(product(*zip(index.min(axis=0), index.max(axis=0), strict=True))))


def rescanned(volume: Volume, move: np.ndarray, spacing: tuple[float, float, float], seed: int) -> Volume:
    """The head after ``move``, acquired on an oblique, flipped and permuted grid of its own."""
    rng = np.random.default_rng(seed)
    there = Volume(volume.array, move @ volume.affine)
    corners = corners_of(there)
    axes = Rotation.from_rotvec(rng.uniform(-0.15, 0.15, 3)).as_matrix() @ (
        np.eye(3)[rng.permutation(3)] * rng.choice([-1, 1], 3)
    )
    centre = corners.mean(axis=0)
    half = np.abs((corners - centre) @ axes).max(axis=0) + 6
    shape = tuple(int(n) for n in np.ceil(2 * half / spacing))
    affine = np.eye(4)
    affine[:3, :3] = axes * spacing
    affine[:3, 3] = centre - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return resample(there, Grid(shape, affine), 1, fill=float(volume.array.min()))


def made_up_head() -> dict[str, Volume]:
    """One made-up head in every contrast: skull, CSF, folded grey and white matter, a lesion, noise, a coil's bias."""
    rng = np.random.default_rng(0)
    shape = (76, 90, 76)
    affine = np.diag([SIZE, SIZE, SIZE, 1.0])
    affine[:3, 3] = (-75, -95, -70)
    xyz = Grid(shape, affine).voxel_to_mm(np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1))
    depth = 1 - np.sqrt((((xyz - [1, -6, 5]) / [64, 80, 60]) ** 2).sum(-1))  # 0 at the skin
    lumps = ndimage.gaussian_filter(rng.standard_normal(shape), 6)
    depth += 0.06 * lumps / lumps.std()  # heads have a face and two ears: an ellipsoid may be turned as one likes
    depth[(np.linalg.norm(xyz - [28, 62, -10], axis=-1) < 14) | (np.linalg.norm(xyz - [-26, 62, -8], axis=-1) < 14)] = 0
    folds = ndimage.gaussian_filter(rng.standard_normal(shape), 2.5)
    folds /= folds.std()
    tissue = np.zeros(shape, int)
    tissue[depth > 0] = 1
    tissue[depth > 0.10] = 2
    tissue[depth + 0.05 * folds > 0.16] = 3
    tissue[depth + 0.08 * folds > 0.26] = 4
    tissue[(depth > 0.3) & (folds > 1.6)] = 2
    tissue[((xyz - [25, 10, 25]) ** 2).sum(-1) < 14**2] = 5
    volumes = {}
    for name, values in CONTRASTS.items():
        image = np.array(values, np.float32)[tissue]
        if name != "ct":
            bias = 1 + 0.06 * np.sin(xyz @ rng.standard_normal(3) / 60)
            image = image * bias
        image = image + rng.normal(0, 8 if name == "ct" else 12, shape) * (tissue > 0)
        volumes[name] = Volume(image.astype(np.float32), affine)
    return volumes
