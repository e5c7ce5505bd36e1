"""The trainer's own parts: schedule, groups, dropped channels. That nnU-Net trains with it is in test_segment."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
from torch import nn

from medmae.errors import InputError
from medmae.nnunet.finding import environment, plugin_folder
from medmae.nnunet.trainer import Schedule, drop_channels, parameter_groups
from medmae.plan import Finetuning
from medmae.processor import computes_in_bf16
from tests.nnunet.test_unetr import segmenter


def rates(settings: Finetuning, epochs: int, pretrained: bool = False) -> list[float]:
    parameter = nn.Parameter(torch.zeros(2, 2))
    group = {"params": [parameter], "pretrained": pretrained, "scale": 1.0}
    optimizer = torch.optim.SGD([group], 1.0)
    schedule = Schedule(optimizer, settings, epochs)
    found = []
    for epoch in range(epochs):
        schedule.step(epoch)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_poly_is_nnunets_after_the_warm_up() -> None:
    found = rates(Finetuning(lr=0.01, warmup=0.0), 100)
    assert found == pytest.approx([0.01 * (1 - e / 100) ** 0.9 for e in range(100)])
    warm = rates(Finetuning(lr=0.01, warmup=0.2), 100)
    assert warm[:20] == pytest.approx([0.01 * (e + 1) / 21 for e in range(20)])
    assert warm[20:] == pytest.approx([0.01 * (1 - e / 80) ** 0.9 for e in range(80)])


def test_cosine_falls_to_nothing() -> None:
    found = rates(Finetuning(lr=0.01, warmup=0.1, decay="cosine"), 50)
    assert found[5:] == pytest.approx([0.005 * (1 + math.cos(math.pi * e / 45)) for e in range(45)])


def test_the_head_trains_alone_while_the_encoder_is_frozen() -> None:
    settings = Finetuning(lr=0.01, warmup=0.0, freeze=0.3)
    assert rates(settings, 10, pretrained=True)[:3] == [0.0] * 3
    assert rates(settings, 10, pretrained=True)[3:] == rates(settings, 10)[3:]
    assert min(rates(settings, 10)) > 0


def test_layers_of_a_transformer_have_rates_of_their_own() -> None:
    network = segmenter()
    vit = {id(p) for p in network.vit.parameters()}
    groups = parameter_groups(network, Finetuning(optimizer="adamw", layer_decay=0.5, weight_decay=0.1), vit)
    scale = {id(p): g["scale"] for g in groups for p in g["params"]}
    assert scale.keys() == {id(p) for p in network.parameters()}
    assert scale[id(network.head.weight)] == 1.0
    assert [scale[id(block.mlp.linear1.weight)] for block in network.vit.blocks] == [0.125, 0.25, 0.5]
    assert scale[id(network.vit.cls_token)] == 0.0625
    for group in groups:
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])
        assert all((id(p) in vit) == group["pretrained"] for p in group["params"])


def test_channels_are_dropped_as_often_as_asked_and_never_all() -> None:
    rng = np.random.default_rng(0)
    counts = []
    for _ in range(2000):
        data = drop_channels(torch.ones(1, 4, 2, 2, 2), 0.5, rng)
        counts.append(int(torch.isnan(data).flatten(2).all(2).sum()))
    assert abs(np.mean(np.array(counts) > 0) - 0.5) < 0.04 and set(counts) == {0, 1, 2, 3}
    one = torch.ones(1, 1, 2, 2, 2)
    assert torch.equal(drop_channels(one, 1.0, rng), one)


def test_nnunet_finds_the_trainer_by_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    assert [f.name for f in plugin_folder().glob("*.py")] == ["nnUNetTrainerMedMAE.py"]
    found = environment({"nnUNet_extTrainer": "/elsewhere"})["nnUNet_extTrainer"]
    assert found == f"/elsewhere{os.pathsep}{plugin_folder()}"
    assert environment({"nnUNet_extTrainer": found})["nnUNet_extTrainer"] == found
    monkeypatch.setenv("nnUNet_extTrainer", str(plugin_folder()))
    trainer = recursive_find_trainer_class_by_name("nnUNetTrainerMedMAE")
    with pytest.raises(InputError, match="not written for a checkpoint"):
        trainer({"plans_name": "nnUNetPlans"}, "3d_fullres", 0, {}, torch.device("cpu"))


def test_mirroring_and_arithmetic_are_the_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from medmae.nnunet.trainer import nnUNetTrainerMedMAE

    seen = []

    def step(self: object, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        return {}

    for name in ("train_step", "validation_step"):
        monkeypatch.setattr(nnUNetTrainer, name, step)
    trainer = object.__new__(nnUNetTrainerMedMAE)
    trainer.device, trainer.print_to_log_file = torch.device("cpu"), lambda *_: None
    trainer.configuration_manager = SimpleNamespace(patch_size=[32, 32, 32])
    for settings, dtype in (
        (Finetuning(), torch.float32),
        (Finetuning(mirror=(0,), cpu_precision="bf16"), torch.bfloat16),
        (Finetuning(cpu_precision="auto"), torch.bfloat16 if computes_in_bf16() else torch.float32),
    ):
        trainer.settings = settings
        rotation, flat, size, axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        assert axes == trainer.inference_allowed_mirroring_axes == settings.mirror
        assert rotation == pytest.approx((-math.pi / 6, math.pi / 6)) and not flat and min(size) > 32
        seen.clear()
        trainer.train_step({})
        trainer.validation_step({})
        assert seen == [dtype, dtype]


def test_threads_of_a_cpu_are_those_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net takes as many as the machine has cores, whatever the process was given."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from medmae.nnunet.trainer import nnUNetTrainerMedMAE

    monkeypatch.setattr(nnUNetTrainer, "initialize", lambda self: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    trainer = object.__new__(nnUNetTrainerMedMAE)
    trainer.device, trainer.ours = torch.device("cpu"), {"seed": 0}
    before = torch.get_num_threads()
    torch.set_num_threads(7)
    try:
        trainer.initialize()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
