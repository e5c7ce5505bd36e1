"""95 % intervals by resampling subjects (Efron 1979): sessions of one subject stay together."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 500


def intervals(
    measure: Callable[[np.ndarray], dict[str, float]], subjects: Sequence[str], seed: int
) -> dict[str, tuple[float, float]]:
    """{metric: (low, high)} of ``measure``, which takes the rows of a resample; ``subjects`` names each row's.

    A resample for which a metric is not defined (a class is missing) does not count; NaN where none is left.
    """
    rng, who = np.random.default_rng(seed), np.array(subjects)
    rows_of = [np.flatnonzero(who == s) for s in dict.fromkeys(subjects)]
    found: dict[str, list[float]] = {}
    for _ in range(RESAMPLES):
        rows = np.concatenate([rows_of[i] for i in rng.integers(len(rows_of), size=len(rows_of))])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                values = measure(rows)
        except ValueError:
            continue
        for name, value in values.items():
            found.setdefault(name, [])
            if math.isfinite(value):
                found[name].append(value)
    nothing = (float("nan"), float("nan"))
    return {
        name: (float(np.percentile(v, 2.5)), float(np.percentile(v, 97.5))) if v else nothing
        for name, v in found.items()
    }
