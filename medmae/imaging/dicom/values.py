"""Values of DICOM elements straight from their bytes.

pydicom tells invalid values aloud, in warnings and log records that quote them, and a patient's name may stand in any
text attribute. Reading the bytes of the few elements that matter says nothing, bears malformed values, and is faster.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

# Private elements, by number, with the representation that their makers use.
PRIVATE: Final = {
    "SiemensImagesInMosaic": (0x0019100A, "US"),
    "SiemensBValue": (0x0019100C, "IS"),
    "SiemensCSAImageHeader": (0x00291010, "OB"),
    "PhilipsBValue": (0x20011003, "FL"),
    "GEBValue": (0x00431039, "IS"),
}
_BINARY: Final = {"US": "u2", "SS": "i2", "UL": "u4", "SL": "i4", "FL": "f4", "FD": "f8", "UV": "u8", "SV": "i8"}


@lru_cache(maxsize=256)
def tag_and_vr(keyword: str) -> tuple[int, str]:
    """Number and value representation of an element; those of ``PRIVATE`` under their names here."""
    if keyword in PRIVATE:
        return PRIVATE[keyword]
    tag = tag_for_keyword(keyword)
    assert tag is not None, keyword
    return tag, dictionary_VR(tag)


def syntax_of(dataset: Dataset) -> str:
    """The transfer syntax that a data set's file states, else the one that its elements are written in."""
    stated = Values(dataset.file_meta).text("TransferSyntaxUID") if hasattr(dataset, "file_meta") else ""
    implicit, little = dataset.original_encoding
    plain = ImplicitVRLittleEndian if implicit else (ExplicitVRLittleEndian if little else ExplicitVRBigEndian)
    return stated or str(plain)


class Values:
    """Elements by keyword, of the first of some data sets that holds them (per-frame before shared before the rest)."""

    def __init__(self, *datasets: Dataset) -> None:
        self.datasets = datasets

    def raw(self, keyword: str) -> tuple[Any, str, bool] | None:
        """(value, representation, little endian) or None when no data set has the element, or it is empty."""
        tag, known = tag_and_vr(keyword)
        for dataset in self.datasets:
            if tag in dataset:
                element: Any = dataset.get_item(tag)
                if isinstance(element, RawDataElement):
                    vr = known if element.VR in (None, "UN") else element.VR
                    if element.value:
                        return element.value, vr, element.is_little_endian
                else:  # one that pydicom has taken apart already
                    return None if element.value in (None, "") else (element.value, element.VR, True)
        return None

    def texts(self, keyword: str) -> tuple[str, ...]:
        """The values as text without padding, undecoded beyond Latin-1: only ASCII words of it are looked at."""
        found = self.raw(keyword)
        if found is None:
            return ()
        value = found[0]
        if isinstance(value, bytes):
            value = value.decode("latin-1").split("\\")
        elif isinstance(value, str) or not isinstance(value, Sequence):
            value = [value]
        return tuple(str(part).strip(" \0") for part in value)

    def text(self, keyword: str) -> str:
        """The first value as text, "" when there is none."""
        return next(iter(self.texts(keyword)), "")

    def numbers(self, keyword: str) -> tuple[float, ...]:
        """All values as finite numbers; () when there are none or one of them is not."""
        found = self.raw(keyword)
        if found is None:
            return ()
        value, vr, little = found
        try:
            if isinstance(value, bytes) and vr in _BINARY:
                numbers = np.frombuffer(value, ("<" if little else ">") + _BINARY[vr]).astype(float).tolist()
            else:
                numbers = [float(part) for part in self.texts(keyword) if part]
        except ValueError:
            return ()
        return tuple(numbers) if all(map(math.isfinite, numbers)) else ()

    def number(self, keyword: str) -> float | None:
        """The first value as a number, or None."""
        return next(iter(self.numbers(keyword)), None)

    def integer(self, keyword: str) -> int | None:
        number = self.number(keyword)
        return None if number is None else int(number)

    def items(self, keyword: str) -> list[Dataset]:
        """The items of a sequence, [] when it is not there."""
        tag, _ = tag_and_vr(keyword)
        for dataset in self.datasets:
            if tag in dataset:
                value = dataset[tag].value
                return list(value) if isinstance(value, Sequence) and not isinstance(value, bytes | str) else []
        return []

    def blob(self, keyword: str) -> bytes:
        """The value's bytes as they are."""
        found = self.raw(keyword)
        return found[0] if found is not None and isinstance(found[0], bytes) else b""
