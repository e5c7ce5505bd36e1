"""nnU-Net plans that suit a checkpoint: its spacing, orientation, normalisation and network, nnU-Net's everything else.

The network sees arrays as it did in pre-training: NIfTI is read in RAS (nnU-Net's ``NibabelIOWithReorient``), and the
plans' transposition turns the axes from nnU-Net's (z, y, x) to (x, y, z).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medmae.cohort.modalities import canonical_modality
from medmae.cohort.nnunet_raw import read_dataset as read_raw
from medmae.errors import InputError
from medmae.files import write_text
from medmae.models.base import MaskedAutoencoder
from medmae.models.cnn import IMPORTED, ConvolutionalMAE, named_arguments
from medmae.nnunet.finding import KEY
from medmae.plan import Finetuning, Image, Triple

CONFIGURATION = "3d_fullres"
TRAINER = "nnUNetTrainerMedMAE"
_COARSER = 1.5  # a checkpoint's spacing that is so many times the data's is not used: detail would be lost
_SMALL = 64  # voxels along the edge of a patch where the checkpoint's crops were smaller
_TOKENS = 8  # the same for transformers, in tokens: attention is quadratic in their number
_RESAMPLING = "resample_data_or_seg_to_shape"


@dataclass(frozen=True)
class Dataset:
    """An nnU-Net raw data set: ``name`` (DatasetXXX_Name), its ``folder``, the names of its ``channels`` in order, and
    of its training images the median ``shape`` and ``spacing`` (mm) along (x, y, z), in RAS where they are NIfTI."""

    name: str
    folder: Path
    description: dict[str, Any]
    channels: tuple[str, ...]
    shape: tuple[float, float, float]
    spacing: tuple[float, float, float]

    @property
    def number(self) -> int:
        return int(self.name[7:10])

    @property
    def is_nifti(self) -> bool:
        return str(self.description["file_ending"]) in (".nii", ".nii.gz")


def read_dataset(folder: str | Path, modalities: Sequence[str] = ()) -> Dataset:
    """The data set in ``folder``; ``modalities`` name its channels where dataset.json does not name them well.

    Raises :class:`InputError` when it is none that nnU-Net can train on.
    """
    folder = Path(folder)
    file = folder / "dataset.json"
    if not file.is_file():
        raise InputError(
            "no nnU-Net data set here",
            where=folder,
            expected="dataset.json, imagesTr and labelsTr",
            remedy="`medmae nnunet dataset` makes one from other layouts.",
        )
    if not (folder.name.startswith("Dataset") and folder.name[7:10].isdigit() and folder.name[10:11] == "_"):
        raise InputError("nnU-Net wants another name of the folder", where=folder, expected="DatasetXXX_Name")
    known = read_raw(folder)  # checks the channels' names
    description = json.loads(file.read_text(encoding="utf-8"))
    if missing := [key for key in ("labels", "numTraining", "file_ending") if key not in description]:
        raise InputError(
            "a dataset.json that nnU-Net cannot use", where=file, field=", ".join(missing), found="missing"
        )
    names = [known.channels[number] for number in sorted(known.channels)]
    if modalities:
        if len(modalities) != len(names) or len(set(modalities)) != len(names):
            raise InputError(
                "one modality a channel",
                where=file,
                field="--modality",
                found=" ".join(modalities),
                expected=f"{len(names)} different names, in the order of the channels",
            )
        names = [canonical_modality(m) or m for m in modalities]
    ending = str(description["file_ending"])
    images = sorted((folder / "imagesTr").glob(f"*_0000{ending}"))
    if not images:
        raise InputError("no training images", where=folder / "imagesTr", expected=f"<case>_0000{ending}")
    shapes, spacings = zip(*(geometry(image) for image in images), strict=True)
    shape, spacing = (tuple(float(v) for v in np.median(values, axis=0)) for values in (shapes, spacings))
    return Dataset(folder.name, folder, description, tuple(names), shape, spacing)  # type: ignore[arg-type]


def geometry(image: Path) -> tuple[np.ndarray, np.ndarray]:
    """Shape and spacing (mm) along (x, y, z), NIfTI turned to RAS; from the header alone."""
    if image.name.endswith((".nii", ".nii.gz")):
        import nibabel as nib

        found: Any = nib.load(image)
        order = nib.orientations.io_orientation(found.affine)[:, 0].astype(int)
        shape, spacing = np.empty(3), np.empty(3)
        shape[order], spacing[order] = found.shape[:3], found.header.get_zooms()[:3]
        return shape, spacing
    import SimpleITK

    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(image))
    reader.ReadImageInformation()
    return np.array(reader.GetSize()[:3], float), np.array(reader.GetSpacing()[:3])


def target_spacing(
    dataset: Dataset, image: Image, wanted: Literal["auto", "checkpoint", "dataset"]
) -> tuple[float, ...]:
    """(x, y, z) mm: the checkpoint's, unless that is much coarser than the data."""
    if wanted == "dataset":
        return dataset.spacing
    coarser = max(mine / theirs for mine, theirs in zip(image.spacing, dataset.spacing, strict=True))
    return dataset.spacing if wanted == "auto" and coarser > _COARSER else tuple(image.spacing)


def patch_size(dataset: Dataset, spacing: Sequence[float], crop: Triple, multiple: Triple, least: Triple) -> list[int]:
    """Voxels of a training patch: the pre-training crop's (``least`` where that was smaller), no more than the data
    needs."""
    found = []
    for extent, old, new, size, step, small in zip(
        dataset.shape, dataset.spacing, spacing, crop, multiple, least, strict=True
    ):
        needed = math.ceil(extent * old / new / step) * step
        usual = math.ceil(max(size, small) / step) * step
        found.append(int(min(needed, usual)))
    return found


def normalisation(image: Image, channels: int) -> dict[str, Any]:
    """nnU-Net's schemes for the checkpoint's normalisation, a name and a flag a channel. Its CT scheme is the window
    itself with the intensity properties that :func:`build_plans` gives it."""
    scheme = image.intensity.scheme
    names = {"zscore-nonzero": "ZScoreNormalization", "zscore": "ZScoreNormalization", "window": "CTNormalization"}
    names["none"] = "NoNormalization"
    return {
        "normalization_schemes": [names[scheme]] * channels,
        "use_mask_for_norm": [scheme == "zscore-nonzero"] * channels,
    }


def architecture(model: MaskedAutoencoder, channels: Sequence[str], settings: Finetuning) -> dict[str, Any]:
    """What nnU-Net's plans say of the network."""
    if isinstance(model, ConvolutionalMAE):
        if model.config.network != "resenc":
            raise InputError("fine-tuning needs a residual encoder", field="model.network", found=model.config.network)
        stock = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
        own = "medmae.nnunet.unet.MissingChannelsUNet"
        return {
            "network_class_name": own if settings.modality_dropout > 0 else stock,
            "arch_kwargs": named_arguments(model.config),
            "_kw_requires_import": list(IMPORTED),
        }
    plan = model.plan.model_copy(update={"modalities": tuple(channels)})
    return {
        "network_class_name": "medmae.models.unetr.ViTSegmenter",
        "arch_kwargs": {
            "plan": plan.model_dump(mode="json"),
            "feature_size": settings.feature_size,
            "drop_path": settings.drop_path,
            "strides": [[1, 1, 1]],  # nnU-Net asks every network for its pooling
        },
        "_kw_requires_import": [],
    }


def build_plans(
    dataset: Dataset,
    model: MaskedAutoencoder,
    checkpoint: str | None,
    fingerprint: dict[str, Any],
    *,
    name: str,
    settings: Finetuning,
    seed: int = 0,
    steps_per_epoch: int = 250,
    validation_steps: int = 50,
    spacing: Literal["auto", "checkpoint", "dataset"] = "auto",
    patch: Triple | None = None,
) -> dict[str, Any]:
    """The plans as nnU-Net writes them, with one configuration, and under ``medmae`` what the trainer needs.

    ``checkpoint`` None: the same network and training from random weights.
    """
    image, channels = model.plan.image, len(dataset.channels)
    mm = target_spacing(dataset, image, spacing)
    multiple = model.grid_multiple
    least: Triple = (_TOKENS * multiple[0], _TOKENS * multiple[1], _TOKENS * multiple[2])
    if isinstance(model, ConvolutionalMAE):
        multiple = (2 ** (len(model.config.features) - 1),) * 3  # nothing is masked: the network's stride alone counts
        least = (_SMALL, _SMALL, _SMALL)
    size = list(patch) if patch else patch_size(dataset, mm, image.crop, multiple, least)
    if any(s % m or s < m for s, m in zip(size, multiple, strict=True)):
        raise InputError(
            "a patch that the network cannot take", field="--patch", found=size, expected=f"multiples of {multiple}"
        )
    if isinstance(model, ConvolutionalMAE) and math.prod(s // m for s, m in zip(size, multiple, strict=True)) < 2:
        size[0] += multiple[0]  # an instance norm over a single voxel is none
    after = [extent * old / new for extent, old, new in zip(dataset.shape, dataset.spacing, mm, strict=True)]
    properties = dict(fingerprint["foreground_intensity_properties_per_channel"])
    if image.intensity.scheme == "window":
        low, high = float(image.intensity.low or 0), float(image.intensity.high or 0)
        bounds = {"percentile_00_5": low, "percentile_99_5": high, "mean": low, "std": high - low}
        properties = {str(c): {**properties.get(str(c), {}), **bounds} for c in range(channels)}
    probabilities = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": f"{name}_{CONFIGURATION}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": settings.batch_size,
        "patch_size": size,
        "median_image_size_in_voxels": after,
        "spacing": list(mm),
        **normalisation(image, channels),
        "resampling_fn_data": _RESAMPLING,
        "resampling_fn_data_kwargs": {**probabilities, "order": 3},
        "resampling_fn_seg": _RESAMPLING,
        "resampling_fn_seg_kwargs": {**probabilities, "is_seg": True},
        "resampling_fn_probabilities": _RESAMPLING,
        "resampling_fn_probabilities_kwargs": probabilities,
        "batch_dice": False,
        "architecture": architecture(model, dataset.channels, settings),
    }
    return {
        "dataset_name": dataset.name,
        "plans_name": name,
        "original_median_spacing_after_transp": list(dataset.spacing),
        "original_median_shape_after_transp": [round(v) for v in dataset.shape],
        "image_reader_writer": "NibabelIOWithReorient" if dataset.is_nifti else "SimpleITKIO",
        "transpose_forward": [2, 1, 0],
        "transpose_backward": [2, 1, 0],
        "configurations": {CONFIGURATION: configuration},
        "experiment_planner_used": "medmae",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": properties,
        KEY: {
            "checkpoint": checkpoint,
            "model": model.plan.name,
            "channels": list(dataset.channels),
            "finetuning": settings.model_dump(mode="json"),
            "steps_per_epoch": steps_per_epoch,
            "validation_steps": validation_steps,
            "seed": seed,
        },
    }


def save_plans(plans: dict[str, Any], dataset: Dataset, preprocessed: Path) -> Path:
    """Where nnU-Net looks for them, with the data set's description beside."""
    folder = preprocessed / dataset.name
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "dataset.json", json.dumps(dataset.description, indent=2))
    file = folder / f"{plans['plans_name']}.json"
    write_text(file, json.dumps(plans, indent=2))
    return file
