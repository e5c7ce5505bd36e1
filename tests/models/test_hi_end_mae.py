"""Hi-End-MAE on any grid: what is hidden stays hidden, and computing less gives the same numbers."""

from __future__ import annotations

import pytest
import torch

from medmae.errors import MedmaeError, PlanError
from medmae.models.base import MaskedAutoencoder
from medmae.models.tokens import patchify
from medmae.models.zoo import create
from tests.plain_hi_end_mae import positions

SMALL = {
    "patch": [4, 4, 4],
    "width": 24,
    "depth": 3,
    "heads": 2,
    "mlp_width": 48,
    "skips": [2, 1, 0],
    "decoder_width": 12,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "decoder_mlp_width": 24,
}
SIZE = (16, 8, 12)


def small(**more: object) -> MaskedAutoencoder:
    torch.manual_seed(0)
    plan = {"name": "s", "method": "hi-end-mae", "modalities": ["ct"], "image": {"crop": SIZE}, "model": SMALL}
    return create({**plan, "masking": {"sampler": "uniform"}, **more}).eval()


@pytest.fixture(scope="module")
def model() -> MaskedAutoencoder:
    return small()


def voxels_of(mask: torch.Tensor) -> torch.Tensor:
    return mask.repeat_interleave(4, 1).repeat_interleave(4, 2).repeat_interleave(4, 3).unsqueeze(1)


@pytest.mark.parametrize(
    ("plan", "width", "patch", "decoder", "heads"),
    [
        ("hi-end-mae-base", 768, 16, 384, 12),
        ("hi-end-mae-large", 1536, 12, 528, 16),
        ("hi-end-mae-large-p16", 1536, 16, 528, 16),
    ],
)
def test_published_sizes(plan: str, width: int, patch: int, decoder: int, heads: int) -> None:
    """Parameters counted by hand from the paper's table: 4·w² + 2·4·w² a block, and so on."""

    def block(w: int) -> int:
        return 12 * w * w + 13 * w  # weights; biases (3w + w + 4w + w) and two norms (4w)

    def cross(w: int) -> int:
        return 16 * w * w + 19 * w  # one more attention (4w² + 4w) and norm (2w)

    expected = 12 * block(width) + 3 * width + patch**3 * width + width  # CLS, norm, patch embedding
    expected += 2 * block(decoder) + 3 * cross(decoder) + 2 * decoder + decoder  # norm, mask token
    expected += 4 * (width + 1) * decoder + (decoder + 1) * patch**3
    with torch.device("meta"):
        model = create(plan)
    assert sum(p.numel() for p in model.parameters()) == expected
    assert model.config.decoder_heads == heads and model.plan.image.crop == (96, 96, 96)
    assert model.plan.image.intensity.low == -175 and model.plan.image.spacing == (1.5, 1.5, 1.5)


def test_positions_follow_the_published_layout() -> None:
    with torch.device("cpu"):
        model = create("hi-end-mae-base")
    torch.testing.assert_close(model.tokenizer.positions.table, positions(6, 768))
    torch.testing.assert_close(model.decoder.positions.table, positions(6, 384))


def test_loss_counts_exactly_the_hidden_patches_on_a_grid_that_is_not_cubic(model: MaskedAutoencoder) -> None:
    """The target is each patch to zero mean and unit biased variance; recomputed from voxels and the mask."""
    torch.manual_seed(1)
    image = torch.randn(3, 1, *SIZE)
    out = model(image, return_prediction=True)
    rows, hidden = patchify(image, (4, 4, 4)), out.mask["ct"].flatten(1)
    assert (hidden.sum(1) == 18).all()  # of 24
    deviation = (rows.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    shown = patchify(out.prediction["ct"], (4, 4, 4))
    expected = ((shown - rows) / deviation)[hidden].square().mean()
    torch.testing.assert_close(out.loss, expected)


def test_predicting_hidden_only_is_the_same_loss_and_gradient(model: MaskedAutoencoder) -> None:
    image = torch.randn(2, 1, *SIZE)
    mask = model(image).mask
    results = []
    for everything in (False, True):
        model.zero_grad()
        out = model(image, mask=mask, return_prediction=everything)
        out.loss.backward()
        results.append([out.loss.detach()] + [p.grad.clone() for p in model.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_hidden_voxels_change_nothing_that_is_encoded(model: MaskedAutoencoder) -> None:
    image = torch.randn(2, 1, *SIZE)
    mask = model(image).mask
    other = torch.where(voxels_of(mask["ct"]), torch.randn_like(image), image)
    assert torch.equal(model.encode(image, mask=mask), model.encode(other, mask=mask))
    assert not torch.equal(model.encode(image), model.encode(other))


def test_decoding_a_share_is_decoding_a_smaller_set(model: MaskedAutoencoder) -> None:
    """With every hidden token asked for, the decoder's two ways of laying out its tokens agree; with some, it is the
    decoder on a volume that has only them."""
    image = torch.randn(2, 1, *SIZE)
    grid = (4, 2, 3)
    seen = torch.stack([torch.randperm(24)[:6].sort().values for _ in range(2)])
    unseen = torch.stack([torch.tensor([i for i in range(24) if i not in row.tolist()]) for row in seen])
    rows = patchify(image, (4, 4, 4))
    latent, skips = model.encode_tokens(rows.gather(1, seen.unsqueeze(-1).expand(-1, -1, 64)), seen, grid)
    whole = model.decoder(latent, skips, seen, unseen, grid)
    torch.testing.assert_close(model.decoder(latent, skips, seen, unseen, grid, alone=True), whole)
    trained = small(masking={"sampler": "uniform", "decode_share": 0.5}).train()
    out = trained(image)
    out.loss.backward()
    assert out.mask["ct"].sum() == 36 and torch.isfinite(out.loss)


def test_other_grids_work(model: MaskedAutoencoder) -> None:
    out = model(torch.randn(1, 1, 8, 20, 24), return_prediction=True)
    assert out.mask["ct"].shape == (1, 2, 5, 6) and out.prediction["ct"].shape == (1, 1, 8, 20, 24)
    assert model.encode({"ct": torch.randn(1, 1, 8, 20, 24)}).shape == (1, 61, 24)


def test_blocks_of_tokens_are_a_choice_of_the_plan() -> None:
    model = small(masking={"sampler": "uniform", "block": 2, "ratio": 0.5}, image={"crop": [16, 16, 16]})
    in_cube = model(torch.randn(4, 1, 16, 16, 16)).mask["ct"].view(4, 2, 2, 2, 2, 2, 2).sum((2, 4, 6))
    assert set(in_cube.flatten().tolist()) == {0, 8}


def test_bad_use_is_told() -> None:
    with pytest.raises(PlanError, match="one modality"):
        small(modalities=["t1", "t2"])
    with pytest.raises(PlanError, match="skips"):
        small(model={**SMALL, "skips": [3, 2, 1]})
    model = small()
    with pytest.raises(MedmaeError, match="same number of tokens"):
        uneven = torch.zeros(2, 4, 2, 3, dtype=torch.bool)
        uneven[0, 0] = True
        model(torch.randn(2, 1, *SIZE), mask={"ct": uneven})
    with pytest.raises(MedmaeError, match="one entry a token"):
        model(torch.randn(2, 1, *SIZE), mask={"ct": torch.zeros(2, 3, 2, 4, dtype=torch.bool)})
    with pytest.raises(MedmaeError, match="cannot synthesise"):
        model.reconstruct({"ct": torch.randn(1, 1, *SIZE)}, ["t1"])
