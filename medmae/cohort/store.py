"""``medmae prepare``: scans into a cohort that training reads fast.

The cohort is what DATA says now. A study whose files are unchanged (size and time of change; when only the time
differs, their content) is skipped; a new or changed one is prepared; one that is gone from DATA, or that has become
unusable, is no longer listed, but its prepared files stay until somebody deletes them. Every study is written beside
its place and renamed, so a run that is killed leaves whole studies only, and the next run continues. Changing the
plan's training crop changes nothing here; any other part of its ``image`` section needs a cohort of its own.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from medmae.cohort.building import Built, Task, build, image_digest, listed, sha256, stamp, to_text
from medmae.cohort.index import AGAIN, FORMAT, KINDS, read_json, study_record, summary
from medmae.cohort.layouts import Layout, find_studies
from medmae.cohort.prepared import Cohort, PreparedStudy, is_cohort
from medmae.cohort.sampling import split_subjects
from medmae.cohort.study import Study
from medmae.errors import InputError, Problem
from medmae.files import explained, write_text
from medmae.plan import Image, Plan

__all__ = ["Cohort", "Prepared", "PreparedStudy", "is_cohort", "prepare", "split_subjects"]

Progress = Callable[[int, int, str], object]
_OURS: Final = {"cohort.json", "studies", ".building", ".lock"}


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
    on_progress: Progress | None = None,
) -> Prepared:
    """Bring the studies in ``data`` into the space of ``plan`` and write (or update) the cohort ``out``.

    ``jobs`` processes work at the same time (default: as many as pay off, at most one a core); with 1 everything
    happens in this one. ``on_progress(done, total, study_id)`` is called after each study. A study that cannot be used
    is named in the result and does not stop the others. Raises :class:`InputError` when there is nothing to prepare,
    when ``out`` was prepared for another image space or is being written by another run, and
    :class:`medmae.errors.MedmaeError` when it cannot be written (full disk, no permission).
    """
    refuse_import_of_main()
    plan, out = Plan.load(plan), Path(out)
    layout = find_studies(data)
    studies, failed, warnings = for_plan(layout, plan)
    refuse_other_content(out, plan.image)
    with explained(out):
        (out / "studies").mkdir(parents=True, exist_ok=True)
    with locked(out):
        shutil.rmtree(out / ".building", ignore_errors=True)  # what a killed run was writing
        run = Run(out, plan.image, studies, on_progress)
        tasks = run.skip_unchanged(plan, layout.label_values)
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


def wanted(study: Study, plan: Plan, record: Mapping[str, Any] | None) -> Study:
    """``study`` with the plan's modalities and those that are prepared already, so that two plans that share a cohort
    do not take them from each other."""
    names = {*plan.modalities, *(record["images"] if record else ())}
    return replace(study, images={name: path for name, path in study.images.items() if name in names})


def refuse_other_content(out: Path, image: Image) -> None:
    """Raise when ``out`` holds anything but a cohort for the same image space."""
    if not out.exists():
        return
    with explained(out):
        if not out.is_dir():
            raise NotADirectoryError(20, "not a folder", str(out))
        foreign = sorted(path.name for path in out.iterdir() if path.name not in _OURS)
    if foreign and not is_cohort(out):
        raise InputError(
            "this folder is not empty and is no prepared cohort",
            where=out,
            field="--out",
            found=", ".join(foreign[:3]),
            remedy="Choose an empty or a new folder.",
        )
    if not is_cohort(out):
        return
    stored = read_json(out / "cohort.json", AGAIN)
    if stored.get("image_digest") != image_digest(image):
        old, new = stored.get("image") or {}, image.model_dump(mode="json")
        changed = [key for key in new if key != "crop" and old.get(key) != new[key]] or ["image"]
        raise InputError(
            "this cohort was prepared for another image space",
            where=out,
            field=", ".join(f"image.{key}" for key in changed),
            found=", ".join(str(old.get(key)) for key in changed),
            expected=", ".join(str(new.get(key)) for key in changed),
            remedy="Choose another folder with -o, or delete this one.",
        )


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the cohort's lock; the system lets go of it however this process ends."""
    with explained(out), open(out / ".lock", "a") as file:
        try:
            import fcntl
        except ImportError:  # Windows; renames alone keep the store whole there
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                "another `medmae prepare` is writing this cohort",
                where=out,
                remedy="Wait for it to end, then run this again.",
            ) from None
        except OSError:  # a file system without locks; renames alone keep the store whole there
            pass
        yield


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

    def skip_unchanged(self, plan: Plan, label_values: frozenset[int] | None) -> list[Task]:
        """Find the studies that are prepared from the very files that are there now; the others are the work to do."""
        tasks = []
        for study in self.studies:
            record = study_record(self.out, study.id)
            task = Task(wanted(study, plan, record), self.image, self.out, label_values)
            if record is not None and is_current(record, task):
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


def is_current(record: Mapping[str, Any], task: Task) -> bool:
    """Whether a prepared study comes from these files, for this image space."""
    facts = (image_digest(task.image), task.study.subject, task.study.session, listed(task.label_values))
    if tuple(record.get(key) for key in ("image", "subject", "session", "label_values")) != facts:
        return False
    known: dict[str, Mapping[str, Any]] = {kind: dict(record[kind]) for kind in KINDS}
    sources = {
        "images": {name: entry["source"] for name, entry in known["images"].items()},
        "labels": {**{name: e["source"] for name, e in known["labels"].items()}, **record["left_out"]},
    }
    for kind, files in zip(KINDS, (task.study.images, task.study.labels), strict=True):
        if set(files) != set(sources[kind]):
            return False
        if not all(is_same(path, sources[kind][name]) for name, path in files.items()):
            return False
    return True


def is_same(path: Path, source: Mapping[str, Any]) -> bool:
    """Whether a file is the one that was read: same size and time, or same size and content."""
    try:
        now = stamp(path)
        if now["size"] != source["size"]:
            return False
        return now["mtime_ns"] == source["mtime_ns"] or sha256(path) == source["sha256"]
    except OSError:
        return False


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


def usable_cores() -> int:
    """The cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(tasks: list[Task], jobs: int) -> Iterator[Built]:
    """Studies as they are ready. Processes are spawned, not forked: the caller may have threads and GPUs."""
    pool = ProcessPoolExecutor(
        min(jobs, len(tasks)), mp_context=multiprocessing.get_context("spawn"), initializer=start_worker
    )
    try:
        futures: dict[Future[Built], Task] = {pool.submit(build, task): task for task in tasks}
        for future in as_completed(futures):
            try:
                yield future.result()
            except BrokenProcessPool:
                study = futures[future].study.id
                yield Built(
                    study,
                    None,
                    [
                        Problem(
                            "a process that prepared studies was killed before this one was done",
                            study,
                            remedy=f"If memory ran out, use fewer --jobs. {GUARD}",
                        )
                    ],
                )
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


GUARD: Final = 'In a script of your own, call prepare under `if __name__ == "__main__":`, or with jobs=1.'


def refuse_import_of_main() -> None:
    """Raise in a process that imports the caller's script only to get ready for work; Python would say it less well."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise InputError("a script that prepares a cohort when it is imported", remedy=GUARD)


def start_worker() -> None:
    """One thread a process, and no life after the parent's: a killed ``prepare`` leaves nobody writing."""
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = "1"
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
