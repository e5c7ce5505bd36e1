"""``medmae prepare``: scans into a cohort that training reads fast.

The cohort is what DATA says now. A study whose files are unchanged (size and time of change; when only the time
differs, their content) is skipped; a new or changed one is prepared; one that is gone from DATA, or that has become
unusable, is no longer listed, but its prepared files stay until somebody deletes them. Every study is written beside
its place and renamed, so a run that is killed leaves whole studies only, and the next run continues. Changing the
plan's training crop changes nothing here; any other part of its ``image`` section needs a cohort of its own.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medmae.cohort.building import build
from medmae.cohort.claiming import locked, make_folder, refuse_other_content
from medmae.cohort.index import AGAIN, FORMAT, read_json, study_record, summary, to_text
from medmae.cohort.integrity import usable_cores
from medmae.cohort.layouts import Layout, find_studies
from medmae.cohort.naming import in_order
from medmae.cohort.prepared import Cohort, PreparedStudy, is_cohort
from medmae.cohort.sampling import split_subjects
from medmae.cohort.sources import Task, image_digest, is_current, refresh, wanted
from medmae.cohort.study import Study
from medmae.cohort.workers import in_processes, refuse_import_of_main
from medmae.errors import InputError, Problem
from medmae.files import write_text
from medmae.plan import Image, Plan

__all__ = ["Cohort", "Prepared", "PreparedStudy", "is_cohort", "prepare", "split_subjects"]

Progress = Callable[[int, int, str], object]


@dataclass(frozen=True)
class Prepared:
    """What :func:`prepare` did.

    ``done``, ``skipped`` (already there, unchanged): ids. ``failed``: what is wrong with the studies that could not be
    prepared (``failed_ids``). ``removed``: ids that are no longer listed because DATA does not have them any more.
    ``warnings``: what was left out or is suspicious in studies that can be used.
    """

    cohort_path: Path
    done: list[str]
    skipped: list[str]
    failed: list[Problem]
    failed_ids: list[str]
    removed: list[str]
    warnings: list[Problem]

    def to_json(self) -> dict[str, Any]:
        return {
            "cohort": str(self.cohort_path),
            "done": self.done,
            "skipped": self.skipped,
            "failed": [asdict(problem) for problem in self.failed],
            "failed_ids": self.failed_ids,
            "removed": self.removed,
            "warnings": [asdict(problem) for problem in self.warnings],
        }


def prepare(
    data: str | Path,
    plan: Plan | str | Path,
    out: str | Path,
    *,
    jobs: int | None = None,
    coregister: bool = False,
    on_progress: Progress | None = None,
) -> Prepared:
    """Bring the studies in ``data`` into the space of ``plan`` and write (or update) the cohort ``out``.

    ``jobs`` processes work at the same time (default: as many as pay off, at most one a core); with 1 everything
    happens in this one. ``coregister`` registers the images of each study to its first in canonical order (see
    :func:`medmae.coregister`), and labels move along; a study that was prepared the other way is prepared again.
    ``on_progress(done, total, study_id)`` is called after each study. A study that cannot be used
    is named in the result and does not stop the others. Raises :class:`InputError` when there is nothing to prepare,
    when ``out`` was prepared for another image space or is being written by another run, and
    :class:`medmae.errors.MedmaeError` when it cannot be written (full disk, no permission).
    """
    refuse_import_of_main()
    plan, out = Plan.load(plan), Path(out)
    layout = find_studies(data)
    studies, failed, warnings = for_plan(layout, plan)
    if not studies:
        raise InputError(
            f"no study has any of the modalities of the plan {plan.name}",
            where=data,
            field="modalities",
            found=" ".join(in_order(name for study in layout.studies for name in study.images)),
            expected=" ".join(plan.modalities),
            remedy="Plan for them with --set 'modalities=[...]', or rename the files.",
            problems=failed,
        )
    refuse_other_content(out, plan.image)
    make_folder(out / "studies")
    with locked(out):
        shutil.rmtree(out / ".building", ignore_errors=True)  # what a killed run was writing
        run = Run(out, plan.image, studies, on_progress)
        tasks = run.skip_unchanged(plan, layout.label_values, coregister)
        removed = run.begin()
        run.build_all(tasks, jobs)
        run.finish()
    left_out = [problem for problem in layout.problems if not problem.fatal]
    failed = [problem for problem in layout.problems if problem.fatal] + failed + run.failed
    return Prepared(
        out,
        run.done,
        run.skipped,
        failed,
        sorted({problem.where.split(": ")[0] for problem in failed if problem.where}),
        removed,
        left_out + warnings + run.warnings + told_removed(out, removed),
    )


def for_plan(layout: Layout, plan: Plan) -> tuple[list[Study], list[Problem], list[Problem]]:
    """The studies that have one of the plan's modalities; those that have none fail; what is left out is told."""
    studies, failed = [], []
    unknown: Counter[str] = Counter()
    for study in layout.studies:
        if set(study.images) & set(plan.modalities):
            unknown.update(set(study.images) - set(plan.modalities))
            studies.append(study)
        else:
            failed.append(
                Problem(
                    f"none of its modalities is in the plan {plan.name}",
                    study.id,
                    "modalities",
                    " ".join(study.images),
                    " ".join(plan.modalities),
                    "Plan for them with --set 'modalities=[...]', or rename the files.",
                )
            )
    warnings = [
        Problem(
            f"{count} studies have {name}, which the plan {plan.name} does not: left out of them",
            None,
            "modalities",
            remedy=f"Add {name} to the plan's modalities to use it.",
            fatal=False,
        )
        for name, count in sorted(unknown.items())
    ]
    return studies, failed, warnings


class Run:
    """One run of :func:`prepare` over a locked store: what is there, what is made, what fails."""

    def __init__(self, out: Path, image: Image, studies: list[Study], on_progress: Progress | None) -> None:
        self.out, self.image, self.studies = out, image, studies
        self.ids = [study.id for study in studies]
        self.on_progress = on_progress
        self.seen = 0
        self.records: dict[str, dict[str, Any]] = {}
        self.done: list[str] = []
        self.skipped: list[str] = []
        self.failed: list[Problem] = []
        self.warnings: list[Problem] = []
        self.before: dict[str, Any] = {}

    def skip_unchanged(self, plan: Plan, label_values: frozenset[int] | None, coregister: bool) -> list[Task]:
        """Find the studies that are prepared from the very files that are there now; the others are the work to do."""
        tasks = []
        for study in self.studies:
            record = study_record(self.out, study.id)
            task = Task(wanted(study, plan, record), self.image, self.out, label_values, coregister)
            if record is not None and is_current(record, task):
                refresh(record, task)
                self.records[study.id] = record
                self.skipped.append(study.id)
                self.tell(study.id)
            else:
                tasks.append(task)
        return tasks

    def begin(self) -> list[str]:
        """Say in ``cohort.json`` that the store is being worked on, if it is; the ids that it will no longer list."""
        if is_cohort(self.out):
            self.before = read_json(self.out / "cohort.json", AGAIN)
        listed = {entry["id"] for entry in self.before.get("studies", [])} | set(self.before.get("expected", []))
        if len(self.records) < len(self.ids) or not self.before:
            self.write(complete=False)
        return sorted(listed - set(self.ids))

    def build_all(self, tasks: list[Task], jobs: int | None) -> None:
        """Prepare what is left, here or in processes of their own."""
        jobs = jobs or min(usable_cores(), math.ceil(len(tasks) / 4))  # a process takes 2 s to start
        for built in map(build, tasks) if jobs <= 1 or len(tasks) <= 1 else in_processes(tasks, jobs):
            if built.stop:
                raise InputError(
                    built.problems[0].what,
                    where=self.out,
                    found=built.problems[0].found,
                    remedy=f"{built.problems[0].remedy or ''} {len(self.done)} studies were prepared and stay; "
                    "run the same command again to continue.".strip(),
                )
            fatal = [problem for problem in built.problems if problem.fatal]
            self.warnings += [problem for problem in built.problems if not problem.fatal]
            if built.record is None:
                self.failed += fatal or [Problem("this study cannot be prepared", built.id)]
            else:
                self.records[built.id] = built.record
                self.done.append(built.id)
            self.tell(built.id)

    def tell(self, study: str) -> None:
        self.seen += 1
        if self.on_progress is not None:
            self.on_progress(self.seen, len(self.ids), study)

    def finish(self) -> None:
        self.done.sort()
        self.write(complete=True)
        shutil.rmtree(self.out / ".building", ignore_errors=True)

    def write(self, *, complete: bool) -> None:
        """``cohort.json``, unless it says so already."""
        data = {
            "format": FORMAT,
            "complete": complete,
            "image": self.image.model_dump(mode="json"),
            "image_digest": image_digest(self.image),
            **({} if complete else {"expected": sorted(self.ids)}),
            **summary(list(self.records.values())),
        }
        comparable = {**data, "image": {**data["image"], "crop": self.before.get("image", {}).get("crop")}}
        if comparable != self.before:
            write_text(self.out / "cohort.json", to_text(data))
            self.before = data


def told_removed(out: Path, removed: list[str]) -> list[Problem]:
    if not removed:
        return []
    some = ", ".join(removed[:5]) + (", ..." if len(removed) > 5 else "")
    return [
        Problem(
            f"{len(removed)} prepared studies are not in DATA any more: no longer part of the cohort",
            str(out),
            found=some,
            remedy=f"Their files stay in {out / 'studies'}; delete those folders to erase them.",
            fatal=False,
        )
    ]
