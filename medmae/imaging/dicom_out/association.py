"""The network under :mod:`medmae.imaging.dicom_out.archive`: associations, and the DIMSE services on them, by
pynetdicom."""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from medmae.errors import InputError, MedmaeError, Problem
from medmae.imaging.dicom_out.identity import plain as text
from medmae.imaging.files import replaced_file

__all__ = ["FIND", "IMAGES", "Peer", "find", "key", "receive_by_get", "receive_by_move", "store", "text", "texts"]

# Study Root Query/Retrieve Information Model (PS3.4 section C.6.2).
FIND: Final = "1.2.840.10008.5.1.4.1.2.2.1"
MOVE: Final = "1.2.840.10008.5.1.4.1.2.2.2"
GET: Final = "1.2.840.10008.5.1.4.1.2.2.3"
# Storage classes that hold images of the body in millimetres, and segmentations of them.
IMAGES: Final = {
    "1.2.840.10008.5.1.4.1.1.4": "MR",
    "1.2.840.10008.5.1.4.1.1.4.1": "MR",  # enhanced
    "1.2.840.10008.5.1.4.1.1.4.4": "MR",  # legacy converted enhanced
    "1.2.840.10008.5.1.4.1.1.2": "CT",
    "1.2.840.10008.5.1.4.1.1.2.1": "CT",
    "1.2.840.10008.5.1.4.1.1.2.2": "CT",
    "1.2.840.10008.5.1.4.1.1.128": "PT",
    "1.2.840.10008.5.1.4.1.1.130": "PT",
    "1.2.840.10008.5.1.4.1.1.128.1": "PT",
    "1.2.840.10008.5.1.4.1.1.66.4": "SEG",
}
# One presentation context for each, so that an archive can send an instance as it keeps it, and "unchanged" stays true:
# 10 classes of 9 syntaxes and the retrieval are within the 128 contexts of an association.
SYNTAXES: Final = (
    "1.2.840.10008.1.2.1",  # explicit VR little endian
    "1.2.840.10008.1.2",  # implicit VR little endian
    "1.2.840.10008.1.2.1.99",  # deflated
    "1.2.840.10008.1.2.4.70",  # JPEG lossless
    "1.2.840.10008.1.2.4.80",  # JPEG-LS lossless
    "1.2.840.10008.1.2.4.90",  # JPEG 2000 lossless
    "1.2.840.10008.1.2.4.91",  # JPEG 2000
    "1.2.840.10008.1.2.4.50",  # JPEG baseline
    "1.2.840.10008.1.2.5",  # RLE
)
SUCCESS: Final = 0x0000
PENDING: Final = (0xFF00, 0xFF01)
STORED: Final = (SUCCESS, 0xB000, 0xB006, 0xB007)  # the last three: stored, with a warning (PS3.4 table B.2-1)
CANNOT_STORE: Final = 0xA700


@dataclass(frozen=True)
class Peer:
    """An archive's address, and our own title."""

    host: str
    port: int
    title: str
    own_title: str
    timeout: float
    tls: ssl.SSLContext | None

    @property
    def where(self) -> str:
        return f"{self.title} at {self.host}:{self.port}"

    @contextmanager
    def associate(self, classes: Sequence[str], handlers: Any = None, roles: Sequence[str] = ()) -> Iterator[Any]:
        """An open association that offers ``classes``, and to store ``roles`` here. Raises :class:`MedmaeError`."""
        entity = _entity(self)
        for uid in classes:
            entity.add_requested_context(uid)
        contexts = entity.requested_contexts + [_context(uid, syntax) for uid in roles for syntax in SYNTAXES]
        yield from self._open(entity, contexts, handlers, _roles(roles))

    @contextmanager
    def associate_to_store(self, pairs: Sequence[tuple[str, str]]) -> Iterator[Any]:
        """An open association for instances of these storage classes and transfer syntaxes."""
        yield from self._open(_entity(self), [_context(*pair) for pair in pairs], None, [])

    def _open(self, entity: Any, contexts: Sequence[Any], handlers: Any, roles: Sequence[Any]) -> Iterator[Any]:
        tls = (self.tls, self.host) if self.tls is not None else None
        try:
            association = entity.associate(
                self.host,
                self.port,
                contexts=list(contexts),
                ae_title=self.title,
                evt_handlers=handlers or [],
                ext_neg=list(roles) or None,
                tls_args=tls,
            )
        except (OSError, RuntimeError, ValueError):
            association = None
        if association is None or not association.is_established:
            rejected = association is not None and association.is_rejected
            raise MedmaeError(
                "the archive refuses the association" if rejected else "the archive cannot be reached",
                where=self.where,
                remedy=f"Let its administrator allow the AE title {self.own_title}."
                if rejected
                else "Check host, port and TLS, and that it runs.",
            )
        try:
            yield association
        finally:
            if association.is_established:
                association.release()


def find(association: Any, level: str, wanted: Mapping[str, str], where: str) -> list[Any]:
    """The answers to a C-FIND at ``level``. Raises :class:`MedmaeError` if it fails."""
    answers = []
    for status, answer in association.send_c_find(_identifier(level, wanted), FIND):
        code = _code(status)
        if code in PENDING and answer is not None:
            answers.append(answer)
        elif code != SUCCESS and code not in PENDING:
            raise _failed("the query", "C-FIND", code, where)
    return answers


def receive_by_get(peer: Peer, level: str, wanted: Mapping[str, Any], out: Path) -> None:
    """C-GET: instances arrive on the association that asked for them. What fails is missing from ``out``."""
    from pynetdicom import evt

    handlers = [(evt.EVT_C_STORE, _keep, [out])]
    with peer.associate([GET], handlers, tuple(IMAGES)) as association:
        _finish(association.send_c_get(_identifier(level, wanted), GET), "C-GET", peer.where)


def receive_by_move(peer: Peer, level: str, wanted: Mapping[str, Any], out: Path, listen: int) -> None:
    """C-MOVE: the archive opens an association to us, at port ``listen``."""
    from pynetdicom import evt

    entity = _entity(peer)
    for uid in IMAGES:
        entity.add_supported_context(uid, list(SYNTAXES))
    try:
        server = entity.start_server(("", listen), block=False, evt_handlers=[(evt.EVT_C_STORE, _keep, [out])])
    except OSError as error:
        raise InputError(
            "this machine cannot listen for what the archive sends",
            field="listen",
            found=f"port {listen}: {error.strerror}",
            remedy="Choose a free port, and have the archive know it.",
        ) from None
    try:
        with peer.associate([MOVE]) as association:
            _finish(association.send_c_move(_identifier(level, wanted), peer.own_title, MOVE), "C-MOVE", peer.where)
    finally:
        server.shutdown()


def store(peer: Peer, headers: Mapping[Path, Any], stored: list[Path]) -> list[Problem]:
    """C-STORE each file; those that the archive took are added to ``stored``, the others are problems."""
    problems = []
    pairs = {path: _pair(header) for path, header in headers.items()}
    kinds = sorted(set(pairs.values()))
    for start in range(0, len(kinds), 128):  # an association holds 128 presentation contexts
        offered = kinds[start : start + 128]
        with peer.associate_to_store(offered) as association:
            for path in [path for path, pair in pairs.items() if pair in offered]:
                why = _send(association, path)
                if why is None:
                    stored.append(path)
                else:
                    remedy = "Send again; if it stays so, ask the archive's administrator."
                    problems.append(Problem("the archive did not store this file", str(path), None, why, remedy=remedy))
    return problems


def texts(answer: Any, name: str) -> tuple[str, ...]:
    """The values of an attribute with several."""
    value = answer.get(name) or ()
    return tuple(filter(None, map(str, [value] if isinstance(value, str) else value)))


def key(uid: str) -> str:
    """The name of an instance's file: a hash, since names of files end up in logs."""
    return hashlib.sha256(uid.encode()).hexdigest()[:32]


def _entity(peer: Peer) -> Any:
    try:
        from pynetdicom import AE
    except ImportError:
        raise MedmaeError(
            "archives need pynetdicom, which is not installed", remedy='Install it: pip install "medmae[archive]"'
        ) from None
    entity = AE(ae_title=peer.own_title)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = entity.connection_timeout = peer.timeout
    return entity


def _context(uid: str, syntax: str) -> Any:
    from pynetdicom import build_context

    return build_context(uid, syntax)


def _roles(uids: Sequence[str]) -> list[Any]:
    from pynetdicom import build_role

    return [build_role(uid, scp_role=True) for uid in uids]


def _identifier(level: str, wanted: Mapping[str, Any]) -> Any:
    from pydicom.dataset import Dataset

    identifier = Dataset()
    identifier.QueryRetrieveLevel = level
    for name, value in wanted.items():
        setattr(identifier, name, value)
    return identifier


def _keep(event: Any, out: Path) -> int:
    """Write an instance as it came: the data set's bytes, under a file's preamble and meta information."""
    uid = str(event.request.AffectedSOPInstanceUID)
    try:
        with replaced_file(out / f"{key(uid)}.dcm") as target:
            target.write(event.encoded_dataset())
    except InputError:
        return CANNOT_STORE
    return SUCCESS


def _finish(answers: Any, service: str, where: str) -> None:
    """Wait for the end of a retrieval. Single instances that fail show by their absence; this is for the whole."""
    for status, _ in answers:
        code = _code(status)
        if code is None or (code not in PENDING and code != SUCCESS and not 0xB000 <= code < 0xC000):
            raise _failed("the retrieval", service, code, where)


def _send(association: Any, path: Path) -> str | None:
    """None if stored, else the reason."""
    if not association.is_established:
        return "the connection was lost"
    try:
        code = _code(association.send_c_store(path))
    except ValueError:
        return "it does not accept this storage class or transfer syntax"
    except Exception:  # a damaged file makes pydicom raise many kinds, whose texts quote values
        return "the file is damaged"
    return None if code in STORED else f"status {'none' if code is None else format(code, '04X')}"


def _pair(header: Any) -> tuple[str, str]:
    return text(header, "SOPClassUID"), str(header.file_meta.TransferSyntaxUID)


def _code(status: Any) -> int | None:
    return int(status.Status) if "Status" in status else None


def _failed(what: str, service: str, code: int | None, where: str) -> MedmaeError:
    found = "no answer in time" if code is None else f"status {code:04X}"
    return MedmaeError(f"{what} failed", where=where, field=service, found=found, remedy="See the archive's own log.")
