"""What a study is: one session's images, a dict of modalities of which some are absent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from medmae.imaging.source import Source


@dataclass(frozen=True)
class Study:
    """One session of one subject.

    ``images`` maps canonical modality names to files or DICOM series; a modality that is not there was not acquired.
    ``labels`` maps a label's name (``seg``, ``brainmask``, ``change_mask``, ...) to its file. ``id`` is unique in its
    cohort and safe as a file name; ``subject`` groups sessions so that a split never separates them.
    """

    id: str
    subject: str
    images: Mapping[str, Source]
    session: str | None = None
    labels: Mapping[str, Path] = field(default_factory=dict)
