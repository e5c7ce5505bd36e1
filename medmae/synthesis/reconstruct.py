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
from medmae.imaging.volume import Volume
from medmae.synthesis.volumes import UNITS, Synthesis, check_targets, pick_device, reconstruct_volumes
from medmae.synthesis.windows import Synthesiser

__all__ = ["Reconstructed", "Synthesis", "reconstruct", "reconstruct_volumes"]
log = logging.getLogger(__name__)


@dataclass
class Reconstructed:
    """What was written. ``failed``: studies without an output, each with its reason; ``skipped``: studies that lack
    nothing; ``reports``: the pages, one a study, and where ``out`` holds several the cohort's, ``index.html``, last."""

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
    format: str = "nifti",
    report: bool = False,
    device: str = "auto",
    precision: str | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> Reconstructed:
    """Write ``<study>_<modality>.nii.gz``, with a JSON side-car, for every study and target; with ``report`` also
    ``<study>.html`` and, for the pages of ``out`` where there are several, ``index.html``.

    ``studies``: folders or tables in any supported layout. ``checkpoint``: what :func:`medmae.load` takes, or a
    model. ``targets`` left out: what the model knows and a study lacks; a target that a study has is synthesised
    from its other modalities. ``images`` {modality: file} adds to a single study, or replaces its files; without
    ``studies`` they are the study, named after their folder. Outputs have the affine and the shape of the study's
    first modality in the model's order (of those it was synthesised from). Files that exist are replaced. A study
    that fails is reported, and the others are written; :class:`MedmaeError` when nothing can be done at all.
    """
    if format != "nifti":
        raise InputError("an output format that is not there", field="format", found=format, expected="nifti")
    out = Path(out)
    model = medmae.load(checkpoint) if isinstance(checkpoint, str | Path) else checkpoint
    targets = [canonical_modality(t) or t for t in targets]
    check_targets(model, targets)
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
            _one_study(study, model, out, targets, provenance, report, device, precision, result)
        except MedmaeError as error:
            where = study.id if error.problem.where is None else f"{study.id}: {error.problem.where}"
            result.failed.append(Problem(**{**vars(error.problem), "where": where}))
        except (OSError, MemoryError) as error:
            result.failed.append(Problem(type(error).__name__, study.id, found=str(error) or None))
    _write_index(out, result)
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


def _one_study(
    study: Study,
    model: Synthesiser,
    out: Path,
    targets: Sequence[str],
    provenance: dict[str, Any],
    report: bool,
    device: str,
    precision: str | None,
    result: Reconstructed,
) -> None:
    volumes: dict[str, Volume] = {m: read_image(study.images[m]) for m in model.modalities if m in study.images}
    if len(volumes) == 1 and len(targets) > 1:  # one target may be impossible without the others being so
        alone = next(iter(volumes))
        if alone in targets:
            found = f"only {alone}"
            result.failed.append(Problem("nothing to synthesise this target from", study.id, alone, found=found))
            targets = [t for t in targets if t != alone]
    syntheses = reconstruct_volumes(model, volumes, targets, device=device, precision=precision)
    hashes = {m: file_hash(study.images[m]) for m in volumes}
    for target, synthesis in syntheses.items():
        path = out / f"{study.id}_{target}.nii.gz"
        car = side_car(synthesis, provenance, hashes)
        # The side-car first: no synthesised image ever lies there without its mark.
        write_text(path.with_name(f"{study.id}_{target}.json"), json.dumps(car, indent=2) + "\n")
        with explained(path):
            write_nifti(synthesis.volume, path)
        result.written.append(path)
    if report:
        from medmae.synthesis.report import write_report
        from medmae.synthesis.report_cohort import page_name

        page = out / page_name(study.id)
        write_report(page, study.id, volumes, syntheses, provenance, model.plan.image.intensity, hashes)
        result.reports.append(page)


def _write_index(out: Path, result: Reconstructed) -> None:
    """The cohort's page, when this call wrote a study's page and the folder holds several."""
    if result.reports:
        from medmae.synthesis.report_cohort import write_index

        index = write_index(out)
        result.reports += [] if index is None else [index]


def side_car(synthesis: Synthesis, provenance: Mapping[str, Any], hashes: Mapping[str, str]) -> dict[str, Any]:
    """What the JSON beside a synthesised image says."""
    grid = synthesis.volume.grid
    return {
        "synthetic": True,
        "warning": "Not acquired: predicted from other images by a model. Not for diagnosis.",
        "target": synthesis.target,
        "sources": {m: {"sha256": hashes[m]} for m in synthesis.sources},
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
