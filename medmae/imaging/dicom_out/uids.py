"""Identifiers and codes of the objects that medmae writes.

UIDs are derived from content: the bytes of an object decide its UID. Run again on the same inputs, with the same
checkpoint and version, an object has the same UID, so an archive recognises it and keeps one; whatever differs, a voxel
or a corrected patient ID, gives another UID, so no two contents ever share one. A random UID would fill an archive with
copies when a pipeline resumes; one derived from the inputs alone would let two different images pass for one.
"""

from __future__ import annotations

import hashlib
import uuid
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

SCHEME: Final = "99MEDMAE"  # private coding schemes begin with 99 (PS3.16 section 8.2)
MANUFACTURER: Final = "medmae"


def derived_uid(*parts: bytes | str) -> str:
    """A UID of the form ``2.25.<number>`` (PS3.5 section B.2) that only ``parts``, in this order, decide.

    The number is a UUID of version 8 (RFC 9562 section 5.8) filled from a SHA-256: 122 bits, so a chance collision is
    out of the question.
    """
    digest = hashlib.sha256(b"medmae")
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big") + data)  # lengths: ("ab", "c") is not ("a", "bc")
    value = bytearray(digest.digest()[:16])
    value[6] = 0x80 | value[6] & 0x0F  # version 8
    value[8] = 0x80 | value[8] & 0x3F  # the variant of RFC 9562
    return f"2.25.{uuid.UUID(bytes=bytes(value)).int}"


def content_hash(dataset: Dataset) -> bytes:
    """SHA-256 of a data set as it is encoded in a file (explicit VR, little endian)."""
    from pydicom.filebase import DicomBytesIO
    from pydicom.filewriter import write_dataset

    stream = DicomBytesIO()
    stream.is_little_endian, stream.is_implicit_VR = True, False
    write_dataset(stream, dataset)
    return hashlib.sha256(stream.getvalue()).digest()


def code(value: str, scheme: str, meaning: str) -> Dataset:
    """An item of a code sequence (PS3.3 section 8.8, Code Sequence Macro)."""
    from pydicom.dataset import Dataset

    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def private_scheme() -> Dataset:
    """An item of Coding Scheme Identification Sequence that says whose codes :data:`SCHEME` are (PS3.3 C.12.1)."""
    from pydicom.dataset import Dataset

    item = Dataset()
    item.CodingSchemeDesignator = SCHEME
    item.CodingSchemeName = "Codes of the program medmae"
    item.CodingSchemeResponsibleOrganization = MANUFACTURER
    return item


def synthesising_equipment(version: str, description: str) -> Dataset:
    """medmae as an item of Contributing Equipment Sequence (PS3.3 C.12.1).

    The purpose (109100, DCM, "Synthesizing Equipment") is the one that the note on Synthetic Data (0008,001C) names.
    """
    from pydicom.dataset import Dataset

    item = Dataset()
    item.Manufacturer = MANUFACTURER
    item.ManufacturerModelName = MANUFACTURER
    item.SoftwareVersions = version
    item.ContributionDescription = description
    item.PurposeOfReferenceCodeSequence = [code("109100", "DCM", "Synthesizing Equipment")]
    return item
