"""Progress on stderr, the same for every long piece of work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console


def stderr() -> Console:
    return Console(stderr=True, highlight=False)


@contextmanager
def progress_callback(title: str, shown: bool = True) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr while the block runs; yields ``on_progress(done, total, name)``, which draws it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, TextColumn("{task.fields[name]}", markup=False), console=stderr())
    task = bar.add_task(title, total=None, name="")

    def on_progress(done: int, total: int, name: str = "") -> None:
        if shown:
            bar.start()  # at the first call: a run that fails before it has no bar
        bar.update(task, completed=done, total=total, name=name)

    try:
        yield on_progress
    finally:
        if bar.live.is_started:
            bar.stop()
