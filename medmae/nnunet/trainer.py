"""The trainer that nnU-Net runs: its own, with a network that begins with a checkpoint's weights and its schedule.

What it needs beside nnU-Net's arguments is in the plans (key ``medmae``, see :mod:`medmae.nnunet.plans`): nnU-Net makes
trainers and networks by name, in processes of its own, and passes nothing else on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

import medmae
from medmae.errors import InputError
from medmae.nnunet.finding import KEY
from medmae.nnunet.transfer import transfer
from medmae.plan import Finetuning
from medmae.processor import computes_in_bf16, usable_threads
from medmae.training.schedules import warmed


class Schedule:
    """Learning rates by epoch: linear warm-up, then poly or cosine to 0, each group by its own ``scale``; while the
    encoder is frozen its groups stand at 0."""

    def __init__(self, optimizer: torch.optim.Optimizer, settings: Finetuning, epochs: int) -> None:
        self.optimizer, self.settings, self.epochs = optimizer, settings, epochs

    def step(self, current_step: int | None = None) -> None:
        """Set the rates of epoch ``current_step``, as nnU-Net calls its scheduler."""
        epoch = current_step or 0
        factor = warmed(epoch, self.epochs, self.settings.warmup, self.settings.decay)
        frozen = epoch < round(self.settings.freeze * self.epochs)
        for group in self.optimizer.param_groups:
            held = frozen and group["pretrained"]
            group["lr"] = 0.0 if held else self.settings.lr * factor * group["scale"]


class nnUNetTrainerMedMAE(nnUNetTrainer):
    """See the module's docstring."""

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net's own default
    ) -> None:
        if KEY not in plans:
            raise InputError(
                "these plans were not written for a checkpoint",
                where=plans.get("plans_name"),
                field=KEY,
                remedy="Write some with `medmae nnunet plan DATASET --checkpoint RUN` and name them with -p.",
            )
        plans.setdefault("continue_training", False)
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.ours: dict[str, Any] = plans[KEY]
        self.settings = Finetuning.model_validate(self.ours["finetuning"])
        self.initial_lr, self.weight_decay = self.settings.lr, self.settings.weight_decay
        self.num_epochs = self.settings.epochs
        self.num_iterations_per_epoch = self.ours["steps_per_epoch"]
        self.num_val_iterations_per_epoch = self.ours["validation_steps"]
        self.save_every = max(1, min(50, self.num_epochs // 10))
        self.enable_deep_supervision = False
        self.from_checkpoint: set[int] = set()  # ids of the parameters that the checkpoint gave
        self.dropout_rng = np.random.default_rng([self.ours["seed"], fold if isinstance(fold, int) else 99])

    def initialize(self) -> None:
        """nnU-Net's, from a seed; the checkpoint's weights come when it asks for the optimiser.

        On a CPU with the threads that this process has cores for. nnU-Net takes one for each core of the machine: in a
        share of a cluster's node, or with two trainings side by side, they mostly wait for one another.
        """
        if self.device.type == "cpu":
            torch.set_num_threads(usable_threads())
        torch.manual_seed(self.ours["seed"])
        np.random.seed(self.ours["seed"])  # nnU-Net's loaders and augmentation draw from it
        super().initialize()

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Schedule]:
        """Called by ``initialize`` once the network is there."""
        network = bare(self.network)
        if self.ours["checkpoint"] is not None:
            model = medmae.load(self.ours["checkpoint"])
            report = transfer(model, network, self.ours["channels"], self.settings.transfer)
            self.print_to_log_file(f"weights of {model.plan.name}: {report}")
            if self.local_rank == 0:
                Path(self.output_folder, "transfer.json").write_text(json.dumps(report.to_json(), indent=2) + "\n")
            named = dict(network.named_parameters())
            used = {*report.transferred, *report.adapted}
            self.from_checkpoint = {id(p) for n, p in named.items() if n in used}
        groups = parameter_groups(network, self.settings, self.from_checkpoint)
        optimizer: torch.optim.Optimizer
        if self.settings.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, self.settings.lr, momentum=self.settings.momentum, nesterov=True)
        else:
            optimizer = torch.optim.AdamW(groups, self.settings.lr)
        return optimizer, Schedule(optimizer, self.settings, self.num_epochs)

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, ...]:
        """nnU-Net's, with the plan's axes to mirror."""
        rotation, flat, size, _ = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        self.inference_allowed_mirroring_axes = self.settings.mirror or None
        return rotation, flat, size, self.settings.mirror

    def arithmetic(self) -> torch.autocast:
        """bf16 where the plan asks for it and there is no GPU; else what nnU-Net does by itself."""
        wanted = self.settings.cpu_precision
        half = wanted == "bf16" or (wanted == "auto" and computes_in_bf16())
        return torch.autocast("cpu", torch.bfloat16, enabled=self.device.type == "cpu" and half)

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """nnU-Net's, on a batch that may have lost some of its channels (NaN)."""
        if self.settings.modality_dropout > 0:
            batch["data"] = drop_channels(batch["data"], self.settings.modality_dropout, self.dropout_rng)
        with self.arithmetic():
            step: dict[str, Any] = super().train_step(batch)
        return step

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        with self.arithmetic():
            step: dict[str, Any] = super().validation_step(batch)
        return step

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        with self.arithmetic():
            super().perform_actual_validation(save_probabilities)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """These networks have one output; nnU-Net switches the others on after validation whatever was there."""

    def plot_network_architecture(self) -> None:
        """nnU-Net's needs a package that no longer works."""


def bare(network: Any) -> nn.Module:
    """The network itself, without what torch.compile and distributed training put around it."""
    for wrapper in ("module", "_orig_mod"):
        network = getattr(network, wrapper, network)
    found: nn.Module = network
    return found


def drop_channels(data: torch.Tensor, chance: float, rng: np.random.Generator) -> torch.Tensor:
    """(B, C, ...) with a random set of the channels, never all of them, NaN in the whole batch; with ``chance``."""
    channels = data.shape[1]
    if channels < 2 or rng.random() >= chance:
        return data
    lost = rng.permutation(channels)[: rng.integers(1, channels)]
    data = data.clone()
    data[:, lost] = float("nan")
    return data


def parameter_groups(network: nn.Module, settings: Finetuning, given: set[int]) -> list[dict[str, Any]]:
    """Groups for the optimiser: pre-trained or new (``pretrained``), with weight decay or (one-dimensional) without,
    and, of a transformer, one a layer with its ``scale`` of the rate."""
    from medmae.models.unetr import ViTSegmenter

    if isinstance(network, ViTSegmenter):
        layers = network.layers()
    else:
        layers = [list(network.parameters())]
    last = len(layers) - 1
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for depth, layer in enumerate(layers):
        scale = settings.layer_decay ** (last - depth)
        for parameter in layer:
            if parameter.requires_grad:
                key = id(parameter) in given, parameter.ndim > 1 or settings.optimizer == "sgd", scale
                groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": settings.lr,
            "weight_decay": settings.weight_decay if decays else 0.0,
            "pretrained": pretrained,
            "scale": scale,
        }
        for (pretrained, decays, scale), parameters in groups.items()
    ]
