"""One segmentation model for every combination of modalities: fine-tuned with modality dropout, used with each subset.

    python pipelines/segment_missing_modalities.py OUT [--checkpoint RUN] [--quick]

On the demonstration's cohort. A second model is fine-tuned alike but for the dropout, to see what the dropout costs
where nothing is missing. Leaves ``combinations.csv``: the held-out studies' Dice of the lesions for each subset.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from segment_with_few_labels import join_labels

import medmae

DROPOUT = 0.35  # share of the steps that lose some of the channels


def main(out: Path, checkpoint: Path | None, quick: bool) -> None:
    """``quick`` shows that every step runs; what it learns is of no use."""
    cohort = medmae.make_demo_cohort(out / "scans", studies=6 if quick else 24, held_out=1 if quick else 6)
    if checkpoint is None:
        steps = 5 if quick else None
        checkpoint = medmae.pretrain(cohort.train, "bm-mae-tiny", out / "run", max_steps=steps, resume=True).run
    dataset = medmae.make_dataset(cohort.train, out / "Dataset302_Lesions", incomplete=True).folder
    join_labels(dataset)
    models = {
        dropout: medmae.finetune_segment(
            dataset,
            checkpoint,
            out / f"dropout-{dropout}",
            overrides=[f"modality_dropout={dropout}", "mirror=[0]", "cpu_precision=auto"],
            epochs=1 if quick else 12,
            steps_per_epoch=2 if quick else 50,
            validation_steps=1,
        ).model
        for dropout in (DROPOUT, 0)
    }
    modalities = medmae.load(checkpoint).modalities
    subsets = [s for n in range(1, len(modalities) + 1) for s in itertools.combinations(modalities, n)]
    rows = []
    for subset in subsets[-2:] if quick else subsets:
        studies = link(cohort.held_out, subset, out / "subsets" / "+".join(subset))
        for dropout, model in models.items():
            if dropout or subset == modalities:
                made = medmae.predict_segment(
                    [studies], model, out / f"segmented-{dropout}" / studies.name, mirror=False
                )
                scores = [
                    dice(f, cohort.held_out / f.name.removesuffix(".nii.gz") / "seg.nii.gz") for f in made.written
                ]
                row = {"modalities": studies.name, "dropout": dropout, "studies": len(scores)}
                rows.append({**row, "dice": float(np.mean(scores))})
                print(rows[-1])
    with (out / "combinations.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def link(scans: Path, subset: Sequence[str], out: Path) -> Path:
    """The studies of ``scans`` that have all of ``subset``, with nothing else."""
    for study in sorted(scans.iterdir()):
        files = [study / f"{modality}.nii.gz" for modality in subset]
        if all(file.exists() for file in files):
            (out / study.name).mkdir(parents=True, exist_ok=True)
            for file in files:
                shutil.copy(file, out / study.name)
    return out


def dice(predicted: Path, truth: Path) -> float:
    """Of everything that is not background; 1 where both are empty."""
    a, b = (np.asanyarray(nib.load(file).dataobj) > 0 for file in (predicted, truth))
    total = a.sum() + b.sum()
    return float(2 * (a & b).sum() / total) if total else 1.0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    main(options.out, options.checkpoint, options.quick)
