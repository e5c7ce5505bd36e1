"""What a mask promises: how many tokens, of which modalities, drawn how."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from medmae.masking import dirichlet_counts, drop_modalities, rank, sample_mask, split_tokens, visible_tokens
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
