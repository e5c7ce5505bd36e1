"""The published BM-MAE format (``bmmae.pth``, ``bmmae_tcga.pth``): a plain state dict."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from medmae.cohort.modalities import canonical_modality
from medmae.plan import Plan

NAME = "BM-MAE"
LICENCE = "Published by the BM-MAE authors; see their terms. Not for clinical use."

_RENAMED = (
    (re.compile(r"^tokenizers\.([^.]+)\.patch_embedding\.patch_embeddings\."), r"tokenizers.\1.proj."),
    (re.compile(r"^tokenizers\.([^.]+)\.patch_embedding\.position_embeddings$"), r"tokenizers.\1.positions.table"),
    (re.compile(r"^decoder\.mask_tokens?$"), "decoder.mask_token"),
    (re.compile(r"^decoder\.position_embeddings$"), "decoder.positions.table"),
    (re.compile(r"^decoder\.decoder_embed\."), "decoder.embed."),
    (re.compile(r"^decoder\.decoder_norm\."), "decoder.norm."),
    (re.compile(r"^decoder\.decoder_pred\."), "decoder.head."),
    (re.compile(r"^decoder\.decoder_blocks\."), "decoder.blocks."),
)
_MODALITY = re.compile(r"^(tokenizers|decoder\.modality_embeddings)\.([^.]+)")
_UNUSED = re.compile(r"\.(norm_cross_attn|cross_attn)\.")  # MONAI's blocks hold them, the method does not use them


def recognises(keys: Iterable[str]) -> bool:
    """Whether a state dict with these keys is a BM-MAE."""
    return any(key.startswith("tokenizers.") and "patch_embedding" in key for key in keys)


def convert(state: dict[str, Tensor], facts: dict[str, Any], file: Path) -> tuple[Plan, dict[str, Tensor], list[str]]:
    """The plan, our names for the tensors, and the keys that the method does not use.

    The modalities are the file's own (``t1ce`` becomes ``t1c``), in its order; everything else is the published
    configuration (plan ``bm-mae-base``).
    """
    modalities = list(
        dict.fromkeys(
            canonical_modality(m.group(2)) or m.group(2) for key in state if (m := _MODALITY.match(key)) is not None
        )
    )
    plan = Plan.load("bm-mae-base")
    ordered = [m for m in plan.modalities if m in modalities] + [m for m in modalities if m not in plan.modalities]
    plan = plan.model_copy(update={"modalities": tuple(ordered)})
    renamed, unused = {}, []
    for key, tensor in state.items():
        if _UNUSED.search(key):
            unused.append(key)
            continue
        name = key
        for pattern, replacement in _RENAMED:
            name = pattern.sub(replacement, name)
        name = _MODALITY.sub(lambda m: f"{m.group(1)}.{canonical_modality(m.group(2)) or m.group(2)}", name)
        renamed[name] = tensor
    return plan, renamed, unused


_OF_MODALITIES = {"t1c": "t1ce"}  # the published file's own name
_BACK = (
    (re.compile(r"^tokenizers\.([^.]+)\.proj\."), r"tokenizers.\1.patch_embedding.patch_embeddings."),
    (re.compile(r"^tokenizers\.([^.]+)\.positions\.table$"), r"tokenizers.\1.patch_embedding.position_embeddings"),
    (re.compile(r"^decoder\.mask_token$"), "decoder.mask_tokens"),
    (re.compile(r"^decoder\.positions\.table$"), "decoder.position_embeddings"),
    (re.compile(r"^decoder\.embed\."), "decoder.decoder_embed."),
    (re.compile(r"^decoder\.norm\."), "decoder.decoder_norm."),
    (re.compile(r"^decoder\.head\."), "decoder.decoder_pred."),
    (re.compile(r"^decoder\.blocks\."), "decoder.decoder_blocks."),
)


def restore(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published names for our tensors: the inverse of :func:`convert`'s renaming."""
    renamed = {}
    for name, tensor in state.items():
        key = name
        for pattern, replacement in _BACK:
            key = pattern.sub(replacement, key)
        key = _MODALITY.sub(lambda m: f"{m.group(1)}.{_OF_MODALITIES.get(m.group(2), m.group(2))}", key)
        renamed[key] = tensor
    return renamed
