"""Pre-trained weights into a segmentation network, with a report of every tensor: transferred, adapted or new."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from medmae.errors import CheckpointError
from medmae.models.base import MaskedAutoencoder, own_names
from medmae.models.bm_mae import BMMAE
from medmae.models.cnn import STEM, ConvolutionalMAE, fit_channels, stem_names
from medmae.models.hi_end_mae import HiEndMAE

_HEADS = ".seg_layers."


@dataclass
class TransferReport:
    """Names of a network's tensors: ``transferred`` as they were, ``adapted`` {name: how}, ``new`` as initialised."""

    transferred: list[str] = field(default_factory=list)
    adapted: dict[str, str] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {"transferred": self.transferred, "adapted": self.adapted, "new": self.new}

    def __str__(self) -> str:
        lines = [f"{len(self.transferred)} tensors transferred, {len(self.adapted)} adapted, {len(self.new)} new"]
        lines += [f"  adapted: {name}: {how}" for name, how in self.adapted.items()]
        groups = sorted({".".join(name.split(".")[:2]) for name in self.new})
        if groups:
            lines.append(f"  new: {', '.join(groups)}")
        return "\n".join(lines)


def transfer(
    model: MaskedAutoencoder, network: nn.Module, channels: Sequence[str], parts: Literal["all", "encoder"] = "all"
) -> TransferReport:
    """Copy the weights of ``model`` into ``network``, whose input channels are ``channels``.

    Channels go by name where the model knows the name; another one begins as the mean of what the model knows,
    scaled so that equal channels together give what they gave. Raises :class:`CheckpointError`, with the list, when
    a tensor that should fit does not; ``network`` is then untouched.
    """
    if isinstance(model, ConvolutionalMAE):
        wanted, adapted = unet_weights(model, channels, parts)
    elif isinstance(model, BMMAE):
        wanted, adapted = bm_mae_weights(model, channels)
    elif isinstance(model, HiEndMAE):
        wanted, adapted = hi_end_weights(model, len(channels))
    else:
        raise CheckpointError("no way from this method to a segmentation network", found=model.plan.method)
    names = own_names(network)
    own = network.state_dict()
    problems = [f"{name} is not in the network" for name in wanted if name not in own]
    problems += [
        f"{name} {tuple(tensor.shape)} instead of {tuple(own[name].shape)}"
        for name, tensor in wanted.items()
        if name in own and own[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(
            f"the checkpoint does not fit the network: {len(wanted) - len(problems)} of {len(wanted)} tensors match",
            where=model.plan.name,
            found="; ".join(problems[:8]) + more,
            expected="plans written for this checkpoint",
            remedy="Write them anew with `medmae nnunet plan`.",
        )
    with torch.no_grad():
        for name, tensor in wanted.items():
            own[name].copy_(tensor)
    given = {names[name] for name in wanted}
    changed = {names[name]: how for name, how in adapted.items()}
    unique = list(dict.fromkeys(names.values()))
    return TransferReport(
        transferred=[n for n in unique if n in given and n not in changed],
        adapted=changed,
        new=[n for n in unique if n not in given and not n.endswith("positions.table")],  # computed, not learned
    )


def unet_weights(
    model: ConvolutionalMAE, channels: Sequence[str], parts: Literal["all", "encoder"]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """nnU-Net's names; the head and, for a part, the decoder are left out."""
    state = {k: v.detach() for k, v in model.network.state_dict().items()}
    wanted = {
        k: v
        for k, v in state.items()
        if _HEADS not in k and (parts == "all" or k.startswith(("encoder.", "decoder.encoder.")))
    }
    if tuple(channels) == model.modalities:
        return wanted, {}
    fitted, how = fit_channels(state[STEM], model.modalities, channels)
    repeats = stem_names(model.network)
    return {**wanted, **dict.fromkeys(repeats, fitted)}, dict.fromkeys(repeats, how)


def bm_mae_weights(model: BMMAE, channels: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Everything but the decoder; a tokenizer for each channel."""
    wanted, adapted = {}, {}
    for name, tensor in model.state_dict().items():
        if not name.startswith(("decoder.", "tokenizers.")):
            wanted[f"vit.{name}"] = tensor
    for channel in channels:
        for leaf in ("proj.weight", "proj.bias"):
            target = f"vit.tokenizers.{channel}.{leaf}"
            if channel in model.modalities:
                wanted[target] = model.state_dict()[f"tokenizers.{channel}.{leaf}"]
            else:
                every = [model.state_dict()[f"tokenizers.{m}.{leaf}"] for m in model.modalities]
                wanted[target] = torch.stack(every).mean(0)
                adapted[target] = f"from the mean of {', '.join(model.modalities)}"
    return wanted, adapted


def hi_end_weights(model: HiEndMAE, channels: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Everything but the decoder; the patch embedding repeated over the channels."""
    wanted: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith("decoder.") and not name.endswith("positions.table"):
            wanted[f"vit.{name}"] = tensor
    if channels == 1:
        return wanted, {}
    first = "vit.tokenizer.proj.weight"
    wanted[first] = wanted[first].repeat(1, channels, 1, 1, 1) / channels
    return wanted, {first: f"{model.modalities[0]} for each of {channels} channels, divided by {channels}"}
