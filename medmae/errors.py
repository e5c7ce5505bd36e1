"""Errors a user can act on: every one says what is wrong, where, and what to do about it.

The command line prints them without a traceback and exits with 2 (nothing could be done) or 1 (some cases
failed); Python callers catch :class:`MedmaeError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True)
class Problem:
    """One thing wrong with one study, file or setting.

    ``where`` is a path or a study id, ``field`` the header field, plan key or table column, ``remedy`` one
    sentence a user can act on. ``fatal`` is False for warnings, which leave the study usable.
    """

    what: str
    where: str | None = None
    field: str | None = None
    found: str | None = None
    expected: str | None = None
    remedy: str | None = None
    fatal: bool = True

    def __str__(self) -> str:
        head = ": ".join(str(part) for part in (self.where, self.field, self.what) if part)
        facts = ", ".join(
            f"{label} {value}" for label, value in (("found", self.found), ("expected", self.expected)) if value
        )
        return head + (f" ({facts})" if facts else "") + (f". {self.remedy}" if self.remedy else "")


class MedmaeError(Exception):
    """Something the user can mend. ``problems`` lists everything that was found, not only the first."""

    def __init__(
        self,
        what: str,
        *,
        where: str | Path | None = None,
        field: str | None = None,
        found: object = None,
        expected: object = None,
        remedy: str | None = None,
        problems: Iterable[Problem] = (),
    ) -> None:
        self.problem = Problem(
            what,
            str(where) if where is not None else None,
            field,
            None if found is None else str(found),
            None if expected is None else str(expected),
            remedy,
        )
        self.problems = list(problems) or [self.problem]
        super().__init__(str(self.problem))

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> Self:
        """The error that several problems make: it says the first fatal one, and holds all."""
        first = next((problem for problem in problems if problem.fatal), problems[0])
        facts = {name: value for name, value in vars(first).items() if name not in ("what", "fatal")}
        return cls(first.what, **facts, problems=problems)


class InputError(MedmaeError):
    """An image, table or folder that cannot be used as it is."""


class PlanError(MedmaeError):
    """A plan or an override that is not valid."""


class CheckpointError(MedmaeError):
    """A checkpoint that is missing, damaged, or of another architecture."""


class TrainingError(MedmaeError):
    """A training that had to stop; what was saved before stays usable."""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """A remedy sentence naming the closest candidates, or all of them when none is close."""
    known = sorted(set(candidates))
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(known)}."
