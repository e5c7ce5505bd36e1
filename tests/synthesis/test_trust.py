"""Intervals hold the truth as often as they say, also for subjects that took no part."""

from __future__ import annotations

import json

import numpy as np
import pytest

from medmae.synthesis.trust import LEVELS, Calibration, Errors, calibrate


def laplace(seed: int, subjects: int = 6, voxels: int = 30_000, wrong: float = 1.0) -> Errors:
    """Errors whose scale is ``wrong`` times a known function of the doubt."""
    errors, rng = Errors(), np.random.default_rng(seed)
    for subject in range(subjects):
        for inputs in (1, 2):
            doubt = rng.uniform(0.1, 2.0, voxels)
            scale = wrong * (0.2 + doubt) / inputs
            errors.add(f"s{subject}", "flair", inputs, doubt, np.abs(rng.laplace(0, scale)))
    return errors


@pytest.mark.parametrize("level", LEVELS)
def test_widths_are_the_quantiles_of_the_errors(level: float) -> None:
    found = calibrate(laplace(0))
    for inputs in (1, 2):
        at = np.array([0.5, 1.0, 1.5])
        width = found.half_width(at, "flair", inputs, level)
        expected = -np.log(1 - level) * (0.2 + at) / inputs  # of |Laplace(0, b)|: -b log(1 - level)
        assert width == pytest.approx(expected, rel=0.08)


def test_new_subjects_are_covered_as_often_as_is_said() -> None:
    found = calibrate(laplace(1))
    assert found.coverage is not None
    for level in LEVELS:
        assert found.coverage[str(level)] == pytest.approx(level, abs=0.01)
    new = laplace(2, subjects=1)
    for (target, inputs), rows in new.pairs.items():
        doubt, error = rows[0][1]
        width = found.half_width(doubt, target, inputs)
        assert width is not None and (error <= width).mean() == pytest.approx(0.9, abs=0.01)


def test_subjects_unlike_one_another_show_in_the_coverage_of_those_left_out() -> None:
    errors, rng = Errors(), np.random.default_rng(0)
    for subject, scale in enumerate((0.5, 0.5, 0.5, 3.0)):
        doubt = rng.uniform(0, 1, 5000)
        errors.add(f"s{subject}", "t2", 1, doubt, np.abs(rng.laplace(0, scale, 5000)))
    found = calibrate(errors)
    assert found.coverage is not None and found.coverage["0.9"] < 0.86


def test_more_doubt_never_narrows_an_interval() -> None:
    errors, rng = Errors(), np.random.default_rng(0)
    doubt = rng.uniform(0, 1, 4000)
    errors.add("s", "t2", 1, doubt, np.abs(rng.normal(0, 1 - 0.5 * doubt)))  # the doubt points the wrong way
    width = calibrate(errors).half_width(np.linspace(-1, 2, 50), "t2", 1)
    assert width is not None and (np.diff(width) >= 0).all()


def test_few_voxels_share_a_curve_and_an_unknown_target_has_none() -> None:
    errors = laplace(0)
    rng = np.random.default_rng(3)
    errors.add("s0", "flair", 3, rng.uniform(size=50), rng.uniform(size=50))
    found = Calibration.from_json(json.loads(json.dumps(calibrate(errors).to_json())))
    at = np.array([1.0])
    assert "flair/3" not in found.curves
    pooled = found.curves["flair"]
    assert found.half_width(at, "flair", 3) == pytest.approx(np.interp(at, pooled["doubt"], pooled["0.9"]))
    assert found.half_width(at, "t1", 1) is None


def test_one_subject_gives_no_coverage() -> None:
    assert calibrate(laplace(0, subjects=1)).coverage is None
