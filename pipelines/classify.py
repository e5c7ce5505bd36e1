"""Which studies have a tumour, which multiple sclerosis: a frozen encoder and a linear head, on the demo cohort.

    python pipelines/classify.py OUT [--checkpoint RUN] [--quick]

Leaves a table, scores, predictions and curves.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import medmae


def main(out: Path, checkpoint: Path | None, quick: bool) -> None:
    """``quick`` shows that every step runs, on few studies; what it learns is of no use."""
    cohort = medmae.make_demo_cohort(out / "scans", studies=8 if quick else 24, held_out=1)
    if checkpoint is None:
        steps = 5 if quick else None
        checkpoint = medmae.pretrain(cohort.train, "bm-mae-tiny", out / "run", max_steps=steps, resume=True).run
    with cohort.table.open(newline="") as stream:
        studies = [row for row in csv.DictReader(stream) if row["split"] == "train"]
    table = out / "labels.csv"
    with table.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["study", "label"])
        writer.writerows((row["study"], row["lesion_type"]) for row in studies)
    settings = medmae.HeadSettings(mode="linear", epochs=20 if quick else 200, batch_size=32, weight_decay=1.0)
    print(
        medmae.finetune_classify(
            table, checkpoint, out / "head", data=cohort.train, settings=settings, folds=2 if quick else 5
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    main(options.out, options.checkpoint, options.quick)
