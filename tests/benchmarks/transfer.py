"""What pre-training is worth downstream: nnU-Net from a checkpoint and from scratch (docs/explanation/transfer.md).

    python tests/benchmarks/transfer.py TASK OUT [--data FOLDER_OF_REAL_SCANS] [--methods PLAN...] [--seeds 0 1 2]

TASK is ``hippocampus`` or ``oasis`` (real scans, split by subject as written down here), ``lesions`` (the
demonstration's cohort with 4, 8 and 16 labelled studies), ``tumours`` (likewise, of a larger one), ``tumours-t1`` (the
same with nothing but T1 of the labelled and the held-out studies), ``tumours-t2`` (the whole tumour on T2 alone) or
``whole-t1`` (the whole tumour on T1 alone, a larger cohort to pre-train on).
Every method is pre-trained on the images of the training side, labels unused, then fine-tuned by nnU-Net's own commands
on the same few labelled cases, with the same steps, rates and held-out cases with and without the weights. Finished
trainings are kept in ``OUT/rows.jsonl`` and not repeated, so a stopped run goes on. Ends with the table, and
``curve.png`` where the number of labels varies.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

import medmae
from medmae.cohort.demo import DemoCohort

METHODS = ("bm-mae-tiny", "hi-end-mae-tiny", "resenc-mae-tiny", "spark-tiny")
HELD_OUT_OASIS = ("oasis-0353", "oasis-0368", "oasis-0379", "oasis-0395", "oasis-0417", "oasis-0456")
HELD_OUT_HIPPOCAMPUS = ("28", "29")  # blocks of ten ids, 280 to 299: a person's two sides are cases of one block

TISSUES = {"tumour_core": 1, "oedema": 2, "enhancing_rim": 3}  # a tumour's, as the demonstration labels them


@dataclass(frozen=True)
class Task:
    """One data set: labelled cases that train, by number of labels; length and patch of the fine-tuning; overrides of
    the pre-training plans and of their fine-tuning, by method ("" for all)."""

    labels: tuple[int, ...]
    epochs: int
    steps: int
    patch: tuple[int, int, int]
    plans: dict[str, list[str]]
    finetuning: dict[str, list[str]] = field(default_factory=dict)


ALWAYS = (
    *("optimizer=adamw", "lr=0.001", "decay=cosine", "warmup=0.1", "weight_decay=0.01"),
    *("mirror=[0]", "cpu_precision=auto"),  # left and right alone, and what a CPU is quickest in
)


VIT = [
    "model.patch=[4,4,4]",
    "model.depth=4",
    "masking.ratio=0.75",
    "training.precision=bf16",
    "training.batch_size=8",
    "training.epochs=10",
    "training.steps_per_epoch=60",
]
VIT_OF_TUMOURS = [
    *("model.depth=4", "model.width=192", "image.crop=[16,16,16]"),
    *("training.epochs=40", "training.steps_per_epoch=100"),
]
# As in the published model the tokens compress (512 voxels to 192 numbers), and the image's own skip connection sees
# half as far as at 4 mm.
VIT_AT_2_MM = [
    *("model.patch=[8,8,8]", "model.depth=4", "model.width=192"),
    *("training.batch_size=8", "training.steps_per_epoch=100"),
    *("training.validate_every=2", "training.preview_every=20", "training.checkpoint_every=2"),
]
TASKS = {
    "hippocampus": Task(
        (16,),
        epochs=3,
        steps=50,
        patch=(32, 48, 32),
        plans={
            "": ["image.spacing=[1,1,1]", "image.crop=[32,48,32]", 'modalities=["t1"]', "reconstruction.shifts=1"],
            "bm-mae-tiny": VIT,
            "hi-end-mae-tiny": VIT,
        },
    ),
    "oasis": Task(
        (6,),
        epochs=8,
        steps=25,
        patch=(48, 48, 48),
        plans={
            "": [
                *("image.spacing=[2,2,2]", "image.crop=[48,48,48]", 'modalities=["t1"]'),
                *("reconstruction.shifts=1", "training.epochs=6"),
            ],
            "bm-mae-tiny": [*VIT, "model.patch=[8,8,8]", "model.width=192", "training.epochs=6"],
        },
    ),
    "lesions": Task(
        (4, 8, 16),
        epochs=6,
        steps=20,
        patch=(48, 48, 48),
        plans={
            "": ["image.spacing=[3,3,3]", "image.crop=[48,48,48]", "reconstruction.shifts=1"],
            "bm-mae-tiny": [*VIT, "model.patch=[8,8,8]", "model.width=192", "training.epochs=40"],
        },
        finetuning={"": ["modality_dropout=0.3"]},
    ),
    "tumours": Task(
        (4, 8, 16),
        epochs=8,
        steps=20,
        patch=(32, 32, 32),
        plans={
            "": ["image.spacing=[4,4,4]", "image.crop=[32,32,32]", "reconstruction.shifts=1"],
            "bm-mae-tiny": [*VIT_OF_TUMOURS, "training.precision=bf16", "training.batch_size=16"],
        },
        finetuning={"": ["modality_dropout=0.3"]},
    ),
    "tumours-t1": Task(
        (4, 8, 16),
        epochs=25,
        steps=10,
        patch=(16, 16, 16),
        plans={
            "": ["image.spacing=[4,4,4]"],
            "bm-mae-tiny": [*VIT_OF_TUMOURS, "training.batch_size=8"],
            "resenc-mae-tiny": [
                *("image.crop=[32,32,32]", "model.features=[8,16,32,64]"),
                *("training.epochs=50", "training.checkpoint_every=10"),
            ],
        },
        # the rate was chosen on training studies alone, for both networks with and without the weights
        finetuning={"": ["lr=0.004"], "bm-mae-tiny": ["batch_size=4"], "resenc-mae-tiny": ["batch_size=8"]},
    ),
    # the rate was chosen on training studies alone
    "tumours-t2": Task(
        (4, 8, 16),
        epochs=20,
        steps=10,
        patch=(32, 32, 32),
        plans={
            "": ["image.spacing=[2,2,2]", "image.crop=[32,32,32]"],
            "bm-mae-tiny": [*VIT_AT_2_MM, "training.epochs=40"],
        },
        finetuning={"": ["lr=0.006", "batch_size=4"], "bm-mae-tiny": ["feature_size=8"]},
    ),
    # layer_decay helps the network from scratch, too: on training studies it was better off with it than without
    "whole-t1": Task(
        (4, 8, 16),
        epochs=20,
        steps=10,
        patch=(32, 32, 32),
        plans={
            "": ["image.spacing=[2,2,2]", "image.crop=[32,32,32]"],
            "bm-mae-tiny": [*VIT_AT_2_MM, "training.epochs=70"],
        },
        finetuning={
            "": ["lr=0.006", "batch_size=4", "mirror=[]"],
            "bm-mae-tiny": ["feature_size=8", "layer_decay=0.5"],
        },
    ),
}


def prepare(name: str, data: Path | None, out: Path) -> tuple[Path, list[str], list[str], Path]:
    """nnU-Net's raw folder, the ids of the training side and of the held-out one, and the images to pre-train on."""
    demonstrations = {
        **{"lesions": lesions, "tumours": tumours, "tumours-t1": tumours_of_t1, "tumours-t2": tumours_of_t2},
        "whole-t1": whole_tumours_of_t1,
    }
    if name in demonstrations:
        return demonstrations[name](out)
    if data is None:
        raise SystemExit("--data: name the folder of real scans")
    return hippocampus(data, out) if name == "hippocampus" else oasis(data, out)


def hippocampus(data: Path, out: Path) -> tuple[Path, list[str], list[str], Path]:
    dataset, images = data / "nnunet_raw" / "Dataset004_Hippocampus", out / "unlabelled"
    ids = cases(dataset)
    held_out = [i for i in ids if i.removeprefix("hippocampus_")[:2] in HELD_OUT_HIPPOCAMPUS]
    for case in set(ids) - set(held_out):
        link(dataset / "imagesTr" / f"{case}_0000.nii.gz", images / case / "t1.nii.gz")
    return dataset, [i for i in ids if i not in held_out], held_out, images


def oasis(data: Path, out: Path) -> tuple[Path, list[str], list[str], Path]:
    dataset, images, both = out / "raw" / "Dataset105_Oasis", out / "unlabelled", out / "studies"
    for subject in sorted((data / "brain_mr_noncommercial").glob("oasis-*")):
        for file in (subject / "ses-1").iterdir():
            link(file, both / subject.name / file.name)
            if subject.name not in HELD_OUT_OASIS and file.name == "t1.nii.gz":
                link(file, images / subject.name / file.name)
    if not (dataset / "dataset.json").exists():
        medmae.make_dataset(both, dataset)
    ids = cases(dataset)
    return dataset, [i for i in ids if i not in HELD_OUT_OASIS], [i for i in ids if i in HELD_OUT_OASIS], images


def lesions(out: Path) -> tuple[Path, list[str], list[str], Path]:
    cohort = medmae.make_demo_cohort(out / "scans", studies=24, held_out=8)
    return of_demo(cohort, out, "Dataset301_Lesions", join_labels)


def tumours(out: Path) -> tuple[Path, list[str], list[str], Path]:
    """The third of a larger cohort that has a tumour, its three tissues; the images of all others pre-train too."""
    cohort = medmae.make_demo_cohort(out / "scans", studies=48, held_out=24)
    return of_demo(cohort, out, "Dataset302_Tumours", keep_tissues, with_tumour(out / "scans"))


def tumours_of_t1(out: Path) -> tuple[Path, list[str], list[str], Path]:
    """Likewise, but T1 is all that the labelled and the held-out studies have."""
    cohort = medmae.make_demo_cohort(out / "scans", studies=51, held_out=24)
    return tumours_of_one(cohort, out, "Dataset303_TumoursT1", keep_tissues, "t1", images=48)


def tumours_of_t2(out: Path) -> tuple[Path, list[str], list[str], Path]:
    """Likewise on T2, the tissues as one label; the held-out studies are others, as those of T1's task had been looked
    at when this task was chosen."""
    cohort = medmae.make_demo_cohort(out / "scans", studies=51, held_out=48)
    seen = {study.name for study in sorted(cohort.held_out.iterdir())[:24]}
    return tumours_of_one(cohort, out, "Dataset304_TumoursT2", join_tissues, "t2", images=48, without=seen)


def whole_tumours_of_t1(out: Path) -> tuple[Path, list[str], list[str], Path]:
    """Likewise on T1, with 120 studies to pre-train on; the held-out ones are the last 24 of 72, others than the tasks
    above have."""
    cohort = medmae.make_demo_cohort(out / "scans", studies=120, held_out=72)
    seen = {study.name for study in sorted(cohort.held_out.iterdir())[:48]}
    return tumours_of_one(cohort, out, "Dataset305_WholeTumoursT1", join_tissues, "t1", images=120, without=seen)


def tumours_of_one(
    cohort: DemoCohort,
    out: Path,
    name: str,
    mend: Callable[[Path], None],
    modality: str,
    images: int,
    without: Collection[str] = (),
) -> tuple[Path, list[str], list[str], Path]:
    """The first ``images`` studies, with all they have, are what pre-trains; labels come of every tumour that has the
    modality, be it among them or not."""
    scans = cohort.train.parent
    for study in sorted(cohort.train.iterdir())[:images]:
        for file in study.iterdir():
            link(file, out / "unlabelled" / study.name / file.name)
    ill = {s for s in with_tumour(scans) - set(without) if any(scans.glob(f"*/{s}/{modality}.nii.gz"))}
    dataset, ids, held_out, _ = of_demo(cohort, out, name, mend, ill, (modality, "seg"))
    return dataset, ids, held_out, out / "unlabelled"


def with_tumour(scans: Path) -> set[str]:
    return {line["study"] for line in csv.DictReader((scans / "cohort.csv").open()) if line["has_tumour"] == "1"}


def of_demo(
    cohort: DemoCohort,
    out: Path,
    name: str,
    mend: Callable[[Path], None],
    chosen: Collection[str] | None = None,
    images: Collection[str] | None = None,
) -> tuple[Path, list[str], list[str], Path]:
    """``chosen``: the studies whose labels are used, ``images``: what is used of them; all if None. ``mend`` changes
    the labels of nnU-Net's folder."""
    dataset, both = out / "raw" / name, out / "studies"
    if not (dataset / "dataset.json").exists():
        for study in [*cohort.train.iterdir(), *cohort.held_out.iterdir()]:
            if chosen is None or study.name in chosen:
                for file in study.iterdir():
                    if images is None or file.name.removesuffix(".nii.gz") in images:
                        link(file, both / study.name / file.name)
        medmae.make_dataset(both, dataset, incomplete=True)
        mend(dataset)
    held_out = {study.name for study in cohort.held_out.iterdir()}
    ids = cases(dataset)
    return dataset, [i for i in ids if i not in held_out], [i for i in ids if i in held_out], cohort.train


def cases(dataset: Path) -> list[str]:
    return sorted(f.name.removesuffix(".nii.gz") for f in (dataset / "labelsTr").glob("*.nii.gz"))


def link(file: Path, at: Path) -> None:
    at.parent.mkdir(parents=True, exist_ok=True)
    if not at.exists():
        at.symlink_to(file.resolve())


def join_labels(dataset: Path) -> None:
    """Every lesion becomes label 1."""
    relabel(dataset, lambda label: label > 0, {"background": 0, "lesion": 1})


def keep_tissues(dataset: Path) -> None:
    """What is no tissue of a tumour becomes background."""
    relabel(dataset, lambda label: np.where(of_tumour(label), label, 0), {"background": 0, **TISSUES})


def join_tissues(dataset: Path) -> None:
    """The tissues of a tumour become label 1, everything else background."""
    relabel(dataset, of_tumour, {"background": 0, "tumour": 1})


def of_tumour(label: np.ndarray) -> np.ndarray:
    return np.isin(label, list(TISSUES.values()))


def relabel(dataset: Path, change: Callable[[np.ndarray], np.ndarray], labels: dict[str, int]) -> None:
    for file in (dataset / "labelsTr").iterdir():
        image: Any = nib.load(file)
        changed = change(np.asanyarray(image.dataobj)).astype(np.uint8)
        nib.save(nib.Nifti1Image(changed, image.affine), file)
    described = json.loads((dataset / "dataset.json").read_text())
    (dataset / "dataset.json").write_text(json.dumps({**described, "labels": labels}))


def labelled(ids: Sequence[str], number: int, seed: int) -> list[str]:
    """The cases whose labels are used: a seed's draw, a larger number's draw holds a smaller one's."""
    order = np.random.default_rng(seed).permutation(len(ids))
    return sorted(ids[i] for i in order[:number])


def of_method(overrides: dict[str, list[str]], method: str) -> list[str]:
    """Those for all methods, then the method's own, which count where both have a field."""
    return [*overrides.get("", []), *overrides.get(method, [])]


def train(
    task: Task,
    method: str,
    dataset: Path,
    run: Path,
    place: Path,
    split: dict[str, list[str]],
    seed: int,
    scratch: bool,
) -> dict[str, Any]:
    """One fine-tuning; the row of the table."""
    prepared, preprocessed = run.parent / f"preprocessed{'-scratch' * scratch}", place / "preprocessed"
    if prepared.exists():
        shutil.copytree(prepared, preprocessed, dirs_exist_ok=True)  # nnU-Net's resampling, the same for every seed
    (preprocessed / dataset.name).mkdir(parents=True, exist_ok=True)
    (preprocessed / dataset.name / "splits_final.json").write_text(json.dumps([split]))
    started = time.perf_counter()
    result = medmae.finetune_segment(
        dataset,
        run,
        place,
        from_scratch=scratch,
        overrides=[*ALWAYS, *of_method(task.finetuning, method)],
        epochs=task.epochs,
        steps_per_epoch=task.steps,
        validation_steps=1,
        spacing="checkpoint",
        patch=task.patch,
        seed=seed,
        device="auto",
    )
    if not prepared.exists():
        shutil.copytree(preprocessed, prepared)
    summary = json.loads((result.model / "fold_0" / "validation" / "summary.json").read_text())
    each = {label: values["Dice"] for label, values in summary["mean"].items()}
    shutil.rmtree(preprocessed)
    return {"dice": result.dice["0"], "labels": each, "seconds": round(time.perf_counter() - started)}


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and spread over the seeds, and in how many of them the checkpoint was ahead."""
    lines = ["| plan | labelled | pre-trained | from scratch | gain | ahead in |", "|---|---|---|---|---|---|"]
    for plan, number in dict.fromkeys((r["plan"], r["number"]) for r in rows):
        mine = {(r["seed"], r["scratch"]): r["dice"] or 0.0 for r in rows if (r["plan"], r["number"]) == (plan, number)}
        seeds = sorted(s for s, scratch in mine if scratch and (s, False) in mine)
        if not seeds:
            continue
        given, bare = ([mine[s, scratch] for s in seeds] for scratch in (False, True))
        gains = [a - b for a, b in zip(given, bare, strict=True)]
        cells = [
            spread(given),
            spread(bare),
            f"{statistics.fmean(gains):+.3f}",
            f"{sum(g > 0 for g in gains)} of {len(seeds)}",
        ]
        lines.append(f"| {plan} | {number} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"


def curve(rows: list[dict[str, Any]], file: Path) -> None:
    """Dice against the number of labelled studies, one panel a plan, every seed a thin line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    plans = list(dict.fromkeys(r["plan"] for r in rows))
    figure = Figure(figsize=(3.6 * len(plans), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, plan in zip(figure.subplots(1, len(plans), sharey=True, squeeze=False)[0], plans, strict=True):
        for scratch, colour, name in ((False, "C0", "pre-trained"), (True, "C1", "from scratch")):
            mine = [r for r in rows if r["plan"] == plan and r["scratch"] is scratch]
            numbers = sorted({r["number"] for r in mine})
            for seed in sorted({r["seed"] for r in mine}):
                of_seed = {r["number"]: r["dice"] or 0.0 for r in mine if r["seed"] == seed}
                panel.plot(list(of_seed), list(of_seed.values()), color=colour, alpha=0.3, linewidth=1)
            means = [statistics.fmean(r["dice"] or 0.0 for r in mine if r["number"] == n) for n in numbers]
            panel.plot(numbers, means, "o-", color=colour, label=name)
        panel.set(title=plan, xlabel="labelled studies", xticks=numbers)
    figure.axes[0].set_ylabel("Dice of held-out studies")
    figure.axes[0].legend(frameon=False)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    task, out = TASKS[options.task], options.out
    dataset, ids, held_out, images = prepare(options.task, options.data, out)
    record = out / "rows.jsonl"
    for method in options.methods:
        plan = medmae.Plan.load(method, of_method(task.plans, method))
        run = medmae.pretrain(images, plan, out / method / "run", resume=True).run
        for seed in options.seeds:
            for number in task.labels:
                split = {"train": labelled(ids, number, seed), "val": held_out}
                for scratch in (False, True):
                    row = {"plan": method, "number": number, "seed": seed, "scratch": scratch}
                    if any({**done, **row} == done for done in read(record)):
                        continue
                    place = out / method / f"{number}-{seed}{'-scratch' * scratch}"
                    row |= train(task, method, dataset, run, place, split, seed, scratch)
                    with record.open("a", encoding="utf-8") as stream:
                        stream.write(json.dumps(row) + "\n")
                    print(row, flush=True)
    rows = read(record)
    print(table(rows))
    if len(task.labels) > 1:
        curve(rows, out / "curve.png")


def read(record: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []


if __name__ == "__main__":
    main()
