"""The demo cohort's lesions: multiple-sclerosis-like spots in white matter, and tumours with core, rim and oedema.

Lesions are drawn in template space, so that they bend with the head. Each is an ellipsoid whose surface noise makes
irregular; its edge is soft over about a voxel. What is seen where two lesions meet is the worse one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from medmae.cohort.demo_anatomy import Field, Template, noise_field, rotation

LABELS: Final = {"background": 0, "tumour_core": 1, "oedema": 2, "enhancing_rim": 3, "white_matter_lesion": 4}
EXPLAINED: Final = {
    "tumour_core": "necrotic centre of a tumour: dark on T1 and T1c, bright on T2, between on FLAIR",
    "oedema": "swollen white matter around a tumour: bright on T2 and FLAIR, does not enhance",
    "enhancing_rim": "the tumour's living rim: bright on T1c",
    "white_matter_lesion": "spots in white matter: bright on T2 and FLAIR, iso- to hypointense on T1; some enhance",
}


@dataclass(frozen=True)
class Spot:
    """One multiple-sclerosis-like lesion. ``turned`` (3x3) divided by its radii takes mm offsets to radii."""

    centre: np.ndarray
    turned: np.ndarray
    radius: float  # the geometric mean of its half-axes, mm
    blackness: float  # 0: T1 as in fresh lesions; 1: a black hole
    uptake: float  # contrast agent, mM; 0: does not enhance


@dataclass(frozen=True)
class Tumour:
    """A tumour: radii of its necrotic core, its enhancing outer surface and its oedema, in mm."""

    centre: np.ndarray
    core: float
    outer: float
    oedema: float


@dataclass(frozen=True)
class Lesions:
    """All lesions of one study, and the noise that makes their outlines irregular."""

    spots: tuple[Spot, ...]
    tumour: Tumour | None
    outline: Field
    fingers: Field


@dataclass(frozen=True)
class LesionShares:
    """What share of each point lesions take, arrays (N,): of the point in ``core``, ``oedema``, ``rim`` and ``spot``;
    ``blackness`` and ``uptake`` (mM) are the spots' own there."""

    core: np.ndarray
    oedema: np.ndarray
    rim: np.ndarray
    spot: np.ndarray
    blackness: np.ndarray
    uptake: np.ndarray

    def labels(self) -> np.ndarray:
        """The label of each point, uint8 (N,): the lesion that takes more than half of it, tumours first."""
        label = np.zeros(self.core.shape, np.uint8)
        label[self.spot > 0.5] = LABELS["white_matter_lesion"]
        tumour = np.stack([self.core, self.oedema, self.rim])
        part = np.array([LABELS["tumour_core"], LABELS["oedema"], LABELS["enhancing_rim"]], np.uint8)
        inside = tumour.sum(axis=0) > 0.5
        label[inside] = part[tumour.argmax(axis=0)][inside]
        return label


def draw_lesions(rng: np.random.Generator, template: Template, has_tumour: bool) -> Lesions:
    """Lesions of one study: a tumour with at most a few small spots, or 5 to 20 spots, mostly beside the ventricles."""
    outline, fingers = noise_field(rng, template, 6, step=3.0), noise_field(rng, template, 5, step=3.0)
    tumour = None
    if has_tumour:
        outer = rng.uniform(10, 19)
        tumour = Tumour(
            centre=_tumour_centre(rng, template),
            core=outer * rng.uniform(0.45, 0.75),
            outer=outer,
            oedema=outer + rng.uniform(7, 16),
        )
    count = int(rng.integers(0, 4)) if has_tumour else int(5 + min(rng.poisson(7), 15))
    worst = 3.0 if has_tumour else 6.5
    active = 0.0 if has_tumour else 0.15
    return Lesions(tuple(_spots(rng, template, count, worst, active)), tumour, outline, fingers)


def _candidates(rng: np.random.Generator, template: Template, count: int) -> np.ndarray:
    """Points spread evenly over the template's box, mm."""
    return rng.uniform(template.low, template.high, (count, 3))


def _spots(rng: np.random.Generator, template: Template, count: int, worst: float, active: float) -> list[Spot]:
    """Spots centred in white matter, six times as often beside a ventricle as elsewhere."""
    points = _candidates(rng, template, 20_000)
    weight = np.where(template.wm.at(points) > 0.9, 0.15 + template.rim.at(points) ** 0.5, 0.0)
    weight[points[:, 2] < -30] *= 0.3  # fewer in brain stem and cerebellum
    chosen = rng.choice(len(points), size=count, replace=False, p=weight / weight.sum())
    spots = []
    for centre in points[chosen]:
        radius = float(np.clip(rng.lognormal(np.log(3.3), 0.4), 2.0, worst))
        ratios = np.exp(rng.normal(0, 0.25, 3))
        half_axes = radius * ratios / ratios.prod() ** (1 / 3)
        turned = rotation(rng.uniform(-90, 90, 3)) / half_axes
        uptake = float(rng.uniform(0.1, 0.35)) if rng.random() < active else 0.0
        spots.append(Spot(centre, turned, radius, float(rng.random() ** 2), uptake))
    return spots


def _tumour_centre(rng: np.random.Generator, template: Template) -> np.ndarray:
    """A place deep in the white matter of one hemisphere, above the cerebellum, some way from the midline."""
    points = _candidates(rng, template, 4_000)
    deep = (template.wm.at(points) > 0.8) & (np.abs(points[:, 0]) > 22) & (points[:, 2] > -8) & (points[:, 2] < 50)
    return np.asarray(points[deep][rng.integers(int(deep.sum()))])


def lesion_shares(lesions: Lesions, points: np.ndarray, wm: np.ndarray, spacing: float) -> LesionShares:
    """Shares of each of ``points`` (N, 3; template mm before the tumour's push) where white matter takes ``wm``.
    Spots and oedema stay in white matter; the solid tumour replaces what was there."""
    edge = 0.3 + 0.25 * spacing  # mm
    outline = lesions.outline.at(points)
    nothing = np.zeros(len(points), np.float32)
    spot, blackness, uptake = nothing.copy(), nothing.copy(), nothing.copy()
    for lesion in lesions.spots:
        near = np.flatnonzero(np.abs(points - lesion.centre).max(axis=1) < 3 * lesion.radius + 4)
        distance = np.linalg.norm((points[near] - lesion.centre) @ lesion.turned.T, axis=1) - 1
        share = _inside(distance * lesion.radius + 0.6 * outline[near], edge) * np.clip(wm[near] * 1.5 - 0.25, 0, 1)
        stronger = share > spot[near]
        here = near[stronger]
        spot[here], blackness[here] = share[stronger], lesion.blackness
        # Active plaques enhance as a ring about as often as as a whole; the ring is what makes them stand out.
        uptake[here] = lesion.uptake * np.exp(-(((distance[stronger] + 0.35) / 0.4) ** 2))
    if lesions.tumour is None:
        return LesionShares(nothing, nothing, nothing, spot, blackness, uptake)

    tumour = lesions.tumour
    distance = np.linalg.norm(points - tumour.centre, axis=1) + 1.8 * outline
    solid = _inside(distance - tumour.outer, edge)
    core = solid * _inside(distance - tumour.core + 1.2 * lesions.fingers.at(points), edge)
    # Oedema runs along white matter in fingers and spares cortex.
    reach = distance - tumour.oedema + 4.0 * lesions.fingers.at(points)
    oedema = (1 - solid) * _inside(reach, edge + 0.6) * np.clip(wm * 1.4 - 0.3, 0, 1)
    return LesionShares(core, oedema, solid - core, spot * (1 - solid - oedema), blackness, uptake)


def _inside(distance: np.ndarray, edge: float) -> np.ndarray:
    """1 well inside (negative mm), 0 well outside, 0.5 on the surface."""
    return np.asarray(1 / (1 + np.exp(np.clip(distance / edge, -30, 30))))
