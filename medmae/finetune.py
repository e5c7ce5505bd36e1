"""Classification and survival: a head on an encoder, by cross-validation.

Each fold trains on its own subjects and predicts the held-out ones. The encoder is frozen (``linear``: its features are
computed once) or trained along, windows of a study at a time. Everything follows from the seed; a fold that is finished
is not trained again.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

import medmae
from medmae.cohort.labels import Label, read_labels
from medmae.cohort.opening import open_data
from medmae.cohort.prepared import PreparedStudy
from medmae.cohort.sampling import stratified_folds
from medmae.curves import draw
from medmae.errors import InputError, Problem, TrainingError
from medmae.features import Pool, inside, layout_of, mean_of, study_features
from medmae.files import explained, replace_folder, strict, write_atomically, write_text
from medmae.intervals import intervals
from medmae.models.base import MaskedAutoencoder
from medmae.models.heads import Head
from medmae.outcomes import Outcome, Survival, classes_of, survival_labels
from medmae.synthesis.volumes import pick_device
from medmae.training.schedules import warmed

log = logging.getLogger(__name__)

Mode = Literal["linear", "full"]
_WINDOW_VOXELS = 2**20  # of a study's windows that one training step looks at


@dataclass(frozen=True)
class HeadSettings:
    """How a head is trained. ``full`` of the paper: AdamW 1e-4, batches of 2, 20 epochs, 5 of warm-up; a frozen encoder
    bears more epochs and a higher rate."""

    mode: Mode = "full"
    pool: Pool = "mean"
    epochs: int = 20
    lr: float = 1e-4
    head_lr: float = 1e-3
    weight_decay: float = 0.05
    batch_size: int = 2
    warmup: float = 0.25  # share of the epochs
    modality_dropout: float = 0.0
    seed: int = 0


@dataclass
class FinetunedHead:
    """``scores``: each metric with its 95 % interval, over all held-out studies of ``folds`` folds."""

    out: Path
    outcome: Outcome
    studies: int
    subjects: int
    folds: int
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    @property
    def files(self) -> dict[str, Path]:
        names = {"json": "scores.json", "predictions": "predictions.csv", "plot": "curves.png"}
        return {key: self.out / name for key, name in names.items()}

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = strict(
            {
                "outcome": self.outcome.to_json(),
                "studies": self.studies,
                "subjects": self.subjects,
                "folds": self.folds,
                "scores": self.scores,
                "files": {k: str(p) for k, p in self.files.items()},
            }
        )
        return found

    def __str__(self) -> str:
        lines = [f"{self.studies} studies of {self.subjects} subjects, {self.folds} folds"]
        lines += [
            f"{name.replace('_', ' ')}: {s['value']:.3f} ({s['low']:.3f} to {s['high']:.3f})"
            for name, s in self.scores.items()
        ]
        return "\n".join([*lines, *map(str, self.files.values())])


def finetune_classify(
    table: str | Path,
    checkpoint: str | Path,
    out: str | Path,
    *,
    data: str | Path | None = None,
    column: str = "label",
    settings: HeadSettings | None = None,
    folds: int = 5,
    device: str = "auto",
    on_progress: Callable[[int, int, str], None] | None = None,
) -> FinetunedHead:
    """Classes, or several labels a study (cells such as ``a;b``), by stratified cross-validation over subjects.

    ``table``: studies with their files (a table of studies) and the ``column``, or with ``data``, a layout of scans,
    only names and labels. A column ``fold`` decides the folds. Writes ``scores.json``, ``predictions.csv``,
    ``curves.png`` and a model a fold to ``out``. Raises :class:`InputError` when too little can be used; single rows
    that cannot be are in ``problems``.
    """

    def labels(studies: Sequence[PreparedStudy], problems: list[Problem]) -> tuple[list[Label], Outcome]:
        found = read_labels(table, column, studies, problems)
        return found, classes_of(found)

    return finetune(table, data, checkpoint, Path(out), labels, settings or HeadSettings(), folds, device, on_progress)


def finetune_survive(
    table: str | Path,
    checkpoint: str | Path,
    out: str | Path,
    *,
    data: str | Path | None = None,
    time: str = "time",
    event: str = "event",
    settings: HeadSettings | None = None,
    folds: int = 5,
    device: str = "auto",
    on_progress: Callable[[int, int, str], None] | None = None,
) -> FinetunedHead:
    """Time to an event (``time`` > 0, ``event`` 1, or 0 where it was not seen), scored by Harrell's C-index.

    See :func:`finetune_classify` for everything else.
    """

    def labels(studies: Sequence[PreparedStudy], problems: list[Problem]) -> tuple[list[Label], Outcome]:
        times, events = (read_labels(table, name, studies, problems) for name in (time, event))
        found = survival_labels(times, events, problems)
        if sum(label.value.endswith("/1") for label in found) < 2:
            raise InputError(
                "too few events to learn from", field=event, found=f"{len(found)} usable studies", problems=problems
            )
        return found, Survival()

    return finetune(table, data, checkpoint, Path(out), labels, settings or HeadSettings(), folds, device, on_progress)


def finetune(
    table: str | Path,
    data: str | Path | None,
    checkpoint: str | Path,
    out: Path,
    labels_of: Callable[[Sequence[PreparedStudy], list[Problem]], tuple[list[Label], Outcome]],
    settings: HeadSettings,
    folds: int,
    device: str,
    on_progress: Callable[[int, int, str], None] | None,
) -> FinetunedHead:
    """What both tasks do."""
    model, chosen = medmae.load(checkpoint), pick_device(device)
    problems: list[Problem] = []
    with ExitStack() as stack:
        cohort = open_data(Path(data if data is not None else table), model.plan, stack, problems)
        labels, outcome = labels_of(cohort.studies, problems)
        by_id = {study.id: study for study in cohort.studies}
        studies = [by_id[label.study] for label in labels]
        targets = np.stack([outcome.target(label) for label in labels])
        splits = splits_of(table, labels, outcome.strata(targets), studies, folds, settings.seed, problems)
        subjects = len({label.subject for label in labels})
        result = FinetunedHead(out, outcome, len(labels), subjects, len(splits), problems=problems)
        with explained(out):
            out.mkdir(parents=True, exist_ok=True)
        predicted = np.full((len(labels), len(outcome.columns)), np.nan)
        frozen = frozen_features(model, studies, settings, chosen, on_progress) if settings.mode == "linear" else None
        given = [cohort.fingerprint, digest_of_weights(model), vars(settings), outcome.to_json()]
        for number, (train, test) in enumerate(splits):
            inputs = digest_of(given, studies, targets, (train, test))
            fold = Fold(out / f"fold_{number}", checkpoint, settings, outcome.fitted(targets[train]), chosen, inputs)
            known = fold.finished()
            if known is None:
                told = (number, len(splits), on_progress)
                known = fold.train(studies, targets, train, test, frozen, told)
            predicted[test] = known
    result.scores = scored(outcome, predicted, targets, [label.subject for label in labels], settings.seed)
    write(result, labels, predicted, targets, splits)
    return result


def frozen_features(
    model: MaskedAutoencoder,
    studies: Sequence[PreparedStudy],
    settings: HeadSettings,
    device: torch.device,
    on_progress: Callable[[int, int, str], None] | None,
) -> Tensor:
    """(n, C) of every study, computed once for all folds."""
    model.to(device).eval()
    rows = []
    for done, study in enumerate(studies):
        if on_progress:
            on_progress(done, len(studies), f"features of {study.id}")
        rows.append(study_features(model, study, pool=settings.pool, device=device))
    return torch.from_numpy(np.stack(rows))


def splits_of(
    table: str | Path,
    labels: Sequence[Label],
    strata: np.ndarray,
    studies: Sequence[PreparedStudy],
    folds: int,
    seed: int,
    problems: list[Problem],
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(training, held-out) rows of each fold; by the table's column ``fold`` where there is one."""
    groups = np.array([label.subject for label in labels])
    try:
        given = {label.study: label.value for label in read_labels(table, "fold", studies, [])}
    except InputError:
        given = {}
    if given:
        if lacking := [label for label in labels if label.study not in given]:
            raise InputError("a study without a fold", where=f"row {lacking[0].row}", field="fold")
        names = np.array([given[label.study] for label in labels])
        torn = [g for g in set(groups) if len(set(names[groups == g])) > 1]
        if torn:
            raise InputError(
                "a subject in two folds",
                where=table,
                field="fold",
                found=", ".join(sorted(torn)[:5]),
                problems=problems,
            )
        if len(set(names)) < 2:
            raise InputError("one fold only", where=table, field="fold", found=names[0])
        return [(np.flatnonzero(names != n), np.flatnonzero(names == n)) for n in sorted(set(names))]
    found = stratified_folds(strata, list(groups), folds, seed)
    if found is None:
        sizes = {int(s): len(set(groups[strata == s])) for s in set(strata)}
        raise InputError(
            "a class with too few subjects to train on and to hold out",
            where=table,
            found=f"subjects a class: {sorted(sizes.values())}",
            expected="at least two",
            problems=problems,
        )
    if len(found) < folds:
        log.info("%d folds instead of %d: the rarest class has no more subjects", len(found), folds)
    return found


def digest_of_weights(model: MaskedAutoencoder) -> str:
    """Of names, shapes, types and bytes: the same wherever the checkpoint lies."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())  # bf16 too
    return found.hexdigest()


def digest_of(
    given: list[Any], studies: Sequence[PreparedStudy], targets: np.ndarray, split: tuple[np.ndarray, np.ndarray]
) -> str:
    """Of all that decides a fold's result: with other labels, images or weights it is another fold."""
    rows = [[(studies[i].id, targets[i].tolist()) for i in side] for side in split]
    return hashlib.sha256(json.dumps([given, rows]).encode()).hexdigest()


@dataclass
class Fold:
    """One fold's training, in its folder. ``inputs``: a digest of all that decides its result."""

    folder: Path
    checkpoint: str | Path
    settings: HeadSettings
    outcome: Outcome
    device: torch.device
    inputs: str

    def finished(self) -> np.ndarray | None:
        """The predictions of a fold that was trained from these inputs, (held-out studies, columns)."""
        file = self.folder / "fold.json"
        if not file.is_file():
            return None
        known = json.loads(file.read_text(encoding="utf-8"))
        if known.get("inputs") != self.inputs:
            return None
        return np.array(known["predicted"], float).reshape(len(known["studies"]), -1)

    def train(
        self,
        studies: Sequence[PreparedStudy],
        targets: np.ndarray,
        train: np.ndarray,
        test: np.ndarray,
        frozen: Tensor | None,
        told: tuple[int, int, Callable[[int, int, str], None] | None],
    ) -> np.ndarray:
        """Train, predict ``test``, and save; (len(test), columns)."""
        settings, (number, folds, on_progress) = self.settings, told
        torch.manual_seed(settings.seed + number)
        rng = np.random.default_rng([settings.seed, number])
        model = medmae.load(self.checkpoint).to(self.device)
        truth = torch.from_numpy(targets).to(self.device)
        with torch.no_grad():
            first = frozen[train] if frozen is not None else self.features(model, [studies[i] for i in train])
        head = Head(first.shape[1], self.outcome.outputs, 256 if settings.mode == "full" else None).to(self.device)
        head.standardise(first.to(self.device))
        optimizer = torch.optim.AdamW(
            [
                {"params": list(model.parameters()) if settings.mode == "full" else [], "lr": settings.lr},
                {"params": list(head.parameters()), "lr": settings.head_lr if settings.mode == "full" else 1e-2},
            ],
            weight_decay=settings.weight_decay,
        )
        base = [group["lr"] for group in optimizer.param_groups]
        losses: list[float] = []
        for epoch in range(settings.epochs):
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * warmed(epoch, settings.epochs, settings.warmup)
            total = 0.0
            for batch in np.array_split(rng.permutation(train), math.ceil(len(train) / settings.batch_size)):
                if frozen is not None:
                    rows = frozen[batch].to(self.device)
                else:
                    rows = torch.stack([self.vector(model, studies[i], rng) for i in batch])
                loss = self.outcome.loss(head(rows), truth[batch])
                if not torch.isfinite(loss):
                    raise TrainingError(
                        "the loss is not finite",
                        where=self.folder.name,
                        found=", ".join(studies[i].id for i in batch),
                        remedy="Look at these studies, or lower the rate.",
                    )
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_([*model.parameters(), *head.parameters()], 1.0)
                optimizer.step()
                total += loss.item() * len(batch)
            losses.append(total / len(train))
            if on_progress:
                done = number * settings.epochs + epoch + 1
                on_progress(done, folds * settings.epochs, f"fold {number}, loss {losses[-1]:.3f}")
        with torch.no_grad():
            rows = frozen[test] if frozen is not None else self.features(model, [studies[i] for i in test])
            predicted = self.outcome.predict(head(rows.to(self.device)).cpu())
        self.save(model, head, [studies[i].id for i in test], predicted, losses)
        return predicted

    def vector(self, model: MaskedAutoencoder, study: PreparedStudy, rng: np.random.Generator) -> Tensor:
        """(C,) of a random part of the study's windows, for training; a modality may be left out."""
        names = [m for m in model.modalities if m in study.modalities]
        if len(names) > 1 and rng.random() < self.settings.modality_dropout:
            names = [str(n) for n in rng.permutation(names)[: rng.integers(1, len(names))]]
            names = [m for m in model.modalities if m in names]
        arrays = {m: study.array(m).astype(np.float32) for m in names}
        corners, padded, occupied = layout_of(model, arrays, inside(arrays, model.plan.image.intensity.scheme))
        if not len(corners):
            raise InputError("nothing but background", where=study.id)
        count = max(1, _WINDOW_VOXELS // math.prod(model.plan.image.crop))
        if len(corners) > count:
            corners = corners[np.sort(rng.choice(len(corners), count, replace=False))]
        return mean_of(model, padded, occupied, corners, self.device, self.settings.pool)

    def features(self, model: MaskedAutoencoder, studies: Sequence[PreparedStudy]) -> Tensor:
        rows = [study_features(model, s, pool=self.settings.pool, device=self.device) for s in studies]
        return torch.from_numpy(np.stack(rows))

    def save(
        self, model: MaskedAutoencoder, head: Head, held: list[str], predicted: np.ndarray, losses: list[float]
    ) -> None:
        def fill(folder: Path) -> None:
            if self.settings.mode == "full":
                model.cpu().save_pretrained(folder / "encoder")
            save_file({k: v.cpu().contiguous() for k, v in head.state_dict().items()}, folder / "head.safetensors")
            facts = {
                "inputs": self.inputs,
                "settings": vars(self.settings),
                "outcome": self.outcome.to_json(),
                "checkpoint": None if self.settings.mode == "full" else str(Path(self.checkpoint).resolve()),
                "studies": held,
                "predicted": predicted.tolist(),
                "losses": losses,
            }
            (folder / "fold.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")

        replace_folder(self.folder, self.folder.with_name(f".{self.folder.name}.previous"), fill)


def scored(
    outcome: Outcome, predicted: np.ndarray, targets: np.ndarray, subjects: Sequence[str], seed: int
) -> dict[str, dict[str, float]]:
    """Each metric with the interval of resampled subjects."""
    ranges = intervals(lambda rows: outcome.measure(predicted[rows], targets[rows]), subjects, seed)
    unknown = float("nan"), float("nan")
    return {
        name: {"value": value, **dict(zip(("low", "high"), ranges.get(name, unknown), strict=True))}
        for name, value in outcome.measure(predicted, targets).items()
    }


def write(
    result: FinetunedHead,
    labels: Sequence[Label],
    predicted: np.ndarray,
    targets: np.ndarray,
    splits: Sequence[tuple[np.ndarray, np.ndarray]],
) -> None:
    """Scores, predictions and curves."""
    fold_of = {int(i): number for number, (_, test) in enumerate(splits) for i in test}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["study", "fold", "truth", *result.outcome.columns])
    for i, (label, row) in enumerate(zip(labels, predicted, strict=True)):
        writer.writerow([label.study, fold_of[i], label.value, *(f"{v:.6g}" for v in row)])
    write_text(result.files["predictions"], text.getvalue())
    write_text(result.files["json"], json.dumps(result.to_json(), indent=2, allow_nan=False) + "\n")
    losses = [
        json.loads((result.out / f"fold_{n}" / "fold.json").read_text(encoding="utf-8"))["losses"]
        for n in range(len(splits))
    ]
    write_atomically(result.files["plot"], lambda path: draw(result.outcome, predicted, targets, losses, path))
