"""What is predicted of a study: a class, several labels, or how long until an event. Targets, losses, scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medmae.cohort.labels import Label
from medmae.errors import InputError, Problem
from medmae.probes import measure

_SEPARATORS = ";|"  # between the labels of a study that has several
_BINS = 10  # of time, at quantiles of the events


class Outcome(ABC):
    """A kind of prediction. ``outputs`` of the head, ``columns`` of a prediction, ``metrics`` best first."""

    kind: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]
    columns: list[str]
    outputs: int

    @abstractmethod
    def target(self, label: Label) -> np.ndarray:
        """A study's truth as numbers."""

    @abstractmethod
    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Scalar, of (B, outputs) and (B, ...)."""

    @abstractmethod
    def predict(self, logits: Tensor) -> np.ndarray:
        """(B, columns) what a user reads."""

    @abstractmethod
    def measure(self, predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        """The metrics of (n, columns) predictions."""

    @abstractmethod
    def strata(self, targets: np.ndarray) -> np.ndarray:
        """(n,) integers that folds spread evenly."""

    @abstractmethod
    def fitted(self, targets: np.ndarray) -> Outcome:
        """The same with what only training studies may decide (class weights, bins of time)."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Enough for :func:`outcome_of`."""


@dataclass
class Named(Outcome):
    """What has ``names``, each with a weight in the loss once training studies are known."""

    names: list[str]
    weights: list[float] | None = None
    metrics: ClassVar[tuple[str, ...]] = ("auc", "average_precision", "balanced_accuracy")

    def __post_init__(self) -> None:
        self.columns, self.outputs = [f"p_{name}" for name in self.names], len(self.names)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "names": self.names, "weights": self.weights}


@dataclass
class Classes(Named):
    """One of ``names``, each weighted by the inverse of its frequency (``weights``)."""

    kind: ClassVar[str] = "classes"

    def target(self, label: Label) -> np.ndarray:
        return np.array(self.names.index(label.value))

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        weights = None if self.weights is None else torch.tensor(self.weights, device=logits.device)
        return F.cross_entropy(logits, targets.long(), weight=weights)

    def predict(self, logits: Tensor) -> np.ndarray:
        found: np.ndarray = logits.softmax(1).numpy()
        return found

    def measure(self, predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        return measure(predicted, truth.astype(int), "classify")

    def strata(self, targets: np.ndarray) -> np.ndarray:
        return targets.astype(int)

    def fitted(self, targets: np.ndarray) -> Classes:
        counts = np.bincount(targets.astype(int), minlength=len(self.names)).clip(min=1)
        return Classes(self.names, [float(w) for w in len(targets) / (len(self.names) * counts)])


@dataclass
class Labels(Named):
    """Any of ``names``, in cells such as ``oedema;necrosis``; an empty set is written ``none``."""

    kind: ClassVar[str] = "labels"

    def target(self, label: Label) -> np.ndarray:
        mine = several(label.value)
        return np.array([float(name in mine) for name in self.names])

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        weights = None if self.weights is None else torch.tensor(self.weights, device=logits.device)
        return F.binary_cross_entropy_with_logits(logits, targets.float(), pos_weight=weights)

    def predict(self, logits: Tensor) -> np.ndarray:
        found: np.ndarray = logits.sigmoid().numpy()
        return found

    def measure(self, predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        each = []
        for i in range(len(self.names)):
            if 0 < truth[:, i].sum() < len(truth):
                both = np.stack([1 - predicted[:, i], predicted[:, i]], axis=1)
                each.append(measure(both, truth[:, i].astype(int), "classify"))
        return {m: float(np.mean([e[m] for e in each])) if each else float("nan") for m in self.metrics}

    def strata(self, targets: np.ndarray) -> np.ndarray:
        rarest = targets[:, targets.sum(0).argsort()]  # a study counts for its rarest label
        return np.where(rarest.any(1), rarest.argmax(1) + 1, 0)

    def fitted(self, targets: np.ndarray) -> Labels:
        positive = targets.sum(0).clip(min=1)
        return Labels(self.names, [float(w) for w in ((len(targets) - positive) / positive).clip(0.1, 10)])


@dataclass
class Survival(Outcome):
    """Time until an event, or until a study was last seen: a discrete-time logistic hazard (Gensheimer & Narasimhan
    2019) over bins that end at ``edges``, quantiles of the training studies' events. The prediction is ``risk``: minus
    the expected number of bins survived."""

    edges: list[float] | None = None
    kind: ClassVar[str] = "survival"
    metrics: ClassVar[tuple[str, ...]] = ("c_index",)

    def __post_init__(self) -> None:
        self.columns, self.outputs = ["risk"], _BINS

    def target(self, label: Label) -> np.ndarray:
        time, event = label.value.split("/")
        return np.array([float(time), float(event)])

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        edges = torch.tensor(self.edges, device=logits.device)
        time, event = targets.float().t().contiguous()
        last = torch.bucketize(time, edges).clamp(max=_BINS - 1)  # the bin in which it ends
        bins = torch.arange(_BINS, device=logits.device)
        died = (bins == last.unsqueeze(1)).float() * event.unsqueeze(1)
        lived = (bins < last.unsqueeze(1)).float()  # censored within a bin: nothing is known of that bin
        at_risk = lived + died
        each = F.binary_cross_entropy_with_logits(logits, died, reduction="none") * at_risk
        return each.sum() / len(targets)

    def predict(self, logits: Tensor) -> np.ndarray:
        survived = torch.cumprod(1 - logits.sigmoid(), dim=1)
        found: np.ndarray = -survived.sum(1, keepdim=True).numpy()
        return found

    def measure(self, predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        return {"c_index": concordance(predicted[:, 0], truth[:, 0], truth[:, 1])}

    def strata(self, targets: np.ndarray) -> np.ndarray:
        return targets[:, 1].astype(int)

    def fitted(self, targets: np.ndarray) -> Survival:
        events = targets[targets[:, 1] > 0, 0]
        known = events if len(events) else targets[:, 0]
        return Survival([float(v) for v in np.quantile(known, np.arange(1, _BINS) / _BINS)])

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "edges": self.edges}


def several(value: str) -> set[str]:
    """The labels of a cell."""
    for separator in _SEPARATORS:
        value = value.replace(separator, ";")
    return {part.strip() for part in value.split(";") if part.strip() and part.strip().lower() != "none"}


def concordance(risk: np.ndarray, time: np.ndarray, event: np.ndarray) -> float:
    """Harrell's C: of all pairs in which one is known to have had its event first, the share in which its risk is
    higher; ties count a half."""
    first = (time[:, None] < time[None, :]) & (event[:, None] > 0)
    first |= (time[:, None] == time[None, :]) & (event[:, None] > 0) & (event[None, :] == 0)
    if not first.any():
        return float("nan")
    higher = (risk[:, None] > risk[None, :]) + 0.5 * (risk[:, None] == risk[None, :])
    return float(higher[first].mean())


def classes_of(labels: Sequence[Label]) -> Outcome:
    """Several labels where a cell holds a separator, else classes. Raises :class:`InputError` for one class only."""
    multi = any(s in label.value for label in labels for s in _SEPARATORS)
    names = sorted(set().union(*(several(label.value) for label in labels)) if multi else {x.value for x in labels})
    if not multi and len(names) < 2:
        raise InputError(
            "there is one class only",
            field="label",
            found=", ".join(names) or "no labelled study",
            expected="two or more",
        )
    return Labels(names) if multi else Classes(names)


def survival_labels(times: Sequence[Label], events: Sequence[Label], problems: list[Problem]) -> list[Label]:
    """Labels ``time/event``; times that are not positive and events that are neither 0 nor 1 go to ``problems``."""
    of_study = {label.study: label for label in events}
    found = []
    for label in times:
        if label.study not in of_study:
            continue
        event = of_study[label.study].value.lower()
        code = {"0": "0", "1": "1", "false": "0", "true": "1", "no": "0", "yes": "1", "0.0": "0", "1.0": "1"}.get(event)
        where = f"row {label.row}"
        try:
            time = float(label.value)
        except ValueError:
            time = float("nan")
        if not time > 0 or not np.isfinite(time):
            problems.append(Problem("a time that is no positive number", where, found=label.value))
        elif code is None:
            problems.append(Problem("an event that is neither 0 nor 1", where, found=event))
        else:
            found.append(Label(label.study, label.subject, f"{time}/{code}", label.row))
    return found


def outcome_of(facts: dict[str, Any]) -> Outcome:
    """The inverse of ``to_json``."""
    kinds: dict[str, type[Outcome]] = {"classes": Classes, "labels": Labels, "survival": Survival}
    given = {k: v for k, v in facts.items() if k != "kind"}
    return kinds[facts["kind"]](**given)
