"""One study's synthesis, from files to files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import medmae
from medmae.cohort.study import Study
from medmae.errors import Problem
from medmae.files import explained, write_text
from medmae.imaging.dicom_out.exporting import export_synthesis, series_of
from medmae.imaging.nifti import write_nifti
from medmae.imaging.registration import Coregistered
from medmae.imaging.registration import coregister as register
from medmae.imaging.source import read_source, sha256
from medmae.imaging.volume import Volume
from medmae.synthesis.marking import mark, side_car
from medmae.synthesis.volumes import Synthesis, check_reference, pick_device, reconstruct_volumes
from medmae.synthesis.windows import Synthesiser


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


@dataclass(frozen=True)
class Place:
    """Whether images are registered to one another, and whose grid the results have."""

    coregister: bool
    reference: str | None


@dataclass
class Work:
    """One study's synthesis from files to files."""

    study: Study
    model: Synthesiser
    out: Path
    targets: Sequence[str]
    place: Place
    provenance: dict[str, Any]
    format: str
    report: bool
    uncertainty: bool
    anomaly: bool
    device: str
    precision: str | None
    result: Reconstructed
    registered: Coregistered | None = None
    series: int = 0  # DICOM series written so far

    def do(self) -> None:
        study, model = self.study, self.model
        volumes = self.read()
        reference = self.place.reference
        if self.place.coregister:
            self.registered = register(volumes, reference)
            volumes, reference = self.registered.volumes, self.registered.reference
        self.hashes = {m: sha256(study.images[m]) for m in volumes}
        targets = self.possible(volumes)
        lacking = [m for m in model.modalities if m not in volumes]
        syntheses: dict[str, Synthesis] = {}
        if targets or lacking or not self.anomaly:
            syntheses = reconstruct_volumes(
                model,
                volumes,
                targets,
                reference=reference,
                device=self.device,
                precision=self.precision,
                uncertainty=self.uncertainty,
            )
        strange = self.strange(syntheses)
        doubts = self.doubts(strange)
        self.result.warnings += doubts
        for target, synthesis in syntheses.items():
            self.write(target, synthesis, strange)
        heat = self.write_anomaly(volumes, reference) if self.anomaly else {}
        if self.report and syntheses:
            self.write_page(volumes, syntheses, doubts, heat)

    def read(self) -> dict[str, Volume]:
        """The images that the model knows, and the reference, in the model's order."""
        check_reference(self.place.reference, self.study.images)
        order = {m: n for n, m in enumerate(self.model.modalities)}
        used = [m for m in self.study.images if m in order or m == self.place.reference]
        used.sort(key=lambda m: order.get(m, len(order)))
        return {m: read_source(self.study.images[m], self.result.warnings) for m in used}

    def possible(self, volumes: Mapping[str, Volume]) -> list[str]:
        """The targets that there is something to synthesise from: one may be impossible without the others being."""
        alone = next(iter(volumes), None)
        if len(volumes) > 1 or len(self.targets) < 2 or alone not in self.targets:
            return list(self.targets)
        what = "nothing to synthesise this target from"
        self.result.failed.append(Problem(what, self.study.id, alone, found=f"only {alone}"))
        return [t for t in self.targets if t != alone]

    def strange(self, syntheses: Mapping[str, Synthesis]) -> dict[str, float]:
        """How unlike training each image is."""
        from medmae.models.base import MaskedAutoencoder
        from medmae.synthesis.familiar import InMemory, strangeness

        model = self.model
        found: dict[str, float] = {}
        if not self.uncertainty or not isinstance(model, MaskedAutoencoder) or "familiar" not in model.companions:
            return {}
        for synthesis in syntheses.values():
            inside = {m: a for m, a in synthesis.study.arrays.items() if m not in found}
            case = InMemory(self.study.id, inside, synthesis.study.grid.affine)
            found |= strangeness(model, case, pick_device(self.device)) if inside else {}
        return found

    def doubts(self, strange: Mapping[str, float]) -> list[Problem]:
        """A warning of each image that is too unlike training."""
        from medmae.synthesis.familiar import LIMIT

        return [
            Problem(
                "unlike the images that the model was trained on: its synthesis was never checked on such",
                self.study.id,
                modality,
                found=f"{value:.1f} times the farthest training image's distance to its nearest other",
                expected=f"at most {LIMIT}",
                remedy="Look at the image and at the synthesis before using it.",
                fatal=False,
            )
            for modality, value in strange.items()
            if value > LIMIT
        ]

    def write(self, target: str, synthesis: Synthesis, strange: Mapping[str, float]) -> None:
        """The synthesis and, where it is known, its uncertainty, each with its side-car."""
        car = side_car(synthesis, self.provenance, self.hashes, self.registered)
        if strange:
            car["distance_from_training"] = {m: round(strange[m], 3) for m in synthesis.sources if m in strange}
        if synthesis.uncertainty is not None:
            name = f"{target}_uncertainty"
            car["uncertainty"] = self.trusted(synthesis, self.file(name).name)
            beside = {**mark("uncertainty", target, self.provenance), **car["uncertainty"]}
            self.write_marked(synthesis.uncertainty, name, beside, synthesis.sources, synthesis.like)
        self.write_marked(synthesis.volume, target, car, synthesis.sources, synthesis.like)

    def file(self, name: str) -> Path:
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
        doubts: Sequence[Problem],
        heat: Mapping[str, Volume],
    ) -> None:
        """The page of the study."""
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
            registered=self.registered,
            warnings=[f"{p.field}: {p.what} ({p.found})." for p in doubts],
        )
        self.result.reports.append(page)

    def write_anomaly(self, volumes: Mapping[str, Volume], reference: str | None) -> dict[str, Volume]:
        """The heat map, on the grid of the reference or the first modality; {modality: map} for the page."""
        from medmae.synthesis.anomaly import anomaly_of

        like = reference or next(m for m in self.model.modalities if m in volumes)
        found, sources = anomaly_of(self.model, volumes, like, self.device, self.precision)
        car = {
            **mark("anomaly", None, self.provenance),
            "meaning": "root mean square over the modalities of image minus expectation; 1 is typical of this study",
            "sources": {m: {"sha256": self.hashes[m]} for m in sources},
        }
        self.write_marked(found, "anomaly", car, sources, like)
        return dict.fromkeys(sources, found)

    def write_marked(
        self, volume: Volume, name: str, car: Mapping[str, Any], sources: Sequence[str], like: str
    ) -> None:
        """The side-car first: no image that a model made ever lies there without its mark."""
        path = self.file(name)
        wanted = dict.fromkeys((*sources, like))
        series = series_of(self.study.images, list(wanted), self.study.id) if self.format == "dicom" else {}
        write_text(path.with_name(f"{path.name.removesuffix('.nii.gz')}.json"), json.dumps(car, indent=2) + "\n")
        if series:
            self.series += 1
            export_synthesis(
                volume,
                series,
                like,
                path,
                sources=sources,
                target=name.replace("_", "-"),
                version=medmae.__version__,
                checkpoint=self.provenance["checkpoint"]["hash"] or "unknown",
                number=self.series,
            )
        else:
            with explained(path):
                write_nifti(volume, path)
        self.result.written.append(path)
