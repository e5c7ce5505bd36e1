"""Files in nnssl's published format give the numbers of nnU-Net's network, and what we export is that format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from torch import Tensor, nn

from medmae import create, export
from medmae.errors import CheckpointError, MedmaeError
from medmae.weights.importing import import_weights, load
from tests.models.test_resenc_mae import nnunets, voxels_of

LARGE = ([32, 64, 128, 256, 320, 320], [1, 3, 4, 6, 6, 6])
SMALL = ([8, 16, 24, 32, 40, 40], [1, 1, 1, 1, 1, 1])


def adaptation_plan(name: str = "ResEncL", arguments: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "architecture_plans": {
            "arch_class_name": name,
            "arch_kwargs": arguments,
            "arch_kwargs_requiring_import": None,
        },
        "pretrain_plan": {"configurations": {"onemmiso": {"spacing": [1, 1, 1], "patch_size": [160, 160, 160]}}},
        "pretrain_num_input_channels": 1,
        "recommended_downstream_patchsize": [160, 160, 160],
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stem",
        "keys_to_in_proj": ("encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"),
        "key_to_lpe": None,
    }


def arguments_of(features: list[int], blocks: list[int]) -> dict[str, Any]:
    return {
        "n_stages": len(features),
        "features_per_stage": features,
        "n_blocks_per_stage": blocks,
        "n_conv_per_stage_decoder": [1] * (len(features) - 1),
    }


def network(features: list[int], blocks: list[int]) -> ResidualEncoderUNet:
    torch.manual_seed(5)
    model = nnunets(features, blocks)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def write(file: Path, network: nn.Module, plan: dict[str, Any], **more: Any) -> Path:
    torch.save({"network_weights": network.state_dict(), "nnssl_adaptation_plan": plan, **more}, file)
    return file


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    plain = network(*LARGE)
    return write(tmp_path_factory.mktemp("nnssl") / "openmind.pth", plain, adaptation_plan()), plain


def test_published_resenc_l_gives_the_networks_numbers(large: tuple[Path, nn.Module], tmp_path: Path) -> None:
    file, plain = large
    model = load(file).eval()
    image = torch.randn(1, 1, 64, 32, 64)
    with torch.no_grad():
        out = model(image, return_prediction=True)
        name = model.modalities[0]
        cut = image.masked_fill(voxels_of(out.mask[name], 16).unsqueeze(1), 0.0)
        assert torch.equal(out.prediction[name], plain(cut))
        for ours, theirs in zip(model.encode(image), plain.encoder(image), strict=True):
            assert torch.equal(ours, theirs)
    report = import_weights(file, tmp_path / "model")
    assert report.plan == "resenc-mae-l" and report.new == [] and report.ignored == []
    again = load(tmp_path / "model").state_dict()
    assert all(torch.equal(again[k], v) for k, v in model.state_dict().items())


class PlainSpark3D(nn.Module):
    """Spark3D on nnU-Net's encoder with hooks, written for numbers alone: the first convolution sees the whole image,
    positions coarser than the mask are all visible, norms gather what is visible."""

    def __init__(self, unet: ResidualEncoderUNet, widths: list[int]) -> None:
        super().__init__()
        self.unet = unet
        self.mask_tokens = nn.ParameterList(nn.Parameter(torch.randn(1, c, 1, 1, 1)) for c in widths[::-1])
        self.densify_norms = nn.ModuleList(nn.InstanceNorm3d(c, affine=True) for c in widths[::-1])
        self.densify_projs = nn.ModuleList([nn.Identity(), *(nn.Conv3d(c, c, 3, padding=1) for c in widths[-2::-1])])

    def visible(self, size: torch.Size, hidden: Tensor) -> Tensor:
        if size[0] < hidden.shape[1]:
            return torch.ones(1, 1, *size, dtype=torch.bool)
        return voxels_of(~hidden, size[0] // hidden.shape[1]).unsqueeze(1)

    def gathered(self, norm: nn.InstanceNorm3d, x: Tensor, visible: Tensor) -> Tensor:
        values = x[:, :, visible[0, 0]]
        y = torch.zeros_like(x)
        centred = values - values.mean(-1, keepdim=True)
        normed = centred / (values.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
        y[:, :, visible[0, 0]] = normed * norm.weight[:, None] + norm.bias[:, None]
        return y

    def forward(self, image: Tensor, hidden: Tensor) -> Tensor:
        handles = []
        for module in self.unet.encoder.modules():
            if isinstance(module, nn.Conv3d):
                hook = module.register_forward_hook(lambda m, _, y: y * self.visible(y.shape[2:], hidden))
            elif isinstance(module, nn.InstanceNorm3d):
                hook = module.register_forward_hook(
                    lambda m, x, _: self.gathered(m, x[0], self.visible(x[0].shape[2:], hidden))
                )
            else:
                continue
            handles.append(hook)
        features = self.unet.encoder(image)
        for handle in handles:
            handle.remove()
        dense = []
        for i, feature in enumerate(features[::-1]):
            visible = self.visible(feature.shape[2:], hidden)
            filled = torch.where(visible, self.gathered(self.densify_norms[i], feature, visible), self.mask_tokens[i])
            dense.append(self.densify_projs[i](filled))
        return self.unet.decoder(dense[::-1])


def spark_weights(plain: PlainSpark3D) -> dict[str, Tensor]:
    return {k: v for k, v in plain.state_dict().items() if not k.startswith("unet.")}


def test_published_spark3d_gives_the_networks_numbers(tmp_path: Path) -> None:
    plain = PlainSpark3D(network(*SMALL), SMALL[0]).eval()
    plan = adaptation_plan("ResEncL", arguments_of(*SMALL))
    file = write(tmp_path / "spark3d.pth", plain.unet, plan, spark_weights=spark_weights(plain))
    model = load(file).eval()
    assert model.plan.method == "spark" and model.leaky
    image = torch.randn(1, 1, 64, 32, 96)
    hidden = torch.rand(1, 4, 2, 6, generator=torch.Generator().manual_seed(0)) < 0.75
    with torch.no_grad():
        got = model(image, mask={model.modalities[0]: hidden}, return_prediction=True).prediction[model.modalities[0]]
        expected = plain(image, hidden)
    assert (got - expected).norm() < 1e-5 * expected.norm()
    report = import_weights(file, tmp_path / "model")
    assert report.new == [] and report.ignored == []


@pytest.mark.parametrize("reverse", [False, True])
def test_scales_counted_from_either_end_are_understood(tmp_path: Path, reverse: bool) -> None:
    plain = PlainSpark3D(network(*SMALL), SMALL[0])
    state = spark_weights(plain)
    if reverse:
        state = {
            ".".join([k.split(".")[0], str(5 - int(k.split(".")[1])), *k.split(".")[2:]]): v for k, v in state.items()
        }
    file = write(tmp_path / "f.pth", plain.unet, adaptation_plan("ResEncL", arguments_of(*SMALL)), spark_weights=state)
    model = load(file)
    assert torch.equal(model.mask_tokens[0], plain.mask_tokens[0])
    assert torch.equal(model.densify_projs[5].weight, plain.densify_projs[5].weight)


def test_unusable_files_are_refused_with_what_was_expected(large: tuple[Path, nn.Module], tmp_path: Path) -> None:
    (tmp_path / "cut.pth").write_bytes(large[0].read_bytes()[:1_000_000])
    with pytest.raises(CheckpointError, match="truncated"):
        load(tmp_path / "cut.pth")
    small = network(*SMALL)
    with pytest.raises(CheckpointError, match="another architecture") as refused:
        load(write(tmp_path / "small.pth", small, adaptation_plan()))
    assert "(32, 1, 3, 3, 3)" in str(refused.value) and "(8, 1, 3, 3, 3)" in str(refused.value)
    with pytest.raises(CheckpointError, match="PrimusM"):
        load(write(tmp_path / "primus.pth", small, adaptation_plan("PrimusM")))

    class Evil:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"network_weights": {"encoder.stem": Evil()}}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="could run code"):
        load(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_part_of_a_network_only_when_asked(tmp_path: Path) -> None:
    weights = {k: v for k, v in network(*SMALL).state_dict().items() if k.startswith("encoder.")}
    plan = adaptation_plan("ResEncL", arguments_of(*SMALL))
    torch.save({"network_weights": weights, "nnssl_adaptation_plan": plan}, tmp_path / "encoder.pth")
    with pytest.raises(CheckpointError, match="missing"):
        load(tmp_path / "encoder.pth")
    report = import_weights(tmp_path / "encoder.pth", tmp_path / "model", allow_partial=True)
    assert report.loaded and report.new and all(".decoder." in name for name in report.new)


def tiny(method: str = "resenc-mae", modalities: tuple[str, ...] = ("t1",)) -> Any:
    torch.manual_seed(2)
    return create(
        {
            "name": "s",
            "method": method,
            "modalities": modalities,
            "image": {"crop": [64, 32, 32]},
            "model": {"features": SMALL[0], "blocks": SMALL[1], "mask_unit": [8, 8, 8]},
            "masking": {"sampler": "shared"},
        }
    ).eval()


@pytest.mark.parametrize("method", ["resenc-mae", "spark"])
def test_export_is_what_nnunet_and_nnssl_read(method: str, tmp_path: Path) -> None:
    """Every key of a network that nnU-Net builds from the plan in the file, and nothing but tensors and plain types."""
    from pydoc import locate

    model = tiny(method)
    report = export(model, tmp_path / "out.pth", to="nnunet")
    content = torch.load(tmp_path / "out.pth", weights_only=True)
    plan = content["nnssl_adaptation_plan"]
    assert set(plan) == set(adaptation_plan())
    arguments = dict(plan["architecture_plans"]["arch_kwargs"])
    for key in plan["architecture_plans"]["arch_kwargs_requiring_import"]:
        arguments[key] = locate(arguments[key]) if arguments[key] else None
    plain = ResidualEncoderUNet(plan["pretrain_num_input_channels"], num_classes=1, **arguments).eval()
    plain.load_state_dict(content["network_weights"])
    image = torch.randn(1, 1, 64, 32, 32)
    with torch.no_grad():
        assert torch.equal(plain(image), model.network(image))
    assert report.tensors == len(plain.state_dict())
    assert all(f"{key}.weight" in content["network_weights"] for key in plan["keys_to_in_proj"])
    assert any(k.startswith(plan["key_to_encoder"]) for k in content["network_weights"])

    back = load(tmp_path / "out.pth")
    assert back.plan.method == method
    assert all(torch.equal(back.state_dict()[k], v) for k, v in model.state_dict().items())


def test_exported_first_layer_fits_the_channels_asked_for(tmp_path: Path) -> None:
    """Equal channels give what the one channel gave: the sum over channels stays."""
    model = tiny()
    export(model, tmp_path / "out.pth", to="nnunet", channels=3)
    content = torch.load(tmp_path / "out.pth", weights_only=True)
    assert content["nnssl_adaptation_plan"]["pretrain_num_input_channels"] == 3
    plain = nnunets(*SMALL, channels=3).eval()
    heads = {k: v for k, v in plain.state_dict().items() if ".seg_layers." in k}
    plain.load_state_dict({**content["network_weights"], **heads})
    image = torch.randn(1, 1, 64, 32, 32)
    with torch.no_grad():
        for ours, theirs in zip(model.encode(image), plain.encoder(image.repeat(1, 3, 1, 1, 1)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_bm_mae_round_trip_is_bit_exact(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create("bm-mae-base")
    export(model, tmp_path / "bmmae.pth", to="bm-mae")
    state = torch.load(tmp_path / "bmmae.pth", weights_only=True)
    assert "tokenizers.t1ce.patch_embedding.patch_embeddings.weight" in state
    again = load(tmp_path / "bmmae.pth")
    assert again.modalities == model.modalities
    assert all(torch.equal(again.state_dict()[k], v) for k, v in model.state_dict().items())
    export(again, tmp_path / "second.pth", to="bm-mae")
    second = torch.load(tmp_path / "second.pth", weights_only=True)
    assert set(second) == set(state) and all(torch.equal(second[k], v) for k, v in state.items())


def test_a_format_that_cannot_hold_the_method_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MedmaeError, match="cannot be written as bm-mae"):
        export(tiny(), tmp_path / "out.pth", to="bm-mae")
    with pytest.raises(MedmaeError, match="cannot be written as nnunet"):
        export(create("bm-mae-tiny"), tmp_path / "out.pth", to="nnunet")
    assert not (tmp_path / "out.pth").exists()
