"""What refining and its intervals are worth on subjects held out: the tables in docs/explanation/results.md.

    python tests/benchmarks/refining.py TRAIN HELD_OUT RUN OUT [--show STUDY...] [--set KEY=VALUE]...

TRAIN and HELD_OUT are folders of studies, RUN a pre-training on TRAIN, or a checkpoint. The refiner is trained, every
modality of HELD_OUT is synthesised from every combination of the others, and the studies to ``--show`` are drawn with
FLAIR before and after refining. What is in OUT already is not made again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import medmae
from medmae.synthesis.scores import METRICS, PREDICTORS

TARGET = "flair"


def markdown(scores: Path) -> str:
    """A row a target and combination: the metrics as model / mean / regression, then what the intervals hold."""
    found = json.loads(scores.read_text(encoding="utf-8"))
    heads = "target | from | studies | PSNR, dB | SSIM | MAE, sd | coverage | half-width, sd: brain, lesions | grid"
    lines = [f"| {heads} |", "|" + "---|" * len(heads.split("|"))]
    groups: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in found["summary"]:
        groups.setdefault((row["target"], row["inputs"]), {})[row["predictor"]] = row
    for (target, inputs), rows in groups.items():
        own = rows["model"]
        cells = [target, inputs.replace("+", " "), str(own["studies"])]
        for metric in METRICS:
            values = [rows[p][metric] if p in rows else None for p in PREDICTORS]
            cells.append(" / ".join(number(v, 1 if metric == "psnr" else 3) for v in values))
        cells += [number(own["coverage"], 3), f"{number(own['width'], 2)}, {number(own['lesion_width'], 2)}"]
        lines.append(f"| {' | '.join([*cells, number(own['grid_residual'], 2)])} |")
    return "\n".join(lines)


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def summary(scores: Path) -> str:
    """How many combinations of two or more inputs are better than both floors in everything, and the coverage."""
    found = json.loads(scores.read_text(encoding="utf-8"))
    several = {(e["target"], e["inputs"]) for e in found["beats"] if "+" in e["inputs"]}
    lost = {(e["target"], e["inputs"]) for e in found["beats"] if not all(e[m]["better"] for m in METRICS)}
    rows = [row for row in found["rows"] if row["predictor"] == "model" and row["coverage"] is not None]
    each = [np.mean([r["coverage"] for r in rows if r["study"] == s]) for s in sorted({r["study"] for r in rows})]
    wider = [r["lesion_width"] > r["width"] for r in rows if r["lesion_width"] is not None]
    lines = [f"{len(several - lost)} of {len(several)} combinations of several inputs better than both floors in all"]
    if each:
        lines.append(f"coverage {np.mean(each):.3f}, by study {min(each):.3f} to {max(each):.3f}")
    if wider:
        lines.append(f"wider in the lesions than in the brain: {np.mean(wider):.2f} of studies and combinations")
    return "\n".join(lines)


def draw(studies: Sequence[Path], before: Path, after: Path, file: Path) -> None:
    """One row a study: T1 and T2 as given, FLAIR before and after refining, as acquired, and the half-width."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heads = (
        "T1, given",
        "T2, given",
        "FLAIR, pre-trained model",
        "FLAIR, refined",
        "FLAIR, acquired",
        "90 % interval, ±",
    )
    figure = Figure(figsize=(1.9 * len(heads), 2.3 * len(studies)), facecolor="black", layout="compressed")
    FigureCanvasAgg(figure)
    models = [medmae.load(before), medmae.load(after)]
    for row, study in zip(figure.subplots(len(studies), len(heads), squeeze=False), studies, strict=True):
        volumes = {f.name.removesuffix(".nii.gz"): medmae.read_image(f) for f in sorted(study.glob("*.nii.gz"))}
        images = {m: volumes[m] for m in models[0].modalities if m in volumes}
        coarse, refined = (
            medmae.reconstruct_volumes(m, images, [TARGET], reference=TARGET, uncertainty=True)[TARGET] for m in models
        )
        assert refined.uncertainty is not None
        truth = images[TARGET].array
        lesion = volumes["seg"].array if "seg" in volumes else truth
        at = int(np.argmax((lesion > 0).sum((0, 1))))
        given = [images[m].array for m in ("t1", "t2")]
        shown = [*given, coarse.volume.array, refined.volume.array, truth, refined.uncertainty.array]
        for ax, array, head in zip(row, shown, heads, strict=True):
            top = float(np.percentile(array[array > 0], 99.5))  # a synthesis has no scanner's scale
            ax.imshow(array[:, :, at].T, cmap="magma" if "±" in head else "gray", origin="lower", vmin=0, vmax=top)
            ax.set_axis_off()
            ax.set_title(head, color="white", fontsize=9)
    figure.savefig(file, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("train", "held_out", "run", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--show", nargs="*", default=[], metavar="STUDY")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    run, scores = options.out / "run", options.out / "scores"
    print(medmae.finetune_synthesis(options.train, options.run, run, overrides=options.set, resume=True))
    if not (scores / "scores.json").exists():
        print(medmae.evaluate_synthesis(options.held_out, run, scores))
    print(markdown(scores / "scores.json"))
    print(summary(scores / "scores.json"))
    if options.show:
        draw([options.held_out / study for study in options.show], options.run, run, options.out / "refined.png")


if __name__ == "__main__":
    main()
