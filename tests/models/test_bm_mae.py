"""BM-MAE on any subset of modalities, any grid, studies of different subsets in one batch."""

from __future__ import annotations

import pytest
import torch

from medmae.errors import MedmaeError, PlanError
from medmae.models.base import MaskedAutoencoder
from medmae.models.zoo import create
from tests.plain_bm_mae import PlainBMMAE

MODALITIES = ("t1", "t1c", "t2", "flair")
SMALL = {
    "patch": [4, 4, 4],
    "width": 24,
    "depth": 2,
    "heads": 2,
    "mlp_width": 48,
    "decoder_width": 12,
    "decoder_depth": 2,
    "decoder_heads": 2,
    "decoder_mlp_width": 24,
}


def small(modalities: tuple[str, ...] = MODALITIES, crop: tuple[int, int, int] = (16, 8, 12), **more: object):  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    plan = {"name": "s", "method": "bm-mae", "modalities": modalities, "image": {"crop": crop}, "model": SMALL, **more}
    return create(plan).eval()


def images_of(model: MaskedAutoencoder, *names: str, batch: int = 2, size: tuple[int, ...] = (16, 8, 12)) -> dict:
    return {m: torch.randn(batch, 1, *size) for m in names or model.modalities}


@pytest.fixture(scope="module")
def model() -> MaskedAutoencoder:
    return small()


def test_published_size_is_78_million() -> None:
    with torch.device("meta"):
        plain = PlainBMMAE()
    with torch.device("cpu"):
        model = create("bm-mae-base")
    unused = sum(p.numel() for n, p in plain.named_parameters() if "norm_cross_attn" in n)
    ours = sum(t.numel() for t in model.state_dict().values())
    assert ours == sum(p.numel() for p in plain.parameters()) - unused
    assert round(ours / 1e6, 1) == 78.3


@pytest.mark.parametrize("names", [("t1",), ("flair", "t2"), ("t1", "t1c", "t2"), MODALITIES])
def test_every_subset_trains_encodes_and_reconstructs(model: MaskedAutoencoder, names: tuple[str, ...]) -> None:
    images = images_of(model, *names)
    out = model(images, return_prediction=True)
    assert out.loss > 0 and set(out.losses) == set(names)
    torch.testing.assert_close(out.loss, sum(out.losses.values()))
    assert all(out.mask[m].all() for m in set(MODALITIES) - set(names))
    assert all(p.shape == (2, 1, 16, 8, 12) for p in out.prediction.values())
    assert model.encode(images).shape == (2, 1 + 24 * len(names), 24)
    target = next((m for m in MODALITIES if m not in names), None)
    if target:
        assert model.reconstruct(images, [target])[target].shape == (2, 1, 16, 8, 12)


def test_loss_counts_exactly_the_hidden_patches_on_a_grid_that_is_not_cubic(model: MaskedAutoencoder) -> None:
    """Recomputed voxel by voxel from the prediction and the mask, upsampled: a transposed mask would not match."""
    images = images_of(model)
    torch.manual_seed(3)
    out = model(images, return_prediction=True)
    for name, image in images.items():
        hidden = out.mask[name]
        voxels = hidden.repeat_interleave(4, 1).repeat_interleave(4, 2).repeat_interleave(4, 3).unsqueeze(1)
        expected = (out.prediction[name] - image)[voxels].square().mean()
        torch.testing.assert_close(out.losses[name], expected)


def test_hidden_voxels_change_nothing_that_is_computed(model: MaskedAutoencoder) -> None:
    images = images_of(model)
    out = model(images, return_prediction=True)
    voxels = {
        m: h.repeat_interleave(4, 1).repeat_interleave(4, 2).repeat_interleave(4, 3).unsqueeze(1)
        for m, h in out.mask.items()
    }
    other = {m: torch.where(voxels[m], torch.randn_like(x), x) for m, x in images.items()}
    again = model(other, mask=out.mask, return_prediction=True)
    for name in MODALITIES:
        assert torch.equal(out.prediction[name], again.prediction[name])
    assert torch.equal(model.encode(images, mask=out.mask), model.encode(other, mask=out.mask))


def test_predicting_hidden_only_is_the_same_loss_and_gradient(model: MaskedAutoencoder) -> None:
    images = images_of(model)
    mask = model(images).mask
    gradients = []
    for everything in (False, True):
        model.zero_grad()
        model(images, mask=mask, return_prediction=everything).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for few, all_ in zip(*gradients, strict=True):
        torch.testing.assert_close(few, all_, rtol=1e-4, atol=1e-6)


def test_incomplete_studies_in_a_batch_equal_the_same_studies_alone(model: MaskedAutoencoder) -> None:
    images = images_of(model)
    present = {"t1c": torch.tensor([True, False]), "flair": torch.tensor([True, False])}
    mask = model(images, present=present).mask
    both = model(images, mask=mask, present=present, return_prediction=True)
    alone = model(
        {m: images[m][1:] for m in ("t1", "t2")}, mask={m: h[1:] for m, h in mask.items()}, return_prediction=True
    )
    for name in MODALITIES:
        torch.testing.assert_close(both.prediction[name][1:], alone.prediction[name], rtol=1e-5, atol=1e-5)


def test_single_modality_studies_batch_with_complete_ones(model: MaskedAutoencoder) -> None:
    """They show fewer tokens than K: the padding must be invisible."""
    images = images_of(model)
    present = {m: torch.tensor([True, m == "t2"]) for m in MODALITIES}
    out = model(images, present=present, return_prediction=True)
    assert int((~out.mask["t2"][1]).sum()) == 12
    alone = model({"t2": images["t2"][1:]}, mask={"t2": out.mask["t2"][1:]}, return_prediction=True)
    torch.testing.assert_close(out.prediction["flair"][1:], alone.prediction["flair"], rtol=1e-5, atol=1e-5)


def test_reconstruction_is_the_prediction_with_everything_else_visible(model: MaskedAutoencoder) -> None:
    images = images_of(model, "t1", "flair")
    visible = {m: torch.zeros(2, 4, 2, 3, dtype=torch.bool) for m in images}
    expected = model(images, mask=visible, return_prediction=True).prediction
    got = model.reconstruct(images, ["t2", "t1c"])
    for name in ("t2", "t1c"):
        torch.testing.assert_close(got[name], expected[name])


def test_a_target_among_the_images_is_not_looked_at(model: MaskedAutoencoder) -> None:
    images = images_of(model)
    first = model.reconstruct(images, ["t2"])["t2"]
    second = model.reconstruct({**images, "t2": torch.randn_like(images["t2"])}, ["t2"])["t2"]
    assert torch.equal(first, second)


def test_other_grids_and_names_work() -> None:
    model = small(("ct", "pet"), crop=(8, 8, 8))
    out = model(images_of(model, size=(12, 8, 4)))
    assert out.mask["pet"].shape == (2, 3, 2, 1)


def test_one_modality_takes_a_bare_tensor() -> None:
    model = small(("ct",))
    x = torch.randn(2, 1, 16, 8, 12)
    assert torch.equal(model.encode(x), model.encode({"ct": x}))


def test_masks_are_reproducible_with_a_generator(model: MaskedAutoencoder) -> None:
    images = images_of(model)
    first, again = (model(images, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert all(torch.equal(first.mask[m], again.mask[m]) for m in MODALITIES)
    assert torch.equal(first.loss, again.loss)


def test_static_path_embeds_like_the_sorted_one(model: MaskedAutoencoder) -> None:
    """Accelerators embed with static shapes; the numbers are those of the CPU's path."""
    rows, modality = torch.randn(2, 7, 64), torch.randint(0, 4, (2, 7))
    torch.testing.assert_close(model.embed_static(rows, modality), model.embed_rows(rows, modality))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({"t3": torch.zeros(1, 1, 16, 8, 12)}, "does not know"),
        ({}, "no image given"),
        ({"t1": torch.zeros(1, 1, 15, 8, 12)}, "patch grid"),
        ({"t1": torch.zeros(1, 1, 16, 8, 12), "t2": torch.zeros(1, 1, 8, 8, 12)}, "one shape"),
        (torch.zeros(1, 1, 16, 8, 12), "ambiguous"),
    ],
)
def test_bad_images_are_refused_with_a_reason(model: MaskedAutoencoder, images: object, message: str) -> None:
    with pytest.raises(MedmaeError, match=message):
        model(images)


def test_bad_masks_are_refused(model: MaskedAutoencoder) -> None:
    images = images_of(model)
    with pytest.raises(MedmaeError, match="one entry a token"):
        model(images, mask={"t1": torch.zeros(2, 2, 4, 3, dtype=torch.bool)})
    hidden = {m: torch.ones(2, 4, 2, 3, dtype=torch.bool) for m in MODALITIES}
    with pytest.raises(MedmaeError, match="no token at all"):
        model(images, mask=hidden)
    uneven = {m: h.clone() for m, h in hidden.items()}
    uneven["t1"][0, 0, 0, 0] = False
    uneven["t1"][1, :2] = False
    with pytest.raises(MedmaeError, match="different numbers"):
        model.encode(images, mask=uneven)


def test_misspelt_model_keys_suggest_the_right_one() -> None:
    with pytest.raises(PlanError, match=r"model\.decoder_width"):
        create("bm-mae-base", ["model.decoder_widht=192"])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_cuda_gives_the_numbers_of_the_cpu(model: MaskedAutoencoder) -> None:
    images = images_of(model)
    out = model(images)
    on_gpu = small().cuda()({m: x.cuda() for m, x in images.items()}, mask=out.mask)
    torch.testing.assert_close(on_gpu.loss.cpu(), out.loss, rtol=1e-3, atol=1e-4)
