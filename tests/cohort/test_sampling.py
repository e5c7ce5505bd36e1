"""Subjects are held back whole, the same ones every time."""

from __future__ import annotations

from pathlib import Path

import pytest

from medmae.cohort.sampling import split_subjects
from medmae.cohort.study import Study


def cohort(subjects: int, sessions: int = 2) -> list[Study]:
    return [Study(f"p{s}_{v}", f"p{s}", {"t1": Path("t1")}) for s in range(subjects) for v in range(sessions)]


def test_no_subject_is_on_both_sides_and_none_is_lost() -> None:
    studies = cohort(40)
    training, validation = split_subjects(studies, 0.2, seed=3)
    assert {s.subject for s in training} & {s.subject for s in validation} == set()
    assert sorted(s.id for s in training + validation) == sorted(s.id for s in studies)
    assert len({s.subject for s in validation}) == 8


def test_the_split_depends_on_the_seed_and_not_on_the_order() -> None:
    studies = cohort(40)
    held_back = {s.id for s in split_subjects(studies, 0.2, seed=3)[1]}
    assert {s.id for s in split_subjects(studies[::-1], 0.2, seed=3)[1]} == held_back
    assert {s.id for s in split_subjects(studies, 0.2, seed=4)[1]} != held_back


@pytest.mark.parametrize(
    ("subjects", "share", "expected"),
    [(3, 0.01, 1), (2, 0.01, 0), (2, 0.5, 1), (1, 0.9, 0), (3, 0.99, 2), (10, 0.0, 0), (0, 0.1, 0)],
)
def test_small_cohorts_hold_back_one_of_three_and_never_all(subjects: int, share: float, expected: int) -> None:
    assert len({s.subject for s in split_subjects(cohort(subjects), share, seed=0)[1]}) == expected


def test_subjects_that_are_added_leave_most_of_the_others_where_they_are() -> None:
    before = {s.subject for s in split_subjects(cohort(100), 0.1, seed=0)[1]}
    after = {s.subject for s in split_subjects(cohort(110), 0.1, seed=0)[1]}
    assert len(before & after) >= 7
