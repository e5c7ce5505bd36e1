"""Checkpoints: a folder of safetensors, JSON and plain tensors, always whole on disk.

``checkpoint/model.safetensors`` the weights in fp32; ``metadata.json`` what the model is and what it expects (no
paths, no study names); ``training_state.pt`` step and optimiser, tensors and plain types only. The one before is
kept as ``checkpoint-previous`` and used when the newest is damaged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from medmae.errors import CheckpointError
from medmae.files import file_hash, replace_folder
from medmae.models.base import MaskedAutoencoder, without_repeats
from medmae.models.refiner import Refiner
from medmae.models.zoo import create
from medmae.plan import Plan, Refining

FOLDER, PREVIOUS = "checkpoint", "checkpoint-previous"
WEIGHTS, METADATA, STATE = "model.safetensors", "metadata.json", "training_state.pt"
COMPANIONS = {"refiner": "refiner.safetensors", "familiar": "familiar.safetensors"}


def save_checkpoint(
    run: Path, weights: Mapping[str, Tensor], metadata: dict[str, Any], state: dict[str, Any] | None
) -> Path:
    """Write ``run/checkpoint``; the one before becomes ``run/checkpoint-previous``. ``weights`` name each tensor once
    (:func:`medmae.models.base.without_repeats`)."""

    def fill(folder: Path) -> None:
        write_weights(folder, weights, metadata)
        if state is not None:
            torch.save(state, folder / STATE)

    replace_folder(run / FOLDER, run / PREVIOUS, fill)
    return run / FOLDER


def save_refined(
    run: Path,
    weights: Mapping[str, Tensor],
    companions: Mapping[str, Mapping[str, Tensor]],
    metadata: dict[str, Any],
    state: dict[str, Any],
) -> Path:
    """:func:`save_checkpoint` of a model with what came with it, {name of :data:`COMPANIONS`: tensors}; their hashes
    go into ``metadata[name]``."""

    def fill(folder: Path) -> None:
        described = dict(metadata)
        for name, tensors in companions.items():
            file = folder / COMPANIONS[name]
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, file)
            described[name] = {**metadata.get(name, {}), "sha256": file_hash(file)}
        write_weights(folder, weights, described)
        torch.save(state, folder / STATE)

    replace_folder(run / FOLDER, run / PREVIOUS, fill)
    return run / FOLDER


def facts_of(plan: Plan) -> dict[str, Any]:
    """What every ``metadata.json`` begins with: the model and the space it works in."""
    return {
        "format": 1,
        "method": plan.method,
        "modalities": list(plan.modalities),
        "plan": plan.model_dump(mode="json"),
        "plan_hash": plan.hash(),
        "image": plan.image.model_dump(mode="json"),
    }


def write_weights(folder: Path, weights: Mapping[str, Tensor], metadata: dict[str, Any]) -> None:
    """The weights and the metadata that describes them, with their hash."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(tensors, folder / WEIGHTS)
    described = {**metadata, "weights_sha256": file_hash(folder / WEIGHTS)}
    (folder / METADATA).write_text(json.dumps(described, indent=2), encoding="utf-8")


def find_checkpoint(path: Path) -> Path:
    """The newest whole checkpoint folder of a run, or ``path`` itself if it is one."""
    candidates = [folder for folder in (path / FOLDER, path / PREVIOUS, path) if (folder / METADATA).is_file()]
    damaged = []
    for folder in candidates:
        try:
            metadata = json.loads((folder / METADATA).read_text(encoding="utf-8"))
            if file_hash(folder / WEIGHTS) == metadata["weights_sha256"]:
                return folder
            damaged.append(f"{folder / WEIGHTS}: not the weights its metadata describes")
        except (OSError, ValueError, KeyError, TypeError) as error:
            damaged.append(f"{folder}: {error}")
    if damaged:
        raise CheckpointError(
            "every checkpoint here is damaged",
            where=path,
            found="; ".join(damaged),
            remedy="Copy the run again, or train anew.",
        )
    raise CheckpointError(
        "no checkpoint here",
        where=path,
        expected=f"a run, or a folder with {WEIGHTS} and {METADATA}",
        remedy="Give the folder that `medmae pretrain -o` or `medmae import -o` wrote.",
    )


def read_checkpoint(path: Path) -> tuple[MaskedAutoencoder, Path]:
    """The model of a run or checkpoint folder (on the CPU, in eval mode) and the folder it came from."""
    folder = find_checkpoint(path)
    metadata = json.loads((folder / METADATA).read_text(encoding="utf-8"))
    model = create(Plan.load(metadata["plan"]))
    load_weights(model, folder / WEIGHTS)
    model.metadata = metadata
    for name in COMPANIONS:
        if name in metadata:
            model.companions[name] = read_companion(folder, name, metadata[name])
    return model.eval(), folder


def read_companion(folder: Path, name: str, facts: Mapping[str, Any]) -> Any:
    """What came with a model: the refiner as a network, anything else as its tensors. Raises
    :class:`CheckpointError` when the file is not the one that ``facts`` describe."""
    file = folder / COMPANIONS[name]
    if not file.is_file() or file_hash(file) != facts["sha256"]:
        raise CheckpointError(
            f"the {name} of this checkpoint is missing or damaged",
            where=file,
            expected=f"SHA-256 {facts['sha256'][:12]}...",
            remedy="Copy the run again, or repeat `medmae finetune synthesis`.",
        )
    tensors = load_file(file)
    if name != "refiner":
        return tensors
    refiner = Refiner(facts["modalities"], Refining.model_validate(facts["settings"]))
    refiner.load_state_dict(tensors)
    return refiner.eval()


def load_weights(model: MaskedAutoencoder, file: Path) -> None:
    """Fill ``model`` from a safetensors file; every tensor must be there and fit."""
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError("not a readable safetensors file", where=file, found=error) from None
    compare(model, weights, file)
    model.load_state_dict(weights, strict=False)  # a tensor with two names is there once


def compare(model: MaskedAutoencoder, weights: dict[str, Tensor], where: Path) -> None:
    """Raise :class:`CheckpointError` listing what differs between a model's tensors and a file's (each named once)."""
    expected = {name: tuple(t.shape) for name, t in without_repeats(model, model.state_dict()).items()}
    found = {name: tuple(t.shape) for name, t in weights.items()}
    if expected == found:
        return
    matching = sum(found.get(name) == shape for name, shape in expected.items())
    missing = sorted(set(expected) - set(found))
    extra = sorted(set(found) - set(expected))
    reshaped = [f"{n} {found[n]} instead of {expected[n]}" for n in expected if n in found and found[n] != expected[n]]
    details = [
        f"{label}: {', '.join(names[:6])}{' ...' if len(names) > 6 else ''} ({len(names)})"
        for label, names in (("missing", missing), ("not in the model", extra), ("other shape", reshaped))
        if names
    ]
    raise CheckpointError(
        f"a checkpoint of another architecture: {matching} of {len(expected)} tensors match",
        where=where,
        found="; ".join(details),
        expected=f"the tensors of plan {model.plan.name} ({model.plan.method})",
        remedy="Use the plan the checkpoint was trained with.",
    )


def read_state(folder: Path) -> dict[str, Any]:
    """``training_state.pt`` of a checkpoint folder."""
    try:
        state: dict[str, Any] = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types for damaged files
        raise CheckpointError(
            "the training state cannot be read, so this run cannot be resumed",
            where=folder / STATE,
            found=type(error).__name__,
            remedy="Start a new run with --init and this checkpoint.",
        ) from None
    return state


def check_state(state: Mapping[str, Any], fingerprint: str, seed: int, folder: Path) -> None:
    """Raise :class:`CheckpointError` when ``state`` is of a training on another cohort or with another seed."""
    if state["fingerprint"] != fingerprint or state["seed"] != seed:
        changed = "cohort" if state["fingerprint"] != fingerprint else "seed"
        raise CheckpointError(
            f"a run continues with the {changed} it began with",
            where=folder,
            found=f"another {changed}",
            remedy="Restore it, or begin a new run with --init.",
        )
