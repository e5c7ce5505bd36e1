"""From a model of ours to the formats that others read: nnU-Net and nnssl's, and BM-MAE's published one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from medmae.errors import MedmaeError
from medmae.files import write_atomically
from medmae.models.base import MaskedAutoencoder
from medmae.plan import Plan
from medmae.weights import bm_mae
from medmae.weights.importing import load


@dataclass
class ExportReport:
    """What was written: ``file``, its ``format``, how many ``tensors``."""

    file: Path
    format: str
    tensors: int
    hint: str

    def to_json(self) -> dict[str, Any]:
        return {"file": str(self.file), "format": self.format, "tensors": self.tensors}

    def __str__(self) -> str:
        return f"{self.tensors} tensors written to {self.file}\n{self.hint}"


def export(
    model: str | Path | MaskedAutoencoder,
    out: str | Path,
    *,
    to: Literal["nnunet", "bm-mae"],
    channels: int | None = None,
) -> ExportReport:
    """Write ``model`` (a run, a checkpoint, or a model) to the file ``out`` for another program.

    ``nnunet``: ``{"network_weights", "nnssl_adaptation_plan"}`` of a ResEnc-UNet MAE or a SparK on that network; every
    key of the U-Net is there, so ``nnUNetv2_train -pretrained_weights`` takes it for plans of the same architecture.
    ``channels``: fit the first layer to that many input channels (the mean over the old ones, scaled so that equal
    channels give what they gave). ``bm-mae``: the published BM-MAE format. Raises :class:`MedmaeError` for a method
    that the format cannot hold.
    """
    found = load(model) if isinstance(model, str | Path) else model
    file = Path(out)
    if to == "bm-mae":
        content, hint = as_bm_mae(found), "The published code and `medmae import` read it."
    else:
        content = as_nnunet(found, channels)
        hint = (
            f"nnU-Net: nnUNetv2_train DATASET 3d_fullres FOLD -p PLANS -pretrained_weights {file}\n"
            "(plans with the same stages, features and blocks; see the adaptation plan in the file)"
        )
    write_atomically(file, lambda path: torch.save(content, path))
    return ExportReport(file, to, len(content.get("network_weights", content)), hint)


def as_bm_mae(model: MaskedAutoencoder) -> dict[str, Tensor]:
    """The published state dict of a BM-MAE."""
    if model.plan.method != "bm-mae":
        raise refused(model, "bm-mae", "bm-mae")
    return bm_mae.restore({k: v.detach().cpu() for k, v in model.state_dict().items()})


def as_nnunet(model: MaskedAutoencoder, channels: int | None = None) -> dict[str, Any]:
    """``network_weights`` and ``nnssl_adaptation_plan`` (tensors and plain types only), ``spark_weights`` for SparK."""
    from medmae.models.cnn import IMPORTED, STEM, ConvolutionalMAE, fit_channels, named_arguments, stem_names

    if not isinstance(model, ConvolutionalMAE) or model.config.network != "resenc":
        raise refused(model, "nnunet", "resenc-mae and spark on the network resenc")
    weights = {k: v.detach().cpu().clone() for k, v in model.network.state_dict().items()}
    inputs = len(model.modalities)
    if channels is not None and channels != inputs:
        fitted, _ = fit_channels(weights[STEM], model.modalities, [f"new {i}" for i in range(channels)])
        weights |= dict.fromkeys(stem_names(model.network), fitted)
        inputs = channels
    image = model.plan.image
    content: dict[str, Any] = {
        "network_weights": weights,
        "nnssl_adaptation_plan": {
            "architecture_plans": {
                "arch_class_name": "ResEncL" if is_large(model) else "ResidualEncoderUNet",
                "arch_kwargs": named_arguments(model.config),
                "arch_kwargs_requiring_import": list(IMPORTED),
            },
            "pretrain_plan": {
                "configurations": {
                    "onemmiso": {
                        "spacing": list(image.spacing),
                        "patch_size": list(image.crop),
                        "normalization_schemes": ["ZScoreNormalization"] * inputs,
                    }
                }
            },
            "pretrain_num_input_channels": inputs,
            "recommended_downstream_patchsize": list(image.crop),
            "key_to_encoder": "encoder.stages",
            "key_to_stem": "encoder.stem",
            "keys_to_in_proj": ["encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"],
            "key_to_lpe": None,
        },
    }
    if model.plan.method == "spark":
        names = ("mask_tokens.", "densify_norms.", "densify_projs.")
        content["spark_weights"] = {k: v.detach().cpu() for k, v in model.state_dict().items() if k.startswith(names)}
    return content


def is_large(model: MaskedAutoencoder) -> bool:
    """Whether the network is ResEnc-L's."""
    large = Plan.load("resenc-mae-l").model
    return all(tuple(model.plan.model.get(key, ())) == tuple(large[key]) for key in ("features", "blocks"))


def refused(model: MaskedAutoencoder, to: str, known: str) -> MedmaeError:
    return MedmaeError(
        f"a model of this method cannot be written as {to}",
        where=model.plan.name,
        field="--to",
        found=model.plan.method,
        expected=f"a model of {known}",
    )
