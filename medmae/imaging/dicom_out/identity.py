"""What an output object takes over from its template: an allow-list, so that nothing else can leak.

Patient and study modules tie the object to the patient's study; beyond UIDs, nothing else of a header is copied, no
private tag and no free text. A name that somebody typed into a description, a comment or an accession number stays
behind.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from medmae.imaging.dicom_out.uids import derived_uid

if TYPE_CHECKING:
    from pydicom.dataelem import RawDataElement
    from pydicom.dataset import Dataset

UTF8: Final = "ISO_IR 192"

# Patient Module, PS3.3 C.7.1.1: the attributes of type 2, and what tells two patients of the same ID apart.
PATIENT_TYPE_2: Final = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex")
PATIENT_TYPE_3: Final = ("IssuerOfPatientID", "TypeOfPatientID", "PatientIdentityRemoved", "DeidentificationMethod")

# General Study Module, PS3.3 C.7.2.1, all of type 2; the value is the form that the standard gives dates and times, or
# an identifier without spaces. Referring Physician's Name, of type 2 too, is written empty.
STUDY: Final[Mapping[str, str]] = {
    "StudyDate": r"\d{8}",
    "StudyTime": r"\d{2}(\d{2}(\d{2}(\.\d{1,6})?)?)?",
    "AccessionNumber": r"[A-Za-z0-9._/-]{1,16}",
    "StudyID": r"[A-Za-z0-9._/-]{1,16}",
}
# PS3.3 C.7.3.1.1.2; without Patient Position a viewer cannot relate the images to the equipment.
PATIENT_POSITIONS: Final = (
    *("HFP", "HFS", "HFDR", "HFDL", "FFDR", "FFDL", "FFP", "FFS"),
    *("LFP", "LFS", "RFP", "RFS", "AFDR", "AFDL", "PFDR", "PFDL"),
)
# Defined terms of PS3.16 annex L that a brain model meets. Others are left out: Body Part Examined is of type 3.
BODY_PARTS: Final = ("HEAD", "BRAIN", "HEADNECK", "NECK", "SKULL", "WHOLEBODY", "CHEST", "ABDOMEN", "PELVIS")


def identity(header: Dataset, raw: Mapping[str, RawDataElement]) -> Dataset:
    """The patient and study modules of ``header`` for a new object, and the character set they are in; ``raw`` as from
    :func:`raw_texts`.

    Text is brought from the template's character set to Unicode (``ISO_IR 192``). Where it does not decode in the set
    that the template declares, a common fault, its bytes and its character set are kept as they are: a wrong guess
    would change a patient's name. Names of attributes that are of type 2 and absent are there, empty.
    """
    from pydicom.dataset import Dataset

    result = Dataset()
    texts = _decoded(header, raw)
    if texts is None:
        _keep_raw(header, raw, result)
    else:
        result.SpecificCharacterSet = UTF8
        for name, text in texts.items():
            setattr(result, name, text)
    for name in PATIENT_TYPE_2:
        if name not in result:
            setattr(result, name, "")
    _complete_deidentification(result)
    result.StudyInstanceUID = plain(header, "StudyInstanceUID")
    words = _name_words(header)
    for name, form in STUDY.items():
        value = plain(header, name)
        fits = re.fullmatch(form, value) and not any(word in value.casefold() for word in words)
        setattr(result, name, value if fits else "")
    result.ReferringPhysicianName = ""
    zone = plain(header, "TimezoneOffsetFromUTC")  # SOP Common, PS3.3 C.12.1: what the study's time is relative to
    if re.fullmatch(r"[+-]\d{4}", zone):
        result.TimezoneOffsetFromUTC = zone
    return result


def raw_texts(header: Dataset) -> dict[str, RawDataElement]:
    """The patient's attributes as bytes. To be taken at once: pydicom decodes a value for good when it is asked for."""
    from pydicom.dataelem import RawDataElement

    found: dict[str, Any] = {name: header.get_item(name) for name in (*PATIENT_TYPE_2, *PATIENT_TYPE_3)}
    return {name: element for name, element in found.items() if isinstance(element, RawDataElement)}


def is_unicode(dataset: Dataset) -> bool:
    """Whether ``dataset`` can hold any character, or only what its template's character set can."""
    return bool(dataset.get("SpecificCharacterSet") == UTF8)


def frame_of_reference(header: Dataset) -> str:
    """The template's Frame of Reference UID (PS3.3 C.7.4.1). A template without one gives a UID of its series: its
    images share coordinates with one another and, for all that is known, with no other series."""
    known = plain(header, "FrameOfReferenceUID")
    return known if is_uid(known) else derived_uid("frame of reference", plain(header, "SeriesInstanceUID"))


def is_uid(text: str) -> bool:
    """Whether this is digits and dots, as a UID is. Leading zeros, which many archives hold though PS3.5 section 9.1
    forbids them, are let pass: references must name what is there."""
    return re.fullmatch(r"[0-9][0-9.]{0,63}", text) is not None


def plain(header: Dataset, name: str) -> str:
    """The value of an attribute that is ASCII by its VR, as text; empty if absent or not readable."""
    try:
        value = header.get(name)
    except Exception:  # pydicom raises many kinds for damaged values
        return ""
    return "" if value is None else str(value).strip(" \0")


def _decoded(header: Dataset, names: Iterable[str]) -> dict[str, str] | None:
    """The texts of the attributes, or None if one does not decode in the declared character set."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # pydicom warns where it replaces what it cannot decode
            texts = {name: _text(header[name].value) for name in names}
    except Exception:
        return None
    declared = [str(term) for term in _terms(header) if str(term).strip() not in ("", "ISO_IR 6", "ISO 2022 IR 6")]
    if not declared and not all(text.isascii() for text in texts.values()):
        return None  # the default repertoire has no such characters; pydicom takes Latin 1 for granted
    return texts


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _terms(header: Dataset) -> list[str]:
    value = header.get("SpecificCharacterSet")
    return [value] if isinstance(value, str) else list(value or ())


def _keep_raw(header: Dataset, raw: Mapping[str, RawDataElement], result: Dataset) -> None:
    """The elements with their bytes as they are in the file."""
    from pydicom.datadict import dictionary_VR

    terms = _terms(header)
    if terms:
        result.SpecificCharacterSet = terms
    for element in raw.values():
        result[element.tag] = element._replace(VR=dictionary_VR(element.tag), is_implicit_VR=False)


def _complete_deidentification(result: Dataset) -> None:
    """De-identification Method is of type 1C: required where Patient Identity Removed is YES (PS3.3 C.7.1.1)."""
    removed = plain(result, "PatientIdentityRemoved")
    if removed not in ("YES", "NO") and "PatientIdentityRemoved" in result:
        del result.PatientIdentityRemoved
    if removed != "YES":
        result.pop("DeidentificationMethod", None)
    elif not plain(result, "DeidentificationMethod"):
        result.DeidentificationMethod = "See the source images"


def _name_words(header: Dataset) -> list[str]:
    """The words of the patient's name, to be found in no identifier that is copied."""
    words = re.split(r"[\W_]+", plain(header, "PatientName").casefold())
    return [word for word in words if len(word) > 2]
