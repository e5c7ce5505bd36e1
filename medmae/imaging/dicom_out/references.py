"""Which images a synthesised slice was made from, as DICOM says it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from medmae.imaging.dicom_out.source import SourceImage, SourceSeries
from medmae.imaging.dicom_out.stack import Stack
from medmae.imaging.dicom_out.uids import code

if TYPE_CHECKING:
    from pydicom.dataset import Dataset


def images_near(series: SourceSeries, stack: Stack) -> list[list[SourceImage]]:
    """For each slice of ``stack``, the images of ``series`` that it lies on or between; all where places are unknown.

    A network sees the whole volume. Yet naming every image in every slice makes headers larger than the pixels (a
    study of 3 x 240 slices: 100 kB a slice), and a reader who follows a reference wants the place. Source Image
    Sequence is of type 3; the series that the network was given are all named by Referenced Series Sequence.
    """
    far = _distances(series, stack)
    if far is None:
        return [list(series.images)] * len(stack.array)
    reach = np.maximum(stack.spacing / 2, far.min(axis=0)) + 1e-3
    return [[series.images[place] for place in np.flatnonzero(column)] for column in (far <= reach).T]


def _distances(series: SourceSeries, stack: Stack) -> np.ndarray | None:
    """How far each image's planes are from the middle of each slice, mm: (images, slices); None where not all say."""
    rows, columns = stack.array.shape[1:]
    down, along = stack.pixel_spacing
    middles = stack.positions + stack.orientation.T @ [along * (columns - 1) / 2, down * (rows - 1) / 2]
    distances = []
    for image in series.images:
        if image.positions is None or image.orientation is None:
            return None
        normal = np.cross(*image.orientation)
        heights = image.positions @ normal  # one a frame
        distances.append(np.abs(heights[:, None] - middles @ normal).min(axis=0))
    return np.array(distances)


def source_item(image: SourceImage) -> Dataset:
    """An item of Source Image Sequence (General Reference Module, PS3.3 C.12.4), its purpose from CID 7202."""
    item = _instance(image)
    item.PurposeOfReferenceCodeSequence = [code("121322", "DCM", "Source image for image processing operation")]
    return item


def add_hierarchy(dataset: Dataset, images: Sequence[SourceImage], own_study: str) -> None:
    """Common Instance Reference Module (PS3.3 C.12.2): study and series of every instance that is referenced."""
    from pydicom.dataset import Dataset

    studies: dict[str, dict[str, list[SourceImage]]] = {}
    for image in images:
        in_study = studies.setdefault(image.uid("StudyInstanceUID"), {})
        in_study.setdefault(image.uid("SeriesInstanceUID"), []).append(image)
    own = studies.pop(own_study, {})
    if own:
        dataset.ReferencedSeriesSequence = list(_series_items(own))
    others = []
    for study, in_study in studies.items():
        item = Dataset()
        item.StudyInstanceUID = study
        item.ReferencedSeriesSequence = list(_series_items(in_study))
        others.append(item)
    if others:
        dataset.StudiesContainingOtherReferencedInstancesSequence = others


def _series_items(in_study: dict[str, list[SourceImage]]) -> Iterator[Dataset]:
    from pydicom.dataset import Dataset

    for uid, images in in_study.items():
        item = Dataset()
        item.SeriesInstanceUID = uid
        item.ReferencedInstanceSequence = [_instance(image) for image in images]
        yield item


def _instance(image: SourceImage) -> Dataset:
    from pydicom.dataset import Dataset

    item = Dataset()
    item.ReferencedSOPClassUID = image.uid("SOPClassUID")
    item.ReferencedSOPInstanceUID = image.uid("SOPInstanceUID")
    return item
