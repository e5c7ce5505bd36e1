"""DICOM files, and folders of them that are whole or not there."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from medmae.errors import InputError
from medmae.imaging.dicom_out.uids import derived_uid
from medmae.imaging.files import replaced_file

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_OURS = re.compile(r"\d{4,}\.dcm")


def write_folder(out: Path, common: Dataset, parts: Sequence[Dataset]) -> list[Path]:
    """An object for each of ``parts``, with what is ``common`` to all, as ``out/0001.dcm`` and on.

    The folder takes its place in one rename, so a half-written series is never met; one that holds nothing but such
    files is replaced. Raises :class:`InputError` if it holds anything else.
    """
    if out.exists() and not (out.is_dir() and all(_OURS.fullmatch(path.name) for path in out.iterdir())):
        raise InputError(
            "this folder holds other files, which would be lost",
            where=out,
            expected="a new folder, or one with an earlier synthesis",
            remedy="Choose another folder.",
        )
    temporary = out.with_name(f".{out.name[:100]}.{secrets.token_hex(4)}.tmp")
    names = [f"{number:04d}.dcm" for number in range(1, len(parts) + 1)]
    try:
        temporary.mkdir(parents=True)
        for name, part in zip(names, parts, strict=True):
            part.update(common)
            with open(temporary / name, "wb") as target:
                _write(target, part)
        for name in names:  # after all are written: the disk then does it in one go
            with open(temporary / name, "rb+") as target:
                os.fsync(target.fileno())
        with suppress(FileNotFoundError):
            shutil.rmtree(out)
        os.replace(temporary, out)
    except OSError as error:
        found = error.strerror or type(error).__name__
        remedy = "Choose another folder, or free some space."
        raise InputError("the folder cannot be written", where=out, found=found, remedy=remedy) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [out / name for name in names]


def write_file(path: Path, dataset: Dataset) -> None:
    """One DICOM file (PS3.10), explicit VR little endian, whole or not at all."""
    with replaced_file(path) as target:
        _write(target, dataset)


def _write(target: BinaryIO, dataset: Dataset) -> None:
    from pydicom import dcmwrite
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import UID, ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UID(dataset.SOPClassUID)
    meta.MediaStorageSOPInstanceUID = UID(dataset.SOPInstanceUID)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = UID(derived_uid("implementation class"))
    meta.ImplementationVersionName = "MEDMAE"
    dataset.file_meta = meta
    dcmwrite(target, dataset, enforce_file_format=True)
