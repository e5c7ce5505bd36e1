"""One study in memory: volumes in, synthesised volumes on the patient's own grid out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from medmae.errors import InputError, nearest
from medmae.imaging.geometry import resample
from medmae.imaging.space import ModelStudy, other_places, to_model_space
from medmae.imaging.volume import Grid, Volume
from medmae.synthesis.floors import foreground
from medmae.synthesis.predicting import predict_study, refiner_of
from medmae.synthesis.trust import Calibration
from medmae.synthesis.windows import Synthesiser, Triple

UNITS = {
    "scanner-units-of-training-cohort": "normalised prediction x std + mean, where mean and std are typical of this "
    "modality's brain voxels in the training cohort",
    "zscore": "normalised prediction as it is: zero mean and unit standard deviation over a typical brain, because "
    "the checkpoint does not know the target's units",
    "window": "the training plan's intensity window undone: the units of the training images",
    "none": "the units of the training images, which were not normalised",
}


@dataclass(frozen=True)
class Synthesis:
    """A synthesised modality.

    ``volume``: on the grid of the study's ``like`` modality, float32, in
    ``units`` (a key of :data:`UNITS`), exactly 0 outside the foreground. ``array``: the same in the model's space
    (``study.grid``), normalised. ``foreground``: there, (D, H, W) bool: where some input is not background.
    ``windows`` passes of size ``window`` over the ``shifts`` of the patch grid made it, then a refiner if ``refined``.
    ``uncertainty``: on the same grid and in the same units, half the width of the interval that holds the truth of
    nine voxels in ten (see :mod:`medmae.synthesis.trust`); None where it was not asked for or the checkpoint was never
    calibrated. ``half_width``: the same in the model's space.
    """

    target: str
    volume: Volume
    units: str
    mean: float | None
    std: float | None
    like: str
    sources: tuple[str, ...]
    study: ModelStudy
    array: np.ndarray
    foreground: np.ndarray
    window: Triple
    windows: int
    shifts: tuple[Triple, ...]
    refined: bool = False
    uncertainty: Volume | None = None
    half_width: np.ndarray | None = None


def reconstruct_volumes(
    model: Synthesiser,
    volumes: Mapping[str, Volume],
    targets: Sequence[str] = (),
    *,
    reference: str | None = None,
    device: str | torch.device = "auto",
    precision: str | None = None,
    uncertainty: bool = False,
) -> dict[str, Synthesis]:
    """Synthesise ``targets`` (default: what the model knows and ``volumes`` lacks) from a study's volumes.

    A target that is among ``volumes`` is not looked at while it is synthesised: it is predicted from all the others.
    Modalities the model does not know are left aside, but for the ``reference``: the one of ``volumes`` whose grid the
    results have (default: the first, in model order, that is predicted from). ``precision`` "32" (default) or "bf16".
    ``uncertainty``: also the width of the intervals, which takes about twice as long; nothing of a checkpoint that was
    never calibrated (``medmae finetune synthesis``). Raises :class:`InputError` for a target the model never saw, a
    reference that is not there, when nothing is left to predict from, and when the volumes do not lie in one frame of
    reference (see :func:`medmae.coregister`).
    """
    check_reference(reference, volumes)
    known = {m: volumes[m] for m in model.modalities if m in volumes}
    check_targets(model, targets)
    if not known:
        raise InputError(
            "no modality that the model knows",
            found=", ".join(sorted(volumes)) or "nothing",
            expected=f"at least one of {', '.join(model.modalities)}",
            remedy="Name the files with --image MODALITY=PATH if they were not recognised.",
        )
    wanted = tuple(dict.fromkeys(targets)) or tuple(m for m in model.modalities if m not in known)
    grouped: dict[tuple[str, ...], list[str]] = {}
    for target in wanted:
        grouped.setdefault(tuple(m for m in known if m != target), []).append(target)
    device = pick_device(device)
    if isinstance(model, torch.nn.Module):
        model.to(device).eval()
    results: dict[str, Synthesis] = {}
    for sources, group in grouped.items():
        if not sources:
            raise InputError(
                "the target is the only modality of this study",
                field=group[0],
                expected="another modality to synthesise it from",
                remedy=f"Add one of {', '.join(m for m in model.modalities if m != group[0])}.",
            )
        given = {m: known[m] for m in sources}
        like = reference or sources[0]
        if problems := other_places({like: volumes[like], **given}):
            raise InputError(problems[0].what, problems=problems)
        for synthesis in _synthesise(
            model, given, group, (like, volumes[like]), device, precision or "32", uncertainty
        ):
            results[synthesis.target] = synthesis
    return {target: results[target] for target in wanted}


def _synthesise(
    model: Synthesiser,
    volumes: dict[str, Volume],
    targets: list[str],
    place: tuple[str, Volume],
    device: torch.device,
    precision: str,
    uncertainty: bool,
) -> list[Synthesis]:
    name, reference = place
    like = reference.grid
    # The reference first, if it is an input: the model's space then has its axes, and its voxels stay what they are.
    study = to_model_space(dict(sorted(volumes.items(), key=lambda item: item[0] != name)), model.plan.image)
    seen = foreground(study.arrays) if model.plan.image.intensity.has_background else None
    trust = calibration_of(model) if uncertainty else None
    predicted = predict_study(
        model, study.arrays, targets, foreground=seen, device=device, precision=precision, doubt=trust is not None
    )
    sources = tuple(volumes)
    native = None if seen is None else native_foreground(volumes, like)
    results = []
    for target in targets:
        array = predicted.arrays[target]
        units, mean, std = units_of(model, target)
        # Interpolated before the background is cut: values beside the brain are then as smooth as inside it.
        volume = study.to_native(array, like, None)
        values = volume.array if mean is None or std is None else volume.array * std + mean
        inside = values if native is None else np.where(native, values, 0)
        width, spread = None, None
        if trust is not None and predicted.doubt is not None:
            width = trust.half_width(predicted.doubt[target], target, len(sources))
        if width is not None:
            width = width if seen is None else np.where(seen, width, 0)
            there = study.to_native(width, like, None).array * (1 if std is None else std)
            spread = volume.with_array((there if native is None else np.where(native, there, 0)).astype(np.float32))
        results.append(
            Synthesis(
                target=target,
                volume=Volume(inside.astype(np.float32), like.affine, reference.frame or study.frame),
                units=units,
                mean=mean,
                std=std,
                like=name,
                sources=sources,
                study=study,
                array=array if seen is None else np.where(seen, array, 0),
                foreground=np.ones(array.shape, bool) if seen is None else seen,
                window=predicted.coarse.window,
                windows=predicted.coarse.windows,
                shifts=predicted.coarse.shifts,
                refined=refiner_of(model) is not None,
                uncertainty=spread,
                half_width=width,
            )
        )
    return results


def calibration_of(model: Synthesiser) -> Calibration | None:
    """What the checkpoint knows of its errors."""
    found = model.metadata.get("calibration")
    return Calibration.from_json(found) if found else None


def native_foreground(volumes: Mapping[str, Volume], like: Grid) -> np.ndarray:
    """Bool on ``like``: where any of the volumes is not 0 (half of the voxel at least), holes filled."""
    return foreground({m: resample(v.with_array(v.array != 0), like, 1).array for m, v in volumes.items()})


def units_of(model: Synthesiser, target: str) -> tuple[str, float | None, float | None]:
    """The key of :data:`UNITS` for what is written, and the mean and standard deviation given back (or None)."""
    intensity = model.plan.image.intensity
    if intensity.scheme == "none":
        return "none", None, None
    if intensity.scheme == "window" and intensity.low is not None and intensity.high is not None:
        return "window", intensity.low, intensity.high - intensity.low
    typical: dict[str, Any] = (model.metadata.get("intensity") or {}).get(target) or {}
    if "mean" in typical and "std" in typical:
        return "scanner-units-of-training-cohort", float(typical["mean"]), float(typical["std"])
    return "zscore", None, None


def check_targets(model: Synthesiser, targets: Sequence[str]) -> None:
    """Raise :class:`InputError` for a target the model never saw."""
    for target in targets:
        if target not in model.modalities:
            raise InputError(
                "the model never saw this modality",
                field="target",
                found=target,
                expected=f"one of {', '.join(model.modalities)}",
                remedy=nearest(target, model.modalities) + " Another one needs a model trained with it.",
            )


def check_reference(reference: str | None, present: Mapping[str, object]) -> None:
    """Raise :class:`InputError` for a reference that the study lacks."""
    if reference is not None and reference not in present:
        raise InputError(
            "the study lacks the reference",
            field="reference",
            found=reference,
            expected=f"one of {', '.join(present)}",
            remedy="Choose an image that the study has.",
        )


def pick_device(device: str | torch.device) -> torch.device:
    """The device of that name; a GPU for "auto" when there is one."""
    if device != "auto":
        chosen = torch.device(device)
        if chosen.type == "cuda" and not torch.cuda.is_available():
            raise InputError("no CUDA device here", field="device", found=str(device), remedy="Use --device cpu.")
        return chosen
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
