"""Studies in plain folders, and in BraTS folders, which are plain folders with well-known names.

- one folder a study, or ``subject/session``: files named by modality (``t1.nii.gz``) or ending in it
  (``BraTS2021_00000_flair.nii.gz``, ``BraTS-GLI-00000-000-t1n.nii.gz``);
- a flat folder of many studies: ``<study>_<modality>.nii.gz``, which is also what this package writes.

A folder is flat when its images differ in what stands before the modality and one of those prefixes has several
modalities or one modality comes twice; otherwise all its images are one study's. In ``a/b`` the folder ``b`` is a
session of ``a`` when it is named like one (``ses-1``, ``visit2``, a date) or when other folders have a ``b`` too and
it is not named like a subject; otherwise ``b`` is a subject of its own.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from medmae.cohort.naming import (
    FileName,
    image_stem,
    in_order,
    is_dicom_name,
    is_foreign_image,
    looks_like_session,
    looks_like_subject,
    read_name,
    safe_id,
    words,
)
from medmae.cohort.study import Study
from medmae.errors import Problem
from medmae.imaging.files import walk

# Folders that only say what kind of files they hold.
_HOLDERS: Final = words("anat mri mr nifti nii niftis image images scan scans raw registered preprocessed")
_BRATS_2023: Final = re.compile(r"(BraTS-[A-Za-z]+-\d+)-(\d{3})", re.IGNORECASE)
_SESSION_AT_END: Final = re.compile(r"(.+?)[_-]((?:ses|session|visit|timepoint|tp)[-_]?[A-Za-z0-9]+)", re.IGNORECASE)

RENAME = "Name it <study>_<modality>.nii.gz, for example case1_t1c.nii.gz, or list the studies in a table (CSV)."
CONVERT = "Convert it to NIfTI (.nii.gz)."


@dataclass
class Found:
    """The files of one study before it has an id; ``parts`` are the names that lead to it."""

    parts: tuple[str, ...]
    images: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))
    labels: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))


def find_in_folders(root: Path) -> tuple[str, list[Study], list[Problem]]:
    """(layout's name, studies, problems) of a tree of plain folders. ``root`` may be one study's folder."""
    root = root.resolve()
    problems: list[Problem] = []
    found: list[Found] = []
    for folder, files in walk(root, problems):
        names = readable_names(files, problems)
        found += studies_of_folder(names, parts_of(folder, root), folder == root, problems)
    studies = named(found, problems)
    brats = sum(study.id.lower().startswith("brats") for study in studies)
    return ("brats" if studies and brats == len(studies) else "folders"), studies, problems


def find_in_file(path: Path) -> tuple[str, list[Study], list[Problem]]:
    """One image file as a study of one modality."""
    problems: list[Problem] = []
    names = readable_names([path], problems)
    folder = parts_of(path.resolve().parent, path.resolve().parent)
    studies = named(studies_of_folder(names, folder, True, problems), problems)
    return "file", studies, problems


def readable_names(files: list[Path], problems: list[Problem]) -> list[FileName]:
    """The image files among ``files``, read; those that say nothing, or that cannot be read, are reported."""
    names = []
    for path in files:
        if image_stem(path) is not None:
            name = read_name(path)
            if name.modality or name.label:
                names.append(name)
            else:
                problems.append(
                    Problem("the name tells no modality and no label: left out", str(path), remedy=RENAME, fatal=False)
                )
        elif is_foreign_image(path) and not is_dicom_name(path):
            problems.append(Problem("this image format is not read: left out", str(path), remedy=CONVERT, fatal=False))
    if dicom := [path for path in files if is_dicom_name(path)]:
        what, remedy = "DICOM in a tree with NIfTI: left out", "Give the DICOM as DATA of its own."
        problems.append(Problem(what, str(dicom[0].parent), found=f"{len(dicom)} files", remedy=remedy, fatal=False))
    return names


def parts_of(folder: Path, root: Path) -> tuple[str, ...]:
    """The names that lead from ``root`` to ``folder``; a session's folder given directly brings its subject along."""
    parts = folder.relative_to(root).parts
    if len(parts) > 1:
        parts = tuple(part for part in parts if part.lower() not in _HOLDERS) or parts
    while not parts or (len(parts) == 1 and looks_like_session(parts[0], below_subject=False)):
        if not root.name:
            break
        parts = (root.name, *parts)
        root = root.parent
    return parts


def studies_of_folder(
    names: list[FileName], parts: tuple[str, ...], is_root: bool, problems: list[Problem]
) -> list[Found]:
    """The studies whose files lie in one folder."""
    images = [name for name in names if name.modality]
    prefixes = sorted({name.prefix for name in images})
    if not images:
        problems += [
            Problem("a label without any image: left out", str(name.path), remedy=RENAME, fatal=False) for name in names
        ]
        return []
    if is_flat(images):
        found = {prefix: Found((*(() if is_root else parts), prefix)) for prefix in prefixes}
    else:
        # In a folder given by itself a prefix with a number names the study; a bare word ("brain_t1") does not.
        by_prefix = is_root and len(prefixes) == 1 and re.search(r"\d", prefixes[0])
        found = dict.fromkeys(prefixes, Found((prefixes[0],) if by_prefix else parts))
    for name in images:
        assert name.modality is not None
        found[name.prefix].images[name.modality].append(name.path)
    for name in names:
        if name.label:
            owner = owner_of(name, found)
            if owner is None:
                problems.append(
                    Problem("a label of no image in its folder: left out", str(name.path), remedy=RENAME, fatal=False)
                )
            else:
                owner.labels[name.label].append(name.path)
    return list({id(study): study for study in found.values()}.values())


def is_flat(images: list[FileName]) -> bool:
    """Whether a folder holds several studies side by side. See the module's docstring."""
    per_prefix = Counter(name.prefix for name in images)
    if len(per_prefix) < 2 or "" in per_prefix:
        return False
    repeated = max(Counter(name.modality for name in images).values()) > 1
    return repeated or max(per_prefix.values()) > 1


def owner_of(label: FileName, found: dict[str, Found]) -> Found | None:
    """The study that a label belongs to: the folder's only one, else the one with the longest fitting prefix."""
    if len({id(study) for study in found.values()}) == 1:
        return next(iter(found.values()))
    fitting = [p for p in found if label.prefix == p or re.match(re.escape(p) + r"[_\-. ]", label.prefix)]
    return found[max(fitting, key=len)] if fitting else None


def named(found: list[Found], problems: list[Problem]) -> list[Study]:
    """Studies with ids, subjects and sessions; one with two files for a modality is reported instead."""
    leaves = Counter(study.parts[-1].casefold() for study in found)
    split = [subject_and_session(study.parts, leaves) for study in found]
    parents: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for names, _ in split:
        parents[names[-1].casefold()].add(names)
    studies = []
    for study, (parts, session) in zip(found, split, strict=True):
        person = "_".join(parts) if len(parents[parts[-1].casefold()]) > 1 else parts[-1]
        identity = safe_id(f"{person}_{session}" if session else person)
        if inside := _BRATS_2023.fullmatch(identity) or (None if session else _SESSION_AT_END.fullmatch(identity)):
            person, session = inside.groups()
        complete = single_files(identity, study.images, study.labels, problems)
        if complete is not None:
            studies.append(Study(identity, safe_id(person), complete[0], session, complete[1]))
    return studies


def subject_and_session(parts: tuple[str, ...], leaves: Counter[str]) -> tuple[tuple[str, ...], str | None]:
    """The names that make the subject, and the session's, of the names that lead to a study."""
    if len(parts) < 2 or looks_like_subject(parts[-1]):
        return parts, None
    if looks_like_session(parts[-1], below_subject=True) or leaves[parts[-1].casefold()] > 1:
        return parts[:-1], parts[-1]
    return parts, None


def single_files(
    study: str, images: dict[str, list[Path]], labels: dict[str, list[Path]], problems: list[Problem]
) -> tuple[dict[str, Path], dict[str, Path]] | None:
    """One file a modality (in canonical order) and label. Two are reported; for a modality that makes the study None,
    for a label only the label is left out."""
    clear = True
    for modality, paths in images.items():
        if len(paths) > 1:
            clear = False
            problems.append(
                Problem(
                    f"{len(paths)} files for the modality {modality}: the study is left out",
                    study,
                    modality,
                    found=", ".join(str(path) for path in sorted(paths)),
                    expected="one file",
                    remedy="Keep one, or say which in a table (CSV).",
                )
            )
    for label, paths in labels.items():
        if len(paths) > 1:
            problems.append(
                Problem(
                    f"{len(paths)} files for the label {label}: left out",
                    study,
                    label,
                    found=", ".join(str(path) for path in sorted(paths)),
                    expected="one file",
                    remedy="Keep one, or say which in a table (CSV).",
                    fatal=False,
                )
            )
    if not clear:
        return None
    return (
        {modality: images[modality][0] for modality in in_order(images)},
        {label: paths[0] for label, paths in labels.items() if len(paths) == 1},
    )
