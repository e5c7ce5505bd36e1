"""Studies with whatever channels they have through a fine-tuned nnU-Net model."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

import medmae
from medmae.cohort.modalities import canonical_modality
from medmae.cohort.study import Study
from medmae.errors import CheckpointError, InputError, MedmaeError, Problem
from medmae.files import explained
from medmae.imaging.nifti import write_nifti
from medmae.imaging.source import Source, read_source
from medmae.nnunet.finding import KEY, environment
from medmae.nnunet.segment import PredictedSegmentation
from medmae.synthesis.collecting import collect


def predict(
    data: Sequence[str | Path] | str | Path,
    model: Path,
    out: Path,
    folds: Sequence[int | str] | None,
    device: torch.device,
    mirror: bool,
    format: str,
    on_progress: Callable[[int, int, str], None] | None,
) -> PredictedSegmentation:
    """See :func:`medmae.nnunet.segment.predict_segment`."""
    predictor, channels, practised = load_predictor(model, folds, device, mirror)
    gathered = collect([data] if isinstance(data, str | Path) else data)
    studies = gathered.studies
    result = PredictedSegmentation(problems=list(gathered.problems))
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
    for done, study in enumerate(studies):
        if on_progress:
            on_progress(done, len(studies), study.id)
        try:
            images = images_of(study, channels)
            absent = [c for c in channels if c not in images]
            if absent and not practised:
                remedy = "Fine-tune with --set modality_dropout=0.5 for a model that is used to it."
                what = f"lacks {', '.join(absent)}, which this model never practised"
                result.problems.append(Problem(what, study.id, remedy=remedy, fatal=False))
            with as_files(images) as files:
                file = segment_one(predictor, study, files, channels, out)
            result.written.append(file if format == "nifti" else as_dicom(file, images, predictor, model))
        except (MedmaeError, OSError, RuntimeError, AssertionError) as error:
            result.problems.append(Problem("could not be segmented", study.id, found=str(error)))
    if on_progress:
        on_progress(len(studies), len(studies), "")
    if not result.written:
        raise InputError("no study could be segmented", where=out, problems=result.problems)
    return result


def load_predictor(
    model: Path, folds: Sequence[int | str] | None, device: torch.device, mirror: bool, any_model: bool = False
) -> tuple[Any, tuple[str, ...], bool]:
    """nnU-Net's predictor, the names of the channels, and whether the model has practised lacking some. ``any_model``:
    also one that others trained, whose dataset.json names the channels."""
    file = model / "plans.json"
    if not file.is_file():
        raise CheckpointError(
            "no nnU-Net model here",
            where=model,
            expected="plans.json, dataset.json and fold_*",
            remedy=("Give the folder <trainer>__<plans>__<configuration> in results/."),
        )
    ours = json.loads(file.read_text(encoding="utf-8")).get(KEY)
    if ours is None and not any_model:
        raise CheckpointError(
            "a model that medmae did not fine-tune", where=model, remedy="Use nnUNetv2_predict_from_modelfolder for it."
        )
    channels = tuple(ours["channels"]) if ours else channels_of(model)
    with quiet():
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

        predictor = nnUNetPredictor(use_mirroring=mirror, device=device, allow_tqdm=False)
        try:
            predictor.initialize_from_trained_model_folder(str(model), None if folds is None else tuple(folds))
        except (FileNotFoundError, IndexError, UnboundLocalError) as error:
            raise CheckpointError(
                "no finished fold in this model", where=model, found=error, expected="fold_*/checkpoint_final.pth"
            ) from None
    return predictor, channels, bool(ours) and ours["finetuning"]["modality_dropout"] > 0


def channels_of(model: Path) -> tuple[str, ...]:
    """What the channels of a model are, by its dataset.json. Raises :class:`InputError` for names that say nothing."""
    described = json.loads((model / "dataset.json").read_text(encoding="utf-8"))["channel_names"]
    names = [str(described[key]) for key in sorted(described, key=int)]
    known = [canonical_modality(name) for name in names]
    unknown = [name for name, modality in zip(names, known, strict=True) if modality is None]
    if unknown:
        raise InputError(
            "channels whose names say no modality",
            where=model / "dataset.json",
            field="channel_names",
            found=", ".join(unknown),
            remedy="Name them as modalities in a copy of the model, such as t1, t1c, t2, flair.",
        )
    return tuple(modality for modality in known if modality is not None)


@contextmanager
def quiet() -> Any:
    """nnU-Net prints, and wants its folders and the plug-in named in the environment."""
    before = dict(os.environ)
    os.environ.update({k: v for k, v in environment().items() if k == "nnUNet_extTrainer"})
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ.setdefault(name, "")
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def images_of(study: Study, channels: Sequence[str]) -> dict[str, Source]:
    """{channel: file}; the one image of a study with one goes into a model's one channel, whatever its name."""
    found = {c: study.images[c] for c in channels if c in study.images}
    if not found and len(channels) == len(study.images) == 1:
        return {channels[0]: next(iter(study.images.values()))}
    if not found:
        raise InputError(
            "none of its images is a channel of the model",
            found=", ".join(study.images) or "no images",
            expected=", ".join(channels),
        )
    return found


@contextmanager
def as_files(images: Mapping[str, Source]) -> Iterator[dict[str, Path]]:
    """The images as NIfTI files, which is what nnU-Net reads; those of DICOM series last as long as the block."""
    with tempfile.TemporaryDirectory(prefix="medmae-") as folder:
        files = {}
        for name, source in images.items():
            if not isinstance(source, Path):
                file = Path(folder) / f"{name}.nii.gz"
                write_nifti(read_source(source), file)
                source = file
            files[name] = source
        yield files


def as_dicom(file: Path, images: Mapping[str, Source], predictor: Any, model: Path) -> Path:
    """A label map as ``<study>.dcm``, a DICOM SEG in the study of the first image, in place of the NIfTI file."""
    from medmae.imaging.dicom_out.exporting import on_disk, series_of
    from medmae.imaging.dicom_out.segmentation import write_segmentation

    series = series_of(images, list(images)[:1], file.name.removesuffix(".nii.gz"))
    names = {int(v): str(k) for k, v in predictor.dataset_json["labels"].items() if v != 0}
    labels = read_source(file)
    with on_disk(series) as files:
        written = write_segmentation(
            labels,
            next(iter(files.values())),
            file.with_name(file.name.removesuffix(".nii.gz") + ".dcm"),
            names=names,
            version=medmae.__version__,
            checkpoint_hash=hashlib.sha256((model / "plans.json").read_bytes()).hexdigest(),
        )
    file.unlink()
    return written


def segment_one(predictor: Any, study: Study, images: dict[str, Path], channels: Sequence[str], out: Path) -> Path:
    """``<study>.nii.gz`` with the model's labels, on the grid of the study's first channel."""
    from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape

    plans, configuration = predictor.plans_manager, predictor.configuration_manager
    with quiet():
        reader = plans.image_reader_writer_class()
        present, properties = reader.read_images([str(images[c]) for c in channels if c in images])
        whole = np.zeros((len(channels), *present.shape[1:]), np.float32)
        whole[[c in images for c in channels]] = present
        preprocessor = configuration.preprocessor_class(verbose=False)
        data, _, properties = preprocessor.run_case_npy(
            whole, None, properties, plans, configuration, predictor.dataset_json
        )
        data = torch.from_numpy(np.asarray(data, np.float32))
        data[[c not in images for c in channels]] = float("nan")  # not acquired
        logits = predictor.predict_logits_from_preprocessed_data(data)
        labels = convert_predicted_logits_to_segmentation_with_correct_shape(
            logits, plans, configuration, predictor.label_manager, properties
        )
        file = out / f"{study.id}{predictor.dataset_json['file_ending']}"
        reader.write_seg(labels, str(file), properties)
    return file
