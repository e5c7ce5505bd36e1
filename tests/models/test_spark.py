"""SparK: what a CNN computes of a masked image does not depend on what the mask hides."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medmae.errors import MedmaeError, PlanError
from medmae.models.base import MaskedAutoencoder
from medmae.models.sparse import SparseEncoder, Visible, masked_norm
from medmae.models.zoo import create

SMALL = {"features": [4, 8, 12], "blocks": [1, 1, 2], "mask_unit": [8, 8, 8]}
SIZE = (16, 24, 32)  # a grid of 2 × 3 × 4 cubes


def small(modalities: tuple[str, ...] = ("t1",), **more: object) -> MaskedAutoencoder:
    torch.manual_seed(0)
    plan = {"name": "s", "method": "spark", "modalities": modalities, "image": {"crop": SIZE}, "model": SMALL}
    return create({**plan, "masking": {"sampler": "shared", "ratio": 0.6}, **more}).eval()


def cube_mask(batch: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 2, 3, 4, generator=torch.Generator().manual_seed(seed)) < 0.6


def voxels_of(mask: torch.Tensor, unit: int = 8) -> torch.Tensor:
    return mask.repeat_interleave(unit, -3).repeat_interleave(unit, -2).repeat_interleave(unit, -1)


@pytest.mark.parametrize("unit", [8, 2])  # coarser and finer than the network's deepest scale
@pytest.mark.parametrize("network", ["resenc", "plain"])
def test_gradient_with_respect_to_hidden_voxels_is_exactly_zero(network: str, unit: int) -> None:
    model = small(model={**SMALL, "network": network, "mask_unit": [unit] * 3})
    image = torch.randn(1, 1, *SIZE, requires_grad=True)
    grid = [s // unit for s in SIZE]
    mask = (torch.rand(1, *grid, generator=torch.Generator().manual_seed(1)) < 0.6).clone()
    hidden = voxels_of(mask, unit).unsqueeze(1)
    outputs = model.encode({"t1": image}, mask={"t1": mask})
    assert len(outputs) == 3
    for output in outputs:
        (gradient,) = torch.autograd.grad((output * torch.randn_like(output)).sum(), image, retain_graph=True)
        assert (gradient[hidden] == 0).all() and (gradient[~hidden] != 0).float().mean() > 0.5
    out = model(image, mask={"t1": mask}, return_prediction=True)
    (gradient,) = torch.autograd.grad(out.prediction["t1"].square().sum(), image)
    assert (gradient[hidden] == 0).all()


def test_hidden_positions_are_zero_at_every_scale() -> None:
    model = small()
    mask = cube_mask(2)
    for scale, output in enumerate(model.encode(torch.randn(2, 1, *SIZE), mask={"t1": mask})):
        hidden = voxels_of(mask, 8 // 2**scale).unsqueeze(1).expand_as(output)
        assert (output[hidden] == 0).all() and (output[~hidden] != 0).any()


@pytest.mark.parametrize("network", ["resenc", "plain"])
def test_all_visible_is_the_dense_network(network: str) -> None:
    """In training, where every layer runs sparsely; in fp64, so that only a difference of meaning can show, too."""
    model = small(model={**SMALL, "network": network}).train()
    image = torch.randn(2, 1, *SIZE)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        model = model.to(dtype)
        dense = model.network.encoder(image.to(dtype))
        for ours, theirs in zip(model.encode(image.to(dtype)), dense, strict=True):
            assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1)


def test_all_visible_resenc_l_is_the_dense_network() -> None:
    torch.manual_seed(0)
    model = create("spark-l").eval()
    image = torch.randn(1, 1, 64, 64, 64)
    with torch.no_grad():
        for ours, theirs in zip(model.encode(image), model.network.encoder(image), strict=True):
            assert torch.equal(ours, theirs)
        model, image = model.train().double(), image.double()
        for ours, theirs in zip(model.encode(image), model.network.encoder(image), strict=True):
            assert (ours - theirs).abs().max() <= 1e-10


@pytest.mark.parametrize("kind", [nn.InstanceNorm3d, nn.BatchNorm3d])
def test_statistics_of_the_sparse_norm_are_those_of_the_gathered_visible_voxels(kind: type[nn.Module]) -> None:
    norm = kind(5, affine=True, eps=1e-5).double().train()  # type: ignore[call-arg]
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.uniform_(-1, 1)
    x = (3 + 2 * torch.randn(3, 5, 8, 12, 16)).double()
    mask = voxels_of(cube_mask(3), 4).unsqueeze(1).logical_not()
    ours = masked_norm(norm, x, mask.float())
    assert (ours[~mask.expand_as(ours)] == 0).all()
    rows = [x[i].permute(1, 2, 3, 0)[mask[i, 0]] for i in range(3)]  # (visible, C) of each sample
    if kind is nn.BatchNorm3d:
        expected = F.batch_norm(torch.cat(rows), None, None, norm.weight, norm.bias, True, eps=1e-5)
        gathered = [x_i.permute(1, 2, 3, 0)[m[0]] for x_i, m in zip(ours, mask, strict=True)]
        torch.testing.assert_close(torch.cat(gathered), expected)
        reference = nn.BatchNorm1d(5).double().train()
        reference(torch.cat(rows))
        torch.testing.assert_close(norm.running_mean, reference.running_mean)
        torch.testing.assert_close(norm.running_var, reference.running_var)
        return
    for i, row in enumerate(rows):
        expected = (row - row.mean(0)) / (row.var(0, correction=0) + 1e-5).sqrt() * norm.weight + norm.bias
        torch.testing.assert_close(ours[i].permute(1, 2, 3, 0)[mask[i, 0]], expected)


@pytest.mark.parametrize("kind", [nn.InstanceNorm3d, nn.BatchNorm3d])
def test_the_sparse_norms_gradient_is_that_of_its_formula(kind: type[nn.Module]) -> None:
    norm = kind(3, affine=True).double().train()  # type: ignore[call-arg]
    x = torch.randn(2, 3, 4, 2, 6, dtype=torch.float64, requires_grad=True)
    mask = (torch.rand(2, 1, 4, 2, 6, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    weight = torch.rand(3, dtype=torch.float64, requires_grad=True)
    bias = torch.rand(3, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(Normed(norm), {"norm.weight": weight, "norm.bias": bias}, (x, mask))

    assert torch.autograd.gradcheck(run, (x, weight, bias))


class Normed(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return masked_norm(self.norm, x, mask)


def test_densify_fills_each_scale_with_its_token() -> None:
    """With the norm and projection made trivial, what the decoder gets is the token where nothing is visible."""
    model = small()
    mask = cube_mask(1)
    got: list[torch.Tensor] = []
    model.network.decoder.register_forward_pre_hook(lambda _, args: got.extend(args[0]))
    with torch.no_grad():
        for i, projection in enumerate(model.densify_projs):
            model.densify_norms[i].weight.zero_()
            if isinstance(projection, nn.Conv3d):
                nn.init.dirac_(projection.weight)
                projection.bias.zero_()
        model(torch.randn(1, 1, *SIZE), mask={"t1": mask})
    assert isinstance(model.densify_projs[0], nn.Identity) and len(got) == 3
    for scale, filled in enumerate(got):
        token = model.mask_tokens[2 - scale]
        hidden = voxels_of(mask, 8 // 2**scale).unsqueeze(1)
        assert torch.equal(filled, torch.where(hidden, token, torch.zeros_like(token)).expand_as(filled))


def test_loss_counts_exactly_the_hidden_voxels_on_a_grid_that_is_not_cubic() -> None:
    model = small(("t1", "t2"))
    images = {m: torch.randn(2, 1, *SIZE) for m in ("t1", "t2")}
    out = model(images, return_prediction=True)
    for m, image in images.items():
        hidden = voxels_of(out.mask[m]).unsqueeze(1)
        torch.testing.assert_close(out.losses[m], (out.prediction[m] - image)[hidden].square().mean())
        assert (out.mask[m].flatten(1).sum(1) == 14).all()  # int(0.6 · 24)


def test_several_modalities_hide_on_their_own_and_leak_nothing() -> None:
    """Dropped and hidden modalities, each with a mask of its own: a gradient reaches visible voxels only."""
    model = small(("t1", "t2", "flair"))
    images = {m: torch.randn(2, 1, *SIZE, requires_grad=True) for m in model.modalities}
    masks = {m: cube_mask(2, seed) for seed, m in enumerate(images)}
    masks["flair"][0] = True
    sum(f.square().sum() for f in model.encode(images, mask=masks)).backward()
    for m, image in images.items():
        hidden = voxels_of(masks[m]).unsqueeze(1)
        assert (image.grad[hidden] == 0).all() and (image.grad[~hidden] != 0).any()
    assert (model.reconstruct({"t1": images["t1"]}, ["flair"])["flair"]).shape == (2, 1, *SIZE)


def test_leaky_is_spark3d() -> None:
    """Its first convolution sees everything; below the mask's resolution every position is visible."""
    deep = {**SMALL, "leaky": True, "features": [4, 8, 12, 12, 12], "blocks": [1] * 5}
    model = small(model=deep, image={"crop": [32] * 3})
    image = torch.randn(1, 1, 32, 32, 32, requires_grad=True)
    mask = torch.rand(1, 4, 4, 4, generator=torch.Generator().manual_seed(2)) < 0.6
    outputs = model.encode({"t1": image}, mask={"t1": mask})
    outputs[0].square().sum().backward()
    assert (image.grad[voxels_of(mask).unsqueeze(1)] != 0).any()
    visible = Visible(~mask.unsqueeze(1), leaky=True)
    assert visible.at(torch.Size((2, 2, 2))).all() and not visible.at(torch.Size((4, 4, 4))).all()
    assert (outputs[4] != 0).all()
    strict = Visible(~mask.unsqueeze(1))
    pooled = F.max_pool3d((~mask.unsqueeze(1)).float(), 2)
    assert torch.equal(strict.at(torch.Size((2, 2, 2))), pooled)


def test_any_encoder_of_convolutions_norms_and_pools_runs_sparsely() -> None:
    """Max and average pools see visible positions only: compared with the same pools over gathered values."""
    encoder = nn.Sequential(nn.Conv3d(1, 3, 3, padding=1), nn.MaxPool3d(2), nn.AvgPool3d(2)).double().eval()
    x, mask = torch.randn(1, 1, 8, 8, 8).double(), torch.rand(1, 1, 4, 4, 4) < 0.5
    mask[0, 0, :2, :2, :2] = False
    got = SparseEncoder(encoder)(encoder, x, Visible(mask))
    fine = voxels_of(mask, 2)
    conv = encoder[0](x) * fine
    largest = torch.where(mask, F.max_pool3d(conv.masked_fill(~fine, -torch.inf), 2), 0.0)
    total, count = F.avg_pool3d(largest, 2), F.avg_pool3d(mask.double(), 2)
    torch.testing.assert_close(got, torch.where(count > 0, total / count.clamp(min=1e-6), 0.0))
    dense = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(MedmaeError, match="Linear"):
        SparseEncoder(dense)(dense, x.float(), Visible(mask))


def test_two_masks_at_once_do_not_meet() -> None:
    """The mask is an argument: the same model on two masks in turn gives what each gives alone."""
    model = small()
    image = torch.randn(1, 1, *SIZE)
    masks = [{"t1": cube_mask(1, seed)} for seed in (0, 1)]
    alone = [small()(image, mask=m).loss for m in masks]
    assert [model(image, mask=m).loss.item() for m in masks] == [loss.item() for loss in alone]
    assert sorted(model.state_dict()) == sorted(small().state_dict())


def test_bad_plans_are_told() -> None:
    with pytest.raises(PlanError, match="power of two"):
        small(model={**SMALL, "mask_unit": [6, 6, 6]})
