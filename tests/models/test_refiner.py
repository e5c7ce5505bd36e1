"""The refiner: begins as what it refines, treats crops and volumes alike, and its doubt teaches it nothing else."""

from __future__ import annotations

import pytest
import torch
from monai.metrics.regression import KernelType, compute_ssim_and_cs

from medmae.models.refiner import RANGE, Refiner, mean_ssim, pattern, refining_loss
from medmae.plan import Refining

NAMES = ("t1", "t2", "flair")
SETTINGS = Refining(width=8, levels=3)


def made(settings: Refining = SETTINGS) -> Refiner:
    """A refiner whose zeros were filled, so that every layer does something."""
    torch.manual_seed(0)
    refiner = Refiner(NAMES, settings)
    for parameter in refiner.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return refiner.eval()


@pytest.mark.parametrize("size", [(16, 16, 16), (13, 18, 21), (5, 7, 3)])
def test_a_new_one_gives_back_what_it_was_given_at_any_size(size: tuple[int, int, int]) -> None:
    values, spread = torch.randn(2, 3, *size), torch.rand(2, 3, *size)
    shown = torch.tensor([[True, False, True], [False, True, False]])
    refined, scale = Refiner(NAMES, SETTINGS)(values, shown, spread)
    assert torch.equal(refined, values)
    assert torch.allclose(scale, torch.full_like(scale, 0.31), atol=1e-3)


def test_a_modality_that_was_given_is_never_changed() -> None:
    values = torch.randn(2, 3, 12, 12, 12)
    shown = torch.tensor([[True, False, True], [False, True, False]])
    refined, scale = made()(values, shown, torch.rand_like(values))
    assert torch.equal(refined[shown], values[shown])
    assert (refined[~shown] != values[~shown]).any() and (scale > 0).all()


def test_the_middle_of_a_crop_is_what_the_whole_volume_gives_there() -> None:
    values, spread = torch.randn(1, 3, 64, 64, 64), torch.rand(1, 3, 64, 64, 64)
    shown = torch.tensor([[True, False, False]])
    refiner = made(Refining(width=8, levels=2))  # which looks no further than 16 voxels
    with torch.no_grad():
        whole, scale = refiner(values, shown, spread)
        part = (slice(None), slice(None), *[slice(8, 56)] * 3)
        crop, doubt = refiner(values[part], shown, spread[part])
    middle = (slice(None), slice(None), *[slice(22, 26)] * 3)
    inside = (slice(None), slice(None), *[slice(30, 34)] * 3)
    assert torch.allclose(crop[middle], whole[inside], atol=1e-5)
    assert torch.allclose(doubt[middle], scale[inside], atol=1e-5)


def test_what_is_given_decides_the_prediction() -> None:
    values = torch.randn(1, 3, 8, 8, 8)
    refiner = made()
    one, _ = refiner(values, torch.tensor([[True, False, False]]), torch.zeros_like(values))
    two, _ = refiner(values, torch.tensor([[True, True, False]]), torch.zeros_like(values))
    assert (one[:, 2] != two[:, 2]).any()


def test_ssim_is_that_of_monai() -> None:
    torch.manual_seed(0)
    a = torch.randn(2, 1, 20, 22, 24)
    b = a + 0.5 * torch.randn_like(a)
    inside = torch.zeros(2, 20, 22, 24)
    inside[:, 3:-3, 3:-3, 3:-3] = 1
    known, _ = compute_ssim_and_cs(a, b, 3, (7, 7, 7), (1.5, 1.5, 1.5), RANGE, KernelType.GAUSSIAN)
    # MONAI's window of sigma 1.5 is 11 wide unless it is told to be 7, and then it is normalised as ours is.
    assert float(mean_ssim(a, b, inside)) == pytest.approx(float(known.mean()), abs=2e-3)
    assert float(mean_ssim(a, a, inside)) == pytest.approx(1)


def test_the_losses_count_only_what_was_synthesised_and_has_a_truth() -> None:
    truth = torch.zeros(1, 3, 8, 8, 8)
    refined = torch.stack([torch.full((8, 8, 8), v) for v in (5.0, 2.0, 9.0)])[None]
    counted = torch.tensor([[False, True, False]])
    inside = torch.zeros(1, 8, 8, 8, dtype=torch.bool)
    inside[:, 2:6, 2:6, 2:6] = True
    scale = torch.full_like(refined, 0.5)
    losses = refining_loss(refined, scale, truth, counted, inside, ssim=0.0)
    assert float(losses["l1"]) == pytest.approx(2.0)
    assert float(losses["doubt"]) == pytest.approx(2.0 / 0.5)  # log(2 b) is 0 at a half
    nothing = refining_loss(refined, scale, truth, torch.zeros_like(counted), inside, ssim=1.0)
    assert float(nothing["loss"]) == 0


def test_doubt_is_learnt_without_moving_the_prediction() -> None:
    refiner = made()
    values, truth = torch.randn(2, 3, 8, 8, 8), torch.randn(2, 3, 8, 8, 8)
    shown = torch.tensor([[True, False, False]] * 2)
    refined, scale = refiner(values, shown, torch.rand_like(values))
    refining_loss(refined, scale, truth, ~shown, torch.ones(2, 8, 8, 8, dtype=torch.bool), 0.5)["doubt"].backward()
    moved = {name.split(".")[0] for name, p in refiner.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"doubt"}


def test_the_blend_of_what_is_given_and_predicted_comes_before_the_correction() -> None:
    refiner = Refiner(NAMES, SETTINGS)
    values = torch.randn(2, 3, 6, 6, 6)
    shown = torch.tensor([[True, True, False], [True, False, False]])
    refiner.blend[pattern(shown[:1]), 2] = torch.tensor([0.5, -0.2, 0.3, 0.1])
    refined, _ = refiner(values, shown, torch.zeros_like(values))
    expected = 0.5 * values[0, 0] - 0.2 * values[0, 1] + 0.3 * values[0, 2] + 0.1
    assert torch.allclose(refined[0, 2], expected, atol=1e-6)
    assert torch.equal(refined[0, :2], values[0, :2]) and torch.equal(refined[1], values[1])
    assert pattern(torch.tensor([[True, False, True], [False, False, False]])).tolist() == [5, 0]
