"""Which studies are learnt from and which are held back: by subject, so that no person is on both sides."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np


class HasSubject(Protocol):
    """A study or a prepared study."""

    @property
    def subject(self) -> str: ...


AnyStudy = TypeVar("AnyStudy", bound=HasSubject)


def split_subjects(studies: Sequence[AnyStudy], share: float, seed: int) -> tuple[list[AnyStudy], list[AnyStudy]]:
    """(training, validation) studies, both in the order given.

    Round(``share`` x subjects) subjects are held back with all their sessions: at least one when there are three or
    more and ``share`` > 0, and never all. Which ones depends on the subjects' names and ``seed`` alone, through a hash,
    so the order of the studies does not matter and subjects that are added later move few others.
    """
    subjects = sorted(
        {study.subject for study in studies}, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest()
    )
    count = round(share * len(subjects))
    if share > 0 and len(subjects) >= 3:
        count = max(count, 1)
    held_back = set(subjects[: min(count, max(0, len(subjects) - 1))])
    return (
        [study for study in studies if study.subject not in held_back],
        [study for study in studies if study.subject in held_back],
    )


def stratified_folds(
    strata: np.ndarray, subjects: Sequence[str], folds: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """(training, held-out) rows of each fold: every subject is held out once, ``strata`` (n,) are spread evenly.

    Fewer folds than asked for where a stratum has fewer subjects; None where one has a single subject.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    who = np.array(subjects)
    count = min([folds, *(len(set(who[strata == s])) for s in set(strata))])
    if count < 2:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of strata with fewer studies than folds; subjects are counted
        return list(StratifiedGroupKFold(count, shuffle=True, random_state=seed).split(strata, strata, who))
