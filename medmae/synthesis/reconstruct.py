"""Studies in, synthesised modalities out: NIfTI files on the patient's own grid, marked as synthetic.

Nothing from a header and no path reaches the side-cars: sources are named by modality and by the hash of their bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import medmae
from medmae.cohort.modalities import canonical_modality
from medmae.errors import InputError, MedmaeError, Problem
from medmae.files import explained
from medmae.synthesis.collecting import collect
from medmae.synthesis.marking import provenance_of
from medmae.synthesis.one_study import Place, Reconstructed, Work
from medmae.synthesis.volumes import Synthesis, check_targets, pick_device, reconstruct_volumes
from medmae.synthesis.windows import Synthesiser

__all__ = ["Reconstructed", "Synthesis", "reconstruct", "reconstruct_volumes"]
log = logging.getLogger(__name__)

FORMATS = ("nifti", "dicom")


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
    have the affine and the shape of the ``reference``, an image of the study (default: the first in the model's order
    of those it was synthesised from). ``coregister`` registers the images to the reference (default: the study's first
    in the model's order) before, see :func:`medmae.coregister`. Files that exist are replaced.

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
    place = Place(coregister, canonical_modality(reference) or reference if reference else None)
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
                *(study, model, out, targets, place, provenance, format, report, uncertainty, anomaly),
                *(device, precision, result),
            ).do()
        except MedmaeError as error:
            result.failed += [
                replace(problem, where=f"{study.id}: {problem.where}" if problem.where else study.id)
                for problem in error.problems
            ]
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


def _write_index(out: Path, result: Reconstructed) -> None:
    """The cohort's page, when this call wrote a study's page and the folder holds several."""
    if result.reports:
        from medmae.synthesis.report_cohort import write_index

        index = write_index(out)
        result.reports += [] if index is None else [index]
