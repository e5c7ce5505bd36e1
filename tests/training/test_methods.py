"""Every method's tiny plan goes through the same training: it learns, resumes exactly and comes back from its run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import medmae
from medmae import Plan
from medmae.training.pretrain import pretrain

TINY = ("bm-mae-tiny", "hi-end-mae-tiny", "resenc-mae-tiny", "spark-tiny")
FAST = [
    "image.spacing=[1,1,1]",
    "image.crop=[16,16,16]",
    "training.batch_size=2",
    "training.steps_per_epoch=4",
    "training.epochs=2",
    "training.warmup_epochs=0",
    "training.cohort_on_device=false",
    "sampling.crop=random",
]
WEIGHTS = Path("checkpoint/model.safetensors")


def fast(name: str) -> Plan:
    return Plan.load(name, [*FAST, 'modalities=["t2"]'] if name.startswith("hi-end") else FAST)


@pytest.mark.parametrize("name", TINY)
def test_a_resumed_run_equals_an_uninterrupted_one(name: str, scans: Path, tmp_path: Path) -> None:
    plan = fast(name)
    options = {"device": "cpu", "progress": False, "seed": 3}
    pretrain(scans, plan, tmp_path / "whole", **options)
    pretrain(scans, plan, tmp_path / "parts", max_steps=3, checkpoint_every=3, **options)
    pretrain(scans, plan, tmp_path / "parts", resume=True, **options)
    whole, parts = load_file(tmp_path / "whole" / WEIGHTS), load_file(tmp_path / "parts" / WEIGHTS)
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)
    assert len({t.data_ptr() for t in whole.values()}) == len(whole)  # each tensor stored once

    model = medmae.load(tmp_path / "whole")
    state = model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in whole.items())
    assert model.metadata["method"] == plan.method
    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    assert list((tmp_path / "whole/previews").glob("*.png"))


@pytest.mark.parametrize("name", TINY[1:])
def test_the_weights_of_another_method_are_refused(name: str, scans: Path, tmp_path: Path) -> None:
    pretrain(scans, fast("bm-mae-tiny"), tmp_path / "other", device="cpu", progress=False, max_steps=1)
    with pytest.raises(medmae.CheckpointError):
        pretrain(scans, fast(name), tmp_path / "run", device="cpu", progress=False, init=tmp_path / "other")
