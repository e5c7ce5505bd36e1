"""Using what was trained: predictions of new studies, and features for other programs."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

import medmae
from medmae.cohort.opening import open_data
from medmae.errors import CheckpointError, InputError, MedmaeError, Problem
from medmae.features import Pool, study_features
from medmae.files import write_atomically
from medmae.finetune import HeadSettings
from medmae.models.heads import Head
from medmae.outcomes import outcome_of
from medmae.synthesis.volumes import pick_device


@dataclass
class Predicted:
    """Rows of a table of predictions or features, its ``file``, and what could not be done."""

    file: Path
    rows: list[dict[str, Any]]
    problems: list[Problem] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {"file": str(self.file), "rows": self.rows}


def predict_outcome(
    data: str | Path,
    model: str | Path,
    out: str | Path,
    *,
    device: str = "auto",
    on_progress: Callable[[int, int, str], None] | None = None,
) -> Predicted:
    """Predict new studies with what :func:`finetune_classify` or :func:`finetune_survive` wrote: the mean of its folds.

    ``out``: a CSV with a row a study. Raises :class:`CheckpointError` for a folder without a finished fold.
    """
    # Not by their names alone: what an earlier run with more folds left is none of this one's.
    scores = Path(model) / "scores.json"
    folds = json.loads(scores.read_text(encoding="utf-8"))["folds"] if scores.is_file() else 0
    folders = [Path(model) / f"fold_{number}" for number in range(folds)]
    if not folders or not all((folder / "fold.json").is_file() for folder in folders):
        raise CheckpointError(
            "no finished fold here" if not folders else "a fold is missing",
            where=model,
            expected="what `medmae finetune classify` wrote when it was done",
            remedy="Repeat that command: it keeps the folds that are finished.",
        )
    chosen, problems = pick_device(device), list[Problem]()
    sums: dict[str, np.ndarray] = {}
    columns: list[str] = []
    with ExitStack() as stack:
        cohort = None
        for done, folder in enumerate(folders):
            facts = json.loads((folder / "fold.json").read_text(encoding="utf-8"))
            outcome, settings = outcome_of(facts["outcome"]), HeadSettings(**facts["settings"])
            encoder = medmae.load(facts["checkpoint"] or folder / "encoder").to(chosen)
            weights = load_file(folder / "head.safetensors")
            head = Head(len(weights["centre"]), outcome.outputs, 256 if settings.mode == "full" else None)
            head.load_state_dict(weights)
            cohort = cohort or open_data(Path(data), encoder.plan, stack, problems)
            columns = outcome.columns
            for number, study in enumerate(cohort.studies):
                if on_progress:
                    on_progress(done * len(cohort.studies) + number, len(folders) * len(cohort.studies), study.id)
                try:
                    row = study_features(encoder, study, pool=settings.pool, device=chosen)
                except MedmaeError as error:
                    problems += [] if done else [Problem(**{**vars(p), "where": study.id}) for p in error.problems]
                    continue
                with torch.no_grad():
                    found = outcome.predict(head(torch.from_numpy(row)[None]))[0]
                sums[study.id] = sums.get(study.id, np.zeros(len(columns))) + found / len(folders)
    if not sums:
        raise InputError("no study could be predicted", where=data, problems=problems)
    rows = [{"study": s, **dict(zip(columns, map(float, v), strict=True))} for s, v in sums.items()]
    write_table(Path(out), rows)
    return Predicted(Path(out), rows, problems)


def predict_features(
    data: str | Path,
    checkpoint: str | Path,
    out: str | Path,
    *,
    pool: Pool = "mean",
    device: str = "auto",
    on_progress: Callable[[int, int, str], None] | None = None,
) -> Predicted:
    """One row of features a study, for scikit-learn and the like: ``study``, ``subject``, ``f0``, ``f1`` ...

    ``out``: ``.csv`` or ``.parquet``. See :func:`medmae.features.study_features` for what they are.
    """
    model, chosen, problems, rows = medmae.load(checkpoint), pick_device(device), list[Problem](), []
    model.to(chosen)
    with ExitStack() as stack:
        cohort = open_data(Path(data), model.plan, stack, problems)
        for done, study in enumerate(cohort.studies):
            if on_progress:
                on_progress(done, len(cohort.studies), study.id)
            try:
                values = study_features(model, study, pool=pool, device=chosen)
            except MedmaeError as error:
                problems += [Problem(**{**vars(p), "where": study.id}) for p in error.problems]
                continue
            named = {f"f{i}": float(v) for i, v in enumerate(values)}
            rows.append({"study": study.id, "subject": study.subject, **named})
    if not rows:
        raise InputError("no study has features", where=data, problems=problems)
    write_table(Path(out), rows)
    return Predicted(Path(out), rows, problems)


def write_table(file: Path, rows: list[dict[str, Any]]) -> None:
    """CSV, or Parquet where the name says so."""
    import pandas as pd

    if file.suffix.lower() not in (".csv", ".parquet"):
        raise InputError(
            "a table of a format that is not written", field="--out", found=file.name, expected=".csv or .parquet"
        )
    frame = pd.DataFrame(rows)
    if file.suffix.lower() == ".parquet":
        write_atomically(file, lambda path: frame.to_parquet(path, index=False))
    else:
        write_atomically(file, lambda path: frame.to_csv(path, index=False))
