"""Studies in, synthesised modalities out: NIfTI files on the patient's own grid, marked as synthetic.

Nothing from a header and no path reaches the side-cars: sources are named by modality and by the hash of their bytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import medmae
from medmae.cohort.layouts import find_studies
from medmae.cohort.modalities import canonical_modality
from medmae.cohort.study import Study
from medmae.errors import InputError, MedmaeError, Problem
from medmae.files import explained, write_text
from medmae.imaging.nifti import read_image, write_nifti
from medmae.imaging.registration import Coregistered
from medmae.imaging.registration import coregister as register
from medmae.imaging.volume import Volume
from medmae.synthesis.volumes import (
    UNITS,
    Synthesis,
    check_reference,
    check_targets,
    pick_device,
    reconstruct_volumes,
)
from medmae.synthesis.windows import Synthesiser

__all__ = ["Reconstructed", "Synthesis", "reconstruct", "reconstruct_volumes"]
log = logging.getLogger(__name__)


@dataclass
class Reconstructed:
    """What was written. ``failed``: studies without an output, each with its reason; ``skipped``: studies that lack
    nothing; ``reports``: the pages, one a study."""

    written: list[Path] = field(default_factory=list)
    failed: list[Problem] = field(default_factory=list)
    reports: list[Path] = field(default_factory=list)
    skipped: list[Problem] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "written": [str(path) for path in self.written],
            "reports": [str(path) for path in self.reports],
            "failed": [vars(problem) for problem in self.failed],
            "skipped": [vars(problem) for problem in self.skipped],
        }


def reconstruct(
    studies: Sequence[str | Path] | str | Path,
    checkpoint: str | Path | Synthesiser,
    out: str | Path,
    *,
    targets: Sequence[str] = (),
    images: Mapping[str, str | Path] | None = None,
    coregister: bool = False,
    reference: str | None = None,
    format: str = "nifti",
    report: bool = False,
    device: str = "auto",
    precision: str | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> Reconstructed:
    """Write ``<study>_<modality>.nii.gz``, with a JSON side-car, for every study and target; with ``report`` also
    ``<study>.html``.

    ``studies``: folders or tables in any supported layout. ``checkpoint``: what :func:`medmae.load` takes, or a
    model. ``targets`` left out: what the model knows and a study lacks; a target that a study has is synthesised
    from its other modalities. ``images`` {modality: file} adds to a single study, or replaces its files; without
    ``studies`` they are the study, named after their folder. Outputs have the affine and the shape of the
    ``reference``, an image of the study (default: the first in the model's order of those it was synthesised from).
    ``coregister`` registers the images to the reference (default: the study's first in the model's order) before,
    see :func:`medmae.coregister`. Files that exist are replaced. A study that fails is reported, and the others are
    written; :class:`MedmaeError` when nothing can be done at all.
    """
    if format != "nifti":
        raise InputError("an output format that is not there", field="format", found=format, expected="nifti")
    out = Path(out)
    model = medmae.load(checkpoint) if isinstance(checkpoint, str | Path) else checkpoint
    targets = [canonical_modality(t) or t for t in targets]
    check_targets(model, targets)
    place = Place(coregister, canonical_modality(reference) or reference if reference else None)
    pick_device(device)
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
    result = Reconstructed()
    found = collect([studies] if isinstance(studies, str | Path) else studies, images, result)
    provenance = provenance_of(model, checkpoint)
    for done, study in enumerate(found):
        if on_progress:
            on_progress(done, len(found), study.id)
        known = [m for m in model.modalities if m in study.images]
        if not targets and len(known) == len(model.modalities):
            remedy = "Name a --target to synthesise it from the others."
            result.skipped.append(Problem("lacks no modality", study.id, remedy=remedy, fatal=False))
            continue
        try:
            _one_study(study, model, out, targets, place, provenance, report, device, precision, result)
        except MedmaeError as error:
            result.failed += [
                replace(problem, where=f"{study.id}: {problem.where}" if problem.where else study.id)
                for problem in error.problems
            ]
        except (OSError, MemoryError) as error:
            result.failed.append(Problem(type(error).__name__, study.id, found=str(error) or None))
    if on_progress:
        on_progress(len(found), len(found), "")
    for problem in result.skipped:
        log.info("%s", problem)
    if not result.written and (result.failed or result.skipped):
        problems = result.failed or result.skipped
        raise InputError("no study could be synthesised", where=out, problems=problems)
    return result


def collect(
    sources: Sequence[str | Path], images: Mapping[str, str | Path] | None, result: Reconstructed
) -> list[Study]:
    """The studies that the arguments name; what is wrong with them goes to ``result.failed``."""
    found: list[Study] = []
    for source in sources:
        if images and not Path(source).exists():
            found.append(Study(safe_name(str(source)), safe_name(str(source)), {}))  # a name for the images
            continue
        try:
            layout = find_studies(Path(source))
        except MedmaeError as error:
            result.failed += error.problems
            continue
        found += layout.studies
        result.failed += [problem for problem in layout.problems if problem.fatal]
    if images:
        found = [with_images(found, images, named=bool(sources))]
    unique = {study.id: study for study in reversed(found)}
    for study_id in {s.id for s in found if found.count(s) > 1 or unique[s.id] is not s}:
        remedy = "Give them different names, or reconstruct them into different folders."
        result.failed.append(Problem("several studies of one name; only the first is used", study_id, remedy=remedy))
    if not unique and not result.failed:
        raise InputError("no study to work on", field="STUDY", remedy="Name folders, or files with --image.")
    return list(reversed(unique.values()))


def with_images(found: Sequence[Study], images: Mapping[str, str | Path], named: bool) -> Study:
    """The one study of ``found`` with ``images`` added or replaced; without a name, one named after their folder."""
    files: dict[str, Path] = {}
    for name, path in images.items():
        modality = canonical_modality(name)
        if modality is None:
            raise InputError("an unknown modality", field="--image", found=name, remedy="Such as t1=t1.nii.gz.")
        files[modality] = Path(path)
    if not named:
        folder = safe_name(next(iter(files.values())).resolve().parent.name)
        return Study(folder, folder, files)
    if len(found) != 1:
        raise InputError("images are given for one study", field="--image", found=f"{len(found)} studies")
    return replace(found[0], images={**found[0].images, **files})


@dataclass(frozen=True)
class Place:
    """Whether images are registered to one another, and whose grid the results have."""

    coregister: bool
    reference: str | None


def _one_study(
    study: Study,
    model: Synthesiser,
    out: Path,
    targets: Sequence[str],
    place: Place,
    provenance: dict[str, Any],
    report: bool,
    device: str,
    precision: str | None,
    result: Reconstructed,
) -> None:
    check_reference(place.reference, study.images)
    used = [m for m in study.images if m in model.modalities or m == place.reference]
    order = {m: n for n, m in enumerate(model.modalities)}
    volumes: dict[str, Volume] = {
        m: read_image(study.images[m]) for m in sorted(used, key=lambda m: order.get(m, len(order)))
    }
    reference, registered = place.reference, None
    if place.coregister:
        registered = register(volumes, reference)
        volumes, reference = registered.volumes, registered.reference
    if len(volumes) == 1 and len(targets) > 1:  # one target may be impossible without the others being so
        alone = next(iter(volumes))
        if alone in targets:
            found = f"only {alone}"
            result.failed.append(Problem("nothing to synthesise this target from", study.id, alone, found=found))
            targets = [t for t in targets if t != alone]
    syntheses = reconstruct_volumes(model, volumes, targets, reference=reference, device=device, precision=precision)
    hashes = {m: file_hash(study.images[m]) for m in volumes}
    for target, synthesis in syntheses.items():
        path = out / f"{study.id}_{target}.nii.gz"
        car = side_car(synthesis, provenance, hashes, registered)
        # The side-car first: no synthesised image ever lies there without its mark.
        write_text(path.with_name(f"{study.id}_{target}.json"), json.dumps(car, indent=2) + "\n")
        with explained(path):
            write_nifti(synthesis.volume, path)
        result.written.append(path)
    if report:
        from medmae.synthesis.report import write_report

        page = out / f"{study.id}.html"
        write_report(page, study.id, volumes, syntheses, provenance, model.plan.image.intensity, hashes, registered)
        result.reports.append(page)


def side_car(
    synthesis: Synthesis,
    provenance: Mapping[str, Any],
    hashes: Mapping[str, str],
    registered: Coregistered | None = None,
) -> dict[str, Any]:
    """What the JSON beside a synthesised image says; of images that were registered, how they were moved."""
    grid = synthesis.volume.grid
    registrations = registered.to_json()["registrations"] if registered else {}
    sources = {
        m: {"sha256": hashes[m], **({"registration": registrations[m]} if m in registrations else {})}
        for m in synthesis.sources
    }
    return {
        "synthetic": True,
        "warning": "Not acquired: predicted from other images by a model. Not for diagnosis.",
        "target": synthesis.target,
        "sources": sources,
        "checkpoint": provenance["checkpoint"],
        "version": provenance["version"],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "intensity": {
            "scale": synthesis.units,
            "meaning": UNITS[synthesis.units],
            "mean": synthesis.mean,
            "std": synthesis.std,
            "background": 0,
        },
        "geometry": {
            "grid_of": synthesis.like,
            "coregistered": registered is not None,
            "shape": list(grid.shape),
            "spacing_mm": [round(float(s), 6) for s in grid.spacing],
            "orientation": grid.orientation,
            "affine": [[float(v) for v in row] for row in grid.affine],
        },
        "inference": {
            "model_shape": list(synthesis.array.shape),
            "model_spacing_mm": [float(s) for s in synthesis.study.grid.spacing],
            "window": list(synthesis.window),
            "windows": synthesis.windows,
            "patch_grid_shifts": [list(shift) for shift in synthesis.shifts],
        },
    }


def provenance_of(model: Synthesiser, checkpoint: str | Path | Synthesiser) -> dict[str, Any]:
    """Version and checkpoint (hash of the weights, plan, method) as side-cars and reports tell them."""
    known = model.metadata.get("weights_sha256")
    if known is None and isinstance(checkpoint, str | Path) and Path(checkpoint).is_file():
        known = file_hash(Path(checkpoint))
    plan = model.plan
    return {
        "version": f"medmae {medmae.__version__}",
        "checkpoint": {"hash": known, "plan": plan.name, "plan_hash": plan.hash(), "method": plan.method},
    }


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def safe_name(text: str) -> str:
    """``text`` as a file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(text).name).strip("-.") or "study"
