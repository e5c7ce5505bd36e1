"""The floors are what they are called, and as strong as such floors can fairly be."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from scipy import ndimage
from sklearn.linear_model import LinearRegression

from medmae.synthesis.floors import Regression, Template, fit_floors, foreground, frame, pull


@dataclass
class Case:
    id: str
    arrays: dict[str, np.ndarray]
    affine: np.ndarray = field(default_factory=lambda: np.diag([2.0, 2.0, 2.0, 1.0]))
    masks: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def modalities(self):
        return tuple(self.arrays)

    @property
    def labels(self):
        return tuple(self.masks)

    def array(self, modality):
        return self.arrays[modality].astype(np.float16)

    def label(self, name):
        return self.masks[name]


def head(shape=(40, 48, 36), centre=(20, 24, 18), radii=(14, 18, 13)):
    """A ball-like head with a bright core off its centre, so that misplacing it costs."""
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    u = (grid - centre) / radii
    inside = (u**2).sum(-1) < 1
    core = ((u - (0.3, 0.2, -0.1)) ** 2).sum(-1) < 0.15
    return np.where(inside, np.where(core, 2.0, -0.5 + 0.3 * u[..., 1]), 0).astype(np.float32)


def case(name, seed, **placement):
    rng = np.random.default_rng(seed)
    image = head(**placement)
    noisy = np.where(image != 0, image + 0.2 * rng.normal(size=image.shape), 0).astype(np.float32)
    return Case(name, {"t1": noisy, "t2": np.where(image != 0, 1 - noisy, 0).astype(np.float32)})


def test_regression_is_scikit_learns_on_the_voxels_of_all_studies_that_have_the_modalities():
    rng = np.random.default_rng(0)
    regression, rows = Regression(), []
    for names in (("t1", "t2", "flair"), ("t1", "flair"), ("flair", "t1", "t2", "pd"), ("t1", "t2")):
        arrays = {m: rng.normal(1, 2, size=(6, 7, 8)) for m in names}
        arrays["t1"] = arrays["t1"] + 0.5 * arrays.get("flair", 0)
        brain = rng.random((6, 7, 8)) < 0.6
        regression.add(arrays, brain)
        if {"t1", "t2", "flair"} <= set(names):
            rows.append(np.stack([arrays[m][brain] for m in ("t1", "t2", "flair")], axis=1))
    table = np.concatenate(rows)
    expected = LinearRegression().fit(table[:, :2], table[:, 2])
    coefficients, studies = regression.coefficients(("t1", "t2"), "flair")
    assert studies == 2
    np.testing.assert_allclose(coefficients, [expected.intercept_, *expected.coef_], rtol=1e-8)
    held_out = {m: rng.normal(size=(3, 4, 5)).astype(np.float32) for m in ("t1", "t2")}
    predicted = regression.predict(held_out, ("t1", "t2"), "flair")
    flat = np.stack([held_out["t1"].ravel(), held_out["t2"].ravel()], axis=1)
    np.testing.assert_allclose(predicted.ravel(), expected.predict(flat), atol=1e-5)
    assert regression.predict(held_out, ("t1", "t2"), "swi") is None


def test_the_mean_of_registered_studies_is_their_plain_mean():
    # Same affine, same shape, heads of different size: an atlas-registered cohort's mean is voxel by voxel.
    cases = [case(str(i), i, radii=(13 + i % 3, 17, 12)) for i in range(5)]
    world = fit_template(cases, "world")
    masks = np.stack([foreground(c.arrays) for c in cases])
    expected = np.where(masks.any(0), np.stack([c.array("t1") for c in cases]).sum(0, dtype=float), 0)
    expected = expected / np.maximum(masks.sum(0), 1)
    seen = masks[0]
    got = world.mean("t1", frame("world", seen, cases[0].affine), seen.shape)
    np.testing.assert_allclose(got[seen], expected[seen], atol=1e-2)  # float16 store


def fit_template(cases, alignment):
    frames = [(frame(alignment, foreground(c.arrays), c.affine), c.arrays["t1"].shape) for c in cases]
    template = Template.fit(alignment, frames)
    for c, (to_voxel, _) in zip(cases, frames, strict=True):
        for m in c.modalities:
            template.add(m, template.pulled(c.array(m), foreground(c.arrays), to_voxel))
    return template


def test_heads_at_other_places_and_sizes_are_brought_together_before_averaging():
    placements = [
        {"centre": (20, 24, 18), "radii": (14, 18, 13)},
        {"shape": (50, 60, 44), "centre": (30, 24, 20), "radii": (16, 20, 15)},
        {"shape": (44, 70, 40), "centre": (16, 40, 22), "radii": (12, 16, 12)},
        {"shape": (60, 60, 60), "centre": (38, 30, 35), "radii": (15, 19, 14)},
    ]
    *training, held_out = (case(str(i), i, **placement) for i, placement in enumerate(placements))
    floors = fit_floors(training, ("t1", "t2"))
    errors = floors.alignment_errors
    assert floors.template.alignment in ("box", "moments")
    assert errors[floors.template.alignment] < 0.5 * errors["world"]
    seen = foreground(held_out.arrays)
    mean = floors.mean("t1", seen, held_out.affine)
    clean = head(**placements[-1])
    assert np.corrcoef(mean[seen], clean[seen])[0, 1] > 0.9  # three subjects' mean, in the fourth's place and size
    assert floors.mean("flair", seen, held_out.affine) is None


def test_an_atlas_registered_cohort_keeps_its_millimetres():
    # Cropped boxes and partly missing brains, but one atlas space: only the millimetres are right.
    cases = []
    for i in range(6):
        image = case(str(i), i)
        cut = min(6 * i, 24)
        for m in image.arrays:
            image.arrays[m] = image.arrays[m][:, cut:, :]  # as if the field of view were shorter
        image.affine = image.affine @ np.array([[1, 0, 0, 0], [0, 1, 0, cut], [0, 0, 1, 0], [0, 0, 0, 1.0]])
        cases.append(image)
    floors = fit_floors(cases, ("t1", "t2"))
    assert floors.template.alignment == "world"
    seen = foreground(cases[2].arrays)
    mean = floors.mean("t1", seen, cases[2].affine)
    assert np.corrcoef(mean[seen], head()[:, 12:, :][seen])[0, 1] > 0.98


def test_the_regression_is_fitted_inside_the_brain_mask():
    image = case("a", 0)
    brain = ndimage.binary_erosion(image.arrays["t1"] != 0, iterations=4)
    spoilt = {"t1": image.arrays["t1"], "t2": np.where(brain, image.arrays["t2"], 50.0).astype(np.float32)}
    floors = fit_floors([Case("a", spoilt, masks={"brainmask": brain.astype(np.uint8)})], ("t1", "t2"))
    coefficients, _ = floors.regression.coefficients(("t1",), "t2")
    np.testing.assert_allclose(coefficients, [1, -1], atol=5e-3)  # t2 = 1 - t1 in the brain


def test_pull_follows_the_matrix_on_an_oblique_grid():
    image = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(20, 22, 24)), 2).astype(np.float32)
    angle = 0.3
    matrix = np.eye(4)
    matrix[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    matrix[:3, 3] = (4, -1, 0.5)
    got = pull(image, matrix, (18, 18, 18))
    for index in ((9, 9, 9), (5, 12, 3), (14, 4, 16)):
        place = (matrix @ [*index, 1])[:3]
        assert got[index] == pytest.approx(ndimage.map_coordinates(image, place[:, None], order=1)[0], abs=1e-6)
