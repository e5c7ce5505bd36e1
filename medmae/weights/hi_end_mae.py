"""The published Hi-End-MAE format (``hi_end_mae_10k.pth``): a state dict, wrapped, with ``module.`` names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from medmae.errors import CheckpointError
from medmae.plan import Plan

NAME = "Hi-End-MAE"
LICENCE = "Published by the Hi-End-MAE authors; see their terms. Not for clinical use."
PLANS = ("hi-end-mae-base", "hi-end-mae-large", "hi-end-mae-large-p16")

_RENAMED = (
    (re.compile(r"^encoder_pos_embed$"), "tokenizer.positions.table"),
    (re.compile(r"^decoder_pos_embed$"), "decoder.positions.table"),
    (re.compile(r"^mask_token$"), "decoder.mask_token"),
    (re.compile(r"^encoder_to_decoder\.3\."), "decoder.embed.3."),
    (
        re.compile(r"^encoder_to_decoder\.2\."),
        "decoder.embed.0.",
    ),  # theirs go shallow to deep, ours as the decoder asks
    (re.compile(r"^encoder_to_decoder\.1\."), "decoder.embed.1."),
    (re.compile(r"^encoder_to_decoder\.0\."), "decoder.embed.2."),
    (re.compile(r"^encoder\.patch_embed\.proj\."), "tokenizer.proj."),
    (re.compile(r"^encoder\.(cls_token$|blocks\.|norm\.)"), r"\1"),
    (re.compile(r"^decoder\.cross_attention_blocks\."), "decoder.cross_blocks."),
    (re.compile(r"\.(attn|self_attn|cross_attn)\.proj\."), r".\1.out_proj."),
    (re.compile(r"\.mlp\.fc([12])\."), r".mlp.linear\1."),
)
_UNUSED = re.compile(r"\.relative_position_index$")


def recognises(keys: Iterable[str]) -> bool:
    """Whether a state dict with these keys is a Hi-End-MAE."""
    return any(key.startswith(("decoder.cross_attention_blocks.", "encoder_to_decoder.")) for key in keys)


def convert(state: dict[str, Tensor], facts: dict[str, Any], file: Path) -> tuple[Plan, dict[str, Tensor], list[str]]:
    """The plan, our names for the tensors, and the keys that the method does not use.

    Base, large (P 12) and large P 16 are told apart by the shape of the patch embedding; another shape is refused.
    """
    embedding = state.get("encoder.patch_embed.proj.weight")
    found = None if embedding is None else (embedding.shape[0], tuple(embedding.shape[2:]))
    known = {}
    for name in PLANS:
        plan = Plan.load(name)
        known[plan.model["width"], tuple(plan.model["patch"])] = plan
    if found not in known:
        raise CheckpointError(
            "a Hi-End-MAE of another architecture",
            where=file,
            field="encoder.patch_embed.proj.weight",
            found="missing" if embedding is None else tuple(embedding.shape),
            expected="; ".join(f"width {width}, patch {patch}" for width, patch in known),
        )
    renamed, unused = {}, []
    for key, tensor in state.items():
        if _UNUSED.search(key):
            unused.append(key)
            continue
        name = key
        for pattern, replacement in _RENAMED:
            name = pattern.sub(replacement, name)
        if name.endswith("positions.table") and tensor.ndim == 3 and not tensor[0, 0].any():
            tensor = tensor[:, 1:]  # a first row of zeros is CLS's
        renamed[name] = tensor
    return known[found], renamed, unused
