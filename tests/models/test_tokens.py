"""Tokens keep places: patches and positions, on cubic and other grids."""

from __future__ import annotations

import pytest
import torch
from monai.networks.blocks.pos_embed_utils import build_sincos_position_embedding
from torch import nn

from medmae.models.tokens import Positions, Tokenizer, patchify, sincos_positions, unpatchify

GRID, PATCH = (2, 3, 5), (4, 2, 3)
SIZE = (8, 6, 15)


def test_patchify_is_c_order_over_tokens_and_voxels() -> None:
    volume = torch.arange(8 * 6 * 15, dtype=torch.float32).view(1, 1, *SIZE)
    tokens = patchify(volume, PATCH)
    i, j, k = 1, 2, 3  # one token, cut by hand
    by_hand = volume[0, 0, 4 * i : 4 * i + 4, 2 * j : 2 * j + 2, 3 * k : 3 * k + 3].flatten()
    assert torch.equal(tokens[0, (i * 3 + j) * 5 + k], by_hand)
    assert torch.equal(unpatchify(tokens, GRID, PATCH), volume)


def test_tokenizer_is_the_convolution_it_stores() -> None:
    tokenizer = Tokenizer(PATCH, 12, GRID)
    volume = torch.randn(2, 1, *SIZE)
    convolved = nn.functional.conv3d(volume, tokenizer.proj.weight, tokenizer.proj.bias, stride=PATCH)
    torch.testing.assert_close(tokenizer(patchify(volume, PATCH)), convolved.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("grid", [(8, 8, 8), GRID])
def test_positions_equal_monai(grid: tuple[int, int, int]) -> None:
    torch.testing.assert_close(sincos_positions(grid, 48), build_sincos_position_embedding(list(grid), 48, 3).data)


def test_positions_of_another_grid_are_computed_not_stretched() -> None:
    positions = Positions((4, 4, 4), 24)
    torch.testing.assert_close(positions((2, 5, 3)), sincos_positions((2, 5, 3), 24))


def test_foreign_tables_are_interpolated() -> None:
    positions = Positions((2, 2, 2), 6)
    positions.table.copy_(torch.arange(8.0).view(1, 8, 1).expand(1, 8, 6))
    stretched = positions((3, 3, 3))
    assert torch.isclose(stretched[0, 13], torch.full((6,), 3.5)).all()  # the centre of a trilinear table
