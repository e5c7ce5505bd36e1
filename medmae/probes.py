"""Which encoder is worth something on my data: frozen features, and simple models on top of them.

Nothing is fine-tuned, so that what is measured is the encoder. Linear probe: standardised features, L2-regularised
logistic (or ridge) regression. kNN: cosine distance between standardised features. Their one setting each is chosen
within the training part of every fold. Subjects are never on both sides of a split.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

import medmae
from medmae.cohort.labels import Label, as_numbers, read_labels
from medmae.cohort.opening import open_data
from medmae.cohort.sampling import stratified_folds
from medmae.errors import InputError, MedmaeError, Problem
from medmae.features import Pool, study_features, study_statistics
from medmae.files import explained, strict, write_atomically, write_text
from medmae.intervals import intervals
from medmae.models.base import MaskedAutoencoder
from medmae.models.zoo import create
from medmae.synthesis.volumes import pick_device

if TYPE_CHECKING:
    from medmae.cohort.prepared import Cohort

log = logging.getLogger(__name__)

Task = Literal["classify", "regress"]
METRICS: dict[str, tuple[str, ...]] = {
    "classify": ("auc", "average_precision", "balanced_accuracy"),
    "regress": ("r2", "mae", "spearman"),
}
HEADINGS = {
    "auc": "ROC AUC",
    "average_precision": "average precision",
    "balanced_accuracy": "balanced accuracy",
    "r2": "R²",
    "mae": "mean absolute error",
    "spearman": "Spearman's ρ",
}
_CLASSES = 10  # numbers with more distinct values than this are a quantity
_STRENGTHS = tuple(10.0**e for e in range(-5, 2))  # C of the logistic, 1/alpha of the ridge regression
_NEIGHBOURS = (1, 3, 5, 9, 15)
STATISTICS, NOTHING = "image statistics", "always the same"


@dataclass
class ProbeScores:
    """``rows``: one dict a features × probe, with every metric and its 95 % interval; ``predictions``: one a study,
    features and probe, from the fold in which it was held out."""

    out: Path
    label: str
    task: Task
    studies: int
    subjects: int
    folds: int
    classes: list[str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    predictions: list[dict[str, Any]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def files(self) -> dict[str, Path]:
        names = {"scores": "probes.csv", "json": "probes.json", "predictions": "predictions.csv", "plot": "probes.png"}
        return {key: self.out / name for key, name in names.items()}

    def to_json(self) -> dict[str, Any]:
        facts = {k: getattr(self, k) for k in ("label", "task", "studies", "subjects", "folds", "classes", "rows")}
        result: dict[str, Any] = strict({**facts, "files": {k: str(p) for k, p in self.files.items()}})
        return result

    def __str__(self) -> str:
        first = METRICS[self.task]
        head = f"{self.label}: {self.studies} studies of {self.subjects} subjects, {self.folds} folds"
        if self.classes:
            head += f", classes {', '.join(self.classes)}"
        lines = [head, f"{'features':32} {'probe':8} " + "  ".join(f"{HEADINGS[m]:>24}" for m in first)]
        for row in self.rows:
            cells = []
            for metric in first:
                low, high = row[f"{metric}_low"], row[f"{metric}_high"]
                cells.append(f"{row[metric]:7.3f} ({low:.3f} to {high:.3f})".rjust(24))
            lines.append(f"{row['features'][:32]:32} {row['probe']:8} " + "  ".join(cells))
        return "\n".join([*lines, *map(str, self.files.values())])

    def write(self) -> None:
        with explained(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
        for file, rows in ((self.files["scores"], self.rows), (self.files["predictions"], self.predictions)):
            text = io.StringIO()
            writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            write_text(file, text.getvalue())
        write_text(self.files["json"], json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n")
        write_atomically(self.files["plot"], lambda path: plot(self, path))


def evaluate_features(
    data: str | Path,
    labels: str | Path,
    checkpoints: Sequence[str | Path] | str | Path,
    out: str | Path,
    *,
    column: str = "label",
    task: Literal["auto", "classify", "regress"] = "auto",
    folds: int = 5,
    pool: Pool = "mean",
    floors: bool = True,
    device: str = "auto",
    seed: int = 0,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> ProbeScores:
    """Probe the frozen encoders of ``checkpoints`` on labelled studies, all on the same folds.

    ``data``: studies in any supported layout, or a cohort prepared for the checkpoint. ``labels``: a table of
    studies and their ``column`` (:mod:`medmae.cohort.labels`). ``task`` ``auto``: numbers with more than ten
    distinct values are a quantity, everything else classes. Stratified folds by subject. ``pool``: see
    :func:`medmae.features.study_features`.

    With ``floors``, beside the checkpoints: the same networks with random weights, image statistics (volume, extent
    and intensity percentiles), and the same answer for everybody. Intervals: 500 resamples of the subjects.

    Writes ``probes.csv``, ``predictions.csv``, ``probes.json`` and ``probes.png`` to ``out``. Studies that cannot be
    used are in ``problems``. Raises :class:`InputError` when too few are left.
    """
    paths = [checkpoints] if isinstance(checkpoints, str | Path) else list(checkpoints)
    models = {name: medmae.load(path) for name, path in named(paths).items()}
    if not models:
        raise InputError("no checkpoint", field="--checkpoint")
    chosen = pick_device(device)
    problems: list[Problem] = []
    features: dict[str, dict[str, np.ndarray]] = {}
    studies: Sequence[Any] = ()
    with ExitStack() as stack:
        for number, (name, model) in enumerate(models.items()):
            cohort = open_data(Path(data), model.plan, stack, problems if number == 0 else [])
            studies = cohort.studies if number == 0 else studies
            nets = {name: model}
            if floors:
                torch.manual_seed(seed)
                nets[f"{name}, random weights"] = create(model.plan)
            for called, net in nets.items():
                told = (called, number, len(models))
                features[called] = extract(net.eval().to(chosen), cohort, pool, chosen, told, problems, on_progress)
            if floors and number == 0:
                features[STATISTICS] = {s.id: study_statistics(s, model.modalities) for s in cohort.studies}
    if on_progress:
        on_progress(1, 1, "")
    usable = read_labels(labels, column, studies, problems)
    usable = [label for label in usable if all(label.study in known for known in features.values())]
    scores = begin(Path(out), column, task, usable, problems)
    splits = split(usable, scores, folds, seed)
    truth = targets_of(usable, scores)
    if floors:
        add(scores, usable, NOTHING, "none", predict_constant(truth, splits, scores), truth, seed)
    for called, known in features.items():
        x = np.stack([known[label.study] for label in usable])
        for probe in ("linear", "knn"):
            predicted = cross_predict(x, truth, [label.subject for label in usable], splits, probe, scores, seed)
            add(scores, usable, called, probe, predicted, truth, seed)
    scores.write()
    return scores


def named(paths: Sequence[str | Path]) -> dict[str, str | Path]:
    """A short name for each checkpoint: its folder's, with the parents' where two share one."""
    shorts = [Path(p).stem if Path(p).is_file() else Path(p).resolve().name for p in paths]
    counts = Counter(shorts)
    full = [str(Path(p)) if counts[s] > 1 else s for p, s in zip(paths, shorts, strict=True)]
    return dict(zip(full, paths, strict=True))


def extract(
    model: MaskedAutoencoder,
    cohort: Cohort,
    pool: Pool,
    device: torch.device,
    told: tuple[str, int, int],
    problems: list[Problem],
    on_progress: Callable[[int, int, str], None] | None,
) -> dict[str, np.ndarray]:
    """{study: features}; studies that the model cannot take go to ``problems``."""
    name, number, models = told
    found = {}
    for done, study in enumerate(cohort.studies):
        if on_progress:
            on_progress(number * len(cohort.studies) + done, models * len(cohort.studies), f"{name}: {study.id}")
        try:
            found[study.id] = study_features(model, study, pool=pool, device=device)
        except MedmaeError as error:
            if "random weights" not in name:
                problems += [Problem(**{**vars(p), "where": study.id}) for p in error.problems]
    return found


def begin(out: Path, column: str, task: str, labels: Sequence[Label], problems: list[Problem]) -> ProbeScores:
    """What is to be predicted, after the checks that need no features."""
    numbers = as_numbers(labels)
    distinct = sorted({label.value for label in labels})
    if task == "auto":
        task = "regress" if numbers is not None and len(distinct) > _CLASSES else "classify"
    if task == "regress" and numbers is None:
        wrong = next(label for label in labels if as_numbers([label]) is None)
        raise InputError(
            "a label that is no number",
            where=f"row {wrong.row}",
            field=column,
            found=wrong.value,
            remedy="Mend the table, or ask for --task classify.",
            problems=problems,
        )
    subjects = len({label.subject for label in labels})
    if len(distinct) < 2 or subjects < 4:
        raise InputError(
            "too few labelled studies for a probe",
            field=column,
            found=f"{len(labels)} studies of {subjects} subjects, labels {', '.join(distinct[:5]) or 'none'}",
            expected="at least two values, and four subjects",
            problems=problems,
        )
    chosen: Task = "regress" if task == "regress" else "classify"
    classes = distinct if chosen == "classify" else []
    return ProbeScores(out, column, chosen, len(labels), subjects, 0, classes, problems=problems)


def targets_of(labels: Sequence[Label], scores: ProbeScores) -> np.ndarray:
    """(n,) class numbers, or the quantity."""
    if scores.task == "regress":
        return np.array([float(label.value) for label in labels])
    return np.array([scores.classes.index(label.value) for label in labels])


def split(labels: Sequence[Label], scores: ProbeScores, folds: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(training, held out) rows of each fold: every subject is held out once, classes spread evenly."""
    truth, groups = targets_of(labels, scores), [label.subject for label in labels]
    if folds < 2:
        raise InputError("too few folds", field="--folds", found=folds, expected="at least 2")
    splits = grouped(truth, groups, scores, folds, seed)
    if splits is None:
        counts = {c: len({label.subject for label in labels if label.value == c}) for c in scores.classes}
        raise InputError(
            "a class with too few subjects to train on and to hold out",
            field=scores.label,
            found=", ".join(f"{k}: {v}" for k, v in counts.items()),
            expected="at least two subjects a class",
            remedy="Label more studies, or join classes.",
            problems=scores.problems,
        )
    scores.folds = len(splits)
    if scores.folds < folds:
        log.info("%d folds instead of %d: the rarest class has no more subjects", scores.folds, folds)
    return splits


def grouped(
    truth: np.ndarray, groups: Sequence[str], scores: ProbeScores, folds: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """Stratified folds by group; fewer than asked for where a class has fewer groups, None where it has one."""
    from sklearn.model_selection import GroupKFold

    if scores.task == "regress":
        count, who = min(folds, len(set(groups))), np.array(groups)
        return None if count < 2 else list(GroupKFold(count, shuffle=True, random_state=seed).split(truth, truth, who))
    splits, whole = stratified_folds(truth, groups, folds, seed), set(range(len(scores.classes)))
    return splits if splits and all(set(truth[train]) == whole for train, _ in splits) else None


def cross_predict(
    x: np.ndarray,
    truth: np.ndarray,
    groups: Sequence[str],
    splits: Sequence[tuple[np.ndarray, np.ndarray]],
    probe: str,
    scores: ProbeScores,
    seed: int,
) -> np.ndarray:
    """Held-out predictions: (n, classes) probabilities, or (n,) values."""
    from sklearn.model_selection import GridSearchCV

    predicted = np.zeros((len(truth), len(scores.classes)) if scores.classes else len(truth))
    for train, test in splits:
        estimator, grid = estimator_of(probe, scores.task, len(train))
        inner = grouped(truth[train], [groups[i] for i in train], scores, 3, seed)
        if inner is not None:
            most = min(len(rows) for rows, _ in inner)
            grid = {k: [v for v in values if k != "probe__n_neighbors" or v <= most] for k, values in grid.items()}
            scoring = "neg_log_loss" if scores.classes else "neg_mean_absolute_error"
            if probe == "knn" and scores.classes:
                scoring = "balanced_accuracy"
            estimator = GridSearchCV(estimator, grid, cv=inner, scoring=scoring)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # convergence at the weakest regularisation, which then is not chosen
            estimator.fit(x[train], truth[train])
        predicted[test] = estimator.predict_proba(x[test]) if scores.classes else estimator.predict(x[test])
    return predicted


def estimator_of(probe: str, task: Task, studies: int) -> tuple[Any, dict[str, list[Any]]]:
    """A pipeline, and what may be chosen in it."""
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import StandardScaler

    grid: dict[str, list[Any]]
    if probe == "linear" and task == "classify":
        model, grid = LogisticRegression(C=0.01, max_iter=5000, class_weight="balanced"), {"probe__C": [*_STRENGTHS]}
    elif probe == "linear":
        model, grid = Ridge(alpha=100.0), {"probe__alpha": [1 / c for c in _STRENGTHS]}
    else:
        neighbours = KNeighborsClassifier if task == "classify" else KNeighborsRegressor
        model = neighbours(min(5, studies), metric="cosine", weights="distance")
        grid = {"probe__n_neighbors": [k for k in _NEIGHBOURS if k <= studies]}
    return Pipeline([("scale", StandardScaler()), ("probe", model)]), grid


def predict_constant(
    truth: np.ndarray, splits: Sequence[tuple[np.ndarray, np.ndarray]], scores: ProbeScores
) -> np.ndarray:
    """The training part's class shares, or its mean, for everybody."""
    predicted = np.zeros((len(truth), len(scores.classes)) if scores.classes else len(truth))
    for train, test in splits:
        if scores.classes:
            predicted[test] = np.bincount(truth[train], minlength=len(scores.classes)) / len(train)
        else:
            predicted[test] = truth[train].mean()
    predicted[:] = predicted.mean(0)  # the folds differ a little, which must not look like knowledge
    return predicted


def add(
    scores: ProbeScores,
    labels: Sequence[Label],
    features: str,
    probe: str,
    predicted: np.ndarray,
    truth: np.ndarray,
    seed: int,
) -> None:
    """A row of scores with intervals, and its predictions."""
    row: dict[str, Any] = {"features": features, "probe": probe, **measure(predicted, truth, scores.task)}

    def of_rows(rows: np.ndarray) -> dict[str, float]:
        if len(np.unique(truth[rows])) < max(2, len(scores.classes)):
            raise ValueError("a class is missing")
        return measure(predicted[rows], truth[rows], scores.task)

    ranges = intervals(of_rows, [label.subject for label in labels], seed)
    for metric in METRICS[scores.task]:
        low, high = ranges.get(metric, (float("nan"), float("nan")))
        row |= {f"{metric}_low": low, f"{metric}_high": high}
    scores.rows.append(row)
    for label, value in zip(labels, predicted, strict=True):
        told = {f"p_{c}": float(p) for c, p in zip(scores.classes, value, strict=True)} if scores.classes else None
        base = {"study": label.study, "features": features, "probe": probe, "truth": label.value}
        scores.predictions.append({**base, **(told or {"predicted": float(value)})})


def measure(predicted: np.ndarray, truth: np.ndarray, task: Task) -> dict[str, float]:
    """The task's metrics; of several classes the mean of each against the rest."""
    from scipy.stats import spearmanr
    from sklearn.metrics import average_precision_score, balanced_accuracy_score, r2_score, roc_auc_score

    if task == "regress":
        constant = np.ptp(predicted) == 0 or np.ptp(truth) == 0
        return {
            "r2": float(r2_score(truth, predicted)),
            "mae": float(np.abs(truth - predicted).mean()),
            "spearman": 0.0 if constant else float(spearmanr(truth, predicted).statistic),
        }
    if predicted.shape[1] == 2:
        auc = roc_auc_score(truth, predicted[:, 1])
        precision = average_precision_score(truth, predicted[:, 1])
    else:
        one_hot = np.eye(predicted.shape[1])[truth]
        auc = roc_auc_score(one_hot, predicted, average="macro")
        precision = average_precision_score(one_hot, predicted, average="macro")
    accuracy = balanced_accuracy_score(truth, predicted.argmax(1))
    return {"auc": float(auc), "average_precision": float(precision), "balanced_accuracy": float(accuracy)}


def plot(scores: ProbeScores, path: Path) -> None:
    """A PNG: a line a kind of features, a dot a probe, bars the 95 % interval."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["features"] for row in scores.rows))
    metrics = METRICS[scores.task]
    figure = Figure(figsize=(4.2 * len(metrics), 0.42 * len(names) + 1.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    looks = {"linear": ("#0b6e99", "o", -0.13), "knn": ("#d08a1d", "D", 0.13), "none": ("#9a9a9a", "s", 0.0)}
    for panel, metric in zip(panels, metrics, strict=True):
        for row in scores.rows:
            colour, marker, offset = looks[row["probe"]]
            value, low, high = row[metric], row[f"{metric}_low"], row[f"{metric}_high"]
            around = [[max(0.0, value - low)], [max(0.0, high - value)]]
            where = names.index(row["features"]) + offset
            panel.errorbar([value], [where], xerr=around, fmt=marker, color=colour, markersize=6, elinewidth=1)
        panel.set_title(HEADINGS[metric], fontsize=10)
        panel.grid(axis="x", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    for probe in ("linear", "knn"):
        panels[0].plot([], [], looks[probe][1], color=looks[probe][0], label=f"{probe} probe")
    title = f"{scores.label}: {scores.studies} studies, {scores.folds} folds by subject"
    figure.legend(loc="outside lower center", ncols=2, frameon=False, title=title)
    figure.savefig(path, dpi=110, format="png")
