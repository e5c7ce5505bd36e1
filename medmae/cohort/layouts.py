"""Where the studies are: DATA in any supported layout, recognised by its content.

- nnU-Net raw dataset (``nnunet_raw.py``), BIDS (``bids.py``), BraTS and plain folders (``folders.py``);
- DICOM, a folder tree or a ZIP (``dicom.py``); a tree with studies in NIfTI is read as NIfTI;
- a table of paths, CSV, TSV or JSON (``table.py``);
- the folder of a single study, or a single image file.

Finding opens no image; what the images are like is :mod:`medmae.cohort.integrity`'s business.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from medmae.cohort.bids import bids_root, find_in_bids
from medmae.cohort.folders import RENAME, find_in_file, find_in_folders
from medmae.cohort.naming import image_stem, is_dicom_name
from medmae.cohort.nnunet_raw import find_in_nnunet, nnunet_root
from medmae.cohort.study import Study
from medmae.cohort.table import TABLE_SUFFIXES, find_in_table
from medmae.errors import InputError, Problem
from medmae.imaging.dicom.opening import has_dicom, is_zip
from medmae.imaging.files import walk

MOST_ALIKE: Final = 50  # problems of one kind that are told one by one


@dataclass(frozen=True)
class Layout:
    """What was found in DATA.

    ``name``: ``nnunet``, ``bids``, ``brats``, ``folders``, ``table``, ``file`` or ``dicom``. ``studies``: those whose
    files are clear, with unique ids, in order of id; a study that is not clear (two files for a modality, an id used
    twice) is a fatal problem instead. ``label_values`` are those that dataset.json allows, None when nothing says.
    """

    name: str
    studies: list[Study]
    problems: list[Problem]
    label_values: frozenset[int] | None = None


def find_studies(data: str | Path, *, series: Mapping[str, int] | None = None) -> Layout:
    """The studies in ``data``, a folder, a ZIP of DICOM, a table or an image.

    ``series`` {modality: SeriesNumber}: which DICOM series is which, against what their headers say.

    Raises :class:`InputError`, with everything that was noticed in ``problems``, when not one study can be made out:
    nothing there, no permission, an empty folder, names that say nothing.
    """
    path = Path(data).expanduser()
    refuse_unusable(path)
    layout = dispatch(path, series)
    studies, duplicates = without_duplicates(layout.studies)
    problems = capped([*layout.problems, *duplicates])
    if not studies:
        raise nothing_found(path, problems)
    return replace(layout, studies=sorted(studies, key=lambda study: study.id), problems=problems)


def dispatch(path: Path, series: Mapping[str, int] | None = None) -> Layout:
    """The layout as its own module reads it."""
    if path.is_file():
        if path.name == "dataset.json" and nnunet_root(path.parent):
            path = path.parent
        elif path.suffix.lower() in TABLE_SUFFIXES:
            return Layout("table", *find_in_table(path))
        elif holds_dicom(path):
            return dicom_layout(path, series)
        else:
            return Layout(*find_in_file(path))
    if root := nnunet_root(path):
        studies, problems, values = find_in_nnunet(path, root)
        return Layout("nnunet", studies, problems, values)
    if root := bids_root(path):
        return Layout("bids", *find_in_bids(root))
    layout = Layout(*find_in_folders(path))
    return dicom_layout(path, series) if not layout.studies and holds_dicom(path) else layout


def dicom_layout(path: Path, series: Mapping[str, int] | None) -> Layout:
    """A DICOM tree, ZIP or file. pydicom is imported only here."""
    from medmae.cohort.dicom import find_in_dicom

    return Layout(*find_in_dicom(path, series))


def holds_dicom(path: Path) -> bool:
    """Whether there is DICOM at ``path``, or a ZIP, which may hold some; names do not count, first bytes do."""
    files = [path] if path.is_file() else (file for _, inner in walk(path, []) for file in inner)
    return any(has_dicom(file) or is_zip(file) for file in files)


def refuse_unusable(path: Path) -> None:
    """Raise for what no layout can be: nothing there, not to be read, a prepared cohort."""
    try:
        found = path.exists()
        if found and path.is_dir():
            next(path.iterdir(), None)
    except PermissionError:
        raise InputError(
            "no permission to read this", where=path, field="DATA", remedy="Change its permissions."
        ) from None
    if not found:
        parent = next((folder for folder in path.absolute().parents if folder.exists()), None)
        raise InputError(
            "there is nothing here", where=path, field="DATA", remedy=f"The path exists up to {parent}: check the rest."
        )
    if path.is_dir() and (path / "cohort.json").is_file() and (path / "studies").is_dir():
        raise InputError(
            "this is a prepared cohort, not a folder of scans",
            where=path,
            field="DATA",
            remedy="Give the folder that it was prepared from; training takes the cohort itself.",
        )


def nothing_found(path: Path, problems: list[Problem]) -> InputError:
    """Why there is no study: what is there instead."""
    if any(problem.fatal for problem in problems):
        return InputError.of(problems)
    if path.is_file() and image_stem(path) is None:
        what, found, remedy = (
            "neither an image nor a table",
            path.suffix or path.name,
            "Give NIfTI, DICOM, CSV or JSON.",
        )
    elif path.is_file():
        what, found, remedy = "the name does not tell the modality", path.name, RENAME
    else:
        files = [file for _, inner in walk(path, []) for file in inner]
        kinds = Counter("".join(file.suffixes[-2:]) or "without a suffix" for file in files)
        dicom = any(is_dicom_name(file) for file in files)
        found = ", ".join(f"{count} files {kind}" for kind, count in kinds.most_common(4)) or "an empty folder"
        what = "no studies here"
        remedy = "Not one of the DICOM files is an image: copy or export them again." if dicom else RENAME
    error = InputError(what, where=path, field="DATA", found=found, remedy=remedy)
    error.problems = [error.problem, *problems]
    return error


def without_duplicates(studies: Iterable[Study]) -> tuple[list[Study], list[Problem]]:
    """Studies whose id nobody else has, also where capitals do not count, and a problem for every other id."""
    same: dict[str, list[Study]] = {}
    for study in studies:
        same.setdefault(study.id.casefold(), []).append(study)
    problems = [
        Problem(
            f"{len(group)} studies have this id: all are left out",
            group[0].id,
            "study",
            found="; ".join(str(next(iter(study.images.values()))) for study in group),
            expected="ids that differ in more than capitals and punctuation",
            remedy="Rename the folders or files, or give the studies ids in a table (CSV).",
        )
        for group in same.values()
        if len(group) > 1
    ]
    return [group[0] for group in same.values() if len(group) == 1], problems


def capped(problems: list[Problem]) -> list[Problem]:
    """Fatal problems all; of warnings of one kind the first ``MOST_ALIKE`` and how many more there are."""
    seen: Counter[str] = Counter()
    kept = []
    for problem in problems:
        seen[problem.what] += not problem.fatal
        if problem.fatal or seen[problem.what] <= MOST_ALIKE:
            kept.append(problem)
    return kept + [
        Problem(f"{count - MOST_ALIKE} more times: {what}", fatal=False)
        for what, count in seen.items()
        if count > MOST_ALIKE
    ]
