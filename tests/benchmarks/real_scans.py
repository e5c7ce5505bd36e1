"""Synthesis on real scans, split by subject: the table in docs/explanation/results.md.

    python tests/benchmarks/real_scans.py FOLDER_OF_REAL_SCANS OUT [--init RUN] [--plan PLAN] [--set KEY=VALUE]...

The folder holds ``brain_mr_open`` and ``brain_mr_noncommercial``. The split is by subject and written down here:
every source with FLAIR has a subject on both sides, and no subject is on both.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import medmae
from medmae.synthesis.scores import METRICS, PREDICTORS

HELD_OUT = ("oms-cs26", "oms-lg12", "brats13-0004")


def links(scans: Path, out: Path) -> tuple[Path, Path]:
    """Folders ``train`` and ``held_out`` of links to the sessions, subject by subject."""
    for session in sorted(scans.glob("brain_mr_*/*/*")):
        subject = session.parent.name
        target = out / ("held_out" if subject in HELD_OUT else "train") / subject / session.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            target.symlink_to(session.resolve(), target_is_directory=True)
    return out / "train", out / "held_out"


def markdown(scores: Path) -> str:
    """The table of a ``scores.json``, for the documentation."""
    rows = json.loads(scores.read_text(encoding="utf-8"))["summary"]
    lines = ["| from | studies | PSNR, dB | SSIM | MAE, sd |", "|---|---|---|---|---|"]
    for inputs in dict.fromkeys(row["inputs"] for row in rows):
        found = {row["predictor"]: row for row in rows if row["inputs"] == inputs}
        cells = []
        for metric in METRICS:
            values = [found[p][metric] if p in found else None for p in PREDICTORS]
            digits = 1 if metric == "psnr" else 3
            cells.append(" / ".join("-" if v is None else f"{v:.{digits}f}" for v in values))
        lines.append(f"| {inputs.replace('+', ' ')} | {found['model']['studies']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scans", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--init", type=Path)
    parser.add_argument("--plan", default="bm-mae-tiny")
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    train, held_out = links(options.scans, options.out)
    print(medmae.inspect(train))
    plan = medmae.Plan.load(options.plan, options.set)
    run = medmae.pretrain(train, plan, options.out / "run", init=options.init, resume=True).run
    medmae.reconstruct(sorted(held_out.iterdir()), run, options.out / "synthesis", targets=["flair"], report=True)
    print(medmae.evaluate_synthesis(held_out, run, options.out / "scores", targets=["flair"]))
    print(markdown(options.out / "scores" / "scores.json"))


if __name__ == "__main__":
    main()
