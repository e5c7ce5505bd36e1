"""What every method shares: the interface of a masked autoencoder on studies, and the checks of its input."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelHubMixin
from torch import Tensor, nn

from medmae.errors import MedmaeError, nearest
from medmae.plan import Plan

Images = Mapping[str, Tensor]


@dataclass
class MAEOutput:
    """What a forward pass gives.

    ``loss`` scalar; ``losses`` {modality: scalar} for the modalities in the batch; ``mask`` {modality:
    (B, gD, gH, gW) bool, True = hidden} for every modality the model knows; ``prediction`` {modality:
    (B, 1, D, H, W)} in the input's intensity space, what the decoder says of every patch, hidden or not, or None.
    """

    loss: Tensor
    losses: dict[str, Tensor]
    mask: dict[str, Tensor]
    prediction: dict[str, Tensor] | None = None


class MaskedAutoencoder(nn.Module, ModelHubMixin, ABC):
    """A method behind the interface that training and synthesis use.

    ``plan`` is the plan it was built from, ``metadata`` what a checkpoint tells of its training (empty for a new
    model), ``companions`` what came with it and works on its output (``refiner``, a network; ``familiar``, tensors that
    describe the training studies): no part of it, and not in its state dict. ``save_pretrained(folder)`` and
    ``push_to_hub("owner/name")`` share it, ``from_pretrained`` gets it back (huggingface_hub's mixin).
    ``grid_multiple``: image sizes must be multiples of it.
    """

    grid_multiple: tuple[int, int, int]

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.metadata: dict[str, Any] = {}
        self.companions: dict[str, Any] = {}

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.plan.modalities

    @property
    def mask_unit(self) -> tuple[int, int, int]:
        """Voxels that one entry of a mask stands for."""
        return self.grid_multiple

    @abstractmethod
    def forward(
        self,
        images: Images | Tensor,
        mask: Mapping[str, Tensor] | None = None,
        return_prediction: bool = False,
        present: Mapping[str, Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> MAEOutput:
        """Mask, encode, decode and score a batch.

        ``images`` {modality: (B, 1, D, H, W) float}, any non-empty subset of ``modalities``; a model of one
        modality also takes the tensor itself. ``mask`` {modality: (B, gD, gH, gW) bool, True = hidden} replaces the
        random one. ``present`` {modality: (B,) bool} says which studies of the batch have a modality (default: all
        have what is in ``images``). ``generator`` (on the images' device) makes the random mask reproducible.
        Raises :class:`MedmaeError` for unknown modalities, disagreeing shapes and sizes that are no multiple of
        ``grid_multiple``.
        """

    @abstractmethod
    def encode(self, images: Images | Tensor, mask: Mapping[str, Tensor] | None = None) -> Any:
        """Features of what is visible; without a mask everything is."""

    def reconstruct(self, images: Images, targets: Sequence[str]) -> dict[str, Tensor]:
        """{target: (B, 1, D, H, W)} predicted from the other modalities in ``images`` (all their tokens visible)."""
        raise MedmaeError(
            f"{self.plan.method} cannot synthesise an absent modality",
            where=self.plan.name,
            remedy="Use a method with a decoder per modality, such as bm-mae.",
        )

    # The Hub: a model reads no file itself, so that what these three do lives with the weights.

    def _save_pretrained(self, save_directory: Path) -> None:
        from medmae.weights import hub

        hub.save(self, save_directory)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> MaskedAutoencoder:
        from medmae.weights import hub

        known = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        model = hub.from_pretrained(model_id, **{k: options[k] for k in known})
        if not isinstance(model, cls):
            raise MedmaeError(
                "a model of another method", where=model_id, found=model.plan.method, expected=cls.__name__
            )
        return model

    def generate_model_card(self, *args: Any, licence: str | None = None, **_: Any) -> ModelCard:
        """The card that ``save_pretrained`` and ``push_to_hub`` write; ``model_card_kwargs={"licence": "cc-by-4.0"}``
        there is ``licence`` here."""
        from medmae.weights import hub

        return hub.card(self, licence)

    def save_memory(self, enabled: bool) -> None:
        """Compute parts of the forward pass again in backward instead of keeping them: same numbers, more time."""

    def checked(self, images: Images | Tensor) -> dict[str, Tensor]:
        """``images`` as a dict in the model's modality order, verified."""
        if isinstance(images, Tensor):
            if len(self.modalities) != 1:
                raise MedmaeError(
                    "a bare tensor is ambiguous for a model of several modalities",
                    field="images",
                    expected=f"a dict with keys among {', '.join(self.modalities)}",
                )
            images = {self.modalities[0]: images}
        for name in images:
            if name not in self.modalities:
                raise MedmaeError(
                    "the model does not know this modality",
                    where=self.plan.name,
                    field="images",
                    found=name,
                    remedy=nearest(name, self.modalities),
                )
        known = {m: images[m] for m in self.modalities if m in images}
        if not known:
            raise MedmaeError("no image given", field="images", expected=f"any of {', '.join(self.modalities)}")
        shapes = {m: tuple(x.shape) for m, x in known.items()}
        first = next(iter(shapes.values()))
        if len(first) != 5 or first[1] != 1 or any(shape != first for shape in shapes.values()):
            raise MedmaeError("images of a batch must share one shape (B, 1, D, H, W)", field="images", found=shapes)
        if any(size % step or size == 0 for size, step in zip(first[2:], self.grid_multiple, strict=True)):
            raise MedmaeError(
                "the image size does not fit the patch grid",
                field="images",
                found=first[2:],
                expected=f"multiples of {self.grid_multiple}",
                remedy="Pad or crop; `medmae reconstruct` does it by itself.",
            )
        return known

    def presence(self, images: Images, present: Mapping[str, Tensor] | None, batch: int) -> Tensor:
        """(B, M) bool on the CPU where that is free: which study has which modality, in model order."""
        columns = []
        for name in self.modalities:
            if name not in images:
                columns.append(torch.zeros(batch, dtype=torch.bool))
            elif present is None or name not in present:
                columns.append(torch.ones(batch, dtype=torch.bool))
            else:
                columns.append(present[name].to(dtype=torch.bool))
        device = next((c.device for c in columns if c.device.type != "cpu"), torch.device("cpu"))
        return torch.stack([c.to(device) for c in columns], dim=1)


def own_names(model: nn.Module) -> dict[str, str]:
    """{name in the state dict: the first name of the same tensor}: networks of dynamic-network-architectures hold each
    convolution under two names and the encoder again in the decoder."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(t), name) for name, t in model.state_dict(keep_vars=True).items()}


def without_repeats(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``weights`` with each tensor of ``model`` once, under its first name; unknown names stay."""
    names = own_names(model)
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        own = names.get(name, name)
        if own not in found or name == own:
            found[own] = tensor
    return found
