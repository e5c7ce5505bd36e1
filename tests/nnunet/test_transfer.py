"""What moves into nnU-Net's freshly built network is the checkpoint's, tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from medmae.errors import CheckpointError
from medmae.models.base import MaskedAutoencoder
from medmae.models.cnn import STEM, fit_channels
from medmae.nnunet.plans import Dataset, build_plans
from medmae.nnunet.transfer import transfer
from medmae.nnunet.unet import MissingChannelsUNet
from medmae.plan import Finetuning
from tests.nnunet.conftest import MODELS, model_of

NOTHING_KNOWN = {"foreground_intensity_properties_per_channel": {str(c): {} for c in range(4)}}


def network_of(model: MaskedAutoencoder, *channels: str, **settings: object) -> nn.Module:
    """As nnU-Net builds it from the plans."""
    description = {"file_ending": ".nii.gz"}
    dataset = Dataset("Dataset901_Boxes", Path("x"), description, channels, (26.0, 18.0, 22.0), (1.0, 1.0, 1.0))
    tuning = Finetuning(feature_size=4, **settings)  # type: ignore[arg-type]
    plans = build_plans(dataset, model, None, NOTHING_KNOWN, name="p", settings=tuning)
    arch = plans["configurations"]["3d_fullres"]["architecture"]
    torch.manual_seed(99)
    return get_network_from_plans(
        arch["network_class_name"],
        arch["arch_kwargs"],
        arch["_kw_requires_import"],
        len(channels),
        3,
        allow_init=True,
        deep_supervision=False,
    ).eval()


def own_name(model: MaskedAutoencoder, name: str) -> str:
    return f"network.{name}" if hasattr(model, "network") else name.removeprefix("vit.")


@pytest.mark.parametrize("method", MODELS)
def test_every_transferred_tensor_is_the_checkpoints(method: str) -> None:
    model = model_of(method)
    network = network_of(model, *model.modalities)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    report = transfer(model, network, model.modalities)
    after, source = network.state_dict(), model.state_dict()
    assert report.adapted == {} and len(report.transferred) > 20
    assert all(torch.equal(after[name], source[own_name(model, name)]) for name in report.transferred)
    assert all(torch.equal(after[name], before[name]) for name in report.new)
    new = {name.split(".")[0] for name in report.new}
    assert new == ({"decoder"} if hasattr(model, "network") else {"image_block", "skips", "ups", "head"})
    kept = [n for n in source if not n.startswith(("decoder.", "densify", "mask_token")) and "positions" not in n]
    used = {own_name(model, name) for name in after}
    assert all(name in used for name in kept if "network" not in name)


@pytest.mark.parametrize("method", ["resenc-mae", "spark"])
def test_the_encoder_alone_leaves_the_decoder_as_it_was(method: str) -> None:
    model = model_of(method)
    network = network_of(model, *model.modalities)
    report = transfer(model, network, model.modalities, "encoder")
    assert all(name.startswith("encoder.") for name in report.transferred)
    assert any(name.startswith("decoder.stages") for name in report.new)
    image = torch.randn(1, len(model.modalities), 16, 16, 16)
    for ours, theirs in zip(network.encoder(image), model.network.encoder(image), strict=True):
        assert torch.equal(ours, theirs)


def test_channels_go_by_name_and_others_by_the_mean() -> None:
    model = model_of("resenc-mae")
    network = network_of(model, "flair", "t1", "dwi")
    report = transfer(model, network, ("flair", "t1", "dwi"))
    weight, source = network.state_dict()[STEM], model.network.state_dict()[STEM]
    assert torch.equal(weight[:, 0], source[:, 2]) and torch.equal(weight[:, 1], source[:, 0])
    torch.testing.assert_close(weight[:, 2], source.mean(1))
    assert list(report.adapted) == [STEM] and "flair, t1 by name" in report.adapted[STEM]
    assert torch.equal(network.state_dict()["decoder.encoder.stem.convs.0.all_modules.0.weight"], weight)


@pytest.mark.parametrize("known", [("a",), ("a", "b", "c")])
def test_equal_channels_together_give_what_they_gave(known: tuple[str, ...]) -> None:
    weight = torch.randn(5, len(known), 3, 3, 3)
    fitted, _ = fit_channels(weight, known, ("x", "y"))
    torch.testing.assert_close(fitted.sum(1), weight.sum(1))


def test_bm_mae_makes_a_tokenizer_for_an_unknown_channel() -> None:
    model = model_of("bm-mae")
    network = network_of(model, "t2", "mri")
    report = transfer(model, network, ("t2", "mri"))
    state, source = network.state_dict(), model.state_dict()
    assert torch.equal(state["vit.tokenizers.t2.proj.weight"], source["tokenizers.t2.proj.weight"])
    mean = torch.stack([source[f"tokenizers.{m}.proj.weight"] for m in model.modalities]).mean(0)
    torch.testing.assert_close(state["vit.tokenizers.mri.proj.weight"], mean)
    assert set(report.adapted) == {"vit.tokenizers.mri.proj.weight", "vit.tokenizers.mri.proj.bias"}


def test_hi_end_repeats_its_embedding_over_channels() -> None:
    model = model_of("hi-end-mae")
    network = network_of(model, "t1", "t2")
    transfer(model, network, ("t1", "t2"))
    image = torch.randn(1, 1, 16, 16, 16)
    ours = network.tokens(image.repeat(1, 2, 1, 1, 1), torch.zeros(1, 2, dtype=torch.bool), (4, 4, 4))[-1]
    torch.testing.assert_close(ours, model.encode(image)[:, 1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["bm-mae", "resenc-mae"])
def test_another_shape_is_refused_with_the_list_and_nothing_is_touched(method: str) -> None:
    model = model_of(method)
    other = {**MODELS[method]["model"], **({"width": 36} if method == "bm-mae" else {"features": [4, 8, 16]})}
    network = network_of(model_of(method, model=other), *model.modalities)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with pytest.raises(CheckpointError, match="does not fit") as refused:
        transfer(model, network, model.modalities)
    assert "instead of" in str(refused.value) and "more" in str(refused.value)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_missing_channels_need_the_network_that_knows_them() -> None:
    model = model_of("resenc-mae")
    network = network_of(model, *model.modalities, modality_dropout=0.5)
    assert isinstance(network, MissingChannelsUNet)
    report = transfer(model, network, model.modalities)
    assert "fill" in report.new
    image = torch.randn(1, 3, 16, 16, 16)
    stock = network_of(model, *model.modalities)
    stock.load_state_dict({k: v for k, v in network.state_dict().items() if k != "fill"})
    assert torch.equal(network(image), stock(image))  # complete studies: the same network
