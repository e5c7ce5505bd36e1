"""How far a synthesis can be trusted: intervals that hold the truth as often as they say.

A model's doubt (:mod:`medmae.synthesis.predicting`) orders voxels from sure to unsure, in no unit. On studies that were
not trained on it is compared with the error that was made: among voxels of like doubt, nine in ten errors are smaller
than some width, and that is the half-width of the 90 % interval of such voxels. Doubt that grows never narrows an
interval (isotonic regression, Barlow et al. 1972). One curve a target and number of modalities given.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

LEVELS = (0.5, 0.8, 0.9, 0.95)
LEVEL = 0.9  # of the interval that is written
_BINS = 24
_SAMPLE = 20_000  # voxels of a study that take part
_FEWEST = 2_000  # voxels below which a curve is shared with the other numbers of modalities


@dataclass
class Calibration:
    """``curves`` {"target/number of inputs": {"doubt": [...], "0.9": half-widths, ...}}, in standard deviations of the
    normalised images; "target" alone pools all numbers. ``coverage``: {level: share of voxels of studies left out in
    turn whose truth lay within}; None for fewer than two subjects. ``studies``: how many."""

    curves: dict[str, dict[str, list[float]]]
    coverage: dict[str, float] | None
    studies: int

    def half_width(self, doubt: np.ndarray, target: str, inputs: int, level: float = LEVEL) -> np.ndarray | None:
        """Of the interval around the synthesis, for each voxel; None for a target that was never calibrated."""
        curve = self.curves.get(f"{target}/{inputs}") or self.curves.get(target)
        if curve is None:
            return None
        width: np.ndarray = np.interp(doubt, curve["doubt"], curve[str(level)]).astype(np.float32)
        return width

    def to_json(self) -> dict[str, Any]:
        return {"levels": list(LEVELS), **vars(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Calibration:
        return cls(dict(data["curves"]), data["coverage"], int(data["studies"]))


@dataclass
class Errors:
    """Doubts and errors of brain voxels, gathered study by study."""

    pairs: dict[tuple[str, int], list[tuple[str, np.ndarray]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, subject: str, target: str, inputs: int, doubt: np.ndarray, error: np.ndarray) -> None:
        """``doubt`` and absolute ``error`` (n,) of a study's brain voxels; evenly thinned to ``_SAMPLE``."""
        step = max(1, len(error) // _SAMPLE)
        self.pairs[target, inputs].append((subject, np.stack([doubt[::step], error[::step]])))

    def subjects(self) -> list[str]:
        return sorted({subject for rows in self.pairs.values() for subject, _ in rows})

    def without(self, subject: str) -> Errors:
        kept = Errors()
        for key, rows in self.pairs.items():
            kept.pairs[key] = [row for row in rows if row[0] != subject]
        return kept


def calibrate(errors: Errors) -> Calibration:
    """Curves from all studies, and the coverage that leaving out each subject in turn gives."""
    subjects = errors.subjects()
    return Calibration(curves_of(errors), left_out(errors, subjects) if len(subjects) > 1 else None, len(subjects))


def curves_of(errors: Errors) -> dict[str, dict[str, list[float]]]:
    pooled: dict[str, list[np.ndarray]] = defaultdict(list)
    curves = {}
    for (target, inputs), rows in errors.pairs.items():
        arrays = [pair for _, pair in rows]
        pooled[target] += arrays
        if sum(a.shape[1] for a in arrays) >= _FEWEST:
            curves[f"{target}/{inputs}"] = curve_of(arrays)
    return {**curves, **{target: curve_of(arrays) for target, arrays in pooled.items() if arrays}}


def curve_of(pairs: Sequence[np.ndarray]) -> dict[str, list[float]]:
    """Knots of half-width against doubt, for every level; studies count alike, however large they are."""
    from sklearn.isotonic import IsotonicRegression

    doubt, error = np.concatenate(pairs, axis=1)
    weight = np.concatenate([np.full(p.shape[1], 1 / p.shape[1]) for p in pairs])
    order = np.argsort(doubt, kind="stable")
    doubt, error, weight = doubt[order], error[order], weight[order]
    share = (np.cumsum(weight) - weight / 2) / weight.sum()
    bins = np.minimum((share * _BINS).astype(int), _BINS - 1)
    knots: dict[str, list[float]] = {"doubt": [], **{str(level): [] for level in LEVELS}}
    for b in np.unique(bins):
        inside = bins == b
        knots["doubt"].append(float(np.average(doubt[inside], weights=weight[inside])))
        for level, value in zip(LEVELS, quantiles(error[inside], weight[inside]), strict=True):
            knots[str(level)].append(value)
    at = np.array(knots["doubt"])
    for level in LEVELS:
        rising = IsotonicRegression().fit_transform(at, np.array(knots[str(level)]))
        knots[str(level)] = [float(v) for v in rising]
    return knots


def quantiles(values: np.ndarray, weights: np.ndarray) -> list[float]:
    """Weighted quantiles of ``values`` at ``LEVELS``."""
    order = np.argsort(values)
    reached = np.cumsum(weights[order]) / weights.sum()
    at = np.minimum(np.searchsorted(reached, LEVELS), len(values) - 1)
    return [float(v) for v in values[order][at]]


def left_out(errors: Errors, subjects: Sequence[str]) -> dict[str, float]:
    """{level: share of the voxels within}, each subject under curves of the others, subjects counting alike."""
    held: dict[str, list[float]] = {str(level): [] for level in LEVELS}
    for subject in subjects:
        others = Calibration(curves_of(errors.without(subject)), None, 0)
        inside: dict[str, list[float]] = {str(level): [] for level in LEVELS}
        for (target, inputs), rows in errors.pairs.items():
            for name, (doubt, error) in rows:
                if name != subject:
                    continue
                for level in LEVELS:
                    width = others.half_width(doubt, target, inputs, level)
                    if width is not None:
                        inside[str(level)].append(float((error <= width).mean()))
        for key, shares in inside.items():
            if shares:
                held[key].append(float(np.mean(shares)))
    return {level: float(np.mean(shares)) for level, shares in held.items() if shares}
