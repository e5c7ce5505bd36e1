"""nnU-Net's own commands with our trainer, on a CPU, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import medmae
from medmae.cli import app
from medmae.errors import TrainingError
from medmae.nnunet.finding import environment
from medmae.nnunet.segment import run
from tests.nnunet.conftest import MODELS

QUICK = ["--epochs", "2", "--steps", "2", "--validation-steps", "1", "--device", "cpu"]


def invoke(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout) if "--json" in arguments else result.stdout


def commands(out: Path, raw: Path, name: str, *arguments: object) -> None:
    """One of nnU-Net's commands, as its user types it."""
    env = {
        **environment(),
        "nnUNet_raw": str(raw.parent),
        "nnUNet_preprocessed": str(out / "preprocessed"),
        "nnUNet_results": str(out / "results"),
        "nnUNet_n_proc_DA": "0" if name == "nnUNetv2_train" else "1",
        "nnUNet_def_n_proc": "1",
    }
    program = Path(sys.executable).with_name(name)
    done = subprocess.run([program, *map(str, arguments)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("method", MODELS)
def test_nnunets_commands_train_predict_and_evaluate(method: str, raw: Path, checkpoints: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = invoke("finetune", "segment", raw, "-c", checkpoints / method, "-o", out, *QUICK, "--json")
    model = Path(told["model"])
    fold = model / "fold_0"
    assert {"plans.json", "dataset.json", "dataset_fingerprint.json"} <= {f.name for f in model.iterdir()}
    assert (fold / "checkpoint_final.pth").exists() and (fold / "progress.png").exists()
    assert (fold / "validation" / "summary.json").exists() and list(told["dice"]) == ["0"]
    assert told["transferred"]["transferred"] > 20
    plans = json.loads((model / "plans.json").read_text())

    inputs, own = tmp_path / "in", tmp_path / "own"
    inputs.mkdir()
    for file in (raw / "imagesTr").glob("case_[01]_*"):
        (inputs / file.name).write_bytes(file.read_bytes())
    arguments = ["-i", inputs, "-o", own, "-d", "901", "-c", "3d_fullres", "-f", "0", "-device", "cpu"]
    arguments += ["-tr", "nnUNetTrainerMedMAE", "-p", plans["plans_name"], "-npp", "0", "-nps", "0"]
    commands(out, raw, "nnUNetv2_predict", *arguments)
    folder = tmp_path / "from-folder"
    arguments = ["-i", inputs, "-o", folder, "-m", model, "-f", "0", "-device", "cpu", "-npp", "1", "-nps", "1"]
    commands(out, raw, "nnUNetv2_predict_from_modelfolder", *arguments)
    ours = tmp_path / "ours"
    invoke("predict", "segment", raw, "--model", model, "-o", ours, "--device", "cpu")
    for case in ("case_0", "case_1"):
        images = [nib.load(f / f"{case}.nii.gz") for f in (own, folder, ours)]
        for image in images[1:]:
            np.testing.assert_array_equal(image.get_fdata(), images[0].get_fdata())
            np.testing.assert_allclose(image.affine, nib.load(inputs / f"{case}_0000.nii.gz").affine)
    arguments = [raw / "labelsTr", own, "-djfile", model / "dataset.json", "-pfile", model / "plans.json", "--chill"]
    commands(out, raw, "nnUNetv2_evaluate_folder", *arguments, "-np", "1")
    assert (own / "summary.json").exists()


@pytest.mark.slow
def test_training_with_missing_channels_and_any_subset_after(raw: Path, checkpoints: Path, tmp_path: Path) -> None:
    for method in ("bm-mae", "resenc-mae"):
        out = tmp_path / method
        told = invoke(
            *["finetune", "segment", raw, "-c", checkpoints / method, "-o", out, *QUICK, "--json"],
            *["--set", "modality_dropout=0.8", "--set", "layer_decay=0.7", "--set", "freeze=0.5"],
        )
        study = tmp_path / f"study-{method}"
        study.mkdir()
        (study / "flair.nii.gz").write_bytes((raw / "imagesTr" / "case_0_0001.nii.gz").read_bytes())
        shown = invoke("predict", "segment", study, "--model", told["model"], "-o", tmp_path / "p", "--json")
        assert shown["problems"] == [] and nib.load(shown["written"][0]).shape == (18, 22, 26)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_network_and_resuming_goes_on(
    raw: Path, checkpoints: Path, tmp_path: Path
) -> None:
    def weights(out: Path, **more: Any) -> dict[str, torch.Tensor]:
        options = {"steps_per_epoch": 2, "validation_steps": 1, "device": "cpu", "epochs": 2, **more}
        found = medmae.finetune_segment(raw, checkpoints / "spark", out, **options)
        file = found.model / "fold_0" / "checkpoint_final.pth"
        state: dict[str, torch.Tensor] = torch.load(file, weights_only=False)["network_weights"]
        return state

    first, again = weights(tmp_path / "a", seed=3), weights(tmp_path / "b", seed=3)
    assert all(torch.equal(first[k], again[k]) for k in first)
    scratch = weights(tmp_path / "c", seed=3, from_scratch=True)
    assert not torch.equal(first["encoder.stem.convs.0.conv.weight"], scratch["encoder.stem.convs.0.conv.weight"])
    weights(tmp_path / "a", seed=3, resume=True)  # finished: validates again


@pytest.mark.slow
def test_stock_nnunet_takes_an_export(raw: Path, checkpoints: Path, tmp_path: Path) -> None:
    """``nnUNetv2_train -pretrained_weights`` with nnU-Net's own trainer, plans of the same architecture."""
    out = tmp_path / "out"
    medmae.export(checkpoints / "resenc-mae", tmp_path / "resenc.pth", to="nnunet", channels=2)
    file = medmae.write_plans(raw, checkpoints / "resenc-mae", out / "preprocessed", name="Ours")
    commands(out, raw, "nnUNetv2_preprocess", "-d", "901", "-plans_name", file.stem, "-c", "3d_fullres", "-np", "1")
    arguments = ["901", "3d_fullres", "0", "-p", file.stem, "-tr", "nnUNetTrainer_1epoch", "-device", "cpu"]
    commands(out, raw, "nnUNetv2_train", *arguments, "-pretrained_weights", tmp_path / "resenc.pth")


def test_a_step_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="preprocess stopped") as told:
        run("preprocess", ["-d", "77"], {k: str(tmp_path) for k in ("nnUNet_raw", "nnUNet_preprocessed")})
    assert "Error" in str(told.value) or "77" in str(told.value)


def test_what_is_no_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(medmae.CheckpointError, match="no nnU-Net model"):
        medmae.predict_segment(tmp_path, tmp_path, tmp_path / "out")
    (tmp_path / "plans.json").write_text("{}")
    with pytest.raises(medmae.CheckpointError, match="did not fine-tune"):
        medmae.predict_segment(tmp_path, tmp_path, tmp_path / "out")


def test_the_folder_for_nnunet_is_printed() -> None:
    assert os.path.isfile(Path(invoke("nnunet", "path").strip()) / "nnUNetTrainerMedMAE.py")
