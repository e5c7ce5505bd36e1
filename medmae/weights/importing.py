"""From a published file to a model: recognise the family by its keys, rename, compare, refuse what does not fit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import medmae
from medmae.errors import CheckpointError
from medmae.files import explained, file_hash, write_text
from medmae.models.base import MaskedAutoencoder, without_repeats
from medmae.models.zoo import create
from medmae.training.checkpoint import compare, facts_of, read_checkpoint, save_checkpoint
from medmae.weights import bm_mae, hi_end_mae, nnssl

FAMILIES: tuple[ModuleType, ...] = (bm_mae, hi_end_mae, nnssl)


@dataclass
class ImportReport:
    """What an import did: tensors ``loaded`` from the file, ``new`` (left at random), and file keys ``ignored``."""

    family: str
    plan: str
    model: Path | None
    loaded: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "family": self.family,
            "plan": self.plan,
            "model": str(self.model) if self.model else None,
            "loaded": len(self.loaded),
            "new": self.new,
            "ignored": self.ignored,
        }

    def __str__(self) -> str:
        lines = [f"{self.family} checkpoint, plan {self.plan}: {len(self.loaded)} tensors loaded"]
        for label, names in (("new (random)", self.new), ("in the file but not used", self.ignored)):
            if names:
                lines.append(f"{len(names)} {label}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}")
        if self.model is not None:
            lines.append(f"Model written to {self.model}")
        return "\n".join(lines)


def load(path: str | Path) -> MaskedAutoencoder:
    """A model from a run, a checkpoint folder or a published file; on the CPU, in eval mode.

    Raises :class:`CheckpointError` when nothing is there, the file is damaged, carries code, or is of another
    architecture than its keys say.
    """
    path = Path(path)
    if path.is_file():
        return read_published(path, allow_partial=False)[0]
    return read_checkpoint(path)[0]


def import_weights(file: str | Path, out: str | Path, *, allow_partial: bool = False) -> ImportReport:
    """Convert a published ``file`` to a run folder ``out`` that every command accepts.

    A file that lacks tensors, or brings some that fit nowhere, is refused unless ``allow_partial``. Raises
    :class:`CheckpointError` for files that cannot be read or recognised.
    """
    out = Path(out)
    model, report = read_published(Path(file), allow_partial)
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
    write_text(out / "plan.json", model.plan.to_json())
    save_checkpoint(out, without_repeats(model, model.state_dict()), model.metadata, state=None)
    report.model = out
    return report


def read_published(file: Path, allow_partial: bool) -> tuple[MaskedAutoencoder, ImportReport]:
    """The model of a published file, and what was matched."""
    state, facts = read_tensors(file)
    family = next((f for f in FAMILIES if f.recognises(state)), None)
    if family is None:
        raise CheckpointError(
            "not a published checkpoint that is known here",
            where=file,
            found=f"{len(state)} tensors, for example {', '.join(list(state)[:3])}",
            expected=f"the keys of {', '.join(f.NAME for f in FAMILIES)}",
        )
    plan, weights, unused = family.convert(state, facts, file)
    model = create(plan)
    own = without_repeats(model, model.state_dict())
    weights = without_repeats(model, weights)
    weights = {
        n: t.reshape(own[n].shape) if n in own and t.numel() == own[n].numel() == max(t.shape) else t
        for n, t in weights.items()
    }
    report = ImportReport(family.NAME, plan.name, None, ignored=list(unused))
    if not allow_partial:
        compare(model, weights, file)
    fitting = {n: t.float() for n, t in weights.items() if n in own and own[n].shape == t.shape}
    model.load_state_dict(fitting, strict=False)
    report.loaded = sorted(fitting)
    report.new = sorted(set(own) - set(fitting))
    report.ignored += sorted(set(weights) - set(fitting))
    if not report.loaded:
        raise CheckpointError("nothing in this file fits", where=file, expected=f"tensors of plan {plan.name}")
    model.metadata = describe(model, family, file)
    return model.eval(), report


def describe(model: MaskedAutoencoder, family: ModuleType, file: Path) -> dict[str, Any]:
    plan = model.plan
    return {
        **facts_of(plan),
        "imported": {"family": family.NAME, "sha256": file_hash(file)},
        "versions": {"medmae": medmae.__version__, "torch": torch.__version__},
        "licence_note": family.LICENCE,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The flat state dict of a ``.pth``/``.pt`` or ``.safetensors`` file, and the plain facts beside it; wrappers and
    ``module.`` are taken off. Groups of weights (``network_weights``, ``spark_weights``) keep their names in front."""
    if not file.is_file():
        raise CheckpointError("no such file", where=file)
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle and zip each raise their own
        carries_code = "weights_only" in str(error).lower() or "unsupported global" in str(error).lower()
        raise CheckpointError(
            "this file carries more than tensors and is not opened: it could run code"
            if carries_code
            else "not a readable checkpoint; it may be truncated",
            where=file,
            found=type(error).__name__,
            expected="a torch file of tensors and plain types, or safetensors",
            remedy="Download it again, or save its state dict alone where you trust it.",
        ) from None
    return flat_tensors(found, file)


def flat_tensors(
    found: Any,
    file: Path,
    wrappers: Sequence[str] = ("state_dict", "model", "model_state_dict"),
    groups: Sequence[str] = ("network_weights", "spark_weights"),
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """See :func:`read_tensors`."""
    if isinstance(found, dict) and isinstance(found.get(groups[0]), dict):
        tensors = {
            f"{group}.{name}": tensor
            for group in groups
            for name, tensor in without_module(found.get(group) or {}).items()
        }
        return tensors, {str(k): v for k, v in found.items() if k not in groups}
    for name in wrappers:
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
    if not isinstance(found, dict) or not any(isinstance(v, Tensor) for v in found.values()):
        raise CheckpointError("no state dict in this file", where=file, found=type(found).__name__)
    return without_module(found), {}


def without_module(state: dict[Any, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict, without the ``module.`` that distributed training puts before every name."""
    tensors = {str(k): v for k, v in state.items() if isinstance(v, Tensor)}
    while tensors and all(k.startswith("module.") for k in tensors):
        tensors = {k.removeprefix("module."): v for k, v in tensors.items()}
    return tensors
