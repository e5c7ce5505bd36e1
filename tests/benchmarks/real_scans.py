"""Synthesis on real scans, split by subject: the table in docs/explanation/results.md.

    python tests/benchmarks/real_scans.py FOLDER_OF_REAL_SCANS OUT [--init RUN] [--plan PLAN] [--set KEY=VALUE]...

The folder holds ``brain_mr_open`` and ``brain_mr_noncommercial``. The split is by subject and written down here:
every source with FLAIR has a subject on both sides, and no subject is on both.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import medmae

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


if __name__ == "__main__":
    main()
