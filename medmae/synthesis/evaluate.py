"""How good a synthesis is, on studies the model never saw: per target and per combination of inputs, beside the floors.

Everything is compared in the model's space, normalised (z-scored) intensities, so scores of different scanners and
modalities share a unit.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

import medmae
from medmae.cohort.modalities import canonical_modality
from medmae.cohort.opening import open_data
from medmae.cohort.prepared import Cohort, is_cohort
from medmae.errors import InputError, MedmaeError, Problem
from medmae.synthesis.downstream import evaluate_downstream
from medmae.synthesis.evaluate_pages import ScorePages
from medmae.synthesis.floors import Case, Floors, brain_of, fit_floors, foreground
from medmae.synthesis.marking import provenance_of
from medmae.synthesis.metrics import Truth, grid_energy_ratio
from medmae.synthesis.predicting import predict_study
from medmae.synthesis.scores import SynthesisScores
from medmae.synthesis.volumes import calibration_of, check_targets, pick_device
from medmae.synthesis.windows import Synthesiser

log = logging.getLogger(__name__)


def evaluate_synthesis(
    data: str | Path,
    checkpoint: str | Path | Synthesiser,
    out: str | Path,
    *,
    targets: Sequence[str] = (),
    training: str | Path | None = None,
    lesion_label: str | None = None,
    report: bool = False,
    segmenter: str | Path | None = None,
    device: str = "auto",
    on_progress: Callable[[int, int, str], None] | None = None,
) -> SynthesisScores:
    """Score every target from every combination of a study's other modalities.

    ``data``: held-out studies, a prepared cohort or any supported layout. ``targets`` default to all modalities of
    the model; a study is scored for those it has, from every non-empty subset of what else it has. Inside the brain
    (the label ``brainmask`` where there is one, else where any modality is not background), and inside the lesion
    mask where the study has the label (``lesion_label``, default ``seg``; all values but 0).

    Beside the model stand two floors fitted on ``training`` (a cohort or a layout; default: ``cohort`` in the run's
    folder): see :mod:`medmae.synthesis.floors`. Without it they are missing, and the result says how to get them.

    Writes ``scores.csv`` (a row a study, target, combination and predictor), ``summary.csv``, ``scores.json``,
    ``plot.png`` and ``index.html`` (the rows of the model, with pictures) to ``out``; with ``report`` also
    ``<study>.html``, every target from all the others beside the truth. ``segmenter``, the results folder of an nnU-Net
    model: also what it loses when its images are synthesised (:func:`medmae.synthesis.downstream.evaluate_downstream`).
    Raises :class:`MedmaeError` when nothing can be scored.
    """
    model = medmae.load(checkpoint) if isinstance(checkpoint, str | Path) else checkpoint
    targets = tuple(dict.fromkeys(canonical_modality(t) or t for t in targets))
    check_targets(model, targets)
    chosen = pick_device(device)
    if isinstance(model, torch.nn.Module):
        model.to(chosen).eval()
    scores = SynthesisScores(
        out=Path(out),
        model={"plan": model.plan.name, "method": model.plan.method, "hash": model.metadata.get("weights_sha256")},
        lesion_label=lesion_label or "seg",
    )
    pages = ScorePages(Path(out), provenance_of(model, checkpoint), model.plan.image.intensity, report)
    with ExitStack() as stack:
        cohort = open_data(Path(data), model.plan, stack, scores.problems)
        floors = _floors(training, checkpoint, model, cohort, stack, scores)
        total = len(cohort.studies)
        for done, study in enumerate(cohort.studies):
            if on_progress:
                on_progress(done, total, study.id)
            try:
                made: dict[str, np.ndarray] = {}
                rows = list(score_study(study, model, targets, floors, scores.lesion_label, chosen, made))
                scores.rows += rows
                if rows:
                    pages.add(study, made, rows)
            except (MedmaeError, OSError) as error:
                scores.problems.append(Problem("could not be scored", study.id, found=str(error)))
        if on_progress:
            on_progress(total, total, "")
    if not scores.rows:
        wanted = ", ".join(targets or model.modalities)
        raise InputError(
            "no study to score",
            where=data,
            expected=f"studies with one of {wanted} and another modality to synthesise it from",
            problems=scores.problems,
        )
    if segmenter is not None:
        scores.downstream = evaluate_downstream(
            data, model, segmenter, Path(out), label=scores.lesion_label, device=device, on_progress=on_progress
        )
        scores.problems += scores.downstream.problems
    scores.write()
    pages.write([str(problem) for problem in scores.problems if not problem.fatal])
    return scores


def _floors(
    training: str | Path | None,
    checkpoint: str | Path | Synthesiser,
    model: Synthesiser,
    held_out: Cohort,
    stack: ExitStack,
    scores: SynthesisScores,
) -> Floors | None:
    """Both floors, without the subjects that are scored; None, with the remedy noted, where nothing is known."""
    if training is None and isinstance(checkpoint, str | Path):
        beside = Path(checkpoint) / "cohort"
        training = beside if is_cohort(beside) else None
    if training is None:
        scores.floors = {
            "missing": "the studies trained on are not known",
            "remedy": "Name them with --training (the cohort, or the scans).",
        }
        return None
    cohort = open_data(Path(training), model.plan, stack, scores.problems)
    scored = {study.subject for study in held_out.studies}
    usable = [s for s in cohort.studies if s.subject not in scored and set(s.modalities) & set(model.modalities)]
    shared = len({s.subject for s in cohort.studies} & scored)
    if shared:
        scores.problems.append(
            Problem(
                f"{shared} of the scored subjects are among the training studies too",
                where=str(training),
                remedy="Their scores are not those of held-out studies. The floors were fitted without them.",
                fatal=False,
            )
        )
    if not usable:
        remedy = "Name others with --training."
        scores.floors = {"missing": "no training study but those that are scored", "remedy": remedy}
        return None
    floors = fit_floors(usable, model.modalities)
    scores.floors = {
        "training_studies": floors.studies,
        "mean_alignment": floors.template.alignment,
        "mean_alignment_errors": floors.alignment_errors,
    }
    return floors


def combinations(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Every non-empty subset, small ones first, in the given order."""
    for size in range(1, len(names) + 1):
        yield from itertools.combinations(names, size)


def score_study(
    study: Case,
    model: Synthesiser,
    targets: Sequence[str],
    floors: Floors | None,
    lesion_label: str,
    device: torch.device,
    pages: dict[str, np.ndarray] | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of ``scores.csv`` for one study; ``pages`` gets each target as the model has it from all the others."""
    names = [m for m in model.modalities if m in study.modalities]
    arrays = {m: study.array(m).astype(np.float32) for m in names}
    wanted = [m for m in (targets or names) if m in arrays]
    brain = brain_of(study, foreground(arrays))
    lesion = study.label(lesion_label) > 0 if lesion_label in study.labels else None
    truths = {m: Truth(arrays[m], brain) for m in wanted}
    zscored = model.plan.image.intensity.has_background
    trust = calibration_of(model)
    for inputs in combinations(names):
        asked = [t for t in wanted if t not in inputs]
        if not asked:
            continue
        shown = {m: arrays[m] for m in inputs}
        seen = foreground(shown)
        found = predict_study(
            model, shown, asked, foreground=seen if zscored else None, device=device, doubt=trust is not None
        )
        for target in asked:
            predictions = {"model": found.arrays[target]}
            if floors is not None:
                mean = floors.mean(target, seen, study.affine)
                linear = floors.regression.predict(shown, inputs, target)
                predictions |= {k: v for k, v in (("mean", mean), ("regression", linear)) if v is not None}
            for name, array in predictions.items():
                array = np.where(seen, array, 0) if zscored else array
                width = None
                if name == "model" and trust is not None and found.doubt is not None:
                    width = trust.half_width(found.doubt[target], target, len(inputs))
                if pages is not None and name == "model" and len(inputs) == len(names) - 1:
                    pages[target] = array
                yield {
                    "study": study.id,
                    "target": target,
                    "inputs": "+".join(inputs),
                    "predictor": name,
                    **_columns(truths[target], array, lesion),
                    **_trusted(arrays[target], array, width, brain & seen, lesion),
                    "grid": grid_energy_ratio(array, model.grid_multiple, brain),
                    "grid_residual": grid_energy_ratio(array - arrays[target], model.grid_multiple, brain),
                }


def _trusted(
    truth: np.ndarray, prediction: np.ndarray, width: np.ndarray | None, brain: np.ndarray, lesion: np.ndarray | None
) -> dict[str, float | None]:
    """Share of the brain's voxels within the interval, and its mean half-width in the brain and in lesions; None
    without intervals."""
    found: dict[str, float | None] = {"coverage": None, "width": None, "lesion_width": None}
    if width is not None and brain.any():
        found["coverage"] = float((np.abs(truth - prediction) <= width)[brain].mean())
        found["width"] = float(width[brain].mean())
        inside = None if lesion is None else lesion & brain
        found["lesion_width"] = None if inside is None or not inside.any() else float(width[inside].mean())
    return found


def _columns(truth: Truth, prediction: np.ndarray, lesion: np.ndarray | None) -> dict[str, Any]:
    whole, inside = truth.scores(prediction, (None, np.zeros_like(prediction, bool) if lesion is None else lesion))
    columns: dict[str, Any] = {}
    for prefix, score in (("", whole), ("lesion_", inside)):
        for key in ("psnr", "ssim", "mae", "voxels"):
            columns[prefix + key] = None if score is None else getattr(score, key)
    return columns
