"""What a training tells while it runs: progress on stderr, ``metrics.jsonl``, TensorBoard, and a stop when the loss
is no longer finite.

Losses stay on the device until :meth:`Monitor.flush`, so that the loop does not wait for it at every step.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from medmae.errors import TrainingError
from medmae.files import write_text
from medmae.progress import stderr

_LINE_EVERY = 30.0  # seconds between progress lines where there is no terminal (a Slurm log)


class Monitor:
    """Collects and shows metrics of the steps from ``start`` to ``last``; ``latest`` holds the newest values."""

    def __init__(self, run: Path, start: int, last: int, steps_per_epoch: int, progress: bool, writes: bool) -> None:
        self.run, self.start, self.last, self.steps_per_epoch = run, start, last, steps_per_epoch
        self.latest: dict[str, float] = {}
        self._pending: list[tuple[int, Tensor, list[str]]] = []
        self._samples, self._since = 0, time.perf_counter()
        self._writes, self._shows = writes, progress
        self._console = stderr()
        self._bar: Progress | None = None
        self._last_line = 0.0
        self._metrics: Any = None
        self._board: Any = None

    def __enter__(self) -> Monitor:
        if self._writes:
            path = self.run / "metrics.jsonl"
            forget_after(path, self.start)
            self._metrics = path.open("a", encoding="utf-8")
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.run / "tensorboard"), purge_step=self.start + 1)
        if self._shows and self._console.is_terminal:
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=self._console)
            self._bar.start()
            self._task = self._bar.add_task("training", total=self.last, completed=self.start, note="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        for stream in (self._metrics, self._board):
            if stream is not None:
                stream.close()

    def step(self, step: int, loss: Tensor, studies: list[str], samples: int) -> None:
        """Note one batch of optimiser step ``step``; nothing waits for the device."""
        self._pending.append((step, loss, studies))
        self._samples += samples

    def flush(self, lr: float) -> None:
        """Read the pending losses; raise :class:`TrainingError` naming the studies if one is not finite."""
        if not self._pending:
            return
        values = torch.stack([loss for _, loss, _ in self._pending]).float().tolist()
        for (step, _, studies), value in zip(self._pending, values, strict=True):
            if not math.isfinite(value):
                self.record(step, {"loss": value, "lr": lr})
                raise TrainingError(
                    f"the loss is {value} at step {step}",
                    where=self.run,
                    field="studies in the batch",
                    found=", ".join(studies),
                    remedy="Look at these with `medmae inspect`; the last checkpoint is whole. "
                    "Continue with --resume, or begin again with a lower training.lr or training.clip_norm=1.",
                )
        step, elapsed = self._pending[-1][0], time.perf_counter() - self._since
        metrics = {
            "loss": sum(values) / len(values),
            "lr": lr,
            "samples_per_second": self._samples / max(elapsed, 1e-9),
        }
        self._pending, self._samples, self._since = [], 0, time.perf_counter()
        self.record(step, metrics)
        self.show(step)

    def validation(self, step: int, metrics: dict[str, float]) -> None:
        """Note validation losses."""
        self.record(step, metrics)
        self._since = time.perf_counter()  # validation is not training time
        if self._shows:
            losses = "  ".join(f"{k.removeprefix('validation_')} {v:.4f}" for k, v in metrics.items())
            self._console.print(f"step {step}: validation {losses}")

    def record(self, step: int, metrics: dict[str, float]) -> None:
        self.latest = {**self.latest, **metrics}
        if self._metrics is not None:
            line = {"step": step, "epoch": step / self.steps_per_epoch, **metrics}
            self._metrics.write(json.dumps(line) + "\n")
            self._metrics.flush()
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)

    def show(self, step: int) -> None:
        note = f"loss {self.latest['loss']:.4f}  {self.latest['samples_per_second']:.2f} samples/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, note=note)
        elif self._shows and (time.monotonic() - self._last_line > _LINE_EVERY or step == self.last):
            self._last_line = time.monotonic()
            self._console.print(f"step {step}/{self.last}  {note}", soft_wrap=True)


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of ``metrics.jsonl`` after ``step``: a resumed run writes them anew."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + os.linesep)
        except (ValueError, KeyError, TypeError):
            break  # cut short by a kill: nothing after it is whole
    write_text(path, "".join(kept))
