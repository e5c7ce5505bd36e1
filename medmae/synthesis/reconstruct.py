"""Studies in, synthesised modalities out: NIfTI files on the patient's own grid, marked as synthetic.

Nothing from a header and no path reaches the side-cars: sources are named by modality and by the hash of their bytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import medmae
from medmae.cohort.modalities import canonical_modality
from medmae.cohort.study import Study
from medmae.errors import InputError, MedmaeError, Problem
from medmae.files import explained, write_text
from medmae.imaging.dicom_out.exporting import export_synthesis, series_of
from medmae.imaging.nifti import write_nifti
from medmae.imaging.source import read_source, sha256
from medmae.imaging.volume import Volume
from medmae.synthesis.collecting import collect
from medmae.synthesis.volumes import UNITS, Synthesis, check_targets, pick_device, reconstruct_volumes
from medmae.synthesis.windows import Synthesiser

__all__ = ["Reconstructed", "Synthesis", "reconstruct", "reconstruct_volumes"]
log = logging.getLogger(__name__)

FORMATS = ("nifti", "dicom")


@dataclass
class Reconstructed:
    """What was written. ``failed``: studies without an output, each with its reason; ``skipped``: studies that lack
    nothing; ``warnings``: what was left out or chosen, and studies that are not to be trusted as usual; ``reports``:
    the pages, one a study, and where ``out`` holds several the cohort's, ``index.html``, last."""

    written: list[Path] = field(default_factory=list)
    failed: list[Problem] = field(default_factory=list)
    reports: list[Path] = field(default_factory=list)
    skipped: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "written": [str(path) for path in self.written],
            "reports": [str(path) for path in self.reports],
            "failed": [vars(problem) for problem in self.failed],
            "skipped": [vars(problem) for problem in self.skipped],
            "warnings": [vars(problem) for problem in self.warnings],
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
    uncertainty: bool = True,
    anomaly: bool = False,
    device: str = "auto",
    precision: str | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> Reconstructed:
    """Write ``<study>_<modality>.nii.gz``, with a JSON side-car, for every study and target; with ``report`` also
    ``<study>.html`` and, for the pages of ``out`` where there are several, ``index.html``.

    ``studies``: folders, DICOM ZIPs or tables in any supported layout. ``checkpoint``: what :func:`medmae.load`
    takes, or a model. ``targets`` left out: what the model knows and a study lacks; a target that a study has is
    synthesised from its other modalities. ``images`` {modality: file, DICOM folder or number of a DICOM series} adds to
    a single study, or replaces its images; without ``studies`` they are the study, named after their folder. Outputs
    have the affine and the shape of the study's first modality in the model's order (of those it was synthesised
    from). Files that exist are replaced.

    ``uncertainty``: with a checkpoint that was calibrated (``medmae finetune synthesis``), also
    ``<study>_<modality>_uncertainty.nii.gz``, half the width of each voxel's 90 % interval in the synthesis' units, and
    a warning for images unlike those of training. ``anomaly``: also ``<study>_anomaly.nii.gz``, where the modalities
    that are there are not what the model expects (see :mod:`medmae.synthesis.anomaly`), for studies that lack nothing
    too.

    ``format`` "dicom": in place of each NIfTI file a folder of MR Image objects in the study that the images came from,
    which must be DICOM (see :mod:`medmae.imaging.dicom_out.writing`); the side-car lies beside the folder.

    A study that fails is reported, and the others are written; :class:`MedmaeError` when nothing can be done at all.
    """
    if format not in FORMATS:
        raise InputError(
            "an output format that is not there", field="format", found=format, expected=" or ".join(FORMATS)
        )
    out = Path(out)
    model = medmae.load(checkpoint) if isinstance(checkpoint, str | Path) else checkpoint
    targets = [canonical_modality(t) or t for t in targets]
    check_targets(model, targets)
    pick_device(device)
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
    collected = collect([studies] if isinstance(studies, str | Path) else studies, images)
    found = collected.studies
    result = Reconstructed(failed=collected.failed, warnings=collected.warnings)
    provenance = provenance_of(model, checkpoint)
    for done, study in enumerate(found):
        if on_progress:
            on_progress(done, len(found), study.id)
        known = [m for m in model.modalities if m in study.images]
        if not targets and len(known) == len(model.modalities) and not anomaly:
            remedy = "Name a --target to synthesise it from the others."
            result.skipped.append(Problem("lacks no modality", study.id, remedy=remedy, fatal=False))
            continue
        try:
            Work(
                *(study, model, out, targets, provenance, format, report, uncertainty, anomaly),
                *(device, precision, result),
            ).do()
        except MedmaeError as error:
            where = study.id if error.problem.where is None else f"{study.id}: {error.problem.where}"
            result.failed.append(Problem(**{**vars(error.problem), "where": where}))
        except (OSError, MemoryError) as error:
            result.failed.append(Problem(type(error).__name__, study.id, found=str(error) or None))
    _write_index(out, result)
    if on_progress:
        on_progress(len(found), len(found), "")
    for problem in (*result.skipped, *result.warnings):
        log.info("%s", problem)
    if not result.written and (result.failed or result.skipped):
        problems = result.failed or result.skipped
        raise InputError("no study could be synthesised", where=out, problems=problems)
    return result


@dataclass
class Work:
    """One study's synthesis from files to files."""

    study: Study
    model: Synthesiser
    out: Path
    targets: Sequence[str]
    provenance: dict[str, Any]
    format: str
    report: bool
    uncertainty: bool
    anomaly: bool
    device: str
    precision: str | None
    result: Reconstructed
    series: int = 0  # DICOM series written so far

    def do(self) -> None:
        study, model = self.study, self.model
        volumes: dict[str, Volume] = {
            m: read_source(study.images[m], self.result.warnings) for m in model.modalities if m in study.images
        }
        self.hashes = {m: sha256(study.images[m]) for m in volumes}
        targets = self.possible(volumes)
        lacking = [m for m in model.modalities if m not in volumes]
        syntheses: dict[str, Synthesis] = {}
        if targets or lacking or not self.anomaly:
            syntheses = reconstruct_volumes(
                model,
                volumes,
                targets,
                device=self.device,
                precision=self.precision,
                uncertainty=self.uncertainty,
            )
        strange = self.strange(syntheses)
        for target, synthesis in syntheses.items():
            self.write(target, synthesis, strange)
        heat = self.write_anomaly(volumes) if self.anomaly else {}
        if self.report and syntheses:
            self.write_page(volumes, syntheses, strange, heat)

    def possible(self, volumes: Mapping[str, Volume]) -> list[str]:
        """The targets that there is something to synthesise from: one may be impossible without the others being."""
        alone = next(iter(volumes), None)
        if len(volumes) > 1 or len(self.targets) < 2 or alone not in self.targets:
            return list(self.targets)
        what = "nothing to synthesise this target from"
        self.result.failed.append(Problem(what, self.study.id, alone, found=f"only {alone}"))
        return [t for t in self.targets if t != alone]

    def strange(self, syntheses: Mapping[str, Synthesis]) -> dict[str, float]:
        """How unlike training each image is; beyond the limit a warning."""
        from medmae.models.base import MaskedAutoencoder
        from medmae.synthesis.familiar import LIMIT, InMemory, strangeness

        model = self.model
        found: dict[str, float] = {}
        if not self.uncertainty or not isinstance(model, MaskedAutoencoder) or "familiar" not in model.companions:
            return {}
        for synthesis in syntheses.values():
            inside = {m: a for m, a in synthesis.study.arrays.items() if m not in found}
            case = InMemory(self.study.id, inside, synthesis.study.grid.affine)
            found |= strangeness(model, case, pick_device(self.device)) if inside else {}
        for modality, value in found.items():
            if value > LIMIT:
                self.result.warnings.append(
                    Problem(
                        "unlike the images that the model was trained on: its synthesis was never checked on such",
                        self.study.id,
                        modality,
                        found=f"{value:.1f} times the farthest training image's distance to its nearest other",
                        expected=f"at most {LIMIT}",
                        remedy="Look at the image and at the synthesis before using it.",
                        fatal=False,
                    )
                )
        return found

    def write(self, target: str, synthesis: Synthesis, strange: Mapping[str, float]) -> None:
        """The synthesis and, where it is known, its uncertainty, each with its side-car."""
        car = side_car(synthesis, self.provenance, self.hashes)
        if strange:
            car["distance_from_training"] = {m: round(strange[m], 3) for m in synthesis.sources if m in strange}
        if synthesis.uncertainty is not None:
            name = f"{target}_uncertainty"
            car["uncertainty"] = self.trusted(synthesis, self.place(name).name)
            beside = {**self.mark("uncertainty", target), **car["uncertainty"]}
            self.write_marked(synthesis.uncertainty, name, beside, synthesis.sources)
        self.write_marked(synthesis.volume, target, car, synthesis.sources)

    def place(self, name: str) -> Path:
        """The file, or the folder of DICOM files, of an image."""
        return self.out / f"{self.study.id}_{name}{'.nii.gz' if self.format == 'nifti' else ''}"

    def trusted(self, synthesis: Synthesis, file: str) -> dict[str, Any]:
        """What the side-car says of the intervals."""
        from medmae.synthesis.trust import LEVEL

        known = self.model.metadata["calibration"]
        assert synthesis.half_width is not None
        seen = synthesis.half_width[synthesis.foreground]
        return {
            "file": file,
            "level": LEVEL,
            "meaning": "half the width of the interval around the synthesis that holds the truth at this level",
            "median_half_width_sd": float(np.median(seen)) if seen.size else None,
            "calibrated_on_subjects": known["studies"],
            "coverage_of_subjects_left_out": (known["coverage"] or {}).get(str(LEVEL)),
        }

    def write_page(
        self,
        volumes: Mapping[str, Volume],
        syntheses: Mapping[str, Synthesis],
        strange: Mapping[str, float],
        heat: Mapping[str, Volume],
    ) -> None:
        """The page of the study."""
        from medmae.synthesis.familiar import LIMIT
        from medmae.synthesis.report import write_report
        from medmae.synthesis.report_cohort import page_name

        page = self.out / page_name(self.study.id)
        write_report(
            page,
            self.study.id,
            volumes,
            syntheses,
            self.provenance,
            self.model.plan.image.intensity,
            self.hashes,
            uncertainty={t: s.uncertainty for t, s in syntheses.items() if s.uncertainty is not None},
            anomaly=heat,
            warnings=[
                f"{modality} is unlike the images that the model was trained on ({value:.1f} times the farthest of "
                "them): its synthesis was never checked on such."
                for modality, value in strange.items()
                if value > LIMIT
            ],
        )
        self.result.reports.append(page)

    def write_anomaly(self, volumes: Mapping[str, Volume]) -> dict[str, Volume]:
        """The heat map, on the grid of the first modality; {modality: map} for the page."""
        from medmae.synthesis.anomaly import anomaly_of

        found, sources = anomaly_of(self.model, volumes, self.device, self.precision)
        car = {
            **self.mark("anomaly", None),
            "meaning": "root mean square over the modalities of image minus expectation; 1 is typical of this study",
            "sources": {m: {"sha256": self.hashes[m]} for m in sources},
        }
        self.write_marked(found, "anomaly", car, sources)
        return dict.fromkeys(sources, found)

    def mark(self, kind: str, target: str | None) -> dict[str, Any]:
        """What every side-car says of a map."""
        return {
            "synthetic": True,
            "kind": kind,
            **({"target": target} if target else {}),
            "warning": "Computed by a model, not acquired. Not for diagnosis.",
            "checkpoint": self.provenance["checkpoint"],
            "version": self.provenance["version"],
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def write_marked(self, volume: Volume, name: str, car: Mapping[str, Any], sources: Sequence[str]) -> None:
        """The side-car first: no image that a model made ever lies there without its mark."""
        path = self.place(name)
        series = series_of(self.study.images, sources, self.study.id) if self.format == "dicom" else {}
        write_text(path.with_name(f"{path.name.removesuffix('.nii.gz')}.json"), json.dumps(car, indent=2) + "\n")
        if series:
            self.series += 1
            export_synthesis(
                volume,
                series,
                sources[0],
                path,
                target=name.replace("_", "-"),
                version=medmae.__version__,
                checkpoint=self.provenance["checkpoint"]["hash"] or "unknown",
                number=self.series,
            )
        else:
            with explained(path):
                write_nifti(volume, path)
        self.result.written.append(path)


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
            "refined": synthesis.refined,
        },
    }


def provenance_of(model: Synthesiser, checkpoint: str | Path | Synthesiser) -> dict[str, Any]:
    """Version and checkpoint (hash of the weights, plan, method) as side-cars and reports tell them."""
    known = model.metadata.get("weights_sha256")
    if known is None and isinstance(checkpoint, str | Path) and Path(checkpoint).is_file():
        known = file_hash(Path(checkpoint))
    plan = model.plan
    told = {"hash": known, "plan": plan.name, "plan_hash": plan.hash(), "method": plan.method}
    if "refiner" in model.metadata:
        told["refiner_hash"] = model.metadata["refiner"]["sha256"]
    return {"version": f"medmae {medmae.__version__}", "checkpoint": told}


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
