"""The command line: every command parses its options, calls the public function of the same name, prints the result.

No logic lives here; what a command does is a Python function that anybody can call.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Literal

import typer

import medmae
from medmae.console import Outcome, command, is_first_process
from medmae.progress import progress_callback

app = typer.Typer(
    name="medmae",
    help="Masked-autoencoder pre-training on 3D medical images, and what it is good for.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
evaluate = typer.Typer(no_args_is_help=True, help="Measure what a model does, on studies that it never saw.")
app.add_typer(evaluate, name="evaluate")
finetune = typer.Typer(no_args_is_help=True, help="Train for a task, beginning with a pre-trained model.")
app.add_typer(finetune, name="finetune")
predict = typer.Typer(no_args_is_help=True, help="Use a fine-tuned model.")
app.add_typer(predict, name="predict")
nnunet = typer.Typer(no_args_is_help=True, help="What nnU-Net's own commands need to work with a pre-trained model.")
app.add_typer(nnunet, name="nnunet")

Data = Annotated[
    Path,
    typer.Argument(metavar="DATA", help="Scans in any supported layout, recognised by content.", show_default=False),
]
Checkpoint = Annotated[
    str, typer.Option("--checkpoint", "-c", help="A run, a checkpoint folder or a published file.", show_default=False)
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write.", show_default=False)]
PlanName = Annotated[
    str, typer.Option("--plan", "-p", help="A plan's name (`medmae plans`) or a path.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change one field of the plan; repeat for more.", show_default=False
    ),
]
Device = Annotated[
    Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute; auto takes a GPU if there is one.")
]
Precision = Annotated[
    Literal["32", "bf16"] | None, typer.Option(help="Arithmetic; left out, what the plan says.", show_default=False)
]
Targets = Annotated[
    list[str] | None, typer.Option("--target", "-t", metavar="MODALITY", help="Repeat for more.", show_default=False)
]
Jobs = Annotated[
    int | None,
    typer.Option(min=1, help="How many studies at a time; left out, what the machine can do.", show_default=False),
]
Coregister = Annotated[
    bool, typer.Option("--coregister", help="Register the images of a study to one another first (rigidly).")
]
Seed = Annotated[int, typer.Option(min=0, help="Same seed, same result.")]


def version(asked: bool) -> None:
    if asked:
        print(f"medmae {medmae.__version__}")
        raise typer.Exit()


@app.callback()
def common(
    _version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Masked-autoencoder pre-training on 3D medical images, and what it is good for."""


@app.command(epilog="Example: medmae demo -o medmae-demo")
@command
def demo(
    out: Out = Path("medmae-demo"),
    seed: Seed = 0,
    device: Device = "auto",
) -> Outcome:
    """Cohort, pre-training, reconstruction, evaluation and report, in minutes on a CPU."""
    result = medmae.demo(out, seed=seed, device=device)
    return Outcome(result.to_json(), str(result).splitlines())


@app.command(epilog="Example: medmae plans bm-mae-base --set training.lr=0.0003")
@command
def plans(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A plan's name or path.", show_default=False)
    ] = None,
    overrides: Overrides = None,
) -> Outcome:
    """List the shipped plans, or show one with every field as it will be used."""
    if name is None:
        listed = [medmae.Plan.load(known) for known in medmae.available_plans()]
        return Outcome({plan.name: plan.model_dump(mode="json") for plan in listed}, [facts(plan) for plan in listed])
    from medmae.models.zoo import check_plan

    plan = medmae.Plan.load(name, overrides or ())
    check_plan(plan)
    return Outcome(plan.model_dump(mode="json"), [plan.to_json()])


@app.command(epilog="Example: medmae inspect SCANS")
@command
def inspect(
    data: Data,
    modalities: Annotated[
        list[str] | None,
        typer.Option("--modality", "-m", metavar="MODALITY", help="Look at these only; repeat for more."),
    ] = None,
    jobs: Jobs = None,
) -> Outcome:
    """Layout, studies and modalities of a folder of scans, and everything wrong with them. Changes nothing."""
    result = medmae.inspect(data, modalities=modalities, jobs=jobs)
    lines = str(result).splitlines()
    return Outcome(result.to_json(), lines, result.problems, len(result.usable), len(result.failed))


@app.command(epilog="Example: medmae prepare SCANS --plan bm-mae-base -o COHORT --jobs 8")
@command
def prepare(
    data: Data,
    plan: PlanName,
    out: Out,
    jobs: Jobs = None,
    overrides: Overrides = None,
    coregister: Coregister = False,
) -> Outcome:
    """Write a cohort that training reads fast. Run it again after an interruption or when scans were added."""
    loaded = medmae.Plan.load(plan, overrides or ())
    with progress_callback("preparing") as on_progress:
        result = medmae.prepare(data, loaded, out, jobs=jobs, coregister=coregister, on_progress=on_progress)
    usable = len(result.done) + len(result.skipped)
    lines = [f"{result.cohort_path}: {len(result.done)} prepared, {len(result.skipped)} already there"]
    return Outcome(result.to_json(), lines, [*result.warnings, *result.failed], usable, len(result.failed))


@app.command(
    epilog="Example: medmae pretrain COHORT --plan bm-mae-base -o RUN --set training.batch_size=2 --device cuda"
)
@command
def pretrain(
    data: Data,
    plan: PlanName,
    out: Out,
    overrides: Overrides = None,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Stop after this many steps.", show_default=False)
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between checkpoints; left out, as planned.", show_default=False)
    ] = None,
    device: Device = "auto",
    precision: Precision = None,
    devices: Annotated[int, typer.Option(min=1, help="Devices a node.")] = 1,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    strategy: Annotated[str, typer.Option(help="Lightning Fabric's: auto, ddp, fsdp, ...")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    init: Annotated[
        str | None, typer.Option(metavar="CHECKPOINT", help="Start from these weights.", show_default=False)
    ] = None,
    seed: Seed = 0,
    coregister: Coregister = False,
) -> Outcome | None:
    """Pre-train a masked autoencoder on scans or on a prepared cohort."""
    result = medmae.pretrain(
        data,
        plan,
        out,
        overrides=overrides or (),
        max_steps=max_steps,
        checkpoint_every=checkpoint_every,
        device=device,
        precision=precision,
        devices=devices,
        nodes=nodes,
        strategy=strategy,
        resume=resume,
        init=init,
        seed=seed,
        coregister=coregister,
    )
    if not is_first_process():
        return None
    how = "stopped early; continue with --resume" if result.interrupted else "done"
    lines = [f"{result.run}: {how} after {result.steps} steps"]
    failed = sum(problem.fatal for problem in result.problems)
    return Outcome(result.to_json(), lines, result.problems, 1, failed, result.interrupted)


@app.command(epilog="Example: medmae reconstruct STUDY --checkpoint RUN --target flair -o OUT --report")
@command
def reconstruct(
    checkpoint: Checkpoint,
    out: Out,
    studies: Annotated[
        list[Path] | None, typer.Argument(metavar="STUDY", help="Folders of one study each.", show_default=False)
    ] = None,
    targets: Targets = None,
    images: Annotated[
        list[str] | None,
        typer.Option(
            "--image",
            metavar="MODALITY=PATH",
            help="An image of one study, or its DICOM series number; repeat.",
            show_default=False,
        ),
    ] = None,
    coregister: Coregister = False,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="MODALITY",
            help="The image whose grid the results have; with --coregister, the others are moved to it.",
            show_default=False,
        ),
    ] = None,
    format: Annotated[
        Literal["nifti", "dicom"], typer.Option(help="What to write; dicom into the studies that DICOM came from.")
    ] = "nifti",
    report: Annotated[bool, typer.Option("--report", help="Also write a page to look at, one a study.")] = False,
    uncertainty: Annotated[
        bool,
        typer.Option("--uncertainty/--no-uncertainty", help="Also its intervals, with a checkpoint that knows them."),
    ] = True,
    anomaly: Annotated[
        bool, typer.Option("--anomaly", help="Also a map of where the images given are not what is expected.")
    ] = False,
    device: Device = "auto",
    precision: Precision = None,
) -> Outcome:
    """Synthesise the modalities that a study lacks, on the grid of the patient's own scan."""
    given = pairs(images or []) or None
    with progress_callback("reconstructing") as on_progress:
        result = medmae.reconstruct(
            studies or (),
            checkpoint,
            out,
            targets=targets or (),
            images=given,
            coregister=coregister,
            reference=reference,
            format=format,
            report=report,
            uncertainty=uncertainty,
            anomaly=anomaly,
            device=device,
            precision=precision,
            on_progress=on_progress,
        )
    lines = [str(path) for path in (*result.written, *result.reports)]
    usable, told = len(result.written) + len(result.skipped), [*result.skipped, *result.warnings, *result.failed]
    return Outcome(result.to_json(), lines, told, usable, len(result.failed))


Dataset = Annotated[
    Path, typer.Argument(metavar="DATASET", help="An nnU-Net raw data set (DatasetXXX_Name).", show_default=False)
]
Modalities = Annotated[
    list[str] | None,
    typer.Option(
        "--modality",
        "-m",
        help="What the channels are, in their order, where dataset.json does not say.",
        show_default=False,
    ),
]
FromScratch = Annotated[bool, typer.Option("--from-scratch", help="The same without the weights, to measure the gain.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a field of the plan's finetuning section.", show_default=False
    ),
]
Spacing = Annotated[
    Literal["auto", "checkpoint", "dataset"],
    typer.Option(help="Voxels of the checkpoint's plan or the data's; auto: the checkpoint's unless much coarser."),
]
Patch = Annotated[
    str | None,
    typer.Option(metavar="X,Y,Z", help="Voxels of a training patch; left out, what suits.", show_default=False),
]
Steps = Annotated[int, typer.Option(min=1, help="Optimiser steps an epoch.")]
ValidationSteps = Annotated[int, typer.Option(min=1, help="Validation batches an epoch.")]


@finetune.command("segment", epilog="Example: medmae finetune segment Dataset004_Hippocampus --checkpoint RUN -o OUT")
@command
def finetune_segment(
    dataset: Dataset,
    checkpoint: Checkpoint,
    out: Out,
    fold: Annotated[list[str] | None, typer.Option(help="A fold, or all; repeat for more.", show_default="0")] = None,
    from_scratch: FromScratch = False,
    modalities: Modalities = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Left out, what the plan says.", show_default=False)] = None,
    settings: Settings = None,
    steps: Steps = 250,
    validation_steps: ValidationSteps = 50,
    spacing: Spacing = "auto",
    patch: Patch = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a training stopped.")] = False,
    device: Device = "auto",
    seed: Seed = 0,
) -> Outcome:
    """Segment with nnU-Net: plans that suit the checkpoint, its weights, nnU-Net's training and validation."""
    with progress_callback("fine-tuning") as on_progress:
        result = medmae.finetune_segment(
            dataset,
            checkpoint,
            out,
            folds=fold_list(fold) or [0],
            from_scratch=from_scratch,
            modalities=modalities or (),
            overrides=settings or (),
            epochs=epochs,
            steps_per_epoch=steps,
            validation_steps=validation_steps,
            spacing=spacing,
            patch=triple(patch),
            resume=resume,
            device=device,
            seed=seed,
            on_progress=on_progress,
        )
    return Outcome(result.to_json(), str(result).splitlines())


@predict.command("segment", epilog="Example: medmae predict segment STUDY --model OUT/results/... -o SEGMENTATIONS")
@command
def predict_segment(
    studies: Annotated[
        list[Path], typer.Argument(metavar="STUDY", help="Folders of studies, any layout.", show_default=False)
    ],
    model: Annotated[Path, typer.Option(help="The results folder of a fine-tuned model.", show_default=False)],
    out: Out,
    fold: Annotated[
        list[str] | None, typer.Option(help="Folds to average; left out, all there are.", show_default=False)
    ] = None,
    mirror: Annotated[bool, typer.Option(help="Average over mirrored images.")] = True,
    format: Annotated[
        Literal["nifti", "dicom"], typer.Option(help="What to write; dicom into the studies that DICOM came from.")
    ] = "nifti",
    device: Device = "auto",
) -> Outcome:
    """Segment studies, whatever channels they have, on their own grid."""
    with progress_callback("segmenting") as on_progress:
        result = medmae.predict_segment(
            studies,
            model,
            out,
            folds=fold_list(fold),
            device=device,
            mirror=mirror,
            format=format,
            on_progress=on_progress,
        )
    failed = sum(problem.fatal for problem in result.problems)
    return Outcome(result.to_json(), [str(p) for p in result.written], result.problems, len(result.written), failed)


Table = Annotated[
    Path,
    typer.Argument(metavar="TABLE", help="CSV of studies and labels; with files, or --data.", show_default=False),
]
Scans = Annotated[Path | None, typer.Option("--data", help="The scans, in any supported layout.", show_default=False)]
Folds = Annotated[int, typer.Option(min=2, help="Of the cross-validation; a column `fold` decides instead.")]
Linear = Annotated[bool, typer.Option("--linear", help="Freeze the encoder and train a linear head.")]
Pooling = Annotated[Literal["mean", "cls"], typer.Option(help="Mean of the tokens, or the CLS token.")]
HeadEpochs = Annotated[int | None, typer.Option(min=1, help="20, or 200 of a linear head.", show_default=False)]
Rate = Annotated[float, typer.Option(min=0, help="Learning rate of the encoder.")]
Batch = Annotated[int, typer.Option(min=1, help="Studies a step.")]
Dropout = Annotated[float, typer.Option(min=0, max=1, help="Chance that a study loses modalities in a step.")]


@finetune.command("synthesis", epilog="Example: medmae finetune synthesis SCANS --checkpoint RUN -o OUT")
@command
def finetune_synthesis(
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="Scans in any supported layout, or a cohort.", show_default=False)
    ],
    checkpoint: Checkpoint,
    out: Out,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change a field of the plan's refining section.", show_default=False
        ),
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(help="Begin with the refiner of another such run.", show_default=False),
    ] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Stop earlier.", show_default=False)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a training stopped.")] = False,
    device: Device = "auto",
    precision: Precision = None,
    seed: Seed = 0,
) -> Outcome:
    """Sharpen what a checkpoint synthesises, and calibrate how far it can be trusted."""
    result = medmae.finetune_synthesis(
        data,
        checkpoint,
        out,
        overrides=settings or (),
        init=init,
        max_steps=max_steps,
        device=device,
        precision=precision,
        resume=resume,
        seed=seed,
    )
    lines = str(result).splitlines()
    if result.interrupted:
        lines[0] += f": stopped after {result.steps} steps; continue with --resume"
    failed = sum(problem.fatal for problem in result.problems)
    return Outcome(result.to_json(), lines, result.problems, 1, failed, result.interrupted)


@finetune.command("classify", epilog="Example: medmae finetune classify labels.csv --data SCANS -c RUN -o OUT")
@command
def finetune_classify(
    table: Table,
    checkpoint: Checkpoint,
    out: Out,
    data: Scans = None,
    column: Annotated[str, typer.Option(help="The table's column to predict.")] = "label",
    linear: Linear = False,
    pool: Pooling = "mean",
    folds: Folds = 5,
    epochs: HeadEpochs = None,
    lr: Rate = 1e-4,
    batch: Batch = 2,
    modality_dropout: Dropout = 0.0,
    device: Device = "auto",
    seed: Seed = 0,
) -> Outcome:
    """Classes, or several labels a study, by stratified cross-validation over subjects."""
    settings = head_settings(linear, pool, epochs, lr, batch, modality_dropout, seed)
    with progress_callback("fine-tuning") as on_progress:
        result = medmae.finetune_classify(
            table,
            checkpoint,
            out,
            data=data,
            column=column,
            settings=settings,
            folds=folds,
            device=device,
            on_progress=on_progress,
        )
    failed = sum(problem.fatal for problem in result.problems)
    return Outcome(result.to_json(), str(result).splitlines(), result.problems, result.studies, failed)


@finetune.command("survive", epilog="Example: medmae finetune survive follow-up.csv --data SCANS -c RUN -o OUT")
@command
def finetune_survive(
    table: Table,
    checkpoint: Checkpoint,
    out: Out,
    data: Scans = None,
    time: Annotated[str, typer.Option(help="The column with the time.")] = "time",
    event: Annotated[str, typer.Option(help="The column with 1 for an event, 0 for none seen.")] = "event",
    linear: Linear = False,
    pool: Pooling = "mean",
    folds: Folds = 5,
    epochs: HeadEpochs = None,
    lr: Rate = 1e-4,
    batch: Batch = 2,
    modality_dropout: Dropout = 0.0,
    device: Device = "auto",
    seed: Seed = 0,
) -> Outcome:
    """Time to an event: a discrete-time hazard, scored by the C-index."""
    settings = head_settings(linear, pool, epochs, lr, batch, modality_dropout, seed)
    with progress_callback("fine-tuning") as on_progress:
        result = medmae.finetune_survive(
            table,
            checkpoint,
            out,
            data=data,
            time=time,
            event=event,
            settings=settings,
            folds=folds,
            device=device,
            on_progress=on_progress,
        )
    failed = sum(problem.fatal for problem in result.problems)
    return Outcome(result.to_json(), str(result).splitlines(), result.problems, result.studies, failed)


def predicted(data: Path, model: Path, out: Path, device: str) -> Outcome:
    with progress_callback("predicting") as on_progress:
        result = medmae.predict_outcome(data, model, out, device=device, on_progress=on_progress)
    failed = sum(problem.fatal for problem in result.problems)
    return Outcome(result.to_json(), [str(result.file)], result.problems, len(result.rows), failed)


HeadModel = Annotated[Path, typer.Option("--model", help="The folder that was fine-tuned.", show_default=False)]
TableOut = Annotated[Path, typer.Option("--out", "-o", help="Table to write, .csv or .parquet.", show_default=False)]


@predict.command("classify", epilog="Example: medmae predict classify SCANS --model OUT -o classes.csv")
@command
def predict_classify(data: Data, model: HeadModel, out: TableOut, device: Device = "auto") -> Outcome:
    """Probabilities for new studies, the mean of the folds."""
    return predicted(data, model, out, device)


@predict.command("survive", epilog="Example: medmae predict survive SCANS --model OUT -o risks.csv")
@command
def predict_survive(data: Data, model: HeadModel, out: TableOut, device: Device = "auto") -> Outcome:
    """Risks for new studies, the mean of the folds."""
    return predicted(data, model, out, device)


@predict.command("features", epilog="Example: medmae predict features SCANS --checkpoint RUN -o features.parquet")
@command
def predict_features(
    data: Data, checkpoint: Checkpoint, out: TableOut, pool: Pooling = "mean", device: Device = "auto"
) -> Outcome:
    """One row of frozen features a study, for scikit-learn and the like."""
    with progress_callback("encoding") as on_progress:
        result = medmae.predict_features(data, checkpoint, out, pool=pool, device=device, on_progress=on_progress)
    failed = sum(problem.fatal for problem in result.problems)
    facts = {"file": str(result.file), "studies": len(result.rows)}
    return Outcome(facts, [str(result.file)], result.problems, len(result.rows), failed)


@nnunet.command("path", epilog='Example: export nnUNet_extTrainer="$(medmae nnunet path)"')
@command
def nnunet_path() -> Outcome:
    """The folder that nnU-Net searches for the trainer."""
    from medmae.nnunet.finding import plugin_folder

    return Outcome({"nnUNet_extTrainer": str(plugin_folder())}, [str(plugin_folder())])


@nnunet.command("plan", epilog="Example: medmae nnunet plan Dataset004_Hippocampus -c RUN -o $nnUNet_preprocessed")
@command
def nnunet_plan(
    dataset: Dataset,
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option("--out", "-o", help="nnU-Net's nnUNet_preprocessed.", show_default=False)],
    name: Annotated[str | None, typer.Option(help="Of the plans.", show_default=False)] = None,
    from_scratch: FromScratch = False,
    modalities: Modalities = None,
    settings: Settings = None,
    steps: Steps = 250,
    validation_steps: ValidationSteps = 50,
    spacing: Spacing = "auto",
    patch: Patch = None,
    seed: Seed = 0,
) -> Outcome:
    """Write nnU-Net plans that begin with a checkpoint, for nnUNetv2_preprocess and nnUNetv2_train."""
    file = medmae.write_plans(
        dataset,
        checkpoint,
        out,
        name=name,
        from_scratch=from_scratch,
        modalities=modalities or (),
        overrides=settings or (),
        spacing=spacing,
        patch=triple(patch),
        steps_per_epoch=steps,
        validation_steps=validation_steps,
        seed=seed,
    )
    number = dataset.resolve().name[7:10]
    lines = [
        str(file),
        f"nnUNetv2_preprocess -d {number} -plans_name {file.stem} -c 3d_fullres",
        f"nnUNetv2_train {number} 3d_fullres 0 -tr nnUNetTrainerMedMAE -p {file.stem}",
    ]
    return Outcome({"plans": str(file), "next": lines[1:]}, lines)


@nnunet.command("dataset", epilog="Example: medmae nnunet dataset SCANS --label seg -o nnUNet_raw/Dataset101_Lesions")
@command
def nnunet_dataset(
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder DatasetXXX_Name to write.", show_default=False)],
    label: Annotated[str, typer.Option(help="The label map to segment.")] = "seg",
    modalities: Annotated[
        list[str] | None,
        typer.Option("--modality", "-m", help="Channels; left out, what most studies have.", show_default=False),
    ] = None,
    incomplete: Annotated[
        bool, typer.Option("--incomplete", help="Keep studies that lack channels, as images of zeros.")
    ] = False,
) -> Outcome:
    """Make an nnU-Net raw data set of labelled studies in any supported layout."""
    result = medmae.make_dataset(data, out, label=label, modalities=modalities or (), incomplete=incomplete)
    failed = sum(problem.fatal for problem in result.problems)
    return Outcome(result.to_json(), [str(result)], result.problems, len(result.studies), failed)


@evaluate.command("synthesis", epilog="Example: medmae evaluate synthesis HELD-OUT --checkpoint RUN -o SCORES")
@command
def evaluate_synthesis(
    data: Data,
    checkpoint: Checkpoint,
    out: Out,
    targets: Targets = None,
    training: Annotated[
        Path | None,
        typer.Option(help="The studies trained on, for the floors; left out, what the run names.", show_default=False),
    ] = None,
    lesion_label: Annotated[
        str | None, typer.Option(metavar="LABEL", help="Score inside this label too.", show_default=False)
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="Also write a page to look at, one a study.")] = False,
    segmenter: Annotated[
        Path | None,
        typer.Option(help="An nnU-Net model: also what it loses on syntheses, by --lesion-label.", show_default=False),
    ] = None,
    device: Device = "auto",
) -> Outcome:
    """PSNR, SSIM and MAE of every target from every combination of inputs, beside two floors."""
    with progress_callback("evaluating") as on_progress:
        result = medmae.evaluate_synthesis(
            data,
            checkpoint,
            out,
            targets=targets or (),
            training=training,
            lesion_label=lesion_label,
            report=report,
            segmenter=segmenter,
            device=device,
            on_progress=on_progress,
        )
    failed = sum(problem.fatal for problem in result.problems)
    return Outcome(result.to_json(), str(result).splitlines(), result.problems, len(result.rows), failed)


@evaluate.command("features", epilog="Example: medmae evaluate features SCANS labels.csv -c RUN-A -c RUN-B -o PROBES")
@command
def evaluate_features(
    data: Data,
    labels: Annotated[Path, typer.Argument(metavar="LABELS", help="Table of studies and labels.", show_default=False)],
    checkpoints: Annotated[
        list[str],
        typer.Option(
            "--checkpoint", "-c", help="A run, a checkpoint or a published file; repeat to compare.", show_default=False
        ),
    ],
    out: Out,
    column: Annotated[str, typer.Option(help="The table's column to predict.")] = "label",
    task: Annotated[
        Literal["auto", "classify", "regress"], typer.Option(help="auto: many distinct numbers are a quantity.")
    ] = "auto",
    folds: Annotated[int, typer.Option(min=2, help="Of the cross-validation, by subject.")] = 5,
    pool: Annotated[Literal["mean", "cls"], typer.Option(help="Mean of the tokens, or the CLS token.")] = "mean",
    floors: Annotated[bool, typer.Option(help="Also random weights, image statistics and a constant.")] = True,
    device: Device = "auto",
    seed: Seed = 0,
) -> Outcome:
    """What frozen features tell of a label: linear and nearest-neighbour probes on your own studies."""
    with progress_callback("probing") as on_progress:
        result = medmae.evaluate_features(
            data,
            labels,
            checkpoints,
            out,
            column=column,
            task=task,
            folds=folds,
            pool=pool,
            floors=floors,
            device=device,
            seed=seed,
            on_progress=on_progress,
        )
    failed = sum(problem.fatal for problem in result.problems)
    return Outcome(result.to_json(), str(result).splitlines(), result.problems, result.studies, failed)


@app.command("import", epilog="Example: medmae import bmmae.pth -o MODEL")
@command
def import_weights(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A published checkpoint.", show_default=False)],
    out: Out,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Keep what fits when some of the file does not.")
    ] = False,
) -> Outcome:
    """Turn a published checkpoint into a model that every command takes."""
    result = medmae.import_weights(file, out, allow_partial=allow_partial)
    return Outcome(result.to_json(), str(result).splitlines())


@app.command(epilog="Example: medmae export RUN --to nnunet -o resenc.pth")
@command
def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A run, a checkpoint folder or a published file.", show_default=False)
    ],
    to: Annotated[Literal["nnunet", "bm-mae"], typer.Option(help="The format.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.", show_default=False)],
    channels: Annotated[
        int | None,
        typer.Option(min=1, help="nnunet: fit the first layer to so many input channels.", show_default=False),
    ] = None,
) -> Outcome:
    """Write a model in a format that other programs read."""
    result = medmae.export(model, out, to=to, channels=channels)
    return Outcome(result.to_json(), str(result).splitlines())


@app.command(epilog="Example: medmae benchmark --plan bm-mae-base --device cuda")
@command
def benchmark(plan: PlanName, device: Device = "auto", overrides: Overrides = None) -> Outcome:
    """Training samples/s, share of the machine's matrix-multiply peak, memory, and the loader alone."""
    result = medmae.benchmark(medmae.Plan.load(plan, overrides or ()), device=device)
    return Outcome(result.to_json(), str(result).splitlines())


def facts(plan: medmae.Plan) -> str:
    """A plan in one line."""
    crop = "×".join(str(size) for size in plan.image.crop)
    spacing = "×".join(f"{size:g}" for size in plan.image.spacing)
    network = ", ".join(f"{key} {plan.model[key]}" for key in ("width", "depth") if key in plan.model)
    return f"{plan.name:<16} {plan.method:<8} {' '.join(plan.modalities)}; crops {crop} at {spacing} mm; {network}"


def pairs(images: list[str]) -> dict[str, Path]:
    """``["t1=a.nii.gz"]`` as {"t1": Path("a.nii.gz")}."""
    found: dict[str, Path] = {}
    for text in images:
        modality, sign, path = text.partition("=")
        if not (modality and sign and path):
            raise typer.BadParameter(f"{text!r} is not MODALITY=PATH, such as t1=t1.nii.gz", param_hint="--image")
        if modality in found:
            raise typer.BadParameter(f"{modality} is given twice", param_hint="--image")
        found[modality] = Path(path)
    return found


def head_settings(
    linear: bool, pool: str, epochs: int | None, lr: float, batch: int, modality_dropout: float, seed: int
) -> medmae.HeadSettings:
    """A frozen encoder's head sees all studies at once, for longer."""
    return medmae.HeadSettings(
        mode="linear" if linear else "full",
        pool="cls" if pool == "cls" else "mean",
        epochs=epochs or (200 if linear else 20),
        lr=lr,
        weight_decay=1.0 if linear else 0.05,
        batch_size=max(batch, 32) if linear else batch,
        modality_dropout=modality_dropout,
        seed=seed,
    )


def triple(text: str | None) -> tuple[int, int, int] | None:
    """``"64,64,32"`` as (64, 64, 32)."""
    if text is None:
        return None
    parts = text.strip("[]() ").split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() for part in parts):
        raise typer.BadParameter(f"{text!r} is not three numbers, such as 64,64,64", param_hint="--patch")
    x, y, z = (int(part) for part in parts)
    return x, y, z


def fold_list(folds: list[str] | None) -> list[int | str] | None:
    """``["0", "all"]`` as [0, "all"]."""
    if folds is None:
        return None
    if wrong := [fold for fold in folds if fold != "all" and not fold.isdigit()]:
        raise typer.BadParameter(f"{wrong[0]!r} is neither a number nor all", param_hint="--fold")
    return [fold if fold == "all" else int(fold) for fold in folds]


def main() -> None:
    logging.captureWarnings(True)  # warnings of libraries are log records: on stderr, in one style
    app()


if __name__ == "__main__":
    main()
