"""One segmentation model for every combination of modalities: fine-tuned with modality dropout, used with each subset.

    python pipelines/segment_missing_modalities.py OUT [--checkpoint RUN] [--quick]

On the demonstration's cohort. Leaves ``combinations.csv``: the held-out studies' Dice of the lesions for each subset.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
from segment_with_few_labels import join_labels

import medmae


def main(out: Path, checkpoint: Path | None, quick: bool) -> None:
    """``quick`` shows that every step runs; what it learns is of no use."""
    cohort = medmae.make_demo_cohort(out / "scans", studies=6 if quick else 24, held_out=1 if quick else 6)
    if checkpoint is None:
        steps = 5 if quick else None
        checkpoint = medmae.pretrain(cohort.train, "bm-mae-tiny", out / "run", max_steps=steps, resume=True).run
    dataset = medmae.make_dataset(cohort.train, out / "Dataset302_Lesions", incomplete=True).folder
    join_labels(dataset)
    result = medmae.finetune_segment(
        dataset,
        checkpoint,
        out / "model",
        overrides=["modality_dropout=0.7"],
        epochs=1 if quick else 12,
        steps_per_epoch=2 if quick else 50,
        validation_steps=1 if quick else 5,
    )
    modalities = medmae.load(checkpoint).modalities
    subsets = [s for n in range(1, len(modalities) + 1) for s in itertools.combinations(modalities, n)]
    rows = []
    for subset in subsets[-2:] if quick else subsets:
        name = "+".join(subset)
        studies = out / "subsets" / name
        for study in sorted(cohort.held_out.iterdir()):
            for modality in subset:
                if (study / f"{modality}.nii.gz").exists():
                    (studies / study.name).mkdir(parents=True, exist_ok=True)
                    shutil.copy(study / f"{modality}.nii.gz", studies / study.name)
        made = medmae.predict_segment([studies], result.model, out / "segmented" / name, mirror=False)
        scores = [
            dice(file, cohort.held_out / file.name.removesuffix(".nii.gz") / "seg.nii.gz") for file in made.written
        ]
        rows.append({"modalities": name, "studies": len(scores), "dice": float(np.mean(scores))})
        print(rows[-1])
    with (out / "combinations.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


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
