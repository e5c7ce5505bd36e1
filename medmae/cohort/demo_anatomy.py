"""The demo cohort's anatomy: the MNI152 template and its tissue maps, bent into a different head for every study.

Template space is RAS+ mm (MNI). A :class:`Head` maps points of a study's world to template points:
``head pose⁻¹`` (rotation, scale, translation), then a diffeomorphism (a stationary velocity field integrated by
scaling and squaring: Arsigny et al., MICCAI 2006), then the push of a tumour, which is radial and monotonic. Each of
the three keeps its Jacobian determinant positive, so nothing folds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import ndimage

MARGIN = 4  # mm kept around the template's brain, for smoothing
LOWEST = -64  # MNI z in mm below which only spinal cord is left, down to the template's last slice
REACH = 16.0  # mm around the brain that displacement and noise fields cover
FIELD_STEP = 4.0  # mm between the nodes of displacement and noise fields
# Lateral ventricles (front and back), third ventricle's upper end, fourth ventricle: MNI mm inside each, both sides.
_VENTRICLE_SEEDS = ((5, 10, 12), (-5, 10, 12), (8, -5, 22), (-8, -5, 22), (0, -44, -32))
_VENTRICLE_BOXES = (((-42, -55, -2), (42, 40, 34)), ((-12, -58, -46), (12, -34, -18)))


@dataclass(frozen=True)
class Field:
    """Values on a grid of template space: ``array`` (nx, ny, nz), node 0 at ``origin`` mm, nodes ``step`` mm apart."""

    array: np.ndarray
    origin: np.ndarray
    step: float

    def at(self, points: np.ndarray) -> np.ndarray:
        """Linear interpolation at ``points`` (N, 3) mm; the nearest node's value beyond the edge. (N,) float32."""
        coordinates = ((points - self.origin) / self.step).T
        return ndimage.map_coordinates(self.array, coordinates, np.float32, order=1, mode="nearest")


@dataclass(frozen=True)
class Template:
    """The maps every study is made of, each a :class:`Field` in template space at 1 mm.

    ``brain`` 0 to 1 (its 0.5 level is the skull-stripped surface); ``wm gm csf`` tissue shares; ``ventricles`` the part
    of CSF inside them; ``rim`` 1 at the ventricles' wall falling off within a few mm; ``detail`` what the template's T1
    shows beyond its tissue shares (deep nuclei, myelination), in units of the WM-to-CSF contrast.
    """

    brain: Field
    wm: Field
    gm: Field
    csf: Field
    ventricles: Field
    rim: Field
    detail: Field
    low: np.ndarray = field(repr=False)  # the brain's box, mm
    high: np.ndarray = field(repr=False)


def load_template(spacing: float) -> Template:
    """Read the maps from nilearn's installation (no download); smoothed, so that ``spacing`` mm voxels do not alias."""
    from nilearn import datasets

    images = [load(resolution=1) for load in _loaders(datasets)]
    affine = np.asarray(images[0].affine, dtype=np.float64)
    t1, wm, gm, mask = (np.asarray(image.dataobj, dtype=np.float32) for image in images)
    mask[:, :, : int(LOWEST - affine[2, 3])] = 0
    inside = np.argwhere(mask > 0)
    low, high = inside.min(0), inside.max(0)
    start = np.maximum(low - MARGIN, 0)
    stop = np.minimum(high + MARGIN + 1, mask.shape)
    box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    t1, wm, gm, mask = (array[box] for array in (t1, wm, gm, mask))
    origin = affine[:3, :3] @ start + affine[:3, 3]

    csf = np.clip(1 - wm - gm, 0, 1)
    ventricles = csf * _ventricles(csf * mask, origin)
    total = wm + gm + csf
    wm, gm, csf = wm / total, gm / total, csf / total
    detail = _detail(t1, wm, gm, csf, mask)
    rim = ndimage.gaussian_filter(ventricles, 2.5)
    rim = np.clip(rim / 0.45, 0, 1) * (1 - ventricles)
    brain = ndimage.gaussian_filter(mask, 1.0)  # the template's mask is jagged: it follows single voxels
    sigma = np.sqrt(max(spacing**2 - 1, 0)) / 2.355  # the coarser voxel's point spread, as FWHM = voxel size

    def as_field(array: np.ndarray) -> Field:
        return Field(ndimage.gaussian_filter(array, sigma).astype(np.float32), origin, 1.0)

    return Template(
        brain=as_field(brain),
        wm=as_field(wm),
        gm=as_field(gm),
        csf=as_field(csf),
        ventricles=as_field(ventricles),
        rim=as_field(rim),
        detail=as_field(detail),
        low=affine[:3, :3] @ low + affine[:3, 3],
        high=affine[:3, :3] @ high + affine[:3, 3],
    )


def _loaders(datasets: object) -> list[Callable[..., Any]]:
    names = ("load_mni152_template", "load_mni152_wm_template", "load_mni152_gm_template", "load_mni152_brain_mask")
    return [getattr(datasets, name) for name in names]


def _ventricles(csf: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """Where CSF is a ventricle: the parts of CSF within boxes around the ventricles that contain a seed."""
    allowed = np.zeros(csf.shape, bool)
    for low, high in _VENTRICLE_BOXES:
        start, stop = (np.round(np.asarray(corner) - origin).astype(int) for corner in (low, high))
        allowed[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = True
    parts, _ = ndimage.label((csf > 0.5) & allowed)
    seeds = [tuple(np.round(np.asarray(seed) - origin).astype(int)) for seed in _VENTRICLE_SEEDS]
    inside = np.isin(parts, [part for part in (parts[seed] for seed in seeds) if part])
    return ndimage.gaussian_filter(ndimage.binary_dilation(inside).astype(np.float32), 0.7)


def _detail(t1: np.ndarray, wm: np.ndarray, gm: np.ndarray, csf: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The template's T1 minus its best fit by tissue shares, over the fitted WM-to-CSF contrast."""
    brain = (mask > 0) & (csf < 0.5)
    shares = np.stack([wm[brain], gm[brain], csf[brain]], axis=1)
    levels, *_ = np.linalg.lstsq(shares, t1[brain], rcond=None)
    rest = (t1 - levels[0] * wm - levels[1] * gm - levels[2] * csf) / (levels[0] - levels[2])
    return np.clip(rest, -0.25, 0.25) * (1 - csf) * mask


def noise_field(rng: np.random.Generator, template: Template, smoothness: float, step: float = FIELD_STEP) -> Field:
    """Gaussian noise smoothed with a sigma of ``smoothness`` mm, of zero mean and unit standard deviation."""
    origin = template.low - REACH
    shape = np.ceil((template.high + REACH - origin) / step).astype(int) + 1
    values = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), smoothness / step, mode="wrap")
    return Field((values - values.mean()) / values.std(), origin, step)


@dataclass(frozen=True)
class Head:
    """Where a study's world lies in template space. ``pose`` (4x4) takes template mm to world mm."""

    pose: np.ndarray
    displacement: tuple[Field, Field, Field]
    push_centre: np.ndarray = field(default_factory=lambda: np.zeros(3))  # template mm
    push_radius: float = 0.0  # mm; 0: no tumour
    push_strength: float = 0.0  # below 1, else it would fold

    def unposed(self, world: np.ndarray) -> np.ndarray:
        """World mm (N, 3) to template mm before the tumour's push: where the lesions are drawn."""
        inverse = np.linalg.inv(self.pose)
        points = world @ inverse[:3, :3].T + inverse[:3, 3]
        return points + np.stack([part.at(points) for part in self.displacement], axis=1)

    def pushed(self, points: np.ndarray) -> np.ndarray:
        """Unposed template mm to the place whose tissue the tumour pushed there: r → r (1 - s exp(-(r/R)²)).

        Its radial derivative is at least 1 - s > 0, so tissue is compressed and never folded.
        """
        if self.push_radius <= 0:
            return points
        offset = points - self.push_centre
        nearness = np.exp(-np.sum(offset**2, axis=1, keepdims=True) / self.push_radius**2)
        return points - self.push_strength * nearness * offset

    def to_template(self, world: np.ndarray) -> np.ndarray:
        """World mm (N, 3) to the template mm whose tissue is there."""
        return self.pushed(self.unposed(world))


def draw_pose(rng: np.random.Generator) -> np.ndarray:
    """A head as it lies in a scanner, 4x4 template mm to world mm: turned by about 5 degrees about each axis (12 at
    most), sized 0.94 to 1.06 along each axis and overall, shifted by about 8 mm."""
    turned = rotation(np.clip(rng.normal(0, 5, 3), -12, 12))
    sized = rng.uniform(0.96, 1.04) * rng.uniform(0.98, 1.02, 3)
    pose = np.eye(4)
    pose[:3, :3] = turned * sized
    pose[:3, 3] = np.clip(rng.normal(0, 8, 3), -20, 20)
    return pose


def rotation(degrees: Sequence[float] | np.ndarray) -> np.ndarray:
    """Turns about x, then y, then z: a 3x3 rotation matrix."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return np.asarray(about_z @ about_y @ about_x)


def draw_displacement(rng: np.random.Generator, template: Template) -> tuple[Field, Field, Field]:
    """A smooth diffeomorphism as displacements in mm (x, y, z): lobes by some mm, gyri by about one, and ventricles
    that are wider or narrower."""
    coarse, fine = rng.uniform(2.5, 4.0), rng.uniform(0.9, 1.4)  # standard deviations, mm
    velocity = np.stack(
        [coarse * noise_field(rng, template, 22).array + fine * noise_field(rng, template, 8).array for _ in range(3)]
    )
    # Sampling moves along the velocity: away from the ventricles narrows them, towards them widens them.
    widening = rng.uniform(-1.5, 4.0)
    nodes = np.stack(np.meshgrid(*(np.arange(n) for n in velocity.shape[1:]), indexing="ij"))
    origin = template.low - REACH
    places = nodes.reshape(3, -1).T * FIELD_STEP + origin
    nearness = ndimage.gaussian_filter(template.ventricles.at(places).reshape(velocity.shape[1:]), 8 / FIELD_STEP)
    slope = np.stack(np.gradient(nearness))
    velocity += widening * slope / max(np.linalg.norm(slope, axis=0).max(), 1e-6)

    step = velocity / FIELD_STEP / 2**6  # in nodes
    for _ in range(6):
        step = step + np.stack(
            [ndimage.map_coordinates(part, nodes + step, np.float32, order=1, mode="nearest") for part in step]
        )
    x, y, z = (Field((part * FIELD_STEP).astype(np.float32), origin, FIELD_STEP) for part in step)
    return x, y, z
