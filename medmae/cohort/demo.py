"""A cohort to try everything on: brain MR studies with real anatomy, made on the spot, nothing downloaded.

The anatomy is the MNI152 template's (``demo_anatomy``), the lesions are drawn (``demo_lesions``), the contrasts follow
from tissue properties (``demo_contrast``), grids and artefacts are a scanner's (``demo_scanner``), and ``demo_study``
puts one study together. Every study is a function of the seed and of its own number, so a cohort can be made in any
order, with any number of jobs, resumed, and enlarged.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from medmae.cohort.demo_anatomy import load_template
from medmae.cohort.demo_lesions import EXPLAINED, LABELS
from medmae.cohort.demo_study import SPLITS, DemoStudy, make_study, plan_study
from medmae.errors import InputError
from medmae.files import explained, replace_folder, write_text
from medmae.imaging.nifti import read_nifti, write_nifti
from medmae.processor import usable_cores

CREDITS: Final = """\
A demonstration cohort made by medmae (make_demo_cohort). These are not scans of anybody: not for clinical use.

train/      studies to learn from; a third of them lack one modality
held_out/   complete studies that no training sees
cohort.csv  one row a study: modalities, lesions, geometry
labels.json what the values in seg.nii.gz mean
demo.json   the settings this cohort was made with

The anatomy is that of the MNI152 template (ICBM 152, nonlinear symmetric, release 2009a) and its tissue maps, as
distributed in nilearn (https://nilearn.github.io). Its copyright notice and permission:

  Copyright (C) 1993-2004 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological Institute, McGill
  University. Permission to use, copy, modify, and distribute this software and its documentation for any purpose and
  without fee is hereby granted, provided that the above copyright notice appear in all copies. The authors and McGill
  University make no representations about the suitability of this software for any purpose. It is provided "as is"
  without express or implied warranty. The authors are not responsible for any data loss, equipment damage, property
  loss, or injury to subjects or patients resulting from the use or misuse of this software package.

Please cite, when you show images of this cohort:
  VS Fonov, AC Evans, K Botteron, CR Almli, RC McKinstry, DL Collins, BDCG: Unbiased average age-appropriate atlases
  for pediatric studies. NeuroImage 54:313-327 (2011).
  VS Fonov, AC Evans, RC McKinstry, CR Almli, DL Collins: Unbiased nonlinear average age-appropriate brain templates
  from birth to adulthood. NeuroImage 47:S102 (2009).
Artefacts by TorchIO: F Perez-Garcia, R Sparks, S Ourselin. Computer Methods and Programs in Biomedicine 208 (2021).
"""


@dataclass(frozen=True)
class DemoCohort:
    """Where a demo cohort is. ``made`` and ``kept`` name the studies made now and found finished; ``notes`` is the
    template's credit and licence, which README.txt in ``out`` holds too."""

    out: Path
    train: Path
    held_out: Path
    table: Path
    made: tuple[str, ...]
    kept: tuple[str, ...]
    notes: str = CREDITS

    def to_json(self) -> dict[str, Any]:
        return {
            key: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
            for key, value in vars(self).items()
        }

    def __str__(self) -> str:
        kept = f", {len(self.kept)} were there already" if self.kept else ""
        return f"{len(self.made)} studies made{kept}: {self.train} and {self.held_out}"


def make_demo_cohort(
    out: str | Path,
    *,
    studies: int = 24,
    seed: int = 0,
    held_out: int = 6,
    spacing: float = 2.0,
    jobs: int | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> DemoCohort:
    """Make ``studies`` studies in ``out/train`` and ``held_out`` in ``out/held_out``, one folder each.

    A study is ``t1 t1c t2 flair`` (int16, skull-stripped, background 0, in arbitrary units), ``seg`` (values in
    ``labels.json``) and ``brainmask``, all ``.nii.gz`` on one grid of ``spacing`` mm (0.7 to 6, isotropic), RAS, LPS,
    PIR or oblique. One in three training studies lacks a modality; one in three of all has a tumour, the others
    lesions as in multiple sclerosis. Study n depends on ``seed``, ``spacing`` and n alone. ``jobs`` threads work at
    once (default: one a core, at most 8). Finished studies in ``out`` are kept, so a stopped run can be taken up and
    a cohort enlarged. ``on_progress(done, total, study)`` is called after each study.

    Raises :class:`InputError` for a bad argument, or when ``out`` holds a demo cohort of other settings or a larger
    one; :class:`MedmaeError` when ``out`` cannot be written.
    """
    out = Path(out)
    _check("studies", studies, 0, 100_000)
    _check("held_out", held_out, 0, 100_000)
    _check("seed", seed, 0, 2**63)
    _check("spacing", spacing, 0.7, 6)
    if studies + held_out == 0:
        raise InputError("a cohort needs a study", field="studies", found=0, expected="at least 1")
    wanted = [plan_study(seed, "train", n) for n in range(studies)]
    wanted += [plan_study(seed, "held_out", n) for n in range(held_out)]
    _claim(out, {"format": 1, "seed": seed, "spacing": float(spacing)}, wanted)
    kept = [study for study in wanted if _folder(out, study).is_dir()]
    todo = [study for study in wanted if study not in kept]
    if todo:
        _make_all(out, todo, seed, spacing, jobs, len(kept), on_progress)
    table = out / "cohort.csv"
    write_text(table, _table([_row(out, study) for study in wanted]))
    write_text(out / "labels.json", json.dumps({"labels": LABELS, "meaning": EXPLAINED}, indent=2) + "\n")
    write_text(out / "README.txt", CREDITS)
    made, found = (tuple(study.name for study in group) for group in (todo, kept))
    return DemoCohort(out, out / "train", out / "held_out", table, made, found)


def _make_all(
    out: Path,
    todo: list[DemoStudy],
    seed: int,
    spacing: float,
    jobs: int | None,
    done: int,
    on_progress: Callable[[int, int, str], None] | None,
) -> None:
    """Make studies side by side, each appearing under its name only when it is whole."""
    import torchio  # noqa: F401  # once, here: threads that import the same module at once wait for each other

    template = load_template(spacing)

    def make(study: DemoStudy) -> None:
        images = make_study(template, study, seed, spacing)
        folder = _folder(out, study)

        def fill(temporary: Path) -> None:
            for name, volume in images.items():
                write_nifti(volume, temporary / f"{name}.nii.gz")

        replace_folder(folder, folder.with_name(f".{folder.name}.previous"), fill)

    with ThreadPoolExecutor(max(1, min(jobs or min(usable_cores(), 8), len(todo)))) as pool:
        running = {pool.submit(make, study): study for study in todo}
        try:
            for count, finished in enumerate(as_completed(running), start=1):
                finished.result()
                if on_progress is not None:
                    on_progress(done + count, done + len(todo), running[finished].name)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _folder(out: Path, study: DemoStudy) -> Path:
    return out / study.split / study.name


def _check(field: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise InputError(
            "out of range", field=field, found=value, expected=f"{low} to {high}", remedy="Choose another value."
        )


def _claim(out: Path, settings: dict[str, Any], wanted: list[DemoStudy]) -> None:
    """Note the settings in ``out``, or make sure that what is there was made with the same ones and is no larger."""
    remedy = "Choose another folder, or remove this one."
    file = out / "demo.json"
    if file.is_file():
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = None
        if found != settings:
            raise InputError(
                "there is a demo cohort with other settings", where=out, found=found, expected=settings, remedy=remedy
            )
    names = {study.name for study in wanted}
    there = [folder.name for split in SPLITS for folder in (out / split).glob("[!.]*") if folder.is_dir()]
    extra = sorted(set(there) - names)
    if extra or (there and not file.is_file()):
        what = "there are studies that do not belong to this cohort"
        raise InputError(what, where=out, found=", ".join(extra or there), remedy=remedy)
    with explained(out):
        for split in SPLITS:
            (out / split).mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(settings, indent=2) + "\n")


def _row(out: Path, study: DemoStudy) -> dict[str, object]:
    """One row of the table; volumes are measured on the label that was written."""
    volume = read_nifti(_folder(out, study) / "seg.nii.gz")
    counts = np.bincount(volume.array.astype(np.uint8).ravel(), minlength=max(LABELS.values()) + 1)
    millilitres = counts * float(np.prod(volume.spacing)) / 1000
    tumour = sum(millilitres[LABELS[name]] for name in ("tumour_core", "oedema", "enhancing_rim"))
    return {
        "study": study.name,
        "split": study.split,
        "modalities": " ".join(study.modalities),
        "lesion_type": "tumour" if study.has_tumour else "ms",
        "has_tumour": int(study.has_tumour),
        "lesion_ml": f"{millilitres[1:].sum():.3f}",
        "tumour_ml": f"{tumour:.3f}",
        "white_matter_lesion_ml": f"{millilitres[LABELS['white_matter_lesion']]:.3f}",
        "geometry": study.geometry,
    }


def _table(rows: list[dict[str, object]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
