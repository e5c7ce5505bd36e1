"""Plans: every hyper-parameter of a method, readable and editable as one JSON file.

A plan is a name among the shipped ones (``plans/*.json``), a path, a dict or a :class:`Plan`. Unknown keys are
errors that suggest the nearest known one. What belongs to a method's network alone is the ``model`` section, which
the method's own ``Config`` (in ``medmae/models/<method>.py``) validates.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from medmae.errors import PlanError, Problem, nearest

Triple = tuple[int, int, int]
AnyModel = TypeVar("AnyModel", bound=BaseModel)


class Section(BaseModel):
    """A part of a plan: immutable, and strict about names."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Intensity(Section):
    """How stored values become what the network sees; every scheme can be undone.

    ``zscore-nonzero``: zero mean, unit (biased) standard deviation over voxels that are not 0, which stay 0.
    ``zscore``: over all voxels. ``window``: clip to [low, high], scale to [0, 1]. ``none``: untouched. ``clip`` cuts
    z-scores to [-clip, clip], so that a few bright voxels (vessels after contrast) do not rule the loss.
    """

    scheme: Literal["zscore-nonzero", "zscore", "window", "none"] = "zscore-nonzero"
    low: float | None = None
    high: float | None = None
    clip: float | None = Field(None, gt=0)  # standard deviations

    @property
    def has_background(self) -> bool:
        """Whether 0 means background; elsewhere (CT, say) it is a value like another."""
        return self.scheme == "zscore-nonzero"

    @model_validator(mode="after")
    def _window_has_bounds(self) -> Intensity:
        if self.scheme == "window" and (self.low is None or self.high is None or self.low >= self.high):
            raise ValueError("a window needs low < high")
        if self.clip is not None and not self.scheme.startswith("zscore"):
            raise ValueError("clip is in standard deviations: it goes with zscore and zscore-nonzero")
        return self


class Image(Section):
    """The space the model works in. Axes are (axis 0, axis 1, axis 2) of the array after reorientation."""

    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)  # mm
    orientation: str = Field("RAS", pattern="^[RL][AP][SI]$")
    crop: Triple = (128, 128, 128)  # voxels of one training crop
    foreground_crop: bool = True  # cut to the box of non-zero voxels of all modalities together
    intensity: Intensity = Intensity()

    @model_validator(mode="after")
    def _positive(self) -> Image:
        if min(self.spacing) <= 0 or min(self.crop) <= 0:
            raise ValueError("spacing and crop must be positive")
        return self


class Masking(Section):
    """What is hidden from the model in training.

    ``ratio`` counts tokens of all modalities together. ``modality_dropout`` is the chance that a study loses a
    random non-empty, non-complete set of its modalities before tokens are drawn. No study shows more than
    ``max_visible_share`` of what it has, so that a study with one modality still has something to predict.

    ``dirichlet`` and ``uniform`` share K visible tokens out among the modalities; ``shared`` hides the same places in
    all of them. ``block``: tokens are hidden in cubes of that many tokens along an edge. ``ratio_to`` (``shared``
    only): every sample draws its own ratio between ``ratio`` and this. ``decode_share`` of the hidden tokens is decoded
    and scored (dual masking, VideoMAE V2, Wang et al. 2023; transformers only).
    """

    sampler: Literal["dirichlet", "uniform", "shared"] = "dirichlet"
    ratio: float = Field(0.75, gt=0, lt=1)
    ratio_to: float | None = Field(None, gt=0, lt=1)
    alpha: float = Field(1.0, gt=0)  # Dirichlet concentration
    block: int = Field(1, gt=0)  # tokens along the edge of what is hidden or seen together
    modality_dropout: float = Field(0.0, ge=0, le=1)
    max_visible_share: float = Field(0.5, gt=0, lt=1)
    decode_share: float = Field(1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _ratios_are_in_order(self) -> Masking:
        if self.ratio_to is not None and (self.sampler != "shared" or self.ratio_to <= self.ratio):
            raise ValueError("ratio_to goes with the sampler shared and is larger than ratio")
        return self


class Sampling(Section):
    """Where a training crop is taken: the centre, anywhere (``random``, uniform over valid corners), or, with
    ``foreground_share`` chance, so that its middle is foreground (``foreground``; anywhere otherwise). A study gives
    ``crops_per_volume`` crops each time it comes up."""

    crop: Literal["center", "random", "foreground"] = "center"
    foreground_share: float = Field(0.75, ge=0, le=1)
    crops_per_volume: int = Field(1, gt=0)


class Augmentation(Section):
    """Applied on the device. ``flip``: chance per axis; ``scale``/``shift``: x·(1+U(-s,s)) + U(-h,h) on the
    normalised intensities, each with its own chance (background zeros stay zero). ``rotate90_chance``: one to three
    quarter turns about a random axis of those whose plane is square. ``rotation`` degrees about each axis and ``zoom``
    (smallest and largest factor), each with its own chance, in one trilinear resampling."""

    flip: tuple[float, float, float] = (0.5, 0.5, 0.5)
    rotate90_chance: float = Field(0.0, ge=0, le=1)
    rotation: float = Field(0.0, ge=0, le=180)
    rotation_chance: float = Field(0.0, ge=0, le=1)
    zoom: tuple[float, float] = (1.0, 1.0)
    zoom_chance: float = Field(0.0, ge=0, le=1)
    scale: float = Field(0.1, ge=0, lt=1)
    scale_chance: float = Field(1.0, ge=0, le=1)
    shift: float = Field(0.1, ge=0)
    shift_chance: float = Field(1.0, ge=0, le=1)


class Training(Section):
    """The optimisation. ``steps_per_epoch`` null means: once through the training studies."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = Field(0.99, ge=0, lt=1)  # sgd only, Nesterov
    weight_decay: float = Field(0.05, ge=0)
    schedule: Literal["min-warmup-cosine", "warmup-cosine", "poly", "constant"] = "min-warmup-cosine"
    warmup_epochs: float = Field(50, ge=0)
    cosine_epochs: float | None = None  # period of the cosine in min-warmup-cosine; null: epochs
    epochs: int = Field(1000, gt=0)
    steps_per_epoch: int | None = Field(None, gt=0)
    batch_size: int = Field(6, gt=0)  # crops per process
    accumulate: int = Field(1, gt=0)
    clip_norm: float | None = Field(None, gt=0)
    precision: Literal["32", "bf16"] = "bf16"
    compile: bool = False
    recompute: bool = False  # parts of forward again in backward: less memory, more time
    cohort_on_device: bool = False  # hold every prepared study in the device's memory
    validation_share: float = Field(0.1, ge=0, lt=1)  # of subjects
    validate_every: int = Field(10, gt=0)  # epochs
    preview_every: int = Field(50, gt=0)  # epochs
    checkpoint_every: int = Field(10, gt=0)  # epochs
    log_every: int = Field(10, gt=0)  # steps

    @field_validator("precision", mode="before")
    @classmethod
    def _digits_are_a_name(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) else value  # `--set training.precision=32` is a number in JSON


class Reconstruction(Section):
    """Whole volumes: windows of the training crop's size, blended with a Gaussian, averaged over ``shifts``
    placements of the patch grid."""

    overlap: float = Field(0.5, ge=0, lt=1)
    shifts: int = Field(4, gt=0)


class Finetuning(Section):
    """How a segmentation network that begins with this model is trained by nnU-Net.

    The learning rate rises linearly over ``warmup`` and falls by ``decay`` (``poly``: (1 - t)^0.9) over the rest;
    both warm-up and ``freeze``, in which only what is new is trained, are shares of all epochs. ``layer_decay``: each
    transformer layer's rate is this times that of the one after it (Clark et al. 2020). ``drop_path``: chance that
    the last block is left out of a step, falling to 0 at the first (stochastic depth, Huang et al. 2016).
    ``modality_dropout``: chance that a step's batch loses a random set of its channels. ``transfer``: what moves of a
    U-Net; of a transformer, always the encoder. ``mirror``: axes (x, y, z) that may be flipped, in training and, to
    average, in prediction. ``cpu_precision``: arithmetic where there is no GPU ("auto": bf16 on processors that have
    it); on one it is nnU-Net's own (fp16).
    """

    optimizer: Literal["adamw", "sgd"] = "sgd"
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(3e-5, ge=0)
    momentum: float = Field(0.99, ge=0, lt=1)  # sgd only, Nesterov
    epochs: int = Field(1000, gt=0)  # of nnU-Net's 250 steps
    batch_size: int = Field(2, gt=0)
    warmup: float = Field(0.05, ge=0, lt=1)
    freeze: float = Field(0.0, ge=0, lt=1)
    decay: Literal["poly", "cosine"] = "poly"
    layer_decay: float = Field(1.0, gt=0, le=1)
    drop_path: float = Field(0.0, ge=0, lt=1)
    modality_dropout: float = Field(0.0, ge=0, le=1)
    transfer: Literal["all", "encoder"] = "all"
    mirror: tuple[Literal[0, 1, 2], ...] = (0, 1, 2)
    cpu_precision: Literal["32", "bf16", "auto"] = "32"
    feature_size: int = Field(32, gt=0)  # channels of the finest level of a transformer's decoder


class Refining(Section):
    """The network that sharpens a synthesis (``medmae finetune synthesis``) and its training.

    ``width``: channels at the finest of ``levels`` resolutions, doubled at each coarser one. ``combinations``: how
    many sets of given modalities are practised on each study (0: every one). ``ssim``: weight of 1 - SSIM beside the
    absolute error. Rates rise over the share ``warmup`` of the steps and fall by a cosine.
    """

    width: int = Field(24, gt=0)
    levels: int = Field(3, gt=0)
    crop: Triple = (64, 64, 64)
    combinations: int = Field(0, ge=0)
    epochs: int = Field(40, gt=0)
    steps_per_epoch: int = Field(250, gt=0)
    batch_size: int = Field(4, gt=0)
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    warmup: float = Field(0.05, ge=0, lt=1)
    ssim: float = Field(0.5, ge=0)
    validation_share: float = Field(0.2, gt=0, lt=1)


class Plan(Section):
    """Everything that decides what is trained. See the module's docstring."""

    name: str
    method: str
    modalities: tuple[str, ...]
    image: Image = Image()
    model: dict[str, Any] = {}
    masking: Masking = Masking()
    sampling: Sampling = Sampling()
    augmentation: Augmentation = Augmentation()
    training: Training = Training()
    reconstruction: Reconstruction = Reconstruction()
    finetuning: Finetuning = Finetuning()
    refining: Refining = Refining()

    @model_validator(mode="after")
    def _modalities_are_named_once(self) -> Plan:
        if not self.modalities or len(set(self.modalities)) != len(self.modalities):
            raise ValueError("modalities must be a non-empty list without repeats")
        return self

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any] | Plan, overrides: Sequence[str] = ()) -> Plan:
        """A shipped plan's name, a path, a dict or a plan, with ``key=value`` overrides applied.

        Raises :class:`PlanError` for an unknown plan, an unknown key (with the nearest known one) or a bad value.
        """
        if isinstance(source, Plan):
            data, where = source.model_dump(mode="json"), source.name
        elif isinstance(source, Mapping):
            data, where = json.loads(json.dumps(source)), str(source.get("name", "plan"))
        else:
            path = find_plan(source)
            where = str(source)
            try:
                data = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
                raise PlanError(
                    "this plan is not readable JSON",
                    where=path,
                    found=error,
                    remedy="Mend the file, or start from `medmae plans bm-mae-base`.",
                ) from None
        if not isinstance(data, dict):
            raise PlanError("a plan is a JSON object", where=where, found=type(data).__name__)
        for override in overrides:
            apply_override(data, override)
        return validate(cls, data, where)

    def hash(self) -> str:
        """Twelve hexadecimal digits that change whenever any field does."""
        return digest(self.model_dump(mode="json"))

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=2)


def digest(data: Any) -> str:
    """Twelve hexadecimal digits of the SHA-256 of ``data`` as canonical JSON."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]


def validate(schema: type[AnyModel], data: Mapping[str, Any], where: str, prefix: str = "") -> AnyModel:
    """``data`` as ``schema``; every violation becomes one :class:`PlanError` naming key, value and remedy."""
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        problems = []
        for item in error.errors(include_url=False):
            key = prefix + ".".join(str(part) for part in item["loc"])
            if item["type"] == "extra_forbidden":
                known = [prefix + name for name in keys_of(schema)]
                problems.append(Problem("unknown plan key", where, key, remedy=nearest(key, known)))
            else:
                found = None if item["type"] == "missing" else repr(item.get("input"))
                problems.append(Problem(item["msg"], where, key or None, found))
    raise PlanError.of(problems)


def keys_of(schema: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of a schema, sections and leaves."""
    names = []
    for name, field in schema.model_fields.items():
        names.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += keys_of(field.annotation, f"{prefix}{name}.")
    return names


def apply_override(data: dict[str, Any], override: str) -> None:
    """Write one ``dotted.key=value`` into ``data``; the value is JSON where it parses as such, else text."""
    key, sign, text = override.partition("=")
    key = key.strip()
    if not sign or not key:
        raise PlanError(
            "an override is written key=value",
            field="--set",
            found=override,
            remedy="For example: --set training.lr=0.0003",
        )
    known = keys_of(Plan)
    if key not in known and not key.startswith("model."):
        raise PlanError("unknown plan key", field=key, remedy=nearest(key, known))
    try:
        value: Any = json.loads(text)
    except json.JSONDecodeError:
        value = text.strip()
    *parents, leaf = key.split(".")
    node = data
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise PlanError("this field has no parts", field=key, found=f"{parent} is {node!r}")
    node[leaf] = value


def plan_folders() -> list[Path]:
    """Where shipped plans are: inside the installed package, or beside it in a clone."""
    package = Path(str(resources.files("medmae")))
    return [folder for folder in (package / "plans", package.parent / "plans") if folder.is_dir()]


def available_plans() -> dict[str, Path]:
    """The shipped plans: {name: path}."""
    found = {path.stem: path for folder in reversed(plan_folders()) for path in folder.glob("*.json")}
    return dict(sorted(found.items()))


def find_plan(name: str | Path) -> Path:
    """The file of a plan given by name or path."""
    path = Path(name)
    if path.suffix == ".json" and path.is_file():
        return path
    shipped = available_plans()
    if str(name) in shipped:
        return shipped[str(name)]
    raise PlanError("no such plan", where=str(name), remedy=nearest(str(name), shipped) + " A path works too.")
