"""A training learns, leaves what the contract says, and continues as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import medmae
from medmae import Plan
from medmae.errors import CheckpointError, InputError, MedmaeError, TrainingError
from medmae.training.pretrain import make_fabric, pretrain
from tests.training.conftest import PLAN

WEIGHTS = Path("checkpoint/model.safetensors")


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def run_of(cohort: Path, out: Path, **more) -> medmae.training.pretrain.TrainedRun:  # type: ignore[no-untyped-def,name-defined]
    return pretrain(cohort, Plan.load(PLAN), out, **{"device": "cpu", "progress": False, **more})


@pytest.fixture(scope="module")
def finished(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    run_of(cohort, out)
    return out


def test_run_folder_holds_what_the_contract_says(finished: Path) -> None:
    plan = Plan.load(finished / "plan.json")
    assert plan == Plan.load(PLAN)
    metadata = json.loads((finished / "checkpoint/metadata.json").read_text())
    assert metadata["method"] == "bm-mae" and metadata["modalities"] == list(plan.modalities)
    assert set(metadata["intensity"]) == set(plan.modalities) and metadata["versions"]["medmae"] == medmae.__version__
    assert "case" not in (finished / "checkpoint/metadata.json").read_text()  # no study names travel with weights
    state = torch.load(finished / "checkpoint/training_state.pt", weights_only=True)
    assert state["step"] == metadata["step"] == 30
    assert (finished / "checkpoint-previous/model.safetensors").exists()
    assert list((finished / "previews").glob("*.png")) and list((finished / "tensorboard").iterdir())
    split = json.loads((finished / "split.json").read_text())
    assert len(split["training"]) == 5
    assert not set(split["training"]) & set(split["validation"])


def test_loss_falls(finished: Path) -> None:
    validation = [m["validation_loss"] for m in metrics(finished) if "validation_loss" in m]
    assert validation[-1] < 0.9 * validation[0]


def test_typical_intensities_are_those_of_the_scans(finished: Path) -> None:
    intensity = json.loads((finished / "checkpoint/metadata.json").read_text())["intensity"]
    assert 250 < intensity["t2"]["mean"] < 400 and 10 < intensity["t2"]["std"] < 120  # around 300 by construction


def test_same_seed_same_weights_other_seed_others(cohort: Path, finished: Path, tmp_path: Path) -> None:
    run_of(cohort, tmp_path / "again")
    run_of(cohort, tmp_path / "other", seed=1)
    first, again, other = (load_file(run / WEIGHTS) for run in (finished, tmp_path / "again", tmp_path / "other"))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])


def test_resumed_run_equals_an_uninterrupted_one(cohort: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_of(cohort, out, max_steps=7, checkpoint_every=3)
    run_of(cohort, out, resume=True)
    whole, resumed = load_file(finished / WEIGHTS), load_file(out / WEIGHTS)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert [m["step"] for m in metrics(out) if "loss" in m] == list(range(1, 31))


def test_killed_run_resumes_to_the_same_weights(cohort: Path, finished: Path, tmp_path: Path) -> None:
    out, plan = tmp_path / "run", tmp_path / "plan.json"
    plan.write_text(json.dumps(PLAN))
    command = [sys.executable, "-m", "medmae", "pretrain", str(cohort), "--plan", str(plan), "-o", str(out)]
    command += ["--device", "cpu", "--checkpoint-every", "1"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (out / "checkpoint-previous").exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
    finally:
        os.kill(process.pid, getattr(signal, "SIGKILL", signal.SIGTERM))
        process.wait()
    medmae.load(out)  # whatever the moment of the kill, something whole is there
    run_of(cohort, out, resume=True)
    whole, resumed = load_file(finished / WEIGHTS), load_file(out / WEIGHTS)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_damaged_newest_checkpoint_falls_back_to_the_one_before(cohort: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_of(cohort, out, max_steps=2, checkpoint_every=1)
    weights = out / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])
    assert medmae.load(out).metadata["step"] == 1
    (out / "checkpoint-previous/model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="damaged"):
        medmae.load(out)


def test_raw_scans_are_prepared_into_the_run(scans: Path, tmp_path: Path) -> None:
    run_of(scans, tmp_path / "run", max_steps=1)
    assert (tmp_path / "run/cohort/cohort.json").exists()


def test_options_reach_the_training(cohort: Path, tmp_path: Path) -> None:
    overrides = ["training.clip_norm=0.5", "training.accumulate=2", "training.cohort_on_device=true"]
    trained = run_of(cohort, tmp_path / "run", overrides=overrides, max_steps=2, precision="bf16")
    assert trained.steps == 2
    assert Plan.load(tmp_path / "run/plan.json").training.accumulate == 2


@pytest.mark.parametrize(
    ("able", "asked", "used"),
    [
        (True, None, torch.bfloat16),
        (False, None, torch.float32),
        (False, "bf16", torch.bfloat16),
        (True, "32", torch.float32),
    ],
)
def test_bf16_of_a_plan_is_fp32_where_it_is_imitated(
    able: bool, asked: str | None, used: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("medmae.training.pretrain.computes_in_bf16", lambda: able)
    fabric = make_fabric(Plan.load(PLAN, ["training.precision=bf16"]), "cpu", asked, 1, 1, "auto")
    with fabric.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == used
    assert ("no bf16 arithmetic" in caplog.text) is not able


def test_cohort_in_memory_gives_the_same_run(cohort: Path, finished: Path, tmp_path: Path) -> None:
    plan = Plan.load(PLAN, ["training.cohort_on_device=true"])
    pretrain(cohort, plan, tmp_path / "run", device="cpu", progress=False)
    first, second = load_file(finished / WEIGHTS), load_file(tmp_path / "run" / WEIGHTS)
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_init_begins_with_other_weights(cohort: Path, finished: Path, tmp_path: Path) -> None:
    run_of(cohort, tmp_path / "run", init=finished, max_steps=1, overrides=["training.lr=1e-12"])
    before, after = load_file(finished / WEIGHTS), load_file(tmp_path / "run" / WEIGHTS)
    torch.testing.assert_close(before["norm.weight"], after["norm.weight"])


def test_a_loss_that_is_not_finite_stops_and_names_the_studies(cohort: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="case") as stopped:
        run_of(cohort, tmp_path / "run", overrides=["training.lr=1e30"], checkpoint_every=1)
    assert "inf" in str(stopped.value) or "nan" in str(stopped.value)
    saved = medmae.load(tmp_path / "run")
    assert saved.metadata["step"] >= 1


def test_an_existing_run_is_not_overwritten(cohort: Path, finished: Path) -> None:
    with pytest.raises(CheckpointError, match="--resume"):
        run_of(cohort, finished)
    with pytest.raises(CheckpointError, match="plan it began with"):
        run_of(cohort, finished, resume=True, overrides=["training.lr=0.1"])
    with pytest.raises(CheckpointError, match="seed it began with"):
        run_of(cohort, finished, resume=True, seed=3)


def test_a_checkpoint_of_another_architecture_is_refused_with_the_list(
    cohort: Path, finished: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="another architecture") as refused:
        run_of(cohort, tmp_path / "run", init=finished, overrides=["model.width=48"])
    assert "other shape" in str(refused.value)


def test_bad_input_is_refused_before_anything_is_trained(cohort: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="another image space"):
        run_of(cohort, tmp_path / "a", overrides=["image.spacing=[2,2,2]"])
    with pytest.raises(InputError):
        run_of(tmp_path / "nowhere", tmp_path / "b")
    with pytest.raises(InputError, match="no study has a modality"):
        run_of(cohort, tmp_path / "c", overrides=['modalities=["ct"]'])
    if not torch.cuda.is_available():
        with pytest.raises(MedmaeError, match="no CUDA"):
            run_of(cohort, tmp_path / "d", device="cuda")
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(MedmaeError, match="file is where a folder should be"):
        run_of(cohort, blocked / "run")


def test_when_no_study_can_be_prepared_every_reason_is_told(tmp_path: Path) -> None:
    for study in ("a", "b"):
        (tmp_path / "scans" / study).mkdir(parents=True)
        (tmp_path / "scans" / study / "t1.nii.gz").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"t1\.nii\.gz") as refused:
        run_of(tmp_path / "scans", tmp_path / "run")
    assert len(refused.value.problems) == 2


@pytest.mark.slow
def test_two_processes_train_together(cohort: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(PLAN))
    command = [sys.executable, "-m", "medmae", "pretrain", str(cohort), "--plan", str(plan)]
    command += ["-o", str(tmp_path / "run"), "--device", "cpu", "--devices", "2", "--max-steps", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert medmae.load(tmp_path / "run").metadata["step"] == 3
