"""One HTML page for many studies: a row a study and target, with scores where they are known and links to the pages.

The page of a folder is made from the pages in it (each carries its own summary), so it holds what earlier calls wrote
too, and can be made again at any time.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from medmae.files import write_text
from medmae.synthesis.layers import STAMP
from medmae.synthesis.report_page import SUMMARY, asset, fill, table, warning_box

INDEX = "index.html"
# {metric: (heading, digits)}, in the order of the columns
METRICS = {
    "psnr": ("PSNR, dB", 2),
    "ssim": ("SSIM", 3),
    "mae": ("MAE, sd", 3),
    "lesion_mae": ("MAE in lesions, sd", 3),
    "mean_psnr": ("PSNR of the mean", 2),
    "regression_psnr": ("PSNR of the regression", 2),
}


@dataclass(frozen=True)
class Row:
    """A synthesis of the cohort: ``inputs`` as "t1+t2", ``metrics`` by the keys of ``METRICS`` (those that are known),
    ``page``: the study's, relative to the cohort's; ``thumbnails``: data URLs, the synthesis and then the truth."""

    study: str
    target: str
    inputs: str
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    page: str | None = None
    thumbnails: tuple[str, ...] = ()


def page_name(study: str) -> str:
    """The file name of a study's page, which is never that of the cohort's."""
    return f"{study}.html" if f"{study}.html".lower() != INDEX else f"{study}_study.html"


def write_index(folder: Path, title: str = "Synthesised studies") -> Path | None:
    """Write ``index.html`` for the study pages that lie in ``folder``; None, and nothing written, when there are fewer
    than two. Other HTML files are left aside."""
    rows: list[Row] = []
    checkpoints: dict[str, int] = {}
    pages = [path for path in sorted(folder.glob("*.html")) if path.name.lower() != INDEX]
    for path in pages:
        found = SUMMARY.search(path.read_text(encoding="utf-8", errors="replace"))
        if found:
            known = json.loads(found[1])
            rows += rows_of(known, path.name)
            checkpoints[known["checkpoint"]] = checkpoints.get(known["checkpoint"], 0) + 1
    if sum(checkpoints.values()) < 2:
        return None
    facts = {f"checkpoint of {count} studies": checkpoint for checkpoint, count in checkpoints.items()}
    return write_cohort(folder / INDEX, title, rows, facts)


def rows_of(summary: Mapping[str, object], page: str) -> Iterable[Row]:
    """The rows that a study's page tells of itself (:func:`medmae.synthesis.report_page.summary`)."""
    targets: list[dict[str, object]] = summary["targets"]  # type: ignore[assignment]
    for target in targets:
        yield Row(
            study=str(summary["study"]),
            target=str(target["target"]),
            inputs=str(target["inputs"]),
            metrics=target["metrics"],  # type: ignore[arg-type]
            warnings=tuple(summary["warnings"]),  # type: ignore[arg-type]
            page=page,
            thumbnails=tuple(target["thumbnails"]),  # type: ignore[arg-type]
        )


def write_cohort(
    path: Path, title: str, rows: Sequence[Row], facts: Mapping[str, str], warnings: Sequence[str] = ()
) -> Path:
    """Write the table of ``rows`` to ``path``, with ``facts`` below it and ``warnings`` of the whole cohort above."""
    studies, targets = {row.study for row in rows}, {row.target for row in rows}
    columns = [key for key in METRICS if any(_known(row.metrics.get(key)) for row in rows)]
    warned = len({row.study for row in rows if row.warnings})
    lead = f"{len(studies)} studies; synthesised: {', '.join(sorted(t.upper() for t in targets))}."
    lead += f" With warnings: {warned} of the studies." if warned else ""
    scored = "Scores are taken on normalised intensities inside the foreground." if columns else "No truth is known."
    heads = [_head("study"), _head("target"), _head("from"), '<th scope="col">synthesis | truth</th>']
    heads += [_head(METRICS[key][0], METRICS[key][1]) for key in columns]
    heads += [_head("warnings")] if warned else []
    write_text(
        path,
        fill(
            "cohort.html",
            {
                "title": html.escape(title),
                "stamp": html.escape(STAMP),
                "lead": html.escape(lead),
                "caption": html.escape(f"{scored} Click a heading to sort."),
                "warnings": warning_box(warnings),
                "heads": "".join(heads),
                "rows": "\n".join(_row(row, columns, bool(warned)) for row in rows),
                "tables": table("Provenance", facts) if facts else "",
                "script": asset("cohort.js"),
            },
        ),
    )
    return path


def _head(text: str, digits: int | None = None) -> str:
    kind = "" if digits is None else f' class="number" data-kind="number" data-digits="{digits}"'
    return f'<th scope="col" aria-sort="none"{kind}>{html.escape(text)}</th>'


def _row(row: Row, columns: Sequence[str], warned: bool) -> str:
    name = html.escape(row.study)
    link = name if row.page is None else f'<a href="{html.escape(quote(row.page))}">{name}</a>'
    inputs = html.escape(" + ".join(row.inputs.upper().split("+")))
    alts = (f"{row.study}: synthetic {row.target.upper()}", f"{row.study}: acquired {row.target.upper()}")
    images = "".join(
        f'<img src="{url}" alt="{html.escape(alt)}">' for url, alt in zip(row.thumbnails, alts, strict=False)
    )
    cells = [f'<th scope="row">{link}</th>', f"<td>{html.escape(row.target.upper())}</td>", f"<td>{inputs}</td>"]
    cells.append(f"<td>{images}</td>")
    for key in columns:
        value = row.metrics.get(key)
        text = f"{value:.{METRICS[key][1]}f}" if _known(value) else ""
        cells.append(f'<td class="number" data-value="{value if _known(value) else ""}">{text}</td>')
    if warned:
        cells.append(f'<td class="warned">{"<br>".join(map(html.escape, row.warnings))}</td>')
    keys = f'data-target="{html.escape(row.target)}" data-inputs="{html.escape(row.inputs)}"'
    return f"<tr {keys}>{''.join(cells)}</tr>"


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
