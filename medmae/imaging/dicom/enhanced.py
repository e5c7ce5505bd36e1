"""Enhanced multi-frame objects: each frame described by its own functional groups, else by the shared ones.

PS3.3 C.7.6.16: an attribute of a frame stands in an item of PerFrameFunctionalGroupsSequence, or, where all frames have
the same, in SharedFunctionalGroupsSequence, inside the one item of its group's sequence.
"""

from __future__ import annotations

from typing import Final

from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset

from medmae.imaging.dicom.header import Frame, frame_of
from medmae.imaging.dicom.opening import File
from medmae.imaging.dicom.values import Values

_KEYWORDS: Final = (
    "FrameContentSequence PlanePositionSequence PlaneOrientationSequence PixelMeasuresSequence "
    "PixelValueTransformationSequence MREchoSequence MRDiffusionSequence MRImageFrameTypeSequence "
    "CTImageFrameTypeSequence PETFrameTypeSequence MRTimingAndRelatedParametersSequence "
    "MRModifierSequence ContrastBolusUsageSequence TemporalPositionSequence"
)
_GROUPS: Final = tuple(tag_for_keyword(name) or 0 for name in _KEYWORDS.split())
_DIRECTION: Final = "DiffusionGradientDirectionSequence"


def frames_of_enhanced(dataset: Dataset, file: File) -> tuple[tuple[Frame, ...], str]:
    """(frames in the order of their pixels, why they could not be made out)."""
    top = Values(dataset)
    shared = [part for item in top.items("SharedFunctionalGroupsSequence")[:1] for part in groups(item)]
    items = top.items("PerFrameFunctionalGroupsSequence")
    count = top.integer("NumberOfFrames") or 1
    if len(items) != count:
        return (), f"{count} frames, of which {len(items)} are described"
    frames = [frame_of(Values(*groups(item), *shared, dataset), file, index) for index, item in enumerate(items)]
    return tuple(frames), ""


def groups(item: Dataset) -> list[Dataset]:
    """The items of the functional groups in ``item`` that matter here, one a group."""
    found = []
    for tag in _GROUPS:
        if tag in item and (inner := item[tag].value):
            found.append(inner[0])
            found += Values(inner[0]).items(_DIRECTION)[:1]
    return found
