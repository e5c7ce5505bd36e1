"""An archive (PACS) as a pipeline needs it: find studies, retrieve one, send files back, go on after an interruption.

DIMSE (PS3.7) by pynetdicom rather than DICOMweb: every archive in a hospital speaks it, DICOMweb is often an option
that nobody has switched on. pynetdicom is an optional dependency: ``pip install "medmae[archive]"``.

Nothing here writes a log, pynetdicom's own is silenced while an association is open (it quotes names and UIDs), and
what is returned shows hashes where it is printed.
"""

from __future__ import annotations

import hashlib
import re
import ssl
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Literal

from medmae.errors import InputError, MedmaeError, Problem
from medmae.imaging.dicom_out.association import (
    FIND,
    Peer,
    find,
    key,
    receive_by_get,
    receive_by_move,
    store,
    text,
    texts,
)
from medmae.imaging.dicom_out.quiet import quiet
from medmae.imaging.dicom_out.source import read_headers


def study_key(uid: str) -> str:
    """What a log may call a study: the first 16 hexadecimal digits of the SHA-256 of its UID."""
    return hashlib.sha256(uid.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class FoundStudy:
    """A study in the archive. ``uid`` is left out where it is printed; ``key`` is what logs and folders may say."""

    key: str
    modalities: tuple[str, ...]
    instances: int | None
    uid: str = field(repr=False)


@dataclass(frozen=True)
class FoundSeries:
    """A series in the archive; ``instances`` where the archive says."""

    key: str
    modality: str
    instances: int | None
    uid: str = field(repr=False)
    study_uid: str = field(repr=False)


@dataclass(frozen=True)
class Sent:
    """What became of files: stored now, there before, or refused (a problem each, by path, without identifiers)."""

    stored: tuple[Path, ...]
    present: tuple[Path, ...]
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class Retrieved:
    """Files of a study, one an instance, and what the archive failed to give."""

    files: tuple[Path, ...]
    fetched: int
    problems: tuple[Problem, ...]


def tls_context(
    authority: str | Path | None = None, certificate: str | Path | None = None, key: str | Path | None = None
) -> ssl.SSLContext:
    """What :class:`Archive` needs for TLS: 1.2 or newer, the archive's certificate and host name checked (PS3.15 B.9).

    ``authority``: PEM file of who signed the archive's certificate, without it this system's own list. ``certificate``
    and ``key``: PEM files that show who we are, for archives that ask. Raises :class:`InputError` for files that are
    missing, of another kind, or no pair.
    """
    field, file = "authority", authority
    try:
        context = ssl.create_default_context(cafile=authority)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if certificate is not None:
            field, file = "certificate", certificate
            context.load_cert_chain(certificate, key, password=_no_password)
    except OSError as error:  # that OpenSSL raises too
        reason = getattr(error, "reason", None) or error.strerror or "it is not PEM"
        raise InputError(
            "no certificate can be read from this file",
            where=str(file),
            field=field,
            found=str(reason).lower().replace("_", " "),
            expected="PEM, and with a certificate its own key, which no password protects",
        ) from None
    return context


def _no_password() -> str:
    """OpenSSL would ask at the terminal, where in a nightly run nobody sits."""
    return ""


@dataclass(frozen=True)
class Archive:
    """Where an archive is, and who we are to it. Connections are opened for each call and closed after it.

    ``host``, ``port`` and ``title`` (the called AE title) as its administrator gave them; ``own_title`` must be known
    there if it checks. ``tls``: for archives that want TLS, see :func:`tls_context`. ``timeout``: seconds without an
    answer. Every method raises :class:`MedmaeError` when the archive cannot be reached or refuses; :class:`InputError`
    for titles that are none.
    """

    host: str
    port: int
    title: str = "ANY-SCP"
    own_title: str = "MEDMAE"
    timeout: float = 60.0
    tls: ssl.SSLContext | None = None

    def __post_init__(self) -> None:
        for name in ("title", "own_title"):
            if not re.fullmatch(
                r"[\x21-\x5b\x5d-\x7e](?:[\x20-\x5b\x5d-\x7e]{0,14}[\x21-\x5b\x5d-\x7e])?", getattr(self, name)
            ):
                raise InputError(
                    "an AE title is 1 to 16 plain characters", field=name, expected="as in the archive's configuration"
                )

    @property
    def _peer(self) -> Peer:
        return Peer(self.host, self.port, self.title, self.own_title, self.timeout, self.tls)

    def echo(self) -> None:
        """Check that the archive answers (C-ECHO)."""
        with quiet(), self._peer.associate(["1.2.840.10008.1.1"]) as association:
            status = association.send_c_echo()
            if "Status" not in status or status.Status != 0:
                raise MedmaeError("the archive does not answer", where=self._peer.where, field="C-ECHO")

    def find_studies(
        self, first: date | None = None, last: date | None = None, *, modality: str | None = None
    ) -> list[FoundStudy]:
        """Studies of the days ``first`` to ``last`` (either may be open) that have a series of ``modality`` (MR, CT,
        ...), in the order of their UIDs, so that a run repeated meets them in the same order."""
        days = f"{first:%Y%m%d}-" if first else "-" if last else ""
        days += f"{last:%Y%m%d}" if last else ""
        wanted = {
            "StudyInstanceUID": "",
            "StudyDate": days,
            "ModalitiesInStudy": modality or "",
            "NumberOfStudyRelatedInstances": "",
        }
        with quiet(), self._peer.associate([FIND]) as association:
            answers = find(association, "STUDY", wanted, self._peer.where)
        studies = {}
        for answer in answers:
            uid, modalities = text(answer, "StudyInstanceUID"), texts(answer, "ModalitiesInStudy")
            # Matching by modality is optional (PS3.4 C.6.2.1.2): an archive that ignores it answers with all studies.
            if uid and (not modality or not modalities or modality in modalities):
                count = text(answer, "NumberOfStudyRelatedInstances")
                studies[uid] = FoundStudy(study_key(uid), modalities, _count(count), uid)
        return [studies[uid] for uid in sorted(studies)]

    def find_series(self, study: FoundStudy | str, *, modality: str | None = None) -> list[FoundSeries]:
        """The series of a study, of one modality if given, in the order of their UIDs."""
        uid = study if isinstance(study, str) else study.uid
        wanted = dict.fromkeys(("SeriesInstanceUID", "Modality", "NumberOfSeriesRelatedInstances"), "")
        wanted["StudyInstanceUID"] = uid
        with quiet(), self._peer.associate([FIND]) as association:
            answers = find(association, "SERIES", wanted, self._peer.where)
        series = {}
        for answer in answers:
            own, kind = text(answer, "SeriesInstanceUID"), text(answer, "Modality")
            if own and (not modality or kind == modality):
                count = _count(text(answer, "NumberOfSeriesRelatedInstances"))
                series[own] = FoundSeries(study_key(own), kind, count, own, uid)
        return [series[own] for own in sorted(series)]

    def retrieve(
        self,
        study: FoundStudy | str,
        out: str | Path,
        *,
        modality: str | None = None,
        by: Literal["get", "move"] = "get",
        listen: int = 11112,
    ) -> Retrieved:
        """Fetch a study, or its series of one modality, to the folder ``out``; instances that are there already are not
        fetched again.

        Files are what the archive sends, byte for byte, under names made from the hash of their UID. Each appears once
        it is whole, so an interrupted call can simply be repeated. ``by``: ``get`` needs one connection to the archive;
        ``move`` is for archives without C-GET: they connect back to ``own_title`` at port ``listen`` of this machine,
        which must be in their configuration, and never over TLS. Instances that the archive could not give are in
        ``problems``.
        """
        if by == "move" and self.tls is not None:
            raise InputError(
                "what an archive sends to a port of ours would come unencrypted",
                where=self._peer.where,
                field="by",
                found="move",
                expected="get, where TLS is asked for",
            )
        out = Path(out)
        files: list[Path] = []
        problems: list[Problem] = []
        fetched = 0
        for series in self.find_series(study, modality=modality):
            uids = self._instances(series)
            missing = [uid for uid in uids if not (out / f"{key(uid)}.dcm").exists()]
            if missing:
                self._fetch(series, missing if len(missing) < len(uids) else [], out, by, listen)
            here = [path for uid in uids if (path := out / f"{key(uid)}.dcm").exists()]
            files += here
            fetched += len(missing) - (len(uids) - len(here))
            if len(here) < len(uids):
                remedy = "Retrieve again; if it stays so, ask the archive's administrator (transfer syntax, rights)."
                what = "the archive did not send all instances of a series"
                problems.append(Problem(what, f"series {series.key}", None, str(len(here)), str(len(uids)), remedy))
        return Retrieved(tuple(files), fetched, tuple(problems))

    def send(self, files: Iterable[str | Path], *, again: bool = False) -> Sent:
        """Store files in the archive (C-STORE). Instances that it holds already are left alone, unless ``again``.

        medmae's own UIDs are derived from content, so an instance that is there under its UID is the same; that makes a
        repeated call cheap. Files that are refused are in ``problems``.
        """
        with quiet():
            headers, problems = read_headers([Path(path) for path in files])
        present = [] if again else self._present(headers)
        left = {path: header for path, header in headers.items() if path not in present}
        stored: list[Path] = []
        if left:
            with quiet():
                refused = store(self._peer, left, stored)
            problems += refused
        return Sent(tuple(stored), tuple(present), tuple(problems))

    def _present(self, headers: dict[Path, Any]) -> list[Path]:
        """Files whose instance the archive holds: asked series by series, not file by file."""
        there: set[str] = set()
        for study, series in sorted(
            {(text(h, "StudyInstanceUID"), text(h, "SeriesInstanceUID")) for h in headers.values()}
        ):
            there |= set(self._instances(FoundSeries("", "", None, series, study)))
        return [path for path, header in headers.items() if text(header, "SOPInstanceUID") in there]

    def _instances(self, series: FoundSeries) -> list[str]:
        wanted = {"StudyInstanceUID": series.study_uid, "SeriesInstanceUID": series.uid, "SOPInstanceUID": ""}
        with quiet(), self._peer.associate([FIND]) as association:
            answers = find(association, "IMAGE", wanted, self._peer.where)
        return sorted({text(answer, "SOPInstanceUID") for answer in answers} - {""})

    def _fetch(
        self, series: FoundSeries, uids: Sequence[str], out: Path, by: Literal["get", "move"], listen: int
    ) -> None:
        wanted: dict[str, Any] = {"StudyInstanceUID": series.study_uid, "SeriesInstanceUID": series.uid}
        if uids:  # PS3.4 C.4.3.1.3: a list of UIDs retrieves what is missing, and no more
            wanted["SOPInstanceUID"] = list(uids)
        level = "IMAGE" if uids else "SERIES"
        with quiet():
            if by == "get":
                receive_by_get(self._peer, level, wanted, out)
            else:
                receive_by_move(self._peer, level, wanted, out, listen)


def _count(value: str) -> int | None:
    return int(value) if value.isdigit() else None
