"""Which studies have a large lesion: a frozen encoder and a linear head, on the demonstration's cohort.

    python pipelines/classify.py OUT [--checkpoint RUN] [--quick]

The label is made from the lesions' volumes, above or below the median. Leaves a table, scores, predictions and curves.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import nibabel as nib
import numpy as np

import medmae


def main(out: Path, checkpoint: Path | None, quick: bool) -> None:
    """``quick`` shows that every step runs, on few studies; what it learns is of no use."""
    cohort = medmae.make_demo_cohort(out / "scans", studies=8 if quick else 24, held_out=1)
    if checkpoint is None:
        steps = 5 if quick else None
        checkpoint = medmae.pretrain(cohort.train, "bm-mae-tiny", out / "run", max_steps=steps, resume=True).run
    volumes = {study.name: lesion_volume(study / "seg.nii.gz") for study in sorted(cohort.train.iterdir())}
    middle = float(np.median(list(volumes.values())))
    table = out / "labels.csv"
    with table.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["study", "label"])
        writer.writerows((study, "large" if volume > middle else "small") for study, volume in volumes.items())
    settings = medmae.HeadSettings(mode="linear", epochs=20 if quick else 200, batch_size=32, weight_decay=1.0)
    print(
        medmae.finetune_classify(
            table, checkpoint, out / "head", data=cohort.train, settings=settings, folds=2 if quick else 5
        )
    )


def lesion_volume(file: Path) -> float:
    """Millilitres of everything that is not background."""
    image = nib.load(file)
    return float((np.asanyarray(image.dataobj) > 0).sum() * np.prod(image.header.get_zooms()[:3]) / 1000)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    main(options.out, options.checkpoint, options.quick)
