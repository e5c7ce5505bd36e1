"""Predictions with and without a refiner, and how they move when their input does."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import medmae
from medmae.models.refiner import Refiner
from medmae.plan import Plan, Refining
from medmae.synthesis.anomaly import PARTS, heat, lattice, residuals
from medmae.synthesis.predicting import HIDDEN, Thinned, predict_study, refine, tile
from medmae.synthesis.windows import patch_shifts, predict_volume
from tests.synthesis.fakes import Linear, plan
from tests.training.conftest import PLAN

METHODS = {
    "bm-mae": PLAN["model"],
    "resenc-mae": {"network": "resenc", "features": [4, 8], "blocks": [1, 1], "mask_unit": [4, 4, 4]},
    "spark": {"network": "resenc", "features": [4, 8], "blocks": [1, 1], "mask_unit": [4, 4, 4], "leaky": False},
}


def model_of(method: str) -> medmae.models.base.MaskedAutoencoder:
    torch.manual_seed(0)
    data = {**PLAN, "method": method, "model": METHODS[method], "reconstruction": {"overlap": 0.25, "shifts": 2}}
    return medmae.create(Plan.load(data)).eval()


def study(names: tuple[str, ...] = ("t1", "t2"), shape: tuple[int, int, int] = (20, 18, 22)) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {m: rng.normal(size=shape).astype(np.float32) for m in names}


def test_spread_is_that_of_the_placements_of_the_patch_grid() -> None:
    pattern = np.random.default_rng(0).normal(size=(8, 8, 8)).astype(np.float32)
    model = Linear(plan(shifts=4, overlap=0.0), {"t1": 1.0}, pattern=pattern)
    image = np.random.default_rng(1).normal(size=(32, 32, 32)).astype(np.float32)
    found = predict_volume(model, {"t1": image}, ["flair"])
    tiled = np.tile(pattern, (6, 6, 6))
    placed = [np.roll(tiled, shift, (0, 1, 2))[8:40, 8:40, 8:40] for shift in patch_shifts((8, 8, 8), 4)]
    inner = (slice(8, 24),) * 3
    assert found.spread["flair"][inner] == pytest.approx(np.std(placed, axis=0)[inner], abs=1e-3)
    assert predict_volume(model, {"t1": image}, ["flair"], shifts=1).spread["flair"].max() < 1e-3


def test_without_a_refiner_it_is_the_model_alone() -> None:
    model, arrays = model_of("bm-mae"), study()
    plain = predict_volume(model, arrays, ["flair"])
    found = predict_study(model, arrays, ["flair"])
    assert found.doubt is None and np.array_equal(found.arrays["flair"], plain.arrays["flair"])


def test_the_refiner_sees_every_absent_modality_and_changes_the_ones_asked_for() -> None:
    model, arrays = model_of("bm-mae"), study()
    torch.manual_seed(1)
    refiner = Refiner(model.modalities, Refining(width=4, levels=2))
    torch.nn.init.normal_(refiner.correction.weight, std=0.1)
    before = predict_study(model, arrays, ["flair"])
    model.companions["refiner"] = refiner
    after = predict_study(model, arrays, ["flair"])
    assert set(after.arrays) == {"flair"} and set(after.coarse.arrays) == {"t1c", "flair"}
    assert np.array_equal(after.coarse.arrays["flair"], before.arrays["flair"])
    assert np.abs(after.arrays["flair"] - before.arrays["flair"]).max() > 1e-3
    with torch.no_grad():  # by hand, in one tile
        order = [arrays.get(m, after.coarse.arrays.get(m)) for m in model.modalities]
        values = torch.from_numpy(np.stack(order))[None]
        spread = torch.from_numpy(np.stack([after.coarse.spread.get(m, 0 * arrays["t1"]) for m in model.modalities]))
        refined, _ = refiner(values, torch.tensor([[True, False, True, False]]), spread[None])
    assert after.arrays["flair"] == pytest.approx(refined[0, 3].numpy(), abs=1e-5)
    assert set(refine(refiner, arrays, after.coarse)[1]) == {"t1c", "flair"}


def test_tiles_are_as_few_as_they_can_be_and_no_larger_than_that_needs() -> None:
    def tiles(size: int, edge: int) -> int:  # along an axis, a quarter shared: MONAI's rule
        return 1 if size <= edge else math.ceil((size - edge) / (edge * 0.75)) + 1

    for size in range(8, 700):
        edge = tile(size)
        assert edge <= min(size, 128) and tiles(size, edge) == tiles(size, 128)
        assert edge == size or tiles(size, edge - 8) > tiles(size, edge)


@pytest.mark.parametrize("method", list(METHODS))
def test_doubt_joins_what_moves_the_prediction(method: str) -> None:
    model, arrays = model_of(method), study(("t1", "t2", "t1c"))
    found = predict_study(model, arrays, ["flair"], doubt=True)
    assert found.doubt is not None
    whole = found.coarse.arrays["flair"]
    fewer = [{m: a for m, a in arrays.items() if m != gone} for gone in arrays]
    apart = [predict_volume(model, some, ["flair"], shifts=1).arrays["flair"] - whole for some in fewer]
    thinned = predict_volume(Thinned(model), arrays, ["flair"], shifts=1).arrays["flair"] - whole
    expected = found.coarse.spread["flair"] ** 2 + np.mean(np.square(apart), axis=0) + thinned**2
    assert found.doubt["flair"] == pytest.approx(np.sqrt(expected), abs=1e-4)
    again = predict_study(model, arrays, ["flair"], doubt=True)
    assert np.array_equal(again.doubt["flair"], found.doubt["flair"])  # type: ignore[index]


@pytest.mark.parametrize("method", list(METHODS))
def test_a_thinned_study_hides_a_quarter_of_every_modality_given(method: str) -> None:
    model, seen = model_of(method), {}
    forward = model.forward

    def spy(images, mask=None, **options):  # type: ignore[no-untyped-def]
        seen.update(mask)
        return forward(images, mask=mask, **options)

    model.forward = spy  # type: ignore[method-assign]
    images = {m: torch.randn(3, 1, 16, 16, 16) for m in ("t1", "t2")}
    Thinned(model).reconstruct(images, ["flair"])
    assert set(seen) == {"t1", "t2"}
    assert all(float(m.float().mean(0).mean()) == HIDDEN for m in seen.values())


def test_the_parts_of_the_lattice_are_even_and_neighbours_differ() -> None:
    part = lattice((8, 8, 8))
    assert torch.bincount(part.flatten(), minlength=PARTS).tolist() == [128] * PARTS
    for axis in range(3):
        assert (part.diff(dim=axis) != 0).all()


class Expecting(Linear):
    """A model that knows every image is 1 everywhere, whatever it is shown; it notes what was hidden."""

    mask_unit = (8, 8, 8)

    def __call__(self, images, mask, return_prediction):  # type: ignore[no-untyped-def]
        self.__dict__.setdefault("masks", []).append({m: h.clone() for m, h in mask.items()})

        class Output:
            prediction = {m: torch.ones_like(x) for m, x in images.items()}

        return Output


def test_a_heat_map_shows_what_was_not_expected_and_each_patch_is_hidden_once() -> None:
    model = Expecting(plan(modalities=("t1", "t2"), overlap=0.0))
    rng = np.random.default_rng(0)
    arrays = {m: (1 + 0.1 * rng.normal(size=(32, 32, 32))).astype(np.float32) for m in ("t1", "t2")}
    arrays["t2"][10:16, 10:16, 10:16] += 2
    seen = np.ones((32, 32, 32), bool)
    found = residuals(model, arrays, foreground=seen)
    assert found["t1"].std() == pytest.approx(1, abs=0.05)
    assert found["t2"][11:15, 11:15, 11:15].mean() == pytest.approx(20, rel=0.1)
    warm = heat(found, seen)
    assert warm[12:14, 12:14, 12:14].min() > 5 * np.median(warm) and 0.8 < np.median(warm) < 1.2
    masks = model.__dict__["masks"]
    assert len(masks) == PARTS
    assert not any((m["t1"] & m["t2"]).any() for m in masks)
    for name in arrays:
        assert torch.stack([m[name].float() for m in masks]).sum(0).eq(1).all()


def test_with_many_modalities_the_others_are_visible_where_one_is_hidden() -> None:
    names = [f"m{i}" for i in range(PARTS + 2)]
    model = Expecting(plan(modalities=names, overlap=0.0))
    arrays = dict.fromkeys(names, np.random.default_rng(0).normal(size=(32, 32, 32)).astype(np.float32))
    residuals(model, arrays, foreground=np.ones((32, 32, 32), bool))
    hidden = torch.stack([torch.stack([m[n] for n in names]) for m in model.__dict__["masks"]])
    assert hidden.sum(1).le(1).all() and hidden.sum(0).eq(1).all()
