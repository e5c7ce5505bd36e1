"""What a study was prepared from: how its files are remembered, and whether they are still the same."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from medmae.cohort.index import KINDS, to_text
from medmae.cohort.study import Study
from medmae.files import write_text
from medmae.imaging.source import Source, sha256, stamp
from medmae.plan import Image, Plan, digest


@dataclass(frozen=True)
class Task:
    """What one process needs to know to prepare one study; small and picklable."""

    study: Study
    image: Image
    cohort: Path
    label_values: frozenset[int] | None
    coregister: bool = False


def wanted(study: Study, plan: Plan, record: Mapping[str, Any] | None) -> Study:
    """``study`` with the plan's modalities and those that are prepared already, so that two plans that share a cohort
    do not take them from each other."""
    names = {*plan.modalities, *(record["images"] if record else ())}
    return replace(study, images={name: path for name, path in study.images.items() if name in names})


def files_of(study: Study) -> dict[str, Mapping[str, Source]]:
    """What a study is made of, {kind: {name: source}}."""
    return dict(zip(KINDS, (study.images, study.labels), strict=True))


def sources_of(files: Mapping[str, Source]) -> dict[str, dict[str, Any]]:
    """{name: {"size", "mtime_ns", "sha256"}}; what cannot be read is left for ``examine`` to tell."""
    sources = {}
    for name, path in files.items():
        with suppress(OSError, BadZipFile):
            sources[name] = {**stamp(path), "sha256": sha256(path)}
    return sources


def image_digest(image: Image) -> str:
    """What the stored arrays depend on: everything of the plan's section but the size of a training crop."""
    return digest(image.model_dump(mode="json", exclude={"crop"}))


def listed(values: frozenset[int] | None) -> list[int] | None:
    return None if values is None else sorted(values)


def is_current(record: Mapping[str, Any], task: Task) -> bool:
    """Whether a prepared study comes from these files, for this image space."""
    facts = (image_digest(task.image), task.study.subject, task.study.session, listed(task.label_values))
    if tuple(record.get(key) for key in ("image", "subject", "session", "label_values")) != facts:
        return False
    if task.coregister != ("registration" in record):
        return False
    known: dict[str, Mapping[str, Any]] = {kind: dict(record[kind]) for kind in KINDS}
    sources = {
        "images": {name: entry["source"] for name, entry in known["images"].items()},
        "labels": {**{name: e["source"] for name, e in known["labels"].items()}, **record["left_out"]},
    }
    for kind, files in files_of(task.study).items():
        if set(files) != set(sources[kind]):
            return False
        if not all(is_same(path, sources[kind][name]) for name, path in files.items()):
            return False
    return True


def is_same(path: Source, source: Mapping[str, Any]) -> bool:
    """Whether a file or series is the one that was read: same size and time, or same size and content."""
    try:
        now = stamp(path)
        if now["size"] != source["size"]:
            return False
        return all(source.get(key) == value for key, value in now.items()) or sha256(path) == source["sha256"]
    except (OSError, BadZipFile):
        return False


def refresh(record: dict[str, Any], task: Task) -> None:
    """Note the times of files that were only touched or copied, so that their content is compared no second time."""
    changed = False
    for kind, files in files_of(task.study).items():
        for name, path in files.items():
            source = record[kind][name]["source"] if name in record[kind] else record["left_out"][name]
            now = stamp(path)
            changed |= any(source.get(key) != value for key, value in now.items())
            source.update(now)
    if changed:
        write_text(task.cohort / "studies" / task.study.id / "study.json", to_text(record))
