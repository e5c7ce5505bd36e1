"""What a segment is, in codes: SNOMED CT and NCI Thesaurus where a name is known, medmae's own code where it is not.

Codes are those of PS3.16 CID 7150 (categories) and CID 7151 (types); their meanings as in the standard's tables.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Final

from medmae.imaging.dicom_out.uids import SCHEME


@dataclass(frozen=True)
class Coded:
    """A code, its scheme and its meaning (PS3.3 section 8.8)."""

    value: str
    scheme: str
    meaning: str


@dataclass(frozen=True)
class SegmentCode:
    """Category and type of what a segment shows (PS3.3 C.8.20.4)."""

    category: Coded
    type: Coded


ABNORMAL: Final = Coded("49755003", "SCT", "Morphologically Abnormal Structure")
ANATOMY: Final = Coded("91723000", "SCT", "Anatomical Structure")
TISSUE: Final = Coded("85756007", "SCT", "Tissue")
FLUID: Final = Coded("91720002", "SCT", "Body Substance")

_KNOWN: Final = {
    "edema": SegmentCode(ABNORMAL, Coded("79654002", "SCT", "Edema")),
    "enhancing tumor": SegmentCode(ABNORMAL, Coded("C113842", "NCIt", "Enhancing Lesion")),
    "hemorrhage": SegmentCode(ABNORMAL, Coded("50960005", "SCT", "Hemorrhage")),
    "lesion": SegmentCode(ABNORMAL, Coded("52988006", "SCT", "Lesion")),
    "brain lesion": SegmentCode(ABNORMAL, Coded("301766008", "SCT", "Lesion of Brain")),
    "mass": SegmentCode(ABNORMAL, Coded("4147007", "SCT", "Mass")),
    "necrosis": SegmentCode(ABNORMAL, Coded("6574001", "SCT", "Necrosis")),
    "tumor": SegmentCode(ABNORMAL, Coded("108369006", "SCT", "Neoplasm")),
    "amygdala": SegmentCode(ANATOMY, Coded("4958002", "SCT", "Amygdala")),
    "brain": SegmentCode(ANATOMY, Coded("12738006", "SCT", "Brain")),
    "brain stem": SegmentCode(ANATOMY, Coded("119238007", "SCT", "Brain Stem")),
    "caudate": SegmentCode(ANATOMY, Coded("11000004", "SCT", "Caudate Nucleus")),
    "hippocampus": SegmentCode(ANATOMY, Coded("5366008", "SCT", "Hippocampus")),
    "liver": SegmentCode(ANATOMY, Coded("10200004", "SCT", "Liver")),
    "putamen": SegmentCode(ANATOMY, Coded("89278009", "SCT", "Putamen")),
    "spleen": SegmentCode(ANATOMY, Coded("78961009", "SCT", "Spleen")),
    "thalamus": SegmentCode(ANATOMY, Coded("42695009", "SCT", "Thalamus")),
    "ventricles": SegmentCode(ANATOMY, Coded("35764002", "SCT", "Brain ventricle")),
    "gray matter": SegmentCode(TISSUE, Coded("389081007", "SCT", "Gray Matter")),
    "white matter": SegmentCode(TISSUE, Coded("389080008", "SCT", "White Matter")),
    "csf": SegmentCode(FLUID, Coded("65216001", "SCT", "Cerebrospinal Fluid")),
}
_SYNONYMS: Final = {
    "oedema": "edema",
    "peritumoral edema": "edema",
    "enhancing tumour": "enhancing tumor",
    "enhancing lesion": "enhancing tumor",
    "haemorrhage": "hemorrhage",
    "lesions": "lesion",
    "necrotic core": "necrosis",
    "neoplasm": "tumor",
    "tumour": "tumor",
    "brainstem": "brain stem",
    "ventricle": "ventricles",
    "grey matter": "gray matter",
    "cerebrospinal fluid": "csf",
}


def segment_code(name: str) -> SegmentCode:
    """The codes for a label's name. One that is not known is a tissue of a type of medmae's own coding scheme, whose
    code value is made from the name and whose meaning is the name."""
    key = " ".join(re.split(r"[\W_]+", name.strip().lower()))
    key = _SYNONYMS.get(key, key)
    if key in _KNOWN:
        return _KNOWN[key]
    value = hashlib.sha256(name.encode()).hexdigest()[:12].upper()
    return SegmentCode(TISSUE, Coded(f"SEG-{value}", SCHEME, name[:64]))
