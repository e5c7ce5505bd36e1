"""Preparing one study: read, judge, bring to the model's space, compress, and put in place whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from medmae.cohort.examine import Examined, examine
from medmae.cohort.index import FORMAT, KINDS, to_text
from medmae.cohort.naming import in_order
from medmae.cohort.sources import Task, files_of, image_digest, listed, sources_of
from medmae.errors import InputError, MedmaeError, Problem
from medmae.files import explained, flush, write_text
from medmae.imaging.geometry import grids_agree, resample_labels
from medmae.imaging.registration import Coregistered, coregister
from medmae.imaging.space import to_model_space
from medmae.imaging.volume import Grid, Volume

# How arrays are packed. Measured on 2 cores with four 150 x 180 x 150 studies of real brain MR (float16, z-scores, 5 %
# noise added), crops of 4 x 128^3 from a warm disk cache: LZ4 level 5 with byte shuffle 8 ms and 2.4 times smaller;
# with bit shuffle 14 ms and 2.1; ZSTD level 1 28 ms and 2.6; LZ4HC level 9 14 ms, 2.4, and ten times slower to write.
# Chunks of 64 to 128 and blocks of 16 or 32 differ by less than the noise; small chunks read least for small crops.
CHUNK: Final = 64
BLOCK: Final = 32


@dataclass(frozen=True)
class Built:
    """``record`` is ``study.json``, None when the study failed. ``stop``: writing itself failed (full disk, no
    permission), so the others would too."""

    id: str
    record: dict[str, Any] | None
    problems: list[Problem]
    stop: bool = False


def build(task: Task) -> Built:
    """Prepare one study. Nothing is raised: a failure is this study's alone, unless writing is impossible."""
    study = task.study
    try:
        sources = {kind: sources_of(files) for kind, files in files_of(study).items()}
        arrays, labels, record, problems = in_model_space(task)
        if record is None:
            return Built(study.id, None, problems)
        for kind in KINDS:
            for name, entry in record[kind].items():
                entry["source"] = sources[kind][name]
        # A label that was left out is part of what this study was prepared from: it is not tried again while unchanged.
        record["left_out"] = {name: source for name, source in sources["labels"].items() if name not in labels}
    except InputError as error:
        return Built(study.id, None, [replace(p, where=f"{study.id}: {p.where or 'images'}") for p in error.problems])
    except MemoryError:
        remedy = "Use fewer --jobs, or a larger spacing in the plan."
        return Built(study.id, None, [Problem("not enough memory for this study", study.id, remedy=remedy)])
    except Exception as error:  # one study must not stop the others, whatever is wrong with it
        found = f"{type(error).__name__}: {error}"
        return Built(study.id, None, [Problem("this study cannot be prepared", study.id, found=found)])
    try:
        write_study(task.cohort, study.id, arrays, labels, record)
    except MedmaeError as error:
        return Built(study.id, None, error.problems, stop=True)
    except OSError as error:
        found, remedy = error.strerror or str(error), "Check the folder and the disk."
        return Built(
            study.id, None, [Problem("the study cannot be written", study.id, None, found, None, remedy)], True
        )
    return Built(study.id, record, problems)


def in_model_space(
    task: Task,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, Any] | None, list[Problem]]:
    """(images, labels, the record without sources, problems); the record is None when the study cannot be used."""
    study = task.study
    seen = examine(study, task.label_values, coregister=task.coregister)
    if not seen.usable:
        return {}, {}, None, seen.problems
    volumes = {name: seen.images[name] for name in in_order(seen.images)}
    registered = None
    if task.coregister:
        registered = coregister(volumes)
        seen.problems += labels_moved_along(seen, volumes, registered, study.id)
        volumes = registered.volumes
    model = to_model_space(volumes, task.image)
    arrays = {}
    for name, array in model.arrays.items():
        with np.errstate(over="ignore"):
            arrays[name] = array.astype(np.float16)
        if not np.isfinite(arrays[name]).all():
            raise InputError(
                "values too large for the prepared store (float16)",
                where=str(study.images[name]),
                field="voxels",
                found=f"up to {np.abs(array).max():g}",
                expected="at most 65504 after normalisation",
                remedy="Choose another image.intensity.scheme in the plan, such as zscore.",
            )
    first = next(iter(volumes.values()))
    labels = {
        name: on_grid(Volume(array, seen.label_grids[name].affine), first.grid, model.grid)
        for name, array in seen.labels.items()
    }
    record = {
        "format": FORMAT,
        "id": study.id,
        "subject": study.subject,
        "session": study.session,
        "image": image_digest(task.image),
        "label_values": listed(task.label_values),
        "shape": list(model.grid.shape),
        "affine": model.grid.affine.tolist(),
        "images": {
            name: {
                "dtype": "float16",
                "scale": model.scales[name].to_json(),
                "native": model.native[name].to_json(),
            }
            for name in arrays
        },
        "labels": {name: {"dtype": str(array.dtype)} for name, array in labels.items()},
    }
    if registered is not None:
        record["registration"] = registered.to_json()
    return arrays, labels, record, seen.problems


def labels_moved_along(
    seen: Examined, acquired: Mapping[str, Volume], registered: Coregistered, study: str
) -> list[Problem]:
    """Labels go where the image went on whose grid they were drawn, the reference first; nobody knows where one on a
    grid of its own went: it is left out, and told."""
    names = sorted(acquired, key=lambda name: name != registered.reference)
    problems = []
    for label, grid in list(seen.label_grids.items()):
        image = next((name for name in names if grids_agree(grid, acquired[name].grid)), None)
        if image is not None:
            seen.label_grids[label] = Grid(grid.shape, registered.volumes[image].affine)
            continue
        del seen.labels[label], seen.label_grids[label]
        problems.append(
            Problem(
                f"the label {label} is on the grid of no image: it is left out, as images are moved by --coregister",
                study,
                "grid",
                remedy="Put it on the grid of the image on which it was drawn.",
                fatal=False,
            )
        )
    return problems


def on_grid(label: Volume, reference: Grid, grid: Grid) -> np.ndarray:
    """A label map on the model's grid. One on the images' own grid, up to rounding in its header, is taken as on it."""
    if grids_agree(label.grid, reference):
        label = Volume(label.array, reference.affine)
    return resample_labels(label, grid).array


def write_study(
    cohort: Path, study: str, arrays: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray], record: dict[str, Any]
) -> None:
    """Write a study's folder beside its place, ``study.json`` last, and rename it into place."""
    place = cohort / "studies" / study
    temporary = cohort / ".building" / f"{study}.{uuid.uuid4().hex[:8]}"
    outdated = temporary.with_name(f"{temporary.name}.old")
    with explained(place):
        temporary.mkdir(parents=True)
        try:
            for kind, suffix, group in (("images", ".b2nd", arrays), ("labels", ".label.b2nd", labels)):
                for name, array in group.items():
                    packed = pack(array)
                    write_bytes(temporary / f"{name}{suffix}", packed)
                    record[kind][name].update(file=f"{name}{suffix}", bytes=len(packed))
            write_text(temporary / "study.json", to_text(record))
            flush(temporary)
            place.parent.mkdir(parents=True, exist_ok=True)
            if place.exists():
                os.replace(place, outdated)
            os.replace(temporary, place)
            flush(place.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(outdated, ignore_errors=True)


def pack(array: np.ndarray) -> bytes:
    """A blosc2 array as the bytes of its file. See ``CHUNK`` for the choice of codec and sizes."""
    import blosc2

    chunks = tuple(min(CHUNK, n) for n in array.shape)
    packed = blosc2.asarray(
        np.ascontiguousarray(array),
        chunks=chunks,
        blocks=tuple(min(BLOCK, n) for n in chunks),
        cparams={
            "codec": blosc2.Codec.LZ4,
            "clevel": 5,
            "filters": [blosc2.Filter.SHUFFLE],
            "typesize": array.itemsize,
            "nthreads": 1,  # studies are prepared in parallel already
        },
    )
    return bytes(packed.to_cframe())


def write_bytes(path: Path, data: bytes) -> None:
    """Write and flush; by Python and not by blosc2, so that a full disk is an OSError."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
