"""Reading a prepared cohort: crops for training, without unpacking whole volumes.

``COHORT/cohort.json`` lists the studies, ``COHORT/studies/<id>/study.json`` describes one, and every modality is a
blosc2 array ``<modality>.b2nd``, float16, in the model's space (labels: ``<name>.label.b2nd``, integers).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from medmae.cohort.index import AGAIN, read_json, study_record, summary
from medmae.errors import InputError, PlanError, Problem
from medmae.imaging.intensity import Scale
from medmae.imaging.volume import Grid
from medmae.plan import Image, validate

Shape = tuple[int, int, int]


def is_cohort(path: str | Path) -> bool:
    """Whether ``path`` is a folder that :func:`medmae.cohort.store.prepare` writes (or began to write)."""
    path = Path(path)
    return (path / "cohort.json").is_file() and (path / "studies").is_dir()


@dataclass(frozen=True)
class PreparedStudy:
    """One study in the model's space. Cheap to make and to send to another process; safe to use from many threads.

    ``modalities`` in canonical order, ``shape`` (D, H, W) of all its arrays, ``labels`` the names of its label maps.
    """

    folder: Path
    id: str
    subject: str
    session: str | None
    modalities: tuple[str, ...]
    shape: Shape
    labels: tuple[str, ...] = ()

    @cached_property
    def record(self) -> dict[str, Any]:
        """``study.json``."""
        return read_json(self.folder / "study.json", self._remedy)

    @cached_property
    def grid(self) -> Grid:
        """Where the arrays are: the model grid."""
        return Grid(self.shape, np.array(self.record["affine"], dtype=np.float64))

    @property
    def affine(self) -> np.ndarray:
        """Voxel index to RAS+ mm of the arrays, (4, 4)."""
        return self.grid.affine

    @cached_property
    def native(self) -> dict[str, Grid]:
        """{modality: the grid its image was acquired on}."""
        return {name: Grid.from_json(entry["native"]) for name, entry in self.record["images"].items()}

    @cached_property
    def scales(self) -> dict[str, Scale]:
        """{modality: how its values were normalised}."""
        return {name: Scale.from_json(entry["scale"]) for name, entry in self.record["images"].items()}

    def crop(self, modality: str, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
        """``size`` voxels from ``start``, float16; ``start`` may be negative, and beyond the edges there are zeros.

        Only the chunks that the crop touches are read. Raises :class:`InputError` for an unknown modality and for a
        damaged file.
        """
        low = [max(0, s) for s in start]
        high = [min(n, s + d) for n, s, d in zip(self.shape, start, size, strict=True)]
        if any(a >= b for a, b in zip(low, high, strict=True)):
            return np.zeros(tuple(size), np.float16)
        inner = self._read(f"{modality}.b2nd", "images", modality, low, high)
        if inner.shape == tuple(size):
            return inner
        result = np.zeros(tuple(size), np.float16)
        result[tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))] = inner
        return result

    def array(self, modality: str) -> np.ndarray:
        """The whole image, float16 (D, H, W)."""
        return self._read(f"{modality}.b2nd", "images", modality, (0, 0, 0), self.shape)

    def label(self, name: str) -> np.ndarray:
        """A whole label map on the same grid, integers (uint8, int16 or int32)."""
        return self._read(f"{name}.label.b2nd", "labels", name, (0, 0, 0), self.shape)

    def check(self) -> list[Problem]:
        """Read every array once; what is damaged."""
        problems = []
        for kind, names in (("images", self.modalities), ("labels", self.labels)):
            for name in names:
                try:
                    _ = self.array(name) if kind == "images" else self.label(name)
                except InputError as error:
                    problems += error.problems
        return problems

    @property
    def _remedy(self) -> str:
        return f"Delete {self.folder} and run `medmae prepare` again: only this study is prepared anew."

    def _read(self, file: str, kind: str, name: str, low: Sequence[int], high: Sequence[int]) -> np.ndarray:
        import blosc2  # here, so that reading file names does not load it

        if name not in (self.modalities if kind == "images" else self.labels):
            raise InputError(
                f"this study has no such {kind[:-1]}",
                where=self.id,
                field=kind,
                found=name,
                expected=", ".join(self.modalities if kind == "images" else self.labels),
            )
        path = self.folder / file
        entry = self.record[kind][name]
        try:
            if path.stat().st_size != entry["bytes"]:
                raise ValueError(f"{path.stat().st_size} bytes instead of {entry['bytes']}")
            # Opened for every crop: 0.2 ms of 2, and a handle is then never shared between threads. One thread of
            # blosc2's own a call, because crops are read by a pool of threads already.
            stored = blosc2.open(str(path), mode="r", dparams={"nthreads": 1})
            if tuple(stored.shape) != self.shape or stored.dtype != np.dtype(entry["dtype"]):
                raise ValueError(f"{stored.dtype} {tuple(stored.shape)} instead of {entry['dtype']} {self.shape}")
            return np.asarray(stored[tuple(slice(a, b) for a, b in zip(low, high, strict=True))])
        except FileNotFoundError:
            raise InputError("a file of the prepared cohort is missing", where=path, remedy=self._remedy) from None
        except (OSError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise InputError(
                "a file of the prepared cohort is damaged", where=path, found=str(error), remedy=self._remedy
            ) from None


@dataclass(frozen=True)
class Cohort:
    """Prepared studies, all in the space that ``image`` describes (its ``crop`` is only what the plan then said).

    ``modalities``: those that any study has, in canonical order. ``fingerprint``: a digest of the studies' ids and of
    their source files' contents. ``complete`` is False while ``prepare`` runs, and after it was interrupted; every
    study listed is whole all the same.
    """

    path: Path
    image: Image
    modalities: tuple[str, ...]
    fingerprint: str
    studies: list[PreparedStudy]
    complete: bool
    scales: dict[str, dict[str, float]]

    @classmethod
    def open(cls, path: str | Path) -> Cohort:
        """Raises :class:`InputError` when ``path`` is no prepared cohort, or when its list of studies is damaged."""
        path = Path(path)
        if not is_cohort(path):
            raise InputError(
                "this is no prepared cohort",
                where=path,
                remedy="Make one with `medmae prepare DATA --plan PLAN -o ...`.",
            )
        data = read_json(path / "cohort.json", AGAIN)
        try:
            image = validate(Image, data["image"], str(path / "cohort.json"), "image.")
            if not data["complete"]:  # what an unfinished run has made so far is looked up
                records = (study_record(path, study) for study in data["expected"])
                data = {**data, **summary([record for record in records if record is not None])}
            studies = [cls._study(path, entry) for entry in data["studies"]]
            return cls(
                path,
                image,
                tuple(data["modalities"]),
                str(data["fingerprint"]),
                studies,
                bool(data["complete"]),
                data["scales"],
            )
        except (KeyError, TypeError, ValueError, PlanError) as error:
            raise InputError(
                "a file of the prepared cohort is damaged",
                where=path / "cohort.json",
                found=f"{type(error).__name__}: {error}",
                remedy=AGAIN,
            ) from None

    @staticmethod
    def _study(path: Path, entry: dict[str, Any]) -> PreparedStudy:
        d, h, w = entry["shape"]
        return PreparedStudy(
            path / "studies" / entry["id"],
            entry["id"],
            entry["subject"],
            entry["session"],
            tuple(entry["modalities"]),
            (d, h, w),
            tuple(entry["labels"]),
        )

    def typical_scales(self) -> dict[str, dict[str, float]]:
        """{modality: {"mean", "std"}} in source units: the medians over the studies; empty where nothing is scaled by
        a z-score (a window's bounds are in the plan)."""
        return {name: dict(scale) for name, scale in self.scales.items()}

    def voxels(self) -> int:
        """How many voxels all images have together."""
        return sum(math.prod(study.shape) * len(study.modalities) for study in self.studies)
