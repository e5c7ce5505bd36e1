"""What a header says of an image's contrast, and of what tells images of one series apart."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from medmae.imaging.dicom.values import Values


@dataclass(frozen=True)
class Facts:
    """What tells contrasts apart, of one frame. Times in ms, b-value in s/mm²; None is not stated.

    ``text`` (the series' description, else the protocol's name), ``protocol`` and ``sequence`` are lower case.
    ``words``: ScanningSequence, SequenceVariant and what enhanced objects say instead.
    """

    modality: str = ""
    image_type: tuple[str, ...] = ()
    text: str = field(default="", repr=False)
    protocol: str = field(default="", repr=False)
    sequence: str = field(default="", repr=False)
    words: tuple[str, ...] = ()
    contrast: str = ""
    three_d: bool = False
    tr: float | None = None
    te: float | None = None
    ti: float | None = None
    agent: bool = False
    b_value: float | None = None
    gradient: tuple[float, ...] = ()
    echo: int | None = None
    temporal: int | None = None
    trigger: float | None = None
    acquisition: int | None = None
    stack: str = ""
    volume: int | None = None
    synthetic: bool = False


def facts_of(values: Values) -> Facts:
    """See :class:`Facts`."""
    words = [
        *values.texts("ScanningSequence"),
        *values.texts("SequenceVariant"),
        *(values.text("EchoPulseSequence"), "IR" if values.text("InversionRecovery") == "YES" else ""),
    ]
    description, protocol = values.text("SeriesDescription"), values.text("ProtocolName")
    return Facts(
        modality=values.text("Modality").upper(),
        image_type=tuple(part.upper() for part in values.texts("FrameType") or values.texts("ImageType")),
        text=(description or protocol).lower(),
        protocol=protocol.lower(),
        sequence=f"{values.text('SequenceName')} {values.text('PulseSequenceName')}".lower(),
        words=tuple(word.upper() for word in words if word),
        contrast=values.text("AcquisitionContrast").upper(),
        three_d=values.text("MRAcquisitionType").upper() == "3D",
        tr=values.number("RepetitionTime"),
        te=first(values.number("EffectiveEchoTime"), values.number("EchoTime")),
        ti=first(values.number("InversionTime"), values.number("InversionTimes")),
        agent=has_agent(values),
        b_value=b_value_of(values),
        gradient=tuple(round(v, 3) for v in values.numbers("DiffusionGradientOrientation")),
        echo=values.integer("EchoNumbers"),
        temporal=first(values.integer("TemporalPositionIndex"), values.integer("TemporalPositionIdentifier")),
        trigger=values.number("TriggerTime"),
        acquisition=values.integer("AcquisitionNumber"),
        stack=values.text("StackID"),
        synthetic=values.text("SyntheticData").upper() == "YES" or description.upper().startswith("SYNTHETIC "),
    )


def first(*values: Any) -> Any:
    """The first that is not None."""
    return next((value for value in values if value is not None), None)


def has_agent(values: Values) -> bool:
    """Whether a contrast agent is stated (PS3.3 C.7.6.4); people type "no" into that field, too."""
    agent = re.sub(r"[^a-z0-9]", "", values.text("ContrastBolusAgent").lower())
    if agent in ("no", "none", "n", "0", "na", "nocontrast", "without", "ohne", "nein", "keine", "keines", "non"):
        return False
    if agent:
        return True
    return bool(values.items("ContrastBolusAgentSequence")) and values.text("ContrastBolusAgentAdministered") != "NO"


def b_value_of(values: Values) -> float | None:
    """The b-value, from the standard's element or the makers' older ones."""
    private = first(values.number("SiemensBValue"), values.number("PhilipsBValue"))
    general = values.number("GEBValue")
    if private is None and general is not None:
        private = general % 1e9 if general >= 1e9 else general  # GE adds 10^9 to mark a synthetic combination
    return first(values.number("DiffusionBValue"), private)
