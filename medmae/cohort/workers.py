"""Preparing studies in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Final

from medmae.cohort.building import Built, build
from medmae.cohort.sources import Task
from medmae.errors import InputError, Problem

GUARD: Final = 'In a script of your own, call prepare under `if __name__ == "__main__":`, or with jobs=1.'


def refuse_import_of_main() -> None:
    """Raise in a process that imports the caller's script only to get ready for work; Python would say it less well."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise InputError("a script that prepares a cohort when it is imported", remedy=GUARD)


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
