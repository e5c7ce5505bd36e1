"""The speed that the project promises, on the machine at hand: ``pytest -m benchmark -s``. Quiet machines only."""

from __future__ import annotations

import pytest
import torch

from tests.benchmarks.run import SECTIONS, conditions, measure, parsed, table

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]


@pytest.mark.benchmark
@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("device", DEVICES)
def test_targets_are_met(section: str, device: str) -> None:
    rows = measure(parsed(["--only", section, "--device", device, "--rounds", "5"]))
    print(f"\n{table(rows, conditions(device), markdown=False)}")
    assert rows
    assert not [row.what for row in rows if row.met is False]
