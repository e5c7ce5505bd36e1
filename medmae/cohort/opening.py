"""Data for a model: a prepared cohort as it is, or scans prepared into the model's space while they are needed."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

from medmae.cohort.prepared import Cohort, is_cohort
from medmae.cohort.store import prepare
from medmae.errors import InputError, Problem
from medmae.plan import Plan


def open_data(data: Path, plan: Plan, stack: ExitStack, problems: list[Problem]) -> Cohort:
    """``data`` as a cohort in the plan's space; a layout of scans is prepared in a folder that ``stack`` removes, and
    what could not be goes to ``problems``.

    Raises :class:`InputError` for a cohort that was prepared for another space.
    """
    if is_cohort(data):
        cohort = Cohort.open(data)
        if cohort.image != plan.image.model_copy(update={"crop": cohort.image.crop}):
            raise InputError(
                "this cohort was prepared for another space than the model's",
                where=data,
                field="image",
                found=cohort.image.model_dump(mode="json"),
                expected=plan.image.model_dump(mode="json"),
                remedy="Give the scans themselves, or prepare them with the checkpoint's plan.",
            )
        return cohort
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="medmae-")))
    prepared = prepare(data, plan, folder / "cohort")
    problems += prepared.failed
    return Cohort.open(prepared.cohort_path)
