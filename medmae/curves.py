"""Curves of a cross-validation: what was predicted of held-out studies, and how training went."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from medmae.outcomes import Labels, Outcome, Survival


def draw(outcome: Outcome, predicted: np.ndarray, targets: np.ndarray, losses: list[list[float]], path: Path) -> None:
    """A PNG: ROC and precision-recall curves, or survival of low and high risk; and the folds' training losses."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from sklearn.metrics import precision_recall_curve, roc_curve

    survival = isinstance(outcome, Survival)
    figure = Figure(figsize=(8.6 if survival else 12.4, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if survival else 3)
    if survival:
        high = predicted[:, 0] > np.median(predicted[:, 0])
        for group, name, colour in ((high, "higher risk", "#c0392b"), (~high, "lower risk", "#0b6e99")):
            panels[0].step(*kaplan_meier(targets[group]), where="post", label=f"{name} ({group.sum()})", color=colour)
        panels[0].set(xlabel="time", ylabel="without event", ylim=(0, 1.03), title="held-out studies")
    else:
        names = getattr(outcome, "names", [])
        several = isinstance(outcome, Labels)
        shown = range(len(names)) if several or len(names) > 2 else [1]
        for i in shown:
            truth = targets[:, i] if several else targets == i
            if 0 < truth.sum() < len(truth):
                panels[0].plot(*roc_curve(truth, predicted[:, i])[:2], label=str(names[i]))
                precision, recall, _ = precision_recall_curve(truth, predicted[:, i])
                panels[1].plot(recall, precision, label=str(names[i]))
        panels[0].plot([0, 1], [0, 1], color="#9a9a9a", linewidth=1)
        panels[0].set(xlabel="false positive rate", ylabel="true positive rate", title="ROC, held-out studies")
        panels[1].set(xlabel="recall", ylabel="precision", title="precision and recall", ylim=(0, 1.03))
    panels[0].legend(frameon=False, fontsize=8)
    for number, values in enumerate(losses):
        panels[-1].plot(range(1, len(values) + 1), values, label=f"fold {number}")
    panels[-1].set(xlabel="epoch", title="training loss")
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, format="png")


def kaplan_meier(targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Times and the share without event (Kaplan & Meier 1958) of (n, 2) times and events."""
    time, event = targets[:, 0], targets[:, 1]
    steps, share = [0.0], [1.0]
    for t in np.unique(time[event > 0]):
        at_risk = (time >= t).sum()
        steps.append(float(t))
        share.append(share[-1] * (1 - ((time == t) & (event > 0)).sum() / at_risk))
    return np.array(steps), np.array(share)
