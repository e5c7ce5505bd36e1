"""Labels of studies in a table: what a probe or a head is to predict.

CSV, TSV or JSON, one row a study. It is named by ``study`` (or id, case), or by ``subject`` (patient, participant) for
all studies of one, or by subject and session; the other columns are labels. An empty cell, ``n/a`` and ``nan`` are a
label that is missing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from medmae.cohort.naming import safe_id
from medmae.cohort.table import meaning_of, read_csv, read_json
from medmae.errors import InputError, Problem, nearest

_MISSING = ("", "n/a", "na", "nan", "none", "null", "?")


class Named(Protocol):
    """A study, prepared or not."""

    @property
    def id(self) -> str: ...
    @property
    def subject(self) -> str: ...
    @property
    def session(self) -> str | None: ...


@dataclass(frozen=True)
class Label:
    """One study's ``value`` as the table has it, and the table's row (1 is the first after the header)."""

    study: str
    subject: str
    value: str
    row: int


def read_labels(table: str | Path, column: str, studies: Sequence[Named], problems: list[Problem]) -> list[Label]:
    """The values of ``column`` for ``studies``, in their order.

    Rows that name no study of ``studies``, studies named twice and missing values go to ``problems``, each with its
    row; what is good is kept. Raises :class:`InputError` when the table has no such column or names nothing.
    """
    table = Path(table)
    if not table.is_file():
        raise InputError("no such table", where=table)
    rows = read_json(table) if table.suffix.lower() == ".json" else read_csv(table)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    labels = [name for name in columns if meaning_of(name)[0] != "field"]
    if column not in columns:
        raise InputError(
            "no such column in this table",
            where=table,
            field=column,
            found=", ".join(columns) or "an empty table",
            remedy=nearest(column, labels),
        )
    if len(labels) == len(columns):
        raise InputError(
            "no column of this table names the studies",
            where=table,
            found=", ".join(columns),
            expected="study, or subject and session",
        )
    found: dict[str, Label] = {}
    for number, row in enumerate(rows, start=1):
        where = f"{table}, row {number}"
        named = matching(row, studies)
        if not named:
            problems.append(Problem("no study of the data is this one", where, found=name_in(row) or "an empty row"))
        value = (row.get(column) or "").strip()
        if named and value.lower() in _MISSING:
            problems.append(Problem("the label is missing", where, column, remedy="Fill it in or remove the row."))
            continue
        for study in named:
            if study.id in found and found[study.id].value != value:
                first = found[study.id]
                problems.append(
                    Problem("a study with two labels", where, column, found=f"{value}, and {first.value} before")
                )
                continue
            found.setdefault(study.id, Label(study.id, study.subject, value, number))
    return [found[study.id] for study in studies if study.id in found]


def fields_of(row: dict[str, str]) -> dict[str, str]:
    """The columns that name a study, under their canonical names."""
    known = {meaning_of(name)[1]: (cell or "").strip() for name, cell in row.items() if meaning_of(name)[0] == "field"}
    return {name: cell for name, cell in known.items() if cell}


def name_in(row: dict[str, str]) -> str:
    fields = fields_of(row)
    return fields.get("study") or "_".join(v for k in ("subject", "session") if (v := fields.get(k)))


def matching(row: dict[str, str], studies: Sequence[Named]) -> list[Named]:
    """The studies that a row names: one by its id, one by subject and session, or all of a subject."""
    fields = fields_of(row)
    if "study" in fields:
        wanted = safe_id(fields["study"])
        return [s for s in studies if s.id == wanted] or [s for s in studies if s.subject == wanted]
    if "subject" not in fields:
        return []
    subject, session = safe_id(fields["subject"]), fields.get("session")
    mine = [s for s in studies if s.subject in (subject, f"sub-{subject}")]
    if session is not None:
        mine = [s for s in mine if s.session in (session, f"ses-{session}")]
    return mine


def as_numbers(labels: Sequence[Label]) -> list[float] | None:
    """The values as finite numbers; None unless all are."""
    try:
        values = [float(label.value) for label in labels]
    except ValueError:
        return None
    return values if all(math.isfinite(v) for v in values) else None
