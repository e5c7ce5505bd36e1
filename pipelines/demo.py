"""From nothing to a synthesised FLAIR: the steps of ``medmae demo`` on the public API.

    python pipelines/demo.py OUT [--quick]

Replace ``make_demo_cohort`` by a folder of your own scans and everything below stays as it is.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import medmae


def main(out: Path, quick: bool) -> None:
    """``quick`` shows that every step runs, on few studies and steps; what it learns is of no use."""
    cohort = medmae.make_demo_cohort(out / "scans", studies=4 if quick else 24, held_out=1 if quick else 6)
    print(medmae.inspect(cohort.train))

    trained = medmae.pretrain(
        cohort.train, "bm-mae-tiny", out / "run", max_steps=20 if quick else None, resume=True, device="auto"
    )
    synthesis = medmae.reconstruct(
        sorted(cohort.held_out.iterdir()), trained.run, out / "synthesis", targets=["flair"], report=True
    )
    scores = medmae.evaluate_synthesis(cohort.held_out, trained.run, out / "scores", targets=["flair"])
    print(scores)
    print("Reports:", *synthesis.reports)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    main(options.out, options.quick)
