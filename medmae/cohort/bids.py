"""Studies in a BIDS dataset: ``sub-01/[ses-1/]anat/sub-01_ses-1_ce-gadolinium_T1w.nii.gz``.

The suffix gives the modality (T1w, T2w, FLAIR, PDw, ...), and a contrast agent (``ce-``) makes a t1 a t1c; ``dseg``,
``mask`` and ``roi`` are labels, named by their ``label-`` or ``desc-`` entity. Folders of other data (func, fmap, eeg,
...) and, unless they are given themselves, ``derivatives`` and ``sourcedata`` are not looked at. Diffusion series
(4-D), phase images and parts of multi-echo or inversion series are no modality of a study and are reported as left out.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Final

from medmae.cohort.folders import CONVERT, RENAME, single_files
from medmae.cohort.modalities import canonical_modality
from medmae.cohort.naming import image_stem, is_foreign_image, label_name, safe_id
from medmae.cohort.study import Study
from medmae.errors import Problem

DATA_TYPES: Final = ("anat", "perf", "dwi", "swi", "pet", "ct")
_LABEL_SUFFIXES: Final = ("dseg", "mask", "roi", "seg")
_PARTS: Final = {"part": ("phase", "real", "imag"), "inv": None, "echo": None, "flip": None, "mt": None}


def bids_root(data: Path) -> Path | None:
    """The dataset (or subject, or session) that ``data`` is; None when it is no BIDS."""
    data = data.resolve()
    if data.name == "derivatives" and not list(subjects(data)):
        inner = [folder for folder in sorted(data.iterdir()) if folder.is_dir() and bids_root(folder)]
        return inner[0] if len(inner) == 1 else None
    sessions = [data] if re.match(r"(sub|ses)-", data.name) else [s for sub in subjects(data) for s in (sub,)]
    return data if any(has_data(folder) for folder in sessions) else None


def subjects(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("sub-*") if path.is_dir())


def has_data(subject: Path) -> bool:
    """Whether a subject or session has a folder of images as BIDS names them."""
    return any((folder / kind).is_dir() for folder in (subject, *subject.glob("ses-*")) for kind in DATA_TYPES)


def find_in_bids(root: Path) -> tuple[list[Study], list[Problem]]:
    """(studies, problems) of a dataset, of one subject's folder, or of one session's."""
    root = root.resolve()
    problems: list[Problem] = []
    if root.name.startswith("ses-") and root.parent.name.startswith("sub-"):
        places = [(root.parent.name, root.name, root)]
    else:
        places = []
        for subject in [root] if root.name.startswith("sub-") else subjects(root):
            sessions = sorted(path for path in subject.glob("ses-*") if path.is_dir())
            places += [(subject.name, session.name, session) for session in sessions]
            if not sessions or any((subject / kind).is_dir() for kind in DATA_TYPES):
                places.append((subject.name, "", subject))
    studies = []
    for name, session, folder in places:
        identity = safe_id(f"{name}_{session}" if session else name)
        images: dict[str, list[Path]] = defaultdict(list)
        labels: dict[str, list[Path]] = defaultdict(list)
        for path in files_of(folder):
            read_bids_file(path, images, labels, problems)
        complete = single_files(identity, images, labels, problems)
        if not images:
            problems.append(
                Problem("no image that is a modality", identity, found=str(folder), remedy=RENAME, fatal=False)
            )
        elif complete is not None:
            studies.append(Study(identity, safe_id(name), complete[0], session or None, complete[1]))
    return studies, problems


def files_of(session: Path) -> list[Path]:
    """What lies in a session's folders of images."""
    return [
        path
        for kind in DATA_TYPES
        if (session / kind).is_dir()
        for path in sorted((session / kind).iterdir())
        if path.is_file() and not path.name.startswith(".")
    ]


def read_bids_file(
    path: Path, images: dict[str, list[Path]], labels: dict[str, list[Path]], problems: list[Problem]
) -> None:
    """Add a file to ``images`` or ``labels``, or report why it is neither."""

    def left_out(what: str, remedy: str) -> None:
        problems.append(Problem(f"{what}: left out", str(path), remedy=remedy, fatal=False))

    stem = image_stem(path)
    if stem is None:
        if is_foreign_image(path):
            left_out("this image format is not read", CONVERT)
        return
    *words, suffix = stem.split("_")
    entities = dict(word.split("-", 1) for word in words if "-" in word)
    if suffix.lower() in _LABEL_SUFFIXES:
        what = entities.get("label") or entities.get("desc")
        kind = "seg" if suffix.lower() == "dseg" else suffix.lower()
        labels[label_name(f"{what}_{kind}" if what and what.lower() != "manual" else kind)].append(path)
        return
    modality = canonical_modality(suffix)
    part = next((k for k, values in _PARTS.items() if k in entities and (not values or entities[k] in values)), None)
    if modality is None or suffix.lower() in ("asl", "bold"):
        left_out(f"the suffix {suffix} is no known modality", RENAME)
    elif part:
        left_out(f"one part ({part}-{entities[part]}) of a series is no modality", "List the study in a table (CSV).")
    elif modality == "dwi" and path.with_name(stem + ".bval").exists():
        left_out(
            "a diffusion series is no modality", "Average it to a trace image, or list one volume in a table (CSV)."
        )
    else:
        images["t1c" if modality == "t1" and "ce" in entities else modality].append(path)
