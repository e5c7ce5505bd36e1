"""What a file's name says: its study, and whether it is a modality, a label, or nothing that is known.

The last words of a name decide: ``case_7_t1ce.nii.gz`` is the t1c of ``case_7``, ``sub-01_T2_FLAIR.nii`` a flair,
``case_7_lesion_mask.nii.gz`` a label. Words are what underscores, hyphens, dots and spaces separate; capitals do not
count. A name that ends in anything else (``t1_brain``, ``t1_reg2``) is not guessed at.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from medmae.cohort.modalities import CANONICAL, canonical_modality

IMAGE_SUFFIXES: Final = (".nii.gz", ".nii")
# Images that are recognised as such, so that they can be reported rather than passed over in silence.
FOREIGN_SUFFIXES: Final = (
    ".mha",
    ".mhd",
    ".nrrd",
    ".nhdr",
    ".mgz",
    ".mgh",
    ".hdr",
    ".dcm",
    ".ima",
    ".mnc",
    ".nii.bz2",
    ".nii.zst",
    ".nii.xz",
)


def words(text: str) -> frozenset[str]:
    """A set of words written as one line."""
    return frozenset(text.split())


# The word that makes a name a label, the words that may stand before it, and those that may follow it.
_LABEL_HEADS: Final = words(
    "seg segs segm segmentation dseg mask masks msk label labels roi lesion lesions brainmask lesionmask changemask "
    "gt groundtruth annotation aseg wmh"
)
_LABEL_BEFORE: Final = words(
    "brain head lesion lesions tumor tumour change stroke infarct wm gm csf whole core edema oedema enhancing necrosis "
    "parenchyma manual auto consensus binary tissue ground desc label"
)
_LABEL_AFTER: Final = words("manual auto final consensus expert truth rater1 rater2 rater3 rater4")
_LABEL_SYNONYMS: Final = {
    **dict.fromkeys(
        ("segs", "segm", "segmentation", "dseg", "label", "labels", "gt", "groundtruth", "ground_truth", "annotation"),
        "seg",
    ),
    **dict.fromkeys(("msk", "masks"), "mask"),
    **dict.fromkeys(("brain_mask", "brain_msk", "brain_seg"), "brainmask"),
    **dict.fromkeys(
        ("lesions", "lesion_mask", "lesionmask", "lesions_mask", "lesion_seg", "lesion_segmentation", "lesion_roi"),
        "lesion",
    ),
    "changemask": "change_mask",
    "tumour_segmentation": "tumor_segmentation",
}

_WORD: Final = re.compile(r"[^_\-.\s]+")
_SESSION: Final = re.compile(
    r"(ses|session|visit|timepoint|tp)[-_]?[a-z0-9]+|baseline|follow[-_]?up[-_]?\d*|bl|fu[-_]?\d*"
)
_SESSION_BELOW_SUBJECT: Final = re.compile(
    r"(study|scan|exam|time|t|v|mr|day|week|month|year|y|m|w|pre|post|preop|postop)[-_]?\d*"
    r"|\d{1,2}|(19|20)\d{2}([-_.]?\d{2}){2}"
)
_SUBJECT: Final = re.compile(r"(sub|subj|subject|patient|pat|pt|participant|case|p|s)[-_]?\d+")


@dataclass(frozen=True)
class FileName:
    """A file's name, read. ``prefix`` is what stands before the modality or label ("" when nothing does)."""

    path: Path
    stem: str
    prefix: str
    modality: str | None = None
    label: str | None = None


def image_stem(path: Path) -> str | None:
    """The name without its image suffix, or None when this is not a format that can be read."""
    for suffix in IMAGE_SUFFIXES:
        if path.name.lower().endswith(suffix) and len(path.name) > len(suffix):
            return path.name[: -len(suffix)]
    return None


def is_foreign_image(path: Path) -> bool:
    """Whether this is a medical image in a format that is not read yet."""
    return path.name.lower().endswith(FOREIGN_SUFFIXES)


def is_dicom_name(path: Path) -> bool:
    """Whether this is DICOM by its name; many DICOM files have no suffix, so a name alone does not rule it out."""
    return path.name.lower().endswith((".dcm", ".ima"))


def read_name(path: Path) -> FileName:
    """What the name of an image file says. ``path`` must end in one of ``IMAGE_SUFFIXES``."""
    stem = image_stem(path) or path.name
    found = [(match.group().lower(), match.start()) for match in _WORD.finditer(stem)]
    for take in (3, 2, 1):  # "t2_flair" before "flair"
        if len(found) >= take:
            modality = canonical_modality("".join(word for word, _ in found[-take:]))
            if modality:
                return FileName(path, stem, _before(stem, found[-take][1]), modality=modality)
    first = _label_start([word for word, _ in found])
    if first is None:
        return FileName(path, stem, stem)
    label = label_name("_".join(word for word, _ in found[first:]))
    return FileName(path, stem, _before(stem, found[first][1]), label=label)


def label_name(name: str) -> str:
    """A label's name in one spelling: lower case, words joined by ``_``, common synonyms of seg and mask merged."""
    parts = [word.lower() for word in _WORD.findall(name)]
    if len(parts) > 1:  # BIDS entities that say nothing by themselves
        parts = [word for word in parts if word not in ("desc", "label")] or parts
    joined = "_".join(parts)
    return _LABEL_SYNONYMS.get(joined, re.sub(r"[^a-z0-9_]", "", joined) or "seg")


def is_label_name(name: str) -> bool:
    """Whether all of ``name`` reads as a label's name ("seg", "lesion mask")."""
    return _label_start([word.lower() for word in _WORD.findall(name)]) == 0


def _label_start(name: list[str]) -> int | None:
    """Where in ``name`` a label's name that runs to the end begins."""
    last = len(name) - 1
    while last > 0 and name[last] in _LABEL_AFTER and name[last - 1] in _LABEL_HEADS | _LABEL_AFTER | {"ground"}:
        last -= 1
    if last < 0 or not (name[last] in _LABEL_HEADS or name[last : last + 2] == ["ground", "truth"]):
        return None
    first = last
    while first > 0 and (name[first - 1] in _LABEL_BEFORE or canonical_modality(name[first - 1])):
        first -= 1
    return first


def _before(stem: str, start: int) -> str:
    return stem[:start].rstrip("_-. ")


def own_name(name: str) -> str:
    """A name that no modality has, made usable as a modality's name and a file's: lower case, digits and ``_``."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def modality_name(name: str) -> str | None:
    """The canonical name where there is one, else the name itself in safe spelling, else None."""
    return canonical_modality(name) or own_name(name) or None


def in_order(modalities: Iterable[str]) -> tuple[str, ...]:
    """Modalities without repeats, canonical ones first and in canonical order."""
    rank = {name: place for place, name in enumerate(CANONICAL)}
    return tuple(sorted(set(modalities), key=lambda name: (rank.get(name, len(rank)), name)))


def safe_id(text: str) -> str:
    """``text`` as something every file system takes as a name; long names end in a digest instead."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._-")
    if len(safe) > 100:
        safe = f"{safe[:87].rstrip('._-')}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    return safe or "study-" + hashlib.sha256(text.encode()).hexdigest()[:12]


def looks_like_session(name: str, *, below_subject: bool) -> bool:
    """Whether a folder's name is a session's; ``below_subject`` also takes what only a place below a subject tells."""
    name = name.lower()
    if _SUBJECT.fullmatch(name):
        return False
    return bool(_SESSION.fullmatch(name) or (below_subject and _SESSION_BELOW_SUBJECT.fullmatch(name)))


def looks_like_subject(name: str) -> bool:
    return bool(_SUBJECT.fullmatch(name.lower()))
