"""One HTML page a study: inputs, synthesis and, where they are known, truth, difference and uncertainty.

The page needs nothing but itself: images and viewer are embedded, its policy forbids any request. It shows the study's
name as the user wrote it, modalities and hashes; nothing from a header.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medmae.imaging.geometry import resample
from medmae.imaging.intensity import normalise
from medmae.imaging.registration import Coregistered
from medmae.imaging.volume import Grid, Volume
from medmae.plan import Intensity
from medmae.synthesis.layers import Layer, difference, grey, heat, shown_grid
from medmae.synthesis.metrics import Score, Truth
from medmae.synthesis.report_page import Panel, StudyPage, write_page
from medmae.synthesis.volumes import Synthesis

FILE_UNIT, NORMALISED = "units of the file", "sd"


@dataclass(frozen=True, eq=False)
class Target:
    """A synthesis as it is shown: arrays (X, Y, Z) on the shown grid, all in ``unit``. ``inside``: where the
    synthesis is no background. ``score``: against the truth."""

    name: str
    sources: tuple[str, ...]
    made: np.ndarray
    inside: np.ndarray
    unit: str
    truth: np.ndarray | None = None
    uncertainty: np.ndarray | None = None
    score: Score | None = None


def write_report(
    path: Path,
    name: str,
    volumes: Mapping[str, Volume],
    syntheses: Mapping[str, Synthesis],
    provenance: Mapping[str, Any],
    intensity: Intensity,
    hashes: Mapping[str, str],
    *,
    uncertainty: Mapping[str, Volume] | None = None,
    truth: Mapping[str, Volume] | None = None,
    anomaly: Mapping[str, Volume] | None = None,
    warnings: Sequence[str] = (),
    registered: Coregistered | None = None,
) -> StudyPage:
    """Write the page of one study to ``path``.

    ``volumes``: what was acquired, {modality: Volume}. ``syntheses``: what
    :func:`medmae.synthesis.volumes.reconstruct_volumes` gave for it. ``intensity``: the plan's, by which truth and
    synthesis become comparable. ``hashes``: of the sources' bytes, {modality: SHA-256}.

    Optional, each on any grid of the same frame: ``truth`` {target: Volume} that was acquired (default: the target
    among ``volumes``), shown with the difference and scored; ``uncertainty`` {target: Volume} in the units of the
    target's ``Synthesis.volume``, 0 where nothing is said; ``anomaly`` {modality: Volume} of modalities among
    ``volumes``, 0 (normal) and up. ``warnings``: sentences shown above everything else, such as that the study is
    unlike the training cohort. ``registered``: how the volumes were brought to one another, if they were. Returns what
    was written, with the scores of the targets that have a truth.
    """
    truths = {t: v for t, v in {**volumes, **(truth or {})}.items() if t in syntheses}
    grid = shown_grid(next(iter(volumes.values())))
    inputs = {m: v for m, v in volumes.items() if any(m in s.sources for s in syntheses.values())}
    targets = [
        _target(synthesis, truths.get(t), (uncertainty or {}).get(t), grid, intensity)
        for t, synthesis in syntheses.items()
    ]
    shown = {m: resample(v, grid).array for m, v in inputs.items()}
    maps = {m: resample(v, grid).array for m, v in (anomaly or {}).items()}
    panels = panels_of(shown, FILE_UNIT, targets, maps, intensity.has_background)
    return write_page(path, name, panels, targets, grid, _facts(syntheses, provenance, hashes, registered), warnings)


def compare(synthesis: Synthesis, truth: Volume, intensity: Intensity) -> Score:
    """PSNR, SSIM and MAE in the model's space, as :func:`medmae.evaluate_synthesis` takes them, in the foreground."""
    array, _ = normalise(resample(truth, synthesis.study.grid).array, intensity)
    (score,) = Truth(array, synthesis.foreground).scores(synthesis.array)
    assert score is not None  # the foreground is not empty: it is that of the inputs
    return score


def normalised_unit(intensity: Intensity) -> str:
    """The unit of the model's intensities, in a word."""
    return NORMALISED if intensity.scheme.startswith("zscore") else "normalised"


def panels_of(
    inputs: Mapping[str, np.ndarray],
    unit: str,
    targets: Iterable[Target],
    anomaly: Mapping[str, np.ndarray],
    background: bool,
) -> list[Panel]:
    """What stands side by side: every input (in ``unit``), every synthesis and, where it is not among the inputs, its
    truth. ``anomaly``: maps over the inputs. ``background``: whether 0 means background in what was acquired."""
    panels = []
    for modality, values in inputs.items():
        label = modality.upper()
        layers: tuple[Layer, ...] = ()
        if modality in anomaly:
            layers = (heat("anomaly", f"{label} anomaly", "0 is as expected", "", anomaly[modality]),)
        panels.append(
            Panel(
                grey(label, "acquired, input", unit, values, inside=_inside(values, background)), label, overlays=layers
            )
        )
    for target in targets:
        panels += _target_panels(target, target.name in inputs, background)
    return panels


def _inside(values: np.ndarray, background: bool) -> np.ndarray:
    return values != 0 if background else np.ones(values.shape, bool)


def _target_panels(target: Target, shown: bool, background: bool) -> list[Panel]:
    name, note = target.name.upper(), "from " + " + ".join(m.upper() for m in target.sources)
    group, overlays, actual = f"{name} synthetic", [], None
    made = grey(group, note, target.unit, target.made, inside=target.inside, like=target.truth, synthetic=True)
    if target.truth is not None:
        told = "acquired, input of others" if shown else "acquired, not an input"
        inside = _inside(target.truth, background)
        actual = grey(f"{name} truth", told, target.unit, target.truth, inside=inside, like=target.truth)
        residual = target.made - target.truth
        overlays.append(difference(f"{name} difference", "synthetic minus truth", target.unit, residual, target.inside))
    if target.uncertainty is not None:
        overlays.append(
            heat("uncertainty", f"{name} uncertainty", "higher is less sure", target.unit, target.uncertainty)
        )
    panels = [Panel(made, group, truth=actual, overlays=tuple(overlays))]
    if actual is not None and not shown:
        panels.append(Panel(actual, group, overlays=tuple(overlays)))
    return panels


def _target(
    synthesis: Synthesis, truth: Volume | None, uncertainty: Volume | None, grid: Grid, intensity: Intensity
) -> Target:
    made = resample(synthesis.volume, grid).array
    known = _inside(synthesis.volume.array, intensity.has_background)
    inside = resample(synthesis.volume.with_array(known), grid).array
    spread = None if uncertainty is None else resample(uncertainty, grid).array
    name, sources = synthesis.target, synthesis.sources
    if truth is None:
        unit = NORMALISED if synthesis.units == "zscore" else FILE_UNIT
        return Target(name, sources, made, inside, unit, uncertainty=spread)
    # Both normalised, each as the plan has it: the patient's scanner need not have the training cohort's units.
    actual, _ = normalise(resample(truth, grid).array, intensity)
    if synthesis.mean is not None and synthesis.std is not None:
        made = (made - synthesis.mean) / synthesis.std
        spread = None if spread is None else spread / synthesis.std
    made = np.where(inside, made, 0)
    score = compare(synthesis, truth, intensity)
    return Target(name, sources, made, inside, normalised_unit(intensity), actual, spread, score)


def _facts(
    syntheses: Mapping[str, Synthesis],
    provenance: Mapping[str, Any],
    hashes: Mapping[str, str],
    registered: Coregistered | None = None,
) -> dict[str, str]:
    first = next(iter(syntheses.values()))
    used = dict.fromkeys(m for s in syntheses.values() for m in s.sources)
    return {
        **model_facts(provenance),
        **{f"{m.upper()} file": f"sha256 {hashes[m]}" for m in used if m in hashes},
        **{f"{m.upper()} place": str(found) for m, found in (registered.registrations if registered else {}).items()},
        "windows": f"{first.windows} of {' x '.join(map(str, first.window))} voxels, "
        f"{len(first.shifts)} placements of the patch grid",
        **{f"{t.upper()} intensities": s.units for t, s in syntheses.items()},
    }


def model_facts(provenance: Mapping[str, Any]) -> dict[str, str]:
    """Version and checkpoint, of :func:`medmae.synthesis.marking.provenance_of`, as the page tells them."""
    checkpoint = provenance["checkpoint"]
    return {
        "made by": str(provenance["version"]),
        "checkpoint": f"{checkpoint['method']}, plan {checkpoint['plan']}, weights {checkpoint['hash'] or 'unknown'}",
    }


__all__ = ["Layer", "Panel", "StudyPage", "Target", "compare", "panels_of", "shown_grid", "write_report"]
