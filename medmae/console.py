"""What every command shares: results on stdout, everything else on stderr, errors without tracebacks, exit codes.

A command returns an :class:`Outcome`; :func:`command` adds ``--json`` and ``--debug`` to its options, prints the
outcome and ends the program with the contract's exit code: 0 all done, 1 some cases failed, 2 wrong use or nothing
usable, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json as jsonlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from medmae.errors import MedmaeError, Problem
from medmae.files import explained, strict
from medmae.progress import stderr

DONE, SOME_FAILED, UNUSABLE, INTERRUPTED = 0, 1, 2, 130

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@dataclass(frozen=True)
class Outcome:
    """What a command has to say. ``usable`` is how many cases went well; with none and a failure nothing was done."""

    data: Any  # what --json prints
    lines: Sequence[str] = ()  # what a person reads on stdout, as plain text
    problems: Sequence[Problem] = ()
    usable: int = 1
    failed: int = 0
    interrupted: bool = False

    @property
    def exit_code(self) -> int:
        if self.interrupted:
            return INTERRUPTED
        if not self.usable:
            return UNUSABLE
        return SOME_FAILED if self.failed else DONE


def command(function: Callable[..., Outcome | None]) -> Callable[..., None]:
    """``function`` with ``--json`` and ``--debug``, its outcome printed and its errors told as the contract says.

    A command that returns None says nothing: what a process of a distributed training does that is not the first.
    """

    @functools.wraps(function)
    def run(*args: Any, json: bool, debug: bool, **kwargs: Any) -> None:
        with errors_told(debug):
            log_to_stderr(debug)
            # Some libraries print; with --json stdout must hold the result and nothing else.
            with contextlib.redirect_stdout(sys.stderr):
                outcome = function(*args, **kwargs)
            if outcome is None:
                return
            say(outcome, json)
        raise typer.Exit(outcome.exit_code)

    signature = inspect.signature(function, eval_str=True)
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for name, kind in (("json", Json), ("debug", Debug))
    ]
    parameters = [*signature.parameters.values(), *options]
    run.__signature__ = signature.replace(parameters=parameters, return_annotation=None)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def say(outcome: Outcome, json: bool) -> None:
    """The result on stdout, the problems on stderr."""
    tell_problems(outcome.problems)
    if json:
        print(jsonlib.dumps(strict(outcome.data), indent=2, allow_nan=False, default=str))
    else:
        for line in outcome.lines:
            print(line)
    sys.stdout.flush()


def tell_problems(problems: Iterable[Problem]) -> None:
    for problem in problems:
        tell("problem" if problem.fatal else "warning", str(problem))


def tell(kind: str, text: str) -> None:
    """One message on stderr, never cut or wrapped in the middle of a path."""
    colour = {"problem": "red", "error": "red", "warning": "yellow"}.get(kind, "cyan")
    stderr().print(f"[{colour}]{kind}:[/{colour}] {escape(text)}", soft_wrap=True)


@contextlib.contextmanager
def errors_told(debug: bool) -> Iterator[None]:
    """Turn every way a command can end badly into a message and an exit code; ``debug`` lets the traceback through."""
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except KeyboardInterrupt:
        tell("error", "interrupted; what was finished before is kept")
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:  # the reader of our output has left, as in `medmae plans | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(SOME_FAILED) from None
    except Exception as error:
        if debug:
            stderr().print_exception(show_locals=False)
        for text in explain(error):
            tell("error", text)
        raise typer.Exit(UNUSABLE) from None


def explain(error: Exception) -> list[str]:
    """What to tell a user about an exception: one text for each problem behind it."""
    if isinstance(error, MedmaeError):
        return [str(problem) for problem in error.problems]
    if isinstance(error, OSError) and error.errno is not None:
        return [explain_os_error(error)]
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return ["out of memory. Use a smaller batch (--set training.batch_size=1) or crop, or another --device."]
    first_line = (str(error).strip().splitlines() or [""])[0]
    return [
        f"medmae stopped on an error of its own: {type(error).__name__}: {first_line}",
        "This is a fault in medmae, not in your data or command. Run it again with --debug and report what it prints.",
    ]


def explain_os_error(error: OSError) -> str:
    """What the operating system refused, where, and a remedy where one is known."""
    where = str(error.filename or "")
    try:
        with explained(Path(where)):
            raise error
    except MedmaeError as known:
        return str(known)
    except OSError:
        return f"{where}: {(error.strerror or str(error)).lower()}".removeprefix(": ")


def log_to_stderr(debug: bool) -> None:
    """Log records of medmae on stderr; other libraries only when they warn."""
    from rich.logging import RichHandler

    handler = RichHandler(console=stderr(), show_path=debug, show_time=False, markup=False)
    # pydicom quotes values of a header that it finds invalid, and any of them may be a patient's name.
    handler.addFilter(lambda record: not record.name.startswith("pydicom"))
    warnings.filterwarnings("ignore", module=r"pydicom\b")
    if not debug:  # libraries that set their own level to INFO, too
        handler.addFilter(lambda record: record.levelno >= logging.WARNING or record.name.startswith("medmae"))
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("medmae").setLevel(logging.DEBUG if debug else logging.INFO)


def is_first_process() -> bool:
    """False in the processes that a distributed launcher started beside the first; they print nothing."""
    rank = next((os.environ[name] for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), "0")
    return rank == "0"
