"""Series as archives keep them, compressed: the voxels are those that were compressed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gdcm
import numpy as np
import pydicom
import pytest
from pydicom.uid import JPEG2000Lossless, JPEGLossless, JPEGLosslessSV1, JPEGLSLossless, RLELossless

from medmae.errors import InputError
from tests.imaging.dicom.build import Builder, phantom
from tests.imaging.dicom.test_reading import only

LOSSLESS = {
    "JPEG lossless, first-order": (gdcm.TransferSyntax.JPEGLosslessProcess14_1, JPEGLosslessSV1),
    "JPEG lossless": (gdcm.TransferSyntax.JPEGLosslessProcess14, JPEGLossless),
    "JPEG-LS": (gdcm.TransferSyntax.JPEGLSLossless, JPEGLSLossless),
    "JPEG 2000": (gdcm.TransferSyntax.JPEG2000Lossless, JPEG2000Lossless),
    "RLE": (gdcm.TransferSyntax.RLELossless, RLELossless),
}


def compress(file: Path, syntax: int) -> None:
    """GDCM's encoders, in place."""
    reader = gdcm.ImageReader()
    reader.SetFileName(str(file))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(syntax))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(file))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()


def signed(array: np.ndarray) -> tuple[np.ndarray, Callable[[int, pydicom.FileDataset], None]]:
    """Twelve bits with a sign, as CT often has them."""

    def change(k: int, dataset: pydicom.FileDataset) -> None:
        dataset.PixelRepresentation, dataset.BitsStored, dataset.HighBit = 1, 12, 11
        dataset.RescaleSlope, dataset.RescaleIntercept = "2", "-24"

    return array.astype(np.int16) - 200, change


@pytest.mark.parametrize("name", LOSSLESS)
def test_voxels_come_out_as_they_went_in(tmp_path: Path, name: str) -> None:
    syntax, uid = LOSSLESS[name]
    for file in Builder(tmp_path / "unsigned").classic("T1"):
        compress(file, syntax)
        assert pydicom.dcmread(file).file_meta.TransferSyntaxUID == uid
    assert np.array_equal(only(tmp_path / "unsigned")[1].array, phantom())
    stored, change = signed(phantom())
    for file in Builder(tmp_path / "signed", Modality="CT").classic("CT", stored, change=change):
        compress(file, syntax)
    assert np.array_equal(only(tmp_path / "signed")[1].array, stored.astype(np.float32) * 2 - 24)


@pytest.mark.parametrize("name", ["JPEG lossless, first-order", "JPEG-LS", "JPEG 2000"])
def test_frames_of_one_file(tmp_path: Path, name: str) -> None:
    file = Builder(tmp_path).enhanced("T1")
    plain = only(tmp_path)[1].array
    compress(file, LOSSLESS[name][0])
    assert pydicom.dcmread(file).file_meta.TransferSyntaxUID == LOSSLESS[name][1]
    assert np.array_equal(only(tmp_path)[1].array, plain)


def test_damaged_compression_is_named(tmp_path: Path) -> None:
    files = Builder(tmp_path).classic("T1")
    for file in files:
        compress(file, LOSSLESS["JPEG 2000"][0])
    blob = files[4].read_bytes()
    at = blob.index(b"\xff\x4f\xff\x51") + 60  # inside the code stream that the marker begins
    files[4].write_bytes(blob[:at] + bytes(len(blob) - at - 8) + blob[-8:])
    with pytest.raises(InputError) as told:
        only(tmp_path)
    assert files[4].name in str(told.value)
