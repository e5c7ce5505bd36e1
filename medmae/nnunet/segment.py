"""Segmentation: nnU-Net's own commands with plans and a trainer that begin with a checkpoint."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import medmae
from medmae.errors import TrainingError
from medmae.files import explained
from medmae.nnunet.finding import KEY, environment
from medmae.nnunet.plans import CONFIGURATION, TRAINER, Dataset, build_plans, read_dataset, save_plans
from medmae.plan import Finetuning, Plan, Triple
from medmae.synthesis.volumes import pick_device

log = logging.getLogger(__name__)

COMMANDS = {
    "fingerprint": "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints:extract_fingerprint_entry",
    "preprocess": "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints:preprocess_entry",
    "train": "nnunetv2.run.run_training:run_training_entry",
}
_KEPT = 15  # lines of nnU-Net's output that an error shows


@dataclass
class FinetunedSegmentation:
    """An ordinary nnU-Net results folder: ``model`` (plans.json, dataset.json, fold_*), and each fold's mean Dice over
    the foreground on its validation cases."""

    model: Path
    plans: Path
    dice: dict[str, float | None] = field(default_factory=dict)
    transferred: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "model": str(self.model),
            "plans": str(self.plans),
            "dice": self.dice,
            "transferred": self.transferred,
        }

    def __str__(self) -> str:
        lines = [f"{self.model}"]
        if self.transferred:
            lines.append(", ".join(f"{count} tensors {kind}" for kind, count in self.transferred.items()))
        lines += [
            f"fold {fold}: mean foreground Dice {'not known' if dice is None else f'{dice:.4f}'}"
            for fold, dice in self.dice.items()
        ]
        return "\n".join(lines)


def write_plans(
    dataset: str | Path | Dataset,
    checkpoint: str | Path,
    preprocessed: str | Path,
    *,
    name: str | None = None,
    from_scratch: bool = False,
    modalities: Sequence[str] = (),
    overrides: Sequence[str] = (),
    spacing: Literal["auto", "checkpoint", "dataset"] = "auto",
    patch: Triple | None = None,
    steps_per_epoch: int = 250,
    validation_steps: int = 50,
    seed: int = 0,
) -> Path:
    """Write nnU-Net plans for ``dataset`` that begin with ``checkpoint``; returns their file.

    ``dataset``: an nnU-Net raw folder, or what was read of it (:func:`medmae.nnunet.plans.read_dataset`).
    ``preprocessed`` is nnU-Net's folder of that name. The data set's fingerprint is taken by nnU-Net, which checks
    the data too. ``overrides``: ``key=value`` for the plan's ``finetuning`` section. ``from_scratch``: the same
    without the weights. See :func:`medmae.nnunet.plans.build_plans` for the others.
    """
    model = medmae.load(checkpoint)
    found = dataset if isinstance(dataset, Dataset) else read_dataset(dataset, modalities)
    settings = finetuning_of(model.plan, overrides)
    preprocessed = Path(preprocessed)
    with explained(preprocessed):
        preprocessed.mkdir(parents=True, exist_ok=True)
    paths = {"nnUNet_raw": str(found.folder.resolve().parent), "nnUNet_preprocessed": str(preprocessed.resolve())}
    fingerprint = preprocessed / found.name / "dataset_fingerprint.json"
    if not fingerprint.is_file():
        run("fingerprint", ["-d", str(found.number), "--verify_dataset_integrity", "-np", "1"], paths)
    plans = build_plans(
        found,
        model,
        None if from_scratch else str(Path(checkpoint).resolve()),
        json.loads(fingerprint.read_text(encoding="utf-8")),
        name=name or plans_name(model.plan.name, from_scratch),
        settings=settings,
        seed=seed,
        steps_per_epoch=steps_per_epoch,
        validation_steps=validation_steps,
        spacing=spacing,
        patch=patch,
    )
    return save_plans(plans, found, preprocessed)


def plans_name(plan: str, from_scratch: bool) -> str:
    """A name that says what a results folder began with."""
    words = "".join(word.capitalize() for word in re.split(r"[^A-Za-z0-9]+", plan))
    return f"nnUNetMedMAE{words}{'Scratch' if from_scratch else ''}Plans"


def finetuning_of(plan: Plan, overrides: Sequence[str]) -> Finetuning:
    """The plan's ``finetuning`` section with ``overrides`` (``lr=0.001``, or ``finetuning.lr=0.001``)."""
    full = [o if o.startswith("finetuning.") else f"finetuning.{o}" for o in overrides]
    return Plan.load(plan, full).finetuning


def finetune_segment(
    dataset: str | Path,
    checkpoint: str | Path,
    out: str | Path,
    *,
    folds: Sequence[int | str] = (0,),
    from_scratch: bool = False,
    modalities: Sequence[str] = (),
    overrides: Sequence[str] = (),
    epochs: int | None = None,
    steps_per_epoch: int = 250,
    validation_steps: int = 50,
    spacing: Literal["auto", "checkpoint", "dataset"] = "auto",
    patch: Triple | None = None,
    resume: bool = False,
    device: str = "auto",
    seed: int = 0,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> FinetunedSegmentation:
    """Plan, preprocess, train and validate, all by nnU-Net.

    ``dataset``: an nnU-Net raw data set (``DatasetXXX_Name``). ``out`` gets ``preprocessed/`` and ``results/``,
    nnU-Net's folders, so its own commands go on from there. ``folds``: numbers, or "all". ``overrides``: of the
    plan's ``finetuning`` section, whose schedule is the paper's. ``resume``: go on where a training stopped.
    Deterministic for a seed as far as nnU-Net is with ``nnUNet_n_proc_DA=0``, which is set on a CPU.

    Raises :class:`InputError` for data that cannot be used and :class:`TrainingError`, with nnU-Net's last words,
    when one of its steps fails; what was finished stays.
    """
    out = Path(out)
    if epochs is not None:
        overrides = [*overrides, f"epochs={epochs}"]
    found = read_dataset(dataset, modalities)
    file = write_plans(
        found,
        checkpoint,
        out / "preprocessed",
        from_scratch=from_scratch,
        overrides=overrides,
        spacing=spacing,
        patch=patch,
        steps_per_epoch=steps_per_epoch,
        validation_steps=validation_steps,
        seed=seed,
    )
    plans = json.loads(file.read_text(encoding="utf-8"))
    paths = {
        "nnUNet_raw": str(found.folder.resolve().parent),
        "nnUNet_preprocessed": str((out / "preprocessed").resolve()),
        "nnUNet_results": str((out / "results").resolve()),
    }
    preprocess(found, plans, out / "preprocessed", paths)
    result = FinetunedSegmentation(
        out / "results" / found.name / f"{TRAINER}__{plans['plans_name']}__{CONFIGURATION}", file
    )
    total = plans[KEY]["finetuning"]["epochs"]
    chosen = pick_device(device).type
    for fold in folds:
        arguments = [str(found.number), CONFIGURATION, str(fold), "-tr", TRAINER, "-p", plans["plans_name"]]
        arguments += ["-device", chosen, *(["--c"] if resume else [])]
        run("train", arguments, paths, watcher(fold, total, on_progress))
        result.dice[str(fold)] = dice_of(result.model / f"fold_{fold}")
        result.transferred = transferred_in(result.model / f"fold_{fold}")
    return result


def preprocess(dataset: Dataset, plans: dict[str, Any], preprocessed: Path, paths: dict[str, str]) -> None:
    """nnU-Net's preprocessing, unless it was done for the same plans already."""
    name = plans["plans_name"]
    configuration = plans["configurations"][CONFIGURATION]
    kept = preprocessed / dataset.name / f"{configuration['data_identifier']}.json"
    decides = {k: v for k, v in configuration.items() if k not in ("architecture", "batch_size", "patch_size")}
    if kept.is_file() and json.loads(kept.read_text(encoding="utf-8")) == json.loads(json.dumps(decides)):
        return
    run("preprocess", ["-d", str(dataset.number), "-plans_name", name, "-c", CONFIGURATION, "-np", "1"], paths)
    kept.write_text(json.dumps(decides, indent=2), encoding="utf-8")


def watcher(fold: int | str, epochs: int, on_progress: Callable[[int, int, str], None] | None) -> Callable[[str], None]:
    """Turns nnU-Net's lines into progress: epochs done of all."""
    state = {"epoch": 0}

    def watch(line: str) -> None:
        if match := re.search(r": Epoch (\d+)\s*$", line):
            state["epoch"] = int(match[1])
        elif "Mean Validation Dice" in line or "weights of" in line:
            log.info("fold %s: %s", fold, line.split(": ", 1)[-1].strip())
        if on_progress and ("Epoch " in line or "Pseudo dice" in line):
            told = line.split(": ", 1)[-1].strip() if "Pseudo" in line else ""
            on_progress(state["epoch"] + bool(told), epochs, f"fold {fold} {told}".strip())

    return watch


def run(
    command: str, arguments: Sequence[str], paths: dict[str, str], watch: Callable[[str], None] | None = None
) -> None:
    """One of nnU-Net's commands in a process of its own, its output read line by line.

    Raises :class:`TrainingError` with its last lines when it fails.
    """
    module, function = COMMANDS[command].split(":")
    code = f"import sys; from {module} import {function} as go; sys.argv = ['nnUNet', *sys.argv[1:]]; go()"
    env = {**environment(), **paths}
    env.setdefault("nnUNet_n_proc_DA", "0" if command == "train" and "cuda" not in arguments else "1")
    env.setdefault("nnUNet_def_n_proc", "1")
    env.setdefault("nnUNet_compile", "f")
    env["PYTHONUNBUFFERED"] = "1"
    last: deque[str] = deque(maxlen=_KEPT)
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            log.debug("%s", line.rstrip())
            if line.strip():
                last.append(line.rstrip())
            if watch:
                watch(line)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if process.wait() != 0:
        raise TrainingError(
            f"nnU-Net's {command} stopped",
            found=reason(list(last)),
            remedy="--debug shows all that it said; what was finished is kept, --resume goes on.",
        )


def reason(lines: list[str]) -> str:
    """The last line of a traceback, or all the last lines."""
    errors = [line for line in lines if re.match(r"^[A-Za-z_.]+(Error|Exception|Exit)\b", line)]
    return errors[-1] if errors else "\n".join(lines)


def dice_of(fold: Path) -> float | None:
    """Mean foreground Dice of a fold's validation."""
    file = fold / "validation" / "summary.json"
    if not file.is_file():
        return None
    value = json.loads(file.read_text(encoding="utf-8"))["foreground_mean"]["Dice"]
    return None if value is None else float(value)


def transferred_in(fold: Path) -> dict[str, int]:
    file = fold / "transfer.json"
    if not file.is_file():
        return {}
    return {kind: len(names) for kind, names in json.loads(file.read_text(encoding="utf-8")).items()}


@dataclass
class PredictedSegmentation:
    """Files ``written``, what ``failed``, and warnings."""

    written: list[Path] = field(default_factory=list)
    problems: list[Any] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {"written": [str(p) for p in self.written], "problems": [vars(p) for p in self.problems]}


def predict_segment(
    data: Sequence[str | Path] | str | Path,
    model: str | Path,
    out: str | Path,
    *,
    folds: Sequence[int | str] | None = None,
    device: str = "auto",
    mirror: bool = True,
    format: Literal["nifti", "dicom"] = "nifti",
    on_progress: Callable[[int, int, str], None] | None = None,
) -> PredictedSegmentation:
    """Segment studies with a fine-tuned ``model`` (an nnU-Net results folder), whatever channels they have.

    ``data``: studies in any supported layout, modalities named as the model's channels. A study that lacks some is
    segmented from the others, which nnU-Net's own command refuses; a model trained without modality dropout has
    never practised that, and the result says so. Writes ``<study>.nii.gz`` to ``out`` on the grid of the study's
    first channel, or, ``format`` "dicom", ``<study>.dcm``, a DICOM SEG in the study that the images came from. A study
    that fails is reported, and the others are written.
    """
    from medmae.nnunet.predict import predict

    return predict(data, Path(model), Path(out), folds, pick_device(device), mirror, format, on_progress)
