"""The segmentation network on a ViT: MONAI's UNETR on the same tokens, and channels that are not there."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import UNETR

from medmae.models.unetr import ViTSegmenter, absent_channels
from medmae.plan import Plan
from tests.nnunet.conftest import VIT, model_of


def segmenter(
    method: str = "bm-mae", modalities: tuple[str, ...] = ("t1", "t2", "flair"), **model: object
) -> ViTSegmenter:
    torch.manual_seed(0)
    plan = {"name": "s", "method": method, "modalities": modalities, "image": {"crop": [16, 16, 16]}}
    plan = Plan.load({**plan, "model": {**VIT, **model}}).model_dump(mode="json")
    return ViTSegmenter(len(modalities), 2, plan, feature_size=4).eval()


def test_patches_of_16_are_monais_unetr() -> None:
    """The same decoder with the same weights on the same tokens gives the same logits."""
    ours = segmenter(modalities=("t1",), patch=[16, 16, 16], depth=12)
    assert ours.taps == [3, 6, 9]
    theirs = UNETR(1, 2, 32, feature_size=4, hidden_size=24, mlp_dim=48, num_heads=2, norm_name="instance").eval()
    image = torch.randn(1, 1, 32, 32, 32)
    tokens = ours.tokens(image, torch.zeros(1, 1, dtype=torch.bool), (2, 2, 2))
    states = dict(zip(ours.taps, tokens, strict=False))
    theirs.vit.forward = lambda _: (tokens[-1], [states.get(i) for i in range(12)])  # type: ignore[method-assign]
    theirs.proj_axes, theirs.proj_view_shape = (0, 4, 1, 2, 3), [2, 2, 2, 24]
    pairs = [(theirs.encoder1.layer, ours.image_block)]
    pairs += [(getattr(theirs, f"encoder{i + 2}"), ours.skips[i]) for i in range(3)]
    for i, up in zip((5, 4, 3, 2), ours.ups, strict=True):
        block = getattr(theirs, f"decoder{i}")
        pairs += [(block.transp_conv, up.up), (block.conv_block, up.block)]
    pairs.append((theirs.out, ours.head))
    for target, source in pairs:
        new = dict(zip(target.state_dict(), source.state_dict().values(), strict=True))
        target.load_state_dict(new)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), theirs(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("patch", "size"), [(4, (16, 8, 20)), (8, (16, 8, 24)), (12, (24, 12, 36)), (16, (16, 32, 16))]
)
@pytest.mark.parametrize("method", ["bm-mae", "hi-end-mae"])
def test_any_patch_and_grid(method: str, patch: int, size: tuple[int, int, int]) -> None:
    more = {"skips": [2, 1, 0]} if method == "hi-end-mae" else {}
    names = ("t1",) if method == "hi-end-mae" else ("t1", "t2")
    network = segmenter(method, names, patch=[patch] * 3, **more)
    logits = network(torch.randn(2, len(names), *size))
    assert logits.shape == (2, 2, *size)
    logits.square().sum().backward()
    assert all(p.grad is not None for n, p in network.named_parameters() if "mask_token" not in n)


def test_tokens_are_the_encoders_averaged_over_modalities() -> None:
    model = model_of("bm-mae")
    network = segmenter()
    network.vit.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("decoder.")})
    images = {m: torch.randn(2, 1, 16, 8, 12) for m in model.modalities}
    ours = network.tokens(torch.cat(list(images.values()), 1), torch.zeros(2, 3, dtype=torch.bool), (4, 2, 3))[-1]
    torch.testing.assert_close(ours, model.encode(images)[:, 1:].unflatten(1, (3, 24)).mean(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("absent", [(0,), (1, 2)])
def test_an_absent_channel_is_as_if_the_model_had_never_had_it(absent: tuple[int, ...]) -> None:
    model, network = model_of("bm-mae"), segmenter()
    network.vit.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("decoder.")})
    image = torch.randn(1, 3, 16, 8, 12)
    gone = torch.zeros(1, 3, dtype=torch.bool)
    gone[0, list(absent)] = True
    there = {m: image[:, i : i + 1] for i, m in enumerate(model.modalities) if i not in absent}
    tokens = model.encode(there)[:, 1:].unflatten(1, (len(there), 24)).mean(1)
    torch.testing.assert_close(network.tokens(image, gone, (4, 2, 3))[-1], tokens, rtol=1e-4, atol=1e-5)
    empty = image.clone()
    empty[:, list(absent)] = float("nan")
    zero = image.clone()
    zero[:, list(absent)] = 0
    assert torch.equal(network(empty), network(zero)) and network(empty).isfinite().all()


def test_studies_that_lack_different_channels_share_a_batch() -> None:
    network = segmenter()
    image = torch.randn(3, 3, 16, 8, 12)
    image[1, 0] = float("nan")
    image[2, 1:] = float("nan")
    together = network(image)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], network(image[i : i + 1]), rtol=1e-4, atol=1e-5)


def test_absent_is_nan_or_nothing_but_zero_beside_something() -> None:
    x = torch.randn(4, 2, 3, 3, 3)
    x[1, 0] = 0
    x[2, 1, 0, 0, 0] = float("nan")
    x[3] = 0  # background in all channels: nothing is absent
    assert absent_channels(x).tolist() == [[False, False], [True, False], [False, True], [False, False]]


def test_drop_path_leaves_out_late_blocks_in_training_alone() -> None:
    network = segmenter()
    network.drop_path = 1.0
    image = torch.randn(1, 3, 16, 8, 12)
    assert torch.equal(network(image), network(image))
    network.train()
    assert network.dropped(2) and not network.dropped(0)
