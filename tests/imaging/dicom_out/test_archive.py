"""The archive client against a small archive made with pynetdicom in this process: failures, interruptions, silence."""

from __future__ import annotations

import logging
import ssl
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pydicom
import pytest
import trustme
from pydicom.dataset import Dataset

from medmae.errors import InputError, MedmaeError
from medmae.imaging.dicom_out.archive import Archive, study_key, tls_context
from tests.imaging.dicom_out.made_series import affine, write_series

pynetdicom = pytest.importorskip("pynetdicom", reason="pynetdicom is not installed")
FIND, GET = "1.2.840.10008.5.1.4.1.2.2.1", "1.2.840.10008.5.1.4.1.2.2.3"
SHAPE = (6, 5, 4)


class Small:
    """Holds instances; ``withheld`` are known but never sent; ``refused`` are not stored. Ignores matching by modality,
    as the standard allows."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.held: dict[str, Dataset] = {}
        self.withheld: set[str] = set()
        self.refused: set[str] = set()
        self.given: list[str] = []
        self.entity = pynetdicom.AE(ae_title="SMALL")
        self.entity.supported_contexts = pynetdicom.AllStoragePresentationContexts
        for context in self.entity.supported_contexts:
            context.scp_role, context.scu_role = True, True
        for uid in (FIND, GET, "1.2.840.10008.1.1"):
            self.entity.add_supported_context(uid)
        handlers = [
            (pynetdicom.evt.EVT_C_STORE, self.store),
            (pynetdicom.evt.EVT_C_FIND, self.find),
            (pynetdicom.evt.EVT_C_GET, self.get),
        ]
        self.server = self.entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers, ssl_context=tls)
        self.archive = Archive("127.0.0.1", self.server.server_address[1], "SMALL", timeout=10)

    def store(self, event: Any) -> int:
        one = event.dataset
        one.file_meta = event.file_meta
        if one.SOPInstanceUID in self.refused:
            return 0xA700
        self.held[one.SOPInstanceUID] = one
        return 0x0000

    def matches(self, wanted: Dataset) -> list[Dataset]:
        names = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
        asked = {name: wanted.get(name) for name in names if wanted.get(name)}
        asked = {name: [value] if isinstance(value, str) else list(value) for name, value in asked.items()}
        return [one for one in self.held.values() if all(one[name].value in values for name, values in asked.items())]

    def find(self, event: Any) -> Iterator[tuple[int, Dataset | None]]:
        name = {"STUDY": "StudyInstanceUID", "SERIES": "SeriesInstanceUID", "IMAGE": "SOPInstanceUID"}
        level = event.identifier.QueryRetrieveLevel
        for value, one in {one[name[level]].value: one for one in self.matches(event.identifier)}.items():
            answer = Dataset()
            answer.QueryRetrieveLevel = level
            answer.StudyInstanceUID = one.StudyInstanceUID
            setattr(answer, name[level], value)
            answer.Modality, answer.ModalitiesInStudy, answer.PatientName = one.Modality, one.Modality, one.PatientName
            yield 0xFF00, answer

    def get(self, event: Any) -> Iterator[Any]:
        found = [one for one in self.matches(event.identifier) if one.SOPInstanceUID not in self.withheld]
        yield len(found)
        for one in found:
            self.given.append(one.SOPInstanceUID)
            yield 0xFF00, one


@pytest.fixture
def small() -> Iterator[Small]:
    made = Small()
    yield made
    made.server.shutdown()


def uid(path: Path) -> str:
    return str(pydicom.dcmread(path).SOPInstanceUID)


def test_a_repeated_retrieval_fetches_what_is_missing_and_no_more(small: Small, tmp_path: Path) -> None:
    files = write_series(tmp_path / "in", affine(), SHAPE)
    assert len(small.archive.send(files).stored) == 4
    (study,) = small.archive.find_studies()
    first = small.archive.retrieve(study, tmp_path / "out")
    assert first.fetched == 4 and {uid(path) for path in first.files} == {uid(path) for path in files}
    gone = uid(first.files[1])
    first.files[1].unlink()
    small.given.clear()
    again = small.archive.retrieve(study, tmp_path / "out")
    assert small.given == [gone] and again.files == first.files
    small.given.clear()
    assert small.archive.retrieve(study, tmp_path / "out").fetched == 0 and not small.given


def test_files_are_sent_once_and_refusals_named(small: Small, tmp_path: Path) -> None:
    files = write_series(tmp_path / "in", affine(), SHAPE)
    small.refused = {uid(files[2])}
    note = tmp_path / "note.txt"
    note.write_text("no image")
    sent = small.archive.send([*files, note])
    assert len(sent.stored) == 3 and not sent.present
    assert {problem.where for problem in sent.problems} == {str(files[2]), str(note)}
    assert [problem.found for problem in sent.problems if problem.where == str(files[2])] == ["status A700"]
    small.refused.clear()
    resumed = small.archive.send(files)
    assert resumed.stored == (files[2],) and len(resumed.present) == 3
    assert len(small.archive.send(files, again=True).stored) == 4


def test_instances_that_the_archive_keeps_back_are_told(small: Small, tmp_path: Path) -> None:
    files = write_series(tmp_path / "in", affine(), SHAPE)
    small.archive.send(files)
    small.withheld = {uid(files[0])}
    got = small.archive.retrieve(small.archive.find_studies()[0], tmp_path / "out")
    assert len(got.files) == got.fetched == 3
    (problem,) = got.problems
    assert (problem.found, problem.expected) == ("3", "4") and str(
        pydicom.dcmread(files[0]).StudyInstanceUID
    ) not in str(got)


def test_studies_of_other_modalities_are_left_out_though_the_archive_sends_them(small: Small, tmp_path: Path) -> None:
    mr = write_series(tmp_path / "mr", affine(), SHAPE)
    ct = write_series(tmp_path / "ct", affine(), SHAPE, Modality="CT")
    small.archive.send([*mr, *ct])
    assert len(small.archive.find_studies()) == 2
    (study,) = small.archive.find_studies(date(2024, 1, 1), date(2024, 12, 31), modality="MR")
    assert study.uid == pydicom.dcmread(mr[0]).StudyInstanceUID and study.key == study_key(study.uid)
    assert not small.archive.find_series(study, modality="CT")


def test_neither_logs_nor_what_is_printed_hold_an_identifier(
    small: Small, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Even where the application logs everything; pynetdicom's own log would quote queries and answers."""
    files = write_series(tmp_path / "in", affine(), SHAPE, PatientName="Zebrowski^A", PatientID="Q7654321")
    with caplog.at_level(logging.DEBUG), caplog.at_level(logging.DEBUG, "pynetdicom"):
        shown = [small.archive.send(files)]
        studies = small.archive.find_studies()
        shown += [studies, small.archive.find_series(studies[0]), small.archive.retrieve(studies[0], tmp_path / "out")]
    one = pydicom.dcmread(files[0])
    text = caplog.text + repr(shown) + " ".join(path.name for path in (tmp_path / "out").iterdir())
    for secret in ("Zebrowski", "Q7654321", one.StudyInstanceUID, one.SeriesInstanceUID, one.SOPInstanceUID):
        assert str(secret) not in text


def test_an_archive_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(MedmaeError, match="PACS at 127.0.0.1:1: the archive cannot be reached.*Check host, port"):
        Archive("127.0.0.1", 1, "PACS", timeout=2).find_studies()


def test_an_archive_that_does_not_know_us_says_so(small: Small) -> None:
    small.entity.require_calling_aet = ["SOMEBODY"]
    with pytest.raises(MedmaeError, match="refuses the association.*allow the AE title MEDMAE"):
        small.archive.echo()


def test_titles_are_checked() -> None:
    for title in ("", "seventeen letters", "a\\b", " x"):
        with pytest.raises(InputError, match="AE title"):
            Archive("host", 104, title)
    Archive("host", 104, "MY PACS")


def test_without_pynetdicom_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynetdicom", None)
    with pytest.raises(MedmaeError, match=r"pip install \"medmae\[archive\]\""):
        Archive("127.0.0.1", 1).echo()


@pytest.fixture
def certificates(tmp_path: Path) -> tuple[trustme.CA, Path]:
    """An authority, and a folder with its certificate, ours, and another authority's."""
    authority, other = trustme.CA(), trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    other.cert_pem.write_to_path(str(tmp_path / "other.pem"))
    ours = authority.issue_cert("medmae.example")
    ours.cert_chain_pems[0].write_to_path(str(tmp_path / "ours.pem"))
    ours.private_key_pem.write_to_path(str(tmp_path / "ours.key"))
    return authority, tmp_path


@pytest.fixture
def secured(certificates: tuple[trustme.CA, Path]) -> Iterator[Small]:
    """An archive that wants TLS, and to know who calls."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificates[0].issue_cert("127.0.0.1").configure_cert(context)
    certificates[0].configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    made = Small(context)
    yield made
    made.server.shutdown()


def test_over_tls_both_sides_know_each_other(
    secured: Small, certificates: tuple[trustme.CA, Path], tmp_path: Path
) -> None:
    pem = certificates[1]
    tls = tls_context(pem / "authority.pem", pem / "ours.pem", pem / "ours.key")
    archive = replace(secured.archive, tls=tls)
    archive.echo()
    files = write_series(tmp_path / "in", affine(), SHAPE)
    assert len(archive.send(files).stored) == 4
    (study,) = archive.find_studies()
    got = archive.retrieve(study, tmp_path / "out")
    assert {uid(path) for path in got.files} == {uid(path) for path in files}
    with pytest.raises(InputError, match="unencrypted"):
        archive.retrieve(study, tmp_path / "moved", by="move")


@pytest.mark.parametrize("wrong", ["authority", "nobody", "plain", "host"])
def test_without_trust_nothing_is_said(secured: Small, certificates: tuple[trustme.CA, Path], wrong: str) -> None:
    pem = certificates[1]
    ours = () if wrong == "nobody" else (pem / "ours.pem", pem / "ours.key")
    tls = tls_context(pem / f"{'other' if wrong == 'authority' else 'authority'}.pem", *ours)
    archive = replace(secured.archive, tls=None if wrong == "plain" else tls)
    if wrong == "host":
        archive = replace(archive, host="localhost")  # the certificate is of 127.0.0.1
    with pytest.raises(MedmaeError, match="cannot be reached.*TLS"):
        archive.echo()


def test_files_that_are_no_certificates_are_named(certificates: tuple[trustme.CA, Path], tmp_path: Path) -> None:
    pem = certificates[1]
    with pytest.raises(InputError, match="gone.pem: authority: .*no such file"):
        tls_context(tmp_path / "gone.pem")
    (tmp_path / "note.pem").write_text("no certificate")
    with pytest.raises(InputError, match="note.pem: authority"):
        tls_context(tmp_path / "note.pem")
    with pytest.raises(InputError, match="ours.pem: certificate"):
        tls_context(pem / "authority.pem", pem / "ours.pem", pem / "note.pem")
