"""The format of nnssl's published checkpoints (OpenMind): ``network_weights`` of a residual-encoder U-Net, the
``nnssl_adaptation_plan`` that describes them, and for Spark3D ``spark_weights``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from medmae.errors import CheckpointError
from medmae.plan import Plan

NAME = "nnssl residual-encoder U-Net"
LICENCE = "Published with OpenMind / nnssl; see their terms. Not for clinical use."
_PREFIX = "network_weights."
_TOKEN = re.compile(r"^spark_weights\.(?:.*\.)?(mask_tokens|densify_norms|densify_projs)\.(\d+)(\..*)?$")


def recognises(keys: Iterable[str]) -> bool:
    """Whether a file with these groups and keys is nnssl's."""
    return any(key.startswith(f"{_PREFIX}encoder.st") for key in keys)


def convert(state: dict[str, Tensor], facts: dict[str, Any], file: Path) -> tuple[Plan, dict[str, Tensor], list[str]]:
    """The plan, our names for the tensors, and the keys that are not used.

    The architecture is the one that the file's adaptation plan gives (``arch_kwargs``), ResEnc-L where it names that;
    with ``spark_weights`` the method is ``spark`` as Spark3D runs it (``leaky``).
    """
    spark = any(key.startswith("spark_weights.") for key in state)
    plan = Plan.load("spark-l" if spark else "resenc-mae-l")
    model = {**plan.model, **architecture(facts, file)}
    if spark:
        model["leaky"] = True
    stem = state.get(f"{_PREFIX}encoder.stem.convs.0.conv.weight")
    channels = 1 if stem is None else stem.shape[1]
    names = plan.modalities if channels == 1 else tuple(f"channel-{i}" for i in range(channels))
    changed: dict[str, Any] = {"model": model, "modalities": names}
    if crop := patch_size(facts):
        changed["image"] = plan.image.model_copy(update={"crop": crop})
    plan = plan.model_copy(update=changed)
    renamed, unused = {}, []
    widths = list(model["features"])[::-1]
    for key, tensor in state.items():
        found = _TOKEN.match(key)
        if key.startswith(_PREFIX):
            renamed[f"network.{key.removeprefix(_PREFIX)}"] = tensor
        elif found:
            kind, index, rest = found.group(1), int(found.group(2)), found.group(3) or ""
            if shallow_first(state, widths):
                index = len(widths) - 1 - index
            renamed[f"{kind}.{index}{rest}"] = tensor
        else:
            unused.append(key)
    return plan, renamed, unused


def shallow_first(state: dict[str, Tensor], widths: list[int]) -> bool:
    """Whether the file counts its scales from the shallowest: its first mask token has that one's width."""
    token = next(
        (t for k, t in state.items() if (m := _TOKEN.match(k)) and m.group(1, 2) == ("mask_tokens", "0")), None
    )
    return token is not None and token.numel() != widths[0] and token.numel() == widths[-1]


def architecture(facts: dict[str, Any], file: Path) -> dict[str, Any]:
    """The fields of our ``model`` section that an adaptation plan decides; empty where it only names ResEnc-L."""
    described = facts.get("nnssl_adaptation_plan") or {}
    plans = described.get("architecture_plans") or {}
    arguments = plans.get("arch_kwargs") or {}
    name = str(plans.get("arch_class_name", "ResEncL")).rsplit(".", 1)[-1]
    if name not in ("ResEncL", "ResidualEncoderUNet"):
        raise CheckpointError(
            "an architecture that is not known here", where=file, found=name, expected="ResEncL or ResidualEncoderUNet"
        )
    fields = {
        "features": arguments.get("features_per_stage"),
        "blocks": arguments.get("n_blocks_per_stage"),
        "decoder_convs": next(iter(arguments.get("n_conv_per_stage_decoder") or ()), None),
    }
    return {k: v for k, v in fields.items() if v is not None}


def patch_size(facts: dict[str, Any]) -> tuple[int, int, int] | None:
    """The recommended patch, where the file gives one."""
    size = (facts.get("nnssl_adaptation_plan") or {}).get("recommended_downstream_patchsize")
    return (int(size[0]), int(size[1]), int(size[2])) if size is not None and len(size) == 3 else None
