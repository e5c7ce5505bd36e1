"""What a mask promises: how many tokens, of which modalities, drawn how."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from medmae.masking import (
    choose_decoded,
    dirichlet_counts,
    drop_modalities,
    rank,
    sample_mask,
    split_tokens,
    visible_tokens,
)
from medmae.plan import Masking

N = 64


def everyone(batch: int, modalities: int = 4) -> torch.Tensor:
    return torch.ones(batch, modalities, dtype=torch.bool)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_published_ratio_shows_512_of_2048() -> None:
    masking = Masking()
    hidden = sample_mask(masking, everyone(8), 512, generator())
    assert visible_tokens(masking, 4, 512) == 512
    assert ((~hidden).flatten(1).sum(1) == 512).all()


@pytest.mark.parametrize("sampler", ["dirichlet", "uniform"])
def test_incomplete_studies_show_the_same_number_of_tokens(sampler: str) -> None:
    present = everyone(3)
    present[1, 0] = False
    present[2, :2] = False
    hidden = sample_mask(Masking(sampler=sampler), present, N, generator())
    assert ((~hidden).flatten(1).sum(1) == N).all()
    assert hidden[1, 0].all() and hidden[2, :2].all()  # what was never acquired is hidden


def test_a_single_modality_keeps_something_to_predict() -> None:
    present = everyone(2)
    present[1, 1:] = False
    hidden = sample_mask(Masking(max_visible_share=0.5), present, N, generator())
    assert (~hidden[1, 0]).sum() == N // 2


def test_shares_follow_the_dirichlet_distribution() -> None:
    """Each share of a symmetric Dirichlet(1) over 4 is Beta(1, 3) (closed form); K = N never needs a redraw."""
    hidden = sample_mask(Masking(), everyone(2000), 512, generator())  # 512: rounding to tokens is negligible
    share = (~hidden).sum(-1).float() / 512
    for modality in range(4):
        assert stats.kstest(share[:, modality].numpy(), stats.beta(1, 3).cdf).pvalue > 1e-4


def test_a_draw_asking_too_much_is_redrawn_not_clipped() -> None:
    """With K = 2N of 4N, accepted draws have no share above one half; clipping would pile up at exactly N."""
    counts = dirichlet_counts(everyone(4000), torch.full((4000,), 2 * N), N, 1.0, generator())
    assert (counts <= N).all() and (counts.sum(1) == 2 * N).all()
    assert (counts == N).float().mean() < 0.05


def test_a_budget_close_to_everything_is_met_exactly() -> None:
    counts = dirichlet_counts(everyone(50), torch.full((50,), 4 * N - 3), N, 0.1, generator())
    assert (counts.sum(1) == 4 * N - 3).all() and (counts <= N).all() and (counts >= 0).all()


def test_choice_within_a_modality_is_uniform() -> None:
    hidden = sample_mask(Masking(), everyone(6000, 1), N, generator())
    shown = (~hidden[:, 0]).sum(0).double()
    expected = shown.sum() / N
    assert stats.chi2.sf(float(((shown - expected) ** 2 / expected).sum()), N - 1) > 1e-4


def test_modality_dropout_keeps_one_to_all_but_one() -> None:
    present = everyone(6000)
    present[:, 3] = False
    kept = drop_modalities(present, 1.0, generator())
    numbers = kept.sum(1)
    assert not kept[:, 3].any()
    assert set(numbers.tolist()) == {1, 2}
    assert abs((numbers == 1).float().mean() - 0.5) < 0.03
    assert torch.equal(drop_modalities(everyone(5, 1), 1.0, generator()), everyone(5, 1))


def test_dropped_modalities_are_hidden_and_the_budget_follows() -> None:
    hidden = sample_mask(Masking(ratio=0.5, modality_dropout=1.0), everyone(500), N, generator())
    shown = (~hidden).sum(-1)
    modalities = (shown > 0).sum(1)
    assert (modalities < 4).all()
    assert torch.equal(shown.sum(1), (modalities * N).clamp(max=2 * N))


def test_same_generator_same_mask() -> None:
    first, again = (sample_mask(Masking(), everyone(3), N, generator(5)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, sample_mask(Masking(), everyone(3), N, generator(6)))


def test_split_is_ascending_and_marks_what_is_lacking() -> None:
    hidden = torch.tensor([[1, 0, 1, 0, 1], [1, 1, 1, 0, 1]]).bool()
    seen, valid, unseen = split_tokens(hidden, 2)
    assert seen[0].tolist() == [1, 3] and valid.tolist() == [[True, True], [True, False]]
    assert seen[1, 0] == 3 and unseen[0].tolist() == [0, 2, 4]


def test_rank_orders() -> None:
    assert rank(torch.tensor([[0.3, 0.1, 0.2]])).tolist() == [[2, 0, 1]]


def shared(**fields: object) -> Masking:
    return Masking(sampler="shared", **fields)  # type: ignore[arg-type]


def test_shared_places_are_the_same_in_every_modality_and_exactly_so_many() -> None:
    present = everyone(4)
    present[1, 2] = False
    hidden = sample_mask(shared(ratio=0.75), present, N, generator())
    assert hidden[1, 2].all()
    there = hidden[[0, 2, 3]]
    assert torch.equal(there, there[:, :1].expand_as(there))
    assert (there.sum(-1) == int(0.75 * N)).all()
    assert visible_tokens(shared(ratio=0.75), 4, N) == 4 * (N - int(0.75 * N))


def test_a_range_of_ratios_gives_every_study_its_own() -> None:
    hidden = sample_mask(shared(ratio=0.6, ratio_to=0.9), everyone(3000, 1), 1000, generator())
    share = hidden[:, 0].sum(-1) / 1000
    assert share.min() >= 0.6 and share.max() <= 0.9
    assert stats.kstest(share.numpy(), stats.uniform(0.6, 0.3).cdf).pvalue > 1e-4


@pytest.mark.parametrize("sampler", ["uniform", "dirichlet", "shared"])
def test_blocks_are_hidden_together_on_a_grid_that_is_not_cubic(sampler: str) -> None:
    """Cubes of 2 tokens: all but the one cut by an exact count are hidden or seen as a whole, wherever they lie."""
    grid = (4, 6, 8)
    masking = Masking(sampler=sampler, block=2, ratio=0.5)  # type: ignore[arg-type]
    hidden = sample_mask(masking, everyone(20, 2), 192, generator(), grid).view(20, 2, 2, 2, 3, 2, 4, 2)
    in_cube = hidden.sum((3, 5, 7)).flatten(2)  # 0 to 8
    split = ((in_cube > 0) & (in_cube < 8)).sum(-1)
    assert (split.sum(1) <= 2).all() and (in_cube == 8).any() and (in_cube == 0).any()
    assert len({tuple(row.tolist()) for row in in_cube[:, 0]}) > 15  # drawn anew for each study


def test_decoding_a_share_takes_different_hidden_tokens_every_time() -> None:
    unseen = torch.arange(100).expand(500, -1)
    chosen = choose_decoded(unseen, 0.25, generator())
    assert chosen.shape == (500, 25) and (chosen.diff(dim=1) > 0).all()
    counts = torch.bincount(chosen.flatten(), minlength=100).double()
    assert stats.chi2.sf(float(((counts - 125) ** 2 / 125).sum()), 99) > 1e-4
    assert torch.equal(choose_decoded(unseen, 1.0, None), unseen)
