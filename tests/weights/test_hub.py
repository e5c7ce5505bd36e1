"""Models to and from the Hub's format, on local folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard

import medmae
from medmae.errors import CheckpointError
from medmae.models.base import MaskedAutoencoder
from medmae.training.pretrain import pretrain
from tests.training.conftest import PLAN, write_scans
from tests.training.test_methods import TINY


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    pretrain(write_scans(folder / "scans"), PLAN, folder / "run", device="cpu", progress=False, max_steps=2)
    return folder / "run"


@pytest.mark.parametrize("plan", TINY)
def test_every_method_comes_back_bit_for_bit(plan: str, tmp_path: Path) -> None:
    model = medmae.create(plan)
    model.save_pretrained(tmp_path / "model")
    for again in (
        MaskedAutoencoder.from_pretrained(tmp_path / "model"),
        type(model).from_pretrained(str(tmp_path / "model")),
        medmae.from_pretrained(tmp_path / "model"),
        medmae.load(tmp_path / "model"),
    ):
        assert type(again) is type(model) and again.plan == model.plan
        assert all(torch.equal(again.state_dict()[k], v) for k, v in model.state_dict().items())
    assert {f.name for f in (tmp_path / "model").iterdir()} >= {
        "README.md",
        "config.json",
        "metadata.json",
        "model.safetensors",
    }


def test_the_card_tells_what_the_run_knows(run: Path, tmp_path: Path) -> None:
    model = medmae.load(run)
    model.save_pretrained(tmp_path / "model", model_card_kwargs={"licence": "cc-by-4.0"})
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.library_name == "medmae" and card.data.license == "cc-by-4.0"
    assert {"bm-mae", "t1", "flair"} <= set(card.data.tags or [])
    metadata = json.loads((run / "checkpoint/metadata.json").read_text())
    for fact in ("1 × 1 × 1 mm", "RAS", "t1, t1c, t2, flair", "5 studies", metadata["data"]["fingerprint"], "2 steps"):
        assert fact in card.text, fact
    assert f"{metadata['intensity']['t2']['mean']:.4g}" in card.text
    assert "case" not in card.text and str(tmp_path) not in card.text
    model.save_pretrained(tmp_path / "other")
    assert ModelCard.load(tmp_path / "other" / "README.md").data.license == "other"


def test_what_is_shared_trains_on_and_synthesises(run: Path, tmp_path: Path) -> None:
    medmae.load(run).save_pretrained(tmp_path / "model")
    shared = medmae.from_pretrained(tmp_path / "model")
    assert shared.metadata["intensity"] == medmae.load(run).metadata["intensity"]
    again = pretrain(
        run / "cohort", PLAN, tmp_path / "next", init=tmp_path / "model", device="cpu", progress=False, max_steps=1
    )
    assert again is not None


def test_push_uploads_these_files_and_no_others(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would go over the wire, seen at huggingface_hub's door."""
    sent: dict[str, Any] = {}

    class Repository:
        repo_id = "owner/name"

    def upload(self: HfApi, **arguments: Any) -> str:
        sent.update({p.name: p.read_bytes() for p in Path(arguments["folder_path"]).iterdir()})
        return "done"

    monkeypatch.setattr(HfApi, "create_repo", lambda *a, **k: Repository())
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    medmae.load(run).push_to_hub("owner/name")
    assert set(sent) == {"README.md", "config.json", "metadata.json", "model.safetensors"}


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no folder of this name"):
        medmae.from_pretrained("nobody/nothing", local_files_only=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        medmae.from_pretrained(tmp_path / "empty")
