"""What pre-training is worth with few labels: nnU-Net's lesion segmentation, from a checkpoint and from scratch.

    python pipelines/segment_with_few_labels.py OUT [--checkpoint RUN] [--labels 4 8 16] [--quick]

On the demonstration's cohort, whose lesions are joined to one label. Each number of labels trains on the first so many
studies and is validated on the same held-out ones. Leaves ``learning-curve.csv`` and ``learning-curve.png``.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

import medmae

HELD_OUT = 8  # studies that validate, the same for every number of labels


def main(out: Path, checkpoint: Path | None, numbers: list[int], quick: bool) -> None:
    """``quick`` shows that every step runs; what it learns is of no use."""
    held_out, steps, epochs = (2, 2, 1) if quick else (HELD_OUT, 50, 12)
    numbers = numbers[:1] if quick else numbers
    cohort = medmae.make_demo_cohort(out / "scans", studies=max(numbers) + held_out, held_out=1)
    if checkpoint is None:
        steps_of_pretraining = 5 if quick else None
        checkpoint = medmae.pretrain(
            cohort.train, "resenc-mae-tiny", out / "run", max_steps=steps_of_pretraining, resume=True
        ).run
    dataset = medmae.make_dataset(cohort.train, out / "Dataset301_Lesions", incomplete=True).folder
    join_labels(dataset)
    cases = sorted(f.name.removesuffix(".nii.gz") for f in (dataset / "labelsTr").iterdir())
    rows = []
    for number in numbers:
        for from_scratch in (False, True):
            place = out / f"{number}-{'scratch' if from_scratch else 'pretrained'}"
            splits = place / "preprocessed" / dataset.name / "splits_final.json"
            splits.parent.mkdir(parents=True, exist_ok=True)
            splits.write_text(json.dumps([{"train": cases[held_out:][:number], "val": cases[:held_out]}]))
            result = medmae.finetune_segment(
                dataset,
                checkpoint,
                place,
                from_scratch=from_scratch,
                overrides=["optimizer=adamw", "lr=0.001", "decay=cosine", "modality_dropout=0.3"],
                epochs=epochs,
                steps_per_epoch=steps,
                validation_steps=1 if quick else 5,
            )
            rows.append({"labels": number, "from_scratch": from_scratch, "dice": result.dice["0"]})
            print(rows[-1])
    write(out, rows)


def join_labels(dataset: Path) -> None:
    """Every lesion becomes label 1."""
    for file in (dataset / "labelsTr").iterdir():
        image = nib.load(file)
        joined = (np.asanyarray(image.dataobj) > 0).astype(np.uint8)
        nib.save(nib.Nifti1Image(joined, image.affine), file)
    described = json.loads((dataset / "dataset.json").read_text())
    (dataset / "dataset.json").write_text(json.dumps({**described, "labels": {"background": 0, "lesion": 1}}))


def write(out: Path, rows: list[dict[str, Any]]) -> None:
    """The learning curve as a table and a picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with (out / "learning-curve.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    for from_scratch, label in ((False, "pre-trained"), (True, "from scratch")):
        mine = [row for row in rows if row["from_scratch"] is from_scratch]
        panel.plot([r["labels"] for r in mine], [r["dice"] or 0.0 for r in mine], "o-", label=label)
    panel.set(xlabel="labelled studies", ylabel="Dice of the held-out studies")
    panel.legend(frameon=False)
    figure.savefig(out / "learning-curve.png", dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--labels", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    main(options.out, options.checkpoint, options.labels, options.quick)
