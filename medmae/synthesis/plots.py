"""The plot of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from medmae.synthesis.scores import LABELS, METRICS, PREDICTORS

if TYPE_CHECKING:
    from medmae.synthesis.scores import SynthesisScores

COLOURS = {"model": "#0b6e99", "mean": "#9a9a9a", "regression": "#d08a1d"}
MARKERS = {"model": "o", "mean": "s", "regression": "D"}
TITLES = {"psnr": "PSNR in the brain (dB)", "ssim": "SSIM in the brain", "mae": "mean absolute error (z)"}


def plot_scores(scores: SynthesisScores, path: Path) -> None:
    """A PNG: a row of panels a target, a line a combination of inputs; dots are means, bars one standard deviation
    over the studies."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    summary = scores.summary()
    targets = list(dict.fromkeys(entry["target"] for entry in summary))
    lines = {t: list(dict.fromkeys(e["inputs"] for e in summary if e["target"] == t)) for t in targets}
    heights = [len(lines[t]) + 1.5 for t in targets]
    figure = Figure(figsize=(12, 0.34 * sum(heights) + 1.1), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(targets), len(METRICS), squeeze=False, sharey="row", height_ratios=heights)
    for row, target in enumerate(targets):
        for column, metric in enumerate(METRICS):
            panel = panels[row][column]
            for offset, predictor in zip((0.0, -0.22, 0.22), PREDICTORS, strict=True):
                entries = [e for e in summary if e["target"] == target and e["predictor"] == predictor]
                entries = [e for e in entries if e[metric] is not None]
                panel.errorbar(
                    [e[metric] for e in entries],
                    [lines[target].index(e["inputs"]) + offset for e in entries],
                    xerr=[e[f"{metric}_std"] for e in entries],
                    fmt=MARKERS[predictor],
                    color=COLOURS[predictor],
                    markersize=6 if predictor == "model" else 4.5,
                    elinewidth=1,
                    label=LABELS[predictor] if entries else None,
                )
            panel.set_yticks(range(len(lines[target])), [name.replace("+", " + ") for name in lines[target]])
            panel.set_ylim(len(lines[target]) - 0.4, -0.6)
            panel.grid(axis="x", alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
            panel.set_title(TITLES[metric] if row == 0 else "", fontsize=10)
            if column == 0:
                panel.set_ylabel(f"{target} from", fontweight="bold")
    handles, labels = panels[0][0].get_legend_handles_labels()
    studies = len({row["study"] for row in scores.rows})
    title = f"{scores.model['plan']}: synthesis on {studies} held-out stud{'y' if studies == 1 else 'ies'}"
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), title=title, frameon=False)
    figure.savefig(path, dpi=110, format="png")
