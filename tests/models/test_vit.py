"""Transformer blocks: recomputation. Their numbers are compared with MONAI's in tests/weights."""

from __future__ import annotations

import torch

from medmae.models.vit import Block, set_recompute


def test_recomputing_changes_memory_and_no_number() -> None:
    torch.manual_seed(0)
    block = Block(24, 4, 48, dropout=0.3)
    x = torch.randn(2, 7, 24)

    def gradients(enabled: bool) -> list[torch.Tensor]:
        set_recompute(block, enabled)
        block.zero_grad()
        torch.manual_seed(1)
        block(x).square().sum().backward()
        return [p.grad.clone() for p in block.parameters() if p.grad is not None]

    kept, again = gradients(False), gradients(True)
    assert len(kept) == 12 and all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        totals = []
        for enabled in (False, True):
            sizes: list[int] = []
            set_recompute(block, enabled)
            block(x)
            totals.append(sum(sizes))
    assert totals[1] < 0.7 * totals[0]
