"""Studies listed in a table: CSV, TSV or JSON.

One row a study. Columns: ``study`` (or id, case), ``subject`` (or patient, participant), ``session`` (or visit,
timepoint); one column a modality under any of its names, one a label (seg, lesion_mask, ...). A modality that medmae
has no name for goes into a column ``image_<name>``. Paths are relative to the table; an empty cell is a modality that
was not acquired. Other columns (age, sex) are ignored. JSON: a list of such rows, or ``{"studies": [...]}``, where a
row may also group its files: ``{"study": "a", "images": {"t1": "a.nii.gz"}, "labels": {"seg": "s.nii.gz"}}``.
"""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from medmae.cohort.folders import single_files
from medmae.cohort.modalities import CANONICAL, canonical_modality
from medmae.cohort.naming import image_stem, is_label_name, label_name, modality_name, safe_id
from medmae.cohort.nnunet_raw import own_modality
from medmae.cohort.study import Study
from medmae.errors import InputError, Problem

TABLE_SUFFIXES: Final = (".csv", ".tsv", ".json")
_COLUMNS: Final = {
    **dict.fromkeys(("study", "studyid", "id", "case", "caseid", "name", "identifier"), "study"),
    **dict.fromkeys(("subject", "subjectid", "patient", "patientid", "participant", "participantid"), "subject"),
    **dict.fromkeys(("session", "sessionid", "visit", "timepoint"), "session"),
}


def find_in_table(table: Path) -> tuple[list[Study], list[Problem]]:
    """(studies, problems) of a table. Raises :class:`InputError` when it is no table of studies."""
    rows = read_json(table) if table.suffix.lower() == ".json" else read_csv(table)
    problems: list[Problem] = []
    columns = {name: None for row in rows for name in row}
    meaning = {name: meaning_of(name) for name in columns}
    warn_of_columns(table, rows, meaning, problems)
    if not any(kind == "image" for kind, _ in meaning.values()):
        raise InputError(
            "no column of this table is a modality",
            where=table,
            found=", ".join(columns) or "no columns",
            expected=f"one of {' '.join(CANONICAL)}, or image_<name>",
            remedy="Name the columns by modality; the cells are paths.",
            problems=problems,
        )
    studies = []
    for number, row in enumerate(rows, start=1):
        study = study_of(table, number, row, meaning, problems)
        if study is not None:
            studies.append(study)
    return studies, problems


def meaning_of(column: str) -> tuple[str, str]:
    """("study" | "subject" | "session" | "image" | "label" | "other", the name it stands for)."""
    compact = re.sub(r"[^a-z0-9]", "", column.lower())
    if compact in _COLUMNS:
        return "field", _COLUMNS[compact]
    if modality := canonical_modality(column):
        return "image", modality
    if match := re.fullmatch(r"(image|label)[_\-.: ](.+)", column.strip(), re.IGNORECASE):
        kind = match[1].lower()
        name = modality_name(match[2]) if kind == "image" else label_name(match[2])
        return (kind, name) if name else ("other", column)
    return ("label", label_name(column)) if is_label_name(column) else ("other", column)


def warn_of_columns(
    table: Path, rows: list[dict[str, str]], meaning: Mapping[str, tuple[str, str]], problems: list[Problem]
) -> None:
    """Columns of images that cannot be placed, and modalities under names of their own."""
    for column, (kind, name) in meaning.items():
        if kind == "other" and any(image_stem(Path(row.get(column) or "")) for row in rows):
            problems.append(
                Problem(
                    "a column of images whose name is no modality: left out",
                    str(table),
                    column,
                    expected=" ".join(CANONICAL),
                    remedy=f"Rename it; image_{modality_name(column) or 'other'} makes it a modality of its own.",
                    fatal=False,
                )
            )
        elif kind == "image" and name not in CANONICAL:
            problems.append(own_modality(re.sub(r"(?i)^image[_\-.: ]", "", column), name, str(table), column))


def study_of(
    table: Path, number: int, row: Mapping[str, str], meaning: Mapping[str, tuple[str, str]], problems: list[Problem]
) -> Study | None:
    """A row as a study; None, and a problem, when it cannot be one."""
    fields: dict[str, str] = {}
    files: dict[str, dict[str, list[Path]]] = {"image": defaultdict(list), "label": defaultdict(list)}
    for column, cell in row.items():
        kind, name = meaning[column]
        text = (cell or "").strip()
        if kind == "field" and text:
            fields.setdefault(name, text)
        elif kind in files and text:
            files[kind][name].append((table.parent / Path(text).expanduser()).absolute())
    subject, session = fields.get("subject"), fields.get("session")
    study = fields.get("study") or "_".join(part for part in (subject, session) if part)
    if not study or not files["image"]:
        problems.append(
            Problem(
                "a row without images" if study else "a row that names no study",
                f"{table}, row {number}",
                "study" if not study else None,
                found=study or None,
                remedy="Fill in the row or remove it.",
            )
        )
        return None
    complete = single_files(safe_id(study), files["image"], files["label"], problems)
    if complete is None:
        return None
    return Study(safe_id(study), safe_id(subject or study), complete[0], session, complete[1])


def read_csv(table: Path) -> list[dict[str, str]]:
    """Rows of a table separated by commas, semicolons or tabs, whichever its header has most of."""
    try:
        text = table.read_text(encoding="utf-8-sig")
        lines = text.splitlines()
        header = lines[0] if lines else ""
        rows = list(csv.DictReader(lines, delimiter=max(",;\t", key=header.count), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise unreadable(table, error) from None
    names = next(csv.reader(lines[:1], delimiter=max(",;\t", key=header.count)), [])
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(
            "a column comes twice", where=table, field=", ".join(repeated), remedy="Give every column its own name."
        )
    return [
        {str(name): value for name, value in row.items() if name is not None and not isinstance(value, list)}
        for row in rows
    ]


def read_json(table: Path) -> list[dict[str, str]]:
    """Rows of a JSON table, files grouped under ``images`` and ``labels`` brought to columns."""
    try:
        data = json.loads(table.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise unreadable(table, error) from None
    rows = data.get("studies") if isinstance(data, dict) else data
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(
            "this JSON is no table of studies",
            where=table,
            expected='a list of {"study": ..., "t1": path, ...}',
            remedy="See the table layout in the docs.",
        )
    return [flat(row) for row in rows]


def flat(row: Mapping[str, Any]) -> dict[str, str]:
    """``images`` and ``labels`` objects of a row as columns; other values as text."""
    columns: dict[str, str] = {}
    for name, value in row.items():
        if isinstance(value, Mapping) and name.lower() in ("images", "labels"):
            kind = name.lower()[:-1]
            columns.update({f"{kind}_{inner}": str(path) for inner, path in value.items() if path})
        elif value is not None:
            columns[name] = str(value)
    return columns


def unreadable(table: Path, error: Exception) -> InputError:
    return InputError("this table cannot be read", where=table, found=error, remedy="Save it as UTF-8 CSV or JSON.")
