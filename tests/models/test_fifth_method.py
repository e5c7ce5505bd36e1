"""CONTRIBUTING's "Add a method in five steps", followed: one file and one plan, and everything works with it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import medmae
from medmae import models
from medmae.cli import app
from medmae.models.zoo import methods
from tests.training.conftest import write_scans

METHOD = '''
"""A masked autoencoder without layers worth the name: each patch from the mean of the visible ones."""

import torch
from torch import nn

from medmae.masking import sample_mask
from medmae.models.base import MAEOutput, MaskedAutoencoder
from medmae.models.tokens import patchify, token_grid, unpatchify
from medmae.plan import Section, Triple


class Config(Section):
    patch: Triple = (4, 4, 4)
    width: int = 8


class LinearMAE(MaskedAutoencoder):
    def __init__(self, plan, config):
        super().__init__(plan)
        self.config, self.grid_multiple = config, config.patch
        self.encoder = nn.Linear(config.patch[0] * config.patch[1] * config.patch[2], config.width)
        self.decoder = nn.Linear(config.width, self.encoder.in_features)

    def forward(self, images, mask=None, return_prediction=False, present=None, generator=None):
        images = self.checked(images)
        first = next(iter(images.values()))
        grid = token_grid(tuple(first.shape[2:]), self.config.patch)
        exists = self.presence(images, present, first.shape[0]).to(first.device)
        tokens = grid[0] * grid[1] * grid[2]
        hidden = sample_mask(self.plan.masking, exists, tokens, generator, grid).view(len(first), -1, *grid)
        if mask is not None:
            hidden = torch.stack([mask[m] for m in self.modalities], dim=1)
        losses, predictions = {}, {}
        summary = self.encode(images, {m: hidden[:, i] for i, m in enumerate(self.modalities)})
        for i, name in enumerate(self.modalities):
            predicted = self.decoder(summary).unsqueeze(1).expand(-1, tokens, -1)
            predictions[name] = unpatchify(predicted, grid, self.config.patch)
            if name in images:
                error = (predicted - patchify(images[name], self.config.patch)).square().mean(-1)
                counted = hidden[:, i].flatten(1) & exists[:, i : i + 1]
                losses[name] = (error * counted).sum() / counted.sum().clamp(min=1)
        shown = {m: hidden[:, i] for i, m in enumerate(self.modalities)}
        return MAEOutput(sum(losses.values()), losses, shown, predictions if return_prediction else None)

    def encode(self, images, mask=None):
        rows = []
        for name, image in self.checked(images).items():
            embedded = self.encoder(patchify(image, self.config.patch))
            seen = torch.ones_like(embedded[..., :1]) if mask is None else ~mask[name].flatten(1).unsqueeze(-1)
            rows.append((embedded * seen).sum(1) / seen.sum(1).clamp(min=1))
        return torch.stack(rows).mean(0)

    def reconstruct(self, images, targets):
        known = {m: x for m, x in images.items() if m not in targets}
        out = self(known, mask=self.nothing(known), return_prediction=True)
        return {m: out.prediction[m] for m in targets}

    def nothing(self, images):
        first = next(iter(images.values()))
        grid = token_grid(tuple(first.shape[2:]), self.config.patch)
        return {m: torch.full((len(first), *grid), m not in images, device=first.device) for m in self.modalities}


def build(plan):
    from medmae.models.zoo import config_of

    return LinearMAE(plan, config_of(plan, Config))
'''
PLAN = {
    "name": "linear-mae-tiny",
    "method": "linear-mae",
    "modalities": ["t1", "t1c", "t2", "flair"],
    "image": {"crop": [16, 16, 16]},
    "model": {"width": 6},
    "training": {"batch_size": 2, "epochs": 4, "warmup_epochs": 0, "lr": 0.05, "precision": "32", "validate_every": 1},
}


@pytest.fixture
def fifth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One file in a folder of methods, one plan."""
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "linear_mae.py").write_text(METHOD)
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(folder)])
    monkeypatch.delitem(sys.modules, "medmae.models.linear_mae", raising=False)
    return tmp_path


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_one_file_and_one_plan_are_a_method(fifth: Path) -> None:
    assert "linear-mae" in methods()
    assert '"width": 6' in run("plans", fifth / "plan.json")
    scans = write_scans(fifth / "scans")
    run("pretrain", scans, "--plan", fifth / "plan.json", "-o", fifth / "run", "--device", "cpu")
    lines = [json.loads(line) for line in (fifth / "run/metrics.jsonl").read_text().splitlines()]
    validation = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert validation[-1] < validation[0]

    model = medmae.load(fifth / "run")
    assert type(model).__name__ == "LinearMAE"
    assert model.encode({"t1": torch.randn(1, 1, 16, 16, 16)}).shape == (1, 6)
    run("reconstruct", scans / "case1", "--checkpoint", fifth / "run", "-o", fifth / "out", "--target", "t1c")
    assert (fifth / "out/case1_t1c.nii.gz").exists()
    run("evaluate", "synthesis", scans, "--checkpoint", fifth / "run", "-o", fifth / "scores", "--target", "flair")
    assert list((fifth / "scores").glob("*.csv"))


def test_a_misspelt_method_suggests_the_right_one(fifth: Path) -> None:
    with pytest.raises(medmae.PlanError, match="linear-mae"):
        medmae.create({**PLAN, "method": "linear-mea"})
