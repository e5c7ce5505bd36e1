"""The prepared store's two JSON files: ``study.json``, one a study, and ``cohort.json``, the list of all.

Neither holds a path or anything from an image's header but its grid: sources are known by size, time and digest.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

from medmae.cohort.naming import in_order
from medmae.errors import InputError
from medmae.plan import digest

FORMAT: Final = 1
AGAIN: Final = "Delete cohort.json and run `medmae prepare` again: what is prepared already is kept."


def to_text(record: Mapping[str, Any]) -> str:
    """As ``study.json`` and ``cohort.json`` are written."""
    return json.dumps(record, indent=1)


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """A JSON object of the store. Raises :class:`InputError` when it is missing, damaged or of another format."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("a file of the prepared cohort is missing", where=path, remedy=remedy) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(
            "a file of the prepared cohort is damaged", where=path, found=str(error), remedy=remedy
        ) from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise InputError(
            "this file of the prepared cohort has another format",
            where=path,
            field="format",
            found=data.get("format") if isinstance(data, dict) else type(data).__name__,
            expected=FORMAT,
            remedy="Prepare the cohort into another folder with this version.",
        )
    return data


def study_record(cohort: Path, study: str) -> dict[str, Any] | None:
    """``study.json`` of a prepared study whose files are all there and whole; None otherwise."""
    folder = cohort / "studies" / study
    try:
        record = read_json(folder / "study.json", AGAIN)
        for entry in (*record["images"].values(), *record["labels"].values()):
            if (folder / entry["file"]).stat().st_size != entry["bytes"]:
                return None
    except (InputError, OSError, KeyError, TypeError, AttributeError):
        return None
    return record


def summary(records: Collection[dict[str, Any]]) -> dict[str, Any]:
    """What ``cohort.json`` says of the studies with these records, in order of id."""
    records = sorted(records, key=lambda record: record["id"])
    sources = [
        [record["id"], {kind: {name: e["source"]["sha256"] for name, e in record[kind].items()} for kind in KINDS}]
        for record in records
    ]
    return {
        "modalities": list(in_order(name for record in records for name in record["images"])),
        "fingerprint": digest(sources),
        "scales": typical_scales(records),
        "studies": [
            {
                "id": record["id"],
                "subject": record["subject"],
                "session": record["session"],
                "modalities": list(in_order(record["images"])),
                "shape": record["shape"],
                "labels": sorted(record["labels"]),
            }
            for record in records
        ],
    }


KINDS: Final = ("images", "labels")


def typical_scales(records: Collection[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """{modality: {"mean", "std"}}: medians over the studies, in source units; only where a z-score was taken."""
    seen: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for record in records:
        for name, entry in record["images"].items():
            if entry["scale"]["kind"].startswith("zscore"):
                seen[name].append((entry["scale"]["mean"], entry["scale"]["std"]))
    return {
        name: {
            "mean": statistics.median(mean for mean, _ in seen[name]),
            "std": statistics.median(std for _, std in seen[name]),
        }
        for name in in_order(seen)
    }
