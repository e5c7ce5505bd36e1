"""ResEnc-UNet MAE is nnU-Net's network itself, on images with cubes cut out."""

from __future__ import annotations

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from medmae.errors import MedmaeError, PlanError
from medmae.models.base import MaskedAutoencoder, own_names, without_repeats
from medmae.models.zoo import create

SMALL = {"features": [4, 8, 12], "blocks": [1, 1, 1], "mask_unit": [4, 4, 4]}
SIZE = (16, 8, 24)  # a grid of 4 × 2 × 6 cubes


def small(modalities: tuple[str, ...] = ("t1",), **more: object) -> MaskedAutoencoder:
    torch.manual_seed(0)
    plan = {"name": "s", "method": "resenc-mae", "modalities": modalities, "image": {"crop": SIZE}, "model": SMALL}
    return create({**plan, "masking": {"sampler": "shared"}, **more}).eval()


def voxels_of(mask: torch.Tensor, unit: int = 4) -> torch.Tensor:
    return mask.repeat_interleave(unit, -3).repeat_interleave(unit, -2).repeat_interleave(unit, -1)


def nnunets(features: list[int], blocks: list[int], channels: int = 1) -> ResidualEncoderUNet:
    """As nnU-Net's plans for ResEnc write it."""
    stages = len(features)
    return ResidualEncoderUNet(
        channels,
        stages,
        features,
        nn.Conv3d,
        [[3, 3, 3]] * stages,
        [[1, 1, 1]] + [[2, 2, 2]] * (stages - 1),
        blocks,
        channels,
        [1] * (stages - 1),
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )


def test_published_network_has_102_million_parameters_and_956_names() -> None:
    with torch.device("meta"):
        model = create("resenc-mae-l")
    state = model.network.state_dict()
    used = [p for n, p in model.network.named_parameters() if "seg_layers" not in n]
    encoder = sum(p.numel() for p in model.network.encoder.parameters())
    assert round(encoder / 1e6, 2) == 90.30
    assert round(sum(p.numel() for p in used) / 1e6, 1) in (102.3, 102.4)
    plain = nnunets([32, 64, 128, 256, 320, 320], [1, 3, 4, 6, 6, 6])
    assert list(state) == list(plain.state_dict()) and len(state) == 956
    assert model.plan.image.crop == (160, 160, 160) and model.plan.masking.ratio == 0.75


def test_prediction_is_the_network_called_directly_bit_for_bit() -> None:
    model = small()
    plain = nnunets(SMALL["features"], SMALL["blocks"]).eval()
    plain.load_state_dict(model.network.state_dict())
    image = torch.randn(2, 1, *SIZE)
    out = model(image, return_prediction=True)
    hidden = voxels_of(out.mask["t1"]).unsqueeze(1)
    cut = image.clone()
    cut[hidden] = 0.0
    assert torch.equal(out.prediction["t1"], plain(cut))
    assert (out.mask["t1"].flatten(1).sum(1) == 36).all()  # int(0.75 · 48)
    torch.testing.assert_close(out.loss, (plain(cut) - image)[hidden].square().mean())
    for ours, theirs in zip(model.encode(image), plain.encoder(image), strict=True):
        assert torch.equal(ours, theirs)


def test_gradients_are_those_of_the_network_called_directly() -> None:
    model = small().train()
    plain = nnunets(SMALL["features"], SMALL["blocks"]).train()
    plain.load_state_dict(model.network.state_dict())
    image = torch.randn(2, 1, *SIZE)
    out = model(image)
    out.loss.backward()
    hidden = voxels_of(out.mask["t1"]).unsqueeze(1)
    (plain(image.masked_fill(hidden, 0.0)) - image)[hidden].square().mean().backward()
    theirs = dict(plain.named_parameters())
    compared = 0
    for name, parameter in model.network.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-6)
            compared += 1
    assert compared > 30


def test_normalised_target_is_each_cube_to_unit_variance() -> None:
    model = small(model={**SMALL, "normalise_target": True})
    image = 3 + 2 * torch.randn(1, 1, *SIZE)
    out = model(image, return_prediction=True)
    cubes = image.unfold(2, 4, 4).unfold(3, 4, 4).unfold(4, 4, 4).flatten(5)
    deviation = (cubes.var(-1, correction=1) + 1e-6).sqrt()
    shown = out.prediction["t1"].unfold(2, 4, 4).unfold(3, 4, 4).unfold(4, 4, 4).flatten(5)
    error = ((shown - cubes) / deviation.unsqueeze(-1)).square().mean(-1)
    torch.testing.assert_close(out.loss, error[:, 0][out.mask["t1"]].mean())


def test_incomplete_studies_count_what_they_have() -> None:
    model = small(("t1", "t2", "flair"))
    images = {m: torch.randn(2, 1, *SIZE) for m in model.modalities}
    present = {m: torch.tensor([True, m != "t2"]) for m in images}
    mask = model(images).mask
    together = model(images, mask=mask, present=present)
    alone = model({m: x[1:] for m, x in images.items() if m != "t2"}, mask={m: v[1:] for m, v in mask.items()})
    assert set(alone.losses) == {"t1", "flair"}
    complete = model({m: x[:1] for m, x in images.items()}, mask={m: v[:1] for m, v in mask.items()})
    torch.testing.assert_close(together.losses["t2"], complete.losses["t2"])
    for m in ("t1", "flair"):  # equally many hidden cubes in both studies
        torch.testing.assert_close(together.losses[m], (alone.losses[m] + complete.losses[m]) / 2)


def test_what_is_absent_is_never_looked_at() -> None:
    model = small(("t1", "t2", "flair"), masking={"sampler": "shared", "modality_dropout": 1.0})
    images = {m: torch.randn(2, 1, *SIZE) for m in ("t1", "flair")}
    first = model.reconstruct(images, ["t2"])["t2"]
    again = model.reconstruct({**images, "t2": torch.randn(2, 1, *SIZE)}, ["t2"])["t2"]
    assert first.shape == (2, 1, *SIZE) and torch.equal(first, again)
    mask = model(images).mask
    hidden = torch.stack([mask[m].flatten(1).all(1) for m in model.modalities], 1)
    assert hidden[:, 1].all() and (hidden[:, [0, 2]].sum(1) == 1).all()  # one of the two there is was dropped


def test_plain_unet_is_a_choice_of_the_plan() -> None:
    model = small(model={**SMALL, "network": "plain", "blocks": [2, 2, 2]})
    assert isinstance(model.network, PlainConvUNet)
    model(torch.randn(1, 1, *SIZE)).loss.backward()


def test_state_dicts_with_repeats_are_stored_once_and_come_back_whole() -> None:
    model = small()
    state = model.state_dict()
    once = without_repeats(model, state)
    assert len(once) == len(set(own_names(model).values())) < len(state) / 2
    other = small()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(once, strict=False)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), other.state_dict().values(), strict=True))


def test_bad_use_is_told() -> None:
    model = small()
    with pytest.raises(MedmaeError, match="one entry a cube"):
        model(torch.randn(1, 1, *SIZE), mask={"t1": torch.zeros(1, 4, 6, 2, dtype=torch.bool)})
    with pytest.raises(MedmaeError, match="does not fit"):
        model(torch.randn(1, 1, 18, 8, 24))
    with pytest.raises(MedmaeError, match="cannot synthesise"):
        model.reconstruct({"t1": torch.randn(1, 1, *SIZE)}, ["t2"])
    with pytest.raises(PlanError, match="stages"):
        small(model={**SMALL, "blocks": [1, 1]})
    with pytest.raises(PlanError, match="too small"):
        small(image={"crop": [4, 4, 4]})
    with pytest.raises(PlanError, match="mask_unit"):
        small(model={**SMALL, "mask_units": [4, 4, 4]})
