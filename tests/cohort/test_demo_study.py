"""What the demo's studies are made of: anatomy that does not fold, contrasts that follow from tissues."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from medmae.cohort.demo_anatomy import Template, load_template
from medmae.cohort.demo_contrast import TISSUES, draw_protocol, signal
from medmae.cohort.demo_study import DemoStudy, Scene, draw_scene, make_study, plan_study

SPACING, SEED = 4.0, 5
STUDIES = [DemoStudy("held_out", number, None, number % 2 == 0, "RAS") for number in range(4)]


@pytest.fixture(scope="module")
def template() -> Template:
    return load_template(SPACING)


@pytest.fixture(scope="module")
def scenes(template: Template) -> list[Scene]:
    return [draw_scene(template, study, SEED, SPACING) for study in STUDIES]


def test_template_maps_are_where_mni_coordinates_say(template: Template) -> None:
    def at(name: str, x: float, y: float, z: float) -> float:
        return float(getattr(template, name).at(np.array([[x, y, z]]))[0])

    assert at("ventricles", 5, 10, 12) > 0.6 and at("ventricles", -8, -5, 22) > 0.6  # lateral ventricles
    assert at("ventricles", 0, -44, -32) > 0.5  # the fourth
    assert at("wm", 28, -30, 30) > 0.9 and at("wm", -28, -30, 30) > 0.9
    assert at("gm", 13, 12, 10) > 0.6  # caudate nucleus
    assert at("brain", 0, -90, 60) < 0.1 and at("brain", 0, 0, -70) < 0.1
    assert at("brain", 0, -42, -60) > 0.9 and at("brain", 0, -42, -72) < 0.1  # the cord is cut, not drawn out
    assert at("csf", 0, -60, 50) > 0.3 and at("ventricles", 0, -60, 50) < 0.01  # the midline fissure is no ventricle


def test_deformations_do_not_fold(template: Template, scenes: list[Scene]) -> None:
    """The Jacobian determinant of world to template by central differences, with and without a tumour's push."""
    rng = np.random.default_rng(0)
    for scene in scenes:
        inside = np.argwhere(scene.mask)
        points = scene.grid.voxel_to_mm(inside[rng.integers(len(inside), size=20_000)] + rng.uniform(-0.5, 0.5, 3))
        columns = [
            (scene.head.to_template(points + step) - scene.head.to_template(points - step)) / 0.2
            for step in 0.1 * np.eye(3)
        ]
        determinant = np.linalg.det(np.stack(columns, axis=-1))
        assert determinant.min() > 0.05
        assert determinant.std() > 0.1  # it bends, and is not an affine map
    assert [scene.head.push_radius > 0 for scene in scenes] == [True, False, True, False]


def test_heads_are_turned_shifted_and_sized_as_between_native_scans(template: Template) -> None:
    """The rigid part of world to template, from a least-squares affine fit and its polar decomposition."""
    rng = np.random.default_rng(1)
    world = rng.uniform(template.low, template.high, (5_000, 3))
    turns, shifts, sizes = [], [], []
    for number in range(8):
        head = draw_scene(template, replace(STUDIES[1], number=number), SEED, SPACING).head
        fit, *_ = np.linalg.lstsq(np.c_[world, np.ones(len(world))], head.to_template(world), rcond=None)
        u, size, vt = np.linalg.svd(fit[:3].T)
        turns.append(Rotation.from_matrix(u @ vt))
        shifts.append(fit[3])
        sizes.append(size.prod())
    angles = [np.degrees((a.inv() * b).magnitude()) for a, b in combinations(turns, 2)]
    assert np.median(angles) > 6 and max(angles) < 50
    assert np.std(shifts, axis=0).min() > 2
    assert 0.01 < np.std(sizes) < 0.2


def tissue_medians(scene: Scene, images: dict[str, np.ndarray], modality: str) -> dict[str, float]:
    values = images[modality][scene.mask]
    shares = scene.anatomy.shares
    pure = {name: shares[name] > limit for name, limit in (("wm", 0.95), ("gm", 0.85), ("csf", 0.8))}
    assert all(part.sum() > 50 for part in pure.values())
    return {name: float(np.median(values[part])) for name, part in pure.items()}


def test_tissues_are_in_the_order_of_each_contrast(template: Template, scenes: list[Scene]) -> None:
    for study, scene in zip(STUDIES, scenes, strict=True):
        images = {name: volume.array for name, volume in make_study(template, study, SEED, SPACING).items()}
        for modality in ("t1", "t1c"):
            level = tissue_medians(scene, images, modality)
            assert level["wm"] > 1.1 * level["gm"] > 1.5 * level["csf"]
        level = tissue_medians(scene, images, "t2")
        assert level["csf"] > 1.5 * level["gm"] > 1.7 * level["wm"]
        level = tissue_medians(scene, images, "flair")
        assert level["gm"] >= level["wm"] > 1.5 * level["csf"]


def test_ventricles_are_dark_on_t1_and_flair_and_bright_on_t2(template: Template) -> None:
    study = STUDIES[1]
    scene = draw_scene(template, study, SEED, SPACING)
    images = {name: volume.array for name, volume in make_study(template, study, SEED, SPACING).items()}
    points = scene.head.to_template(scene.grid.voxel_to_mm(np.argwhere(scene.mask)))
    ventricle = template.ventricles.at(points) > 0.7
    assert ventricle.sum() > 20
    for modality, darker in (("t1", True), ("flair", True), ("t2", False)):
        values = images[modality][scene.mask]
        assert (np.median(values[ventricle]) < np.percentile(values, 15)) == darker
        assert (np.median(values[ventricle]) > np.percentile(values, 85)) != darker


def test_flair_does_not_follow_from_the_other_contrasts_by_a_linear_map(template: Template) -> None:
    """What makes the demo worth learning: trees on the same three grey values explain far more than a linear map."""
    from sklearn.ensemble import HistGradientBoostingRegressor
    from sklearn.linear_model import LinearRegression

    inputs, targets = [], []
    for study in STUDIES:
        images = {
            name: volume.array.astype(float) for name, volume in make_study(template, study, SEED, SPACING).items()
        }
        brain = images["brainmask"] > 0
        scaled = {
            name: (images[name][brain] - images[name][brain].mean()) / images[name][brain].std()
            for name in ("t1", "t1c", "t2", "flair")
        }
        inputs.append(np.stack([scaled[name] for name in ("t1", "t1c", "t2")], axis=1))
        targets.append(scaled["flair"])
    seen, known = np.concatenate(inputs[:3]), np.concatenate(targets[:3])
    linear = LinearRegression().fit(seen, known).score(inputs[3], targets[3])
    trees = HistGradientBoostingRegressor(max_iter=40, random_state=0).fit(seen, known).score(inputs[3], targets[3])
    assert linear < 0.75
    assert trees > linear + 0.1


def test_a_study_lies_at_the_same_place_on_every_kind_of_grid(template: Template) -> None:
    """The same head imaged as RAS, LPS, sagittal and oblique: its lesions are at the same millimetres."""
    centres, volumes = [], []
    for geometry in ("RAS", "LPS", "PIR", "oblique"):
        images = make_study(template, replace(STUDIES[0], geometry=geometry), SEED, SPACING)
        lesion = images["seg"]
        centres.append(lesion.grid.voxel_to_mm(np.argwhere(lesion.array > 0)).mean(0))
        volumes.append(np.count_nonzero(lesion.array))
    assert np.abs(np.array(centres) - centres[0]).max() < 0.25 * SPACING
    assert np.ptp(volumes) < 0.05 * np.mean(volumes)
    oblique = make_study(template, replace(STUDIES[0], geometry="oblique"), SEED, SPACING)["t1"].affine
    assert np.count_nonzero(np.abs(oblique[:3, :3]) > 0.01 * SPACING) > 3


def test_what_a_study_is_does_not_depend_on_how_many_there_are() -> None:
    plans = [plan_study(7, "train", number) for number in range(120)]
    assert plans == [plan_study(7, "train", number) for number in reversed(range(120))][::-1]
    for start in range(0, 120, 3):
        three = plans[start : start + 3]
        assert sum(study.missing is not None for study in three) == sum(study.has_tumour for study in three) == 1
    missing = [study.missing for study in plans if study.missing]
    assert {modality: missing.count(modality) for modality in ("t1", "t1c", "t2", "flair")} == dict.fromkeys(
        ("t1", "t1c", "t2", "flair"), 10
    )
    both = sum(study.has_tumour and study.missing is not None for study in plans)
    assert 3 < both < 30  # a missing modality does not tell the lesion
    assert all(plan_study(7, "held_out", number).missing is None for number in range(30))


def test_signals_have_the_extremes_that_theory_gives() -> None:
    """Ernst: a spoiled echo peaks at arccos(exp(-TR/T1)). Inversion recovery: fluid is nulled at its TI; T2 decay:
    twice the echo time squares the attenuation."""
    protocol, one = draw_protocol(np.random.default_rng(0)), np.ones(1)
    white, fluid = TISSUES["wm"], TISSUES["csf"]
    ernst = np.degrees(np.arccos(np.exp(-protocol.t1_tr / white.t1)))
    flips = np.linspace(2, 40, 381)
    signals = [float(signal("t1", replace(protocol, t1_flip=flip), white, one, one)[0]) for flip in flips]
    assert flips[int(np.argmax(signals))] == pytest.approx(ernst, abs=0.1)

    times = np.linspace(500, 5000, 9001)
    left = [float(signal("flair", replace(protocol, flair_ti=ti), fluid, one, one)[0]) for ti in times]
    null = fluid.t1 * np.log(2 / (1 + np.exp(-protocol.flair_tr / fluid.t1)))
    assert times[int(np.argmin(left))] == pytest.approx(null, abs=1)
    assert 0.9 * null < protocol.flair_ti < null

    short, long = (float(signal("t2", replace(protocol, t2_te=te), white, one, one)[0]) for te in (50, 100))
    start = white.density * (1 - np.exp(-protocol.t2_tr / white.t1))
    assert long / start == pytest.approx((short / start) ** 2, rel=1e-6)


def test_contrast_agent_shows_on_t1c_alone() -> None:
    protocol, one = draw_protocol(np.random.default_rng(1)), np.ones(1)
    rim = TISSUES["enhancing"]
    without = replace(rim, uptake=0.0)
    for modality in ("t1", "t2", "flair"):
        assert signal(modality, protocol, rim, one, one) == signal(modality, protocol, without, one, one)
    assert signal("t1c", protocol, rim, one, one) > 1.5 * signal("t1c", protocol, without, one, one)


def test_labels_lie_in_tissue_and_tumours_are_core_in_rim_in_oedema(scenes: list[Scene]) -> None:
    for study, scene in zip(STUDIES, scenes, strict=True):
        label = scene.on_grid(scene.anatomy.lesions.labels())
        assert label.any() and not label[~scene.mask].any()
        total = np.sum(list(scene.anatomy.shares.values()), axis=0)
        assert np.allclose(total, 1, atol=1e-3)
        assert all(share.min() > -1e-3 for share in scene.anatomy.shares.values())
        if study.has_tumour:
            core, rim = label == 1, label == 3
            shell = ndimage.binary_dilation(core) & ~core
            assert core.any() and np.isin(label[shell], (3,)).mean() > 0.9
            assert (label == 2).sum() > rim.sum() * 0.3
