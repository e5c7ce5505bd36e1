"""One study of the demo cohort: what it is to be, what is in it, and its images.

Every study is a function of the seed, its split and its number; each part of it draws from a random stream of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from medmae.cohort.demo_anatomy import Head, Template, draw_displacement, draw_pose
from medmae.cohort.demo_contrast import (
    MODALITIES,
    Anatomy,
    Protocol,
    Tissue,
    contrast,
    draw_anatomy,
    draw_protocol,
    draw_tissues,
    healthy_shares,
)
from medmae.cohort.demo_lesions import draw_lesions, lesion_shares
from medmae.cohort.demo_scanner import GEOMETRIES, image_head, receive_coil, scan
from medmae.imaging.volume import Grid, Volume

SPLITS: Final = ("train", "held_out")


@dataclass(frozen=True)
class DemoStudy:
    """What is decided about a study before it is made. ``number`` counts from 0 within its split."""

    split: str
    number: int
    missing: str | None
    has_tumour: bool
    geometry: str

    @property
    def name(self) -> str:
        return f"{'train' if self.split == 'train' else 'held'}-{self.number + 1:03d}"

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(modality for modality in MODALITIES if modality != self.missing)


def plan_study(seed: int, split: str, number: int) -> DemoStudy:
    """What study ``number`` of a split is to be.

    Studies are planned in threes, of which one has a tumour and (in training) one lacks a modality; which modality
    goes round, so that each is missing equally often, and so does the geometry.
    """
    start = np.random.default_rng([seed, SPLITS.index(split), 0])
    first_missing, first_geometry = start.permutation(len(MODALITIES)), int(start.integers(len(GEOMETRIES)))
    block, place = divmod(number, 3)
    draw = np.random.default_rng([seed, SPLITS.index(split), 1, block])
    incomplete, tumour = (int(value) for value in draw.integers(0, 3, 2))
    lacks = split == "train" and place == incomplete
    return DemoStudy(
        split,
        number,
        MODALITIES[first_missing[block % len(MODALITIES)]] if lacks else None,
        place == tumour,
        GEOMETRIES[(first_geometry + number) % len(GEOMETRIES)],
    )


@dataclass(frozen=True)
class Scene:
    """A study before it is imaged: the voxels of ``grid`` that are brain (``mask``) and, in their order, what is there
    (``anatomy``), under the study's own tissue properties and sequence settings."""

    head: Head
    grid: Grid
    mask: np.ndarray
    anatomy: Anatomy
    tissues: dict[str, Tissue]
    protocol: Protocol
    coil: np.ndarray

    def on_grid(self, values: np.ndarray) -> np.ndarray:
        """Values of the brain's voxels as an image; 0 elsewhere."""
        array = np.zeros(self.grid.shape, values.dtype)
        array[self.mask] = values
        return array


def draw_scene(template: Template, study: DemoStudy, seed: int, spacing: float) -> Scene:
    """Draw all of a study but its images. Each part has a random stream of its own, so that a change of one leaves the
    others as they are."""
    bend, ill, place, inside, machine = _streams(study, seed)[:-1]
    head, lesions = (
        Head(draw_pose(bend), draw_displacement(bend, template)),
        draw_lesions(ill, template, study.has_tumour),
    )
    if lesions.tumour is not None:
        radius, strength = 1.6 * lesions.tumour.outer, ill.uniform(0.15, 0.5)
        head = replace(head, push_centre=lesions.tumour.centre, push_radius=radius, push_strength=strength)
    grid, mask = image_head(place, template, head, study.geometry, spacing)
    unpushed = head.unposed(grid.voxel_to_mm(np.argwhere(mask)))
    points = head.pushed(unpushed)
    healthy = healthy_shares(inside, template, points)
    # A tumour lies where it grew; the tissue around it came from elsewhere.
    shares = lesion_shares(lesions, unpushed, healthy["wm"], spacing)
    anatomy = draw_anatomy(inside, template, points, shares, healthy, spacing)
    return Scene(head, grid, mask, anatomy, draw_tissues(inside), draw_protocol(machine), receive_coil(machine))


def make_study(template: Template, study: DemoStudy, seed: int, spacing: float) -> dict[str, Volume]:
    """The images of one study by file name: its modalities, ``seg`` and ``brainmask``. No file is touched."""
    scene = draw_scene(template, study, seed, spacing)
    arrays = {"seg": scene.on_grid(scene.anatomy.lesions.labels()), "brainmask": scene.mask.astype(np.uint8)}
    white = scene.anatomy.shares["wm"] > 0.9
    for modality, rng in zip(MODALITIES, _streams(study, seed)[-1].spawn(len(MODALITIES)), strict=True):
        if modality in study.modalities:
            image = contrast(modality, scene.anatomy, scene.tissues, scene.protocol)
            image = scene.on_grid(image / np.median(image[white]))
            arrays[modality] = scan(rng, image, scene.mask, scene.grid.affine, scene.coil)
    return {name: Volume(array, scene.grid.affine) for name, array in arrays.items()}


def _streams(study: DemoStudy, seed: int) -> list[np.random.Generator]:
    """For bending, lesions, place, tissue, machine, and last the images."""
    return np.random.default_rng([seed, SPLITS.index(study.split), 2, study.number]).spawn(6)
