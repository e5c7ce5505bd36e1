"""Pre-training: from a folder of scans, or a prepared cohort, to a run folder.

One loop for every method, on Lightning Fabric (devices, nodes, precision, DDP/FSDP, Slurm and torchrun). All
randomness derives from the seed and the step, so a resumed run repeats an uninterrupted one.
"""

from __future__ import annotations

import json
import logging
import platform
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import medmae
from medmae.cohort.store import Cohort, PreparedStudy, is_cohort, prepare, split_subjects
from medmae.errors import CheckpointError, InputError, MedmaeError, Problem
from medmae.files import explained, write_text
from medmae.models.base import MaskedAutoencoder, without_repeats
from medmae.models.zoo import check_plan, create
from medmae.plan import Plan
from medmae.processor import computes_in_bf16
from medmae.progress import progress_callback
from medmae.training.augment import augment
from medmae.training.batches import Batch, Crops, prefetch, sample_rng, to_device
from medmae.training.checkpoint import (
    FOLDER,
    PREVIOUS,
    check_state,
    facts_of,
    find_checkpoint,
    load_weights,
    read_state,
    save_checkpoint,
)
from medmae.training.monitor import Monitor
from medmae.training.previews import write_preview
from medmae.training.schedules import lr_factor, make_optimizer

_MASKS, _AUGMENTATION, _DROPOUT, _VALIDATION = 2, 3, 4, 5  # purposes of a sample's random numbers
logger = logging.getLogger(__name__)


@dataclass
class TrainedRun:
    """What a training left: ``run`` folder, ``steps`` done in all, last ``metrics``, studies that were left out."""

    run: Path
    steps: int
    metrics: dict[str, float]
    problems: list[Problem] = field(default_factory=list)
    interrupted: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "run": str(self.run),
            "steps": self.steps,
            "metrics": self.metrics,
            "problems": [str(p) for p in self.problems],
            "interrupted": self.interrupted,
        }


def pretrain(
    data: str | Path,
    plan: str | Path | Plan,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    max_steps: int | None = None,
    checkpoint_every: int | None = None,
    device: str = "auto",
    precision: str | None = None,
    devices: int = 1,
    nodes: int = 1,
    strategy: str = "auto",
    resume: bool = False,
    init: str | Path | None = None,
    seed: int = 0,
    coregister: bool = False,
    progress: bool = True,
) -> TrainedRun:
    """Train ``plan`` on ``data`` (a prepared cohort, or any layout of scans, then prepared into ``out/cohort``).

    ``max_steps`` stops earlier than the plan's epochs without changing its schedule; ``checkpoint_every`` is in
    optimiser steps (default: the plan's epochs). ``resume`` continues ``out`` (or begins it when it holds no
    checkpoint yet); ``init`` begins with another checkpoint's weights. ``coregister``: as in :func:`medmae.prepare`,
    for scans that are prepared here. Raises :class:`MedmaeError` for a bad plan,
    unusable data, an existing run without ``resume``, or a loss that is no longer finite.
    """
    plan, run = Plan.load(plan, overrides), Path(out)
    check_plan(plan)
    fabric = make_fabric(plan, device, precision, devices, nodes, strategy)
    fabric.launch()
    resume = begin_run(run, plan, resume, fabric)
    cohort, problems = open_cohort(Path(data), plan, run, fabric, progress, coregister)
    training, validation = split(cohort, plan, seed)
    loop = Loop(fabric, plan, run, cohort, training, validation, seed, init)
    if resume:
        loop.resume()
    last = loop.total_steps if max_steps is None else min(max_steps, loop.total_steps)
    every = checkpoint_every or plan.training.checkpoint_every * loop.steps_per_epoch
    metrics, interrupted = loop.train(last, every, progress and fabric.is_global_zero)
    return TrainedRun(run, loop.step, metrics, problems, interrupted)


def make_fabric(plan: Plan, device: str, precision: str | None, devices: int, nodes: int, strategy: str) -> Fabric:
    """Fabric for the machine at hand; says which setting is impossible instead of a traceback. ``precision`` None: the
    plan's, but fp32 on a processor that only imitates bf16."""
    if device == "cuda" and not torch.cuda.is_available():
        raise MedmaeError("no CUDA device is available", field="--device", found=device, remedy="Use --device cpu.")
    accelerator = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    chosen = precision or plan.training.precision
    if chosen == "bf16" and accelerator == "cpu" and not computes_in_bf16():
        told = "bf16 is many times slower than fp32"
        if precision is None:
            chosen, told = "32", "the plan's bf16 is computed in fp32"
        logger.warning("this processor has no bf16 arithmetic: %s", told)
    try:
        return Fabric(
            accelerator=accelerator,
            devices=devices,
            num_nodes=nodes,
            strategy=strategy,
            precision="bf16-mixed" if chosen == "bf16" else "32-true",
        )
    except (ValueError, RuntimeError, TypeError, ImportError) as error:
        raise MedmaeError(
            "this combination of devices and strategy is not possible here",
            field="--device/--devices/--nodes/--strategy",
            found=f"{device}/{devices}/{nodes}/{strategy}: {error}",
        ) from None


def begin_run(run: Path, plan: Plan, resume: bool, fabric: Fabric) -> bool:
    """Make or check the run folder; whether there is a checkpoint to continue from."""
    exists = any((run / name).exists() for name in (FOLDER, PREVIOUS))
    if exists and not resume:
        raise CheckpointError(
            "this folder already holds a run",
            where=run,
            remedy="Continue it with --resume, or choose another folder with -o.",
        )
    if exists:
        before = Plan.load(run / "plan.json")
        if before.hash() != plan.hash():
            old, new = before.model_dump(mode="json"), plan.model_dump(mode="json")
            changed = [k for k in new if new[k] != old[k]]
            raise CheckpointError(
                "a run continues with the plan it began with",
                where=run / "plan.json",
                field=", ".join(changed),
                found="another plan or other overrides",
                remedy="Give the same --plan and --set, or begin a new run with --init.",
            )
    elif fabric.is_global_zero:
        with explained(run):
            run.mkdir(parents=True, exist_ok=True)
            write_text(run / "plan.json", plan.to_json())
    fabric.barrier()
    return exists


def open_cohort(
    data: Path, plan: Plan, run: Path, fabric: Fabric, progress: bool, coregister: bool = False
) -> tuple[Cohort, list[Problem]]:
    """The prepared cohort at ``data``, or ``data`` prepared into ``run/cohort`` by the first process."""
    problems: list[Problem] = []
    if coregister and is_cohort(data):
        raise InputError(
            "the images of a prepared cohort are on one grid already",
            where=data,
            field="--coregister",
            remedy="Use it with `medmae prepare`, or give the scans themselves.",
        )
    if not is_cohort(data):
        if fabric.is_global_zero:
            with progress_callback("preparing", progress) as report:
                prepared = prepare(data, plan, run / "cohort", coregister=coregister, on_progress=report)
            problems = [*prepared.warnings, *prepared.failed]
        fabric.barrier()
        data = run / "cohort"
    cohort = Cohort.open(data)
    if not cohort.studies and problems:  # why every one of them failed says more than that none is left
        raise InputError.of(problems)
    if cohort.image != plan.image.model_copy(update={"crop": cohort.image.crop}):
        ours, theirs = plan.image.model_dump(), cohort.image.model_dump()
        different = [k for k in ours if k != "crop" and ours[k] != theirs[k]]
        raise InputError(
            "this cohort was prepared for another image space",
            where=data,
            field=", ".join(f"image.{k}" for k in different),
            found=", ".join(str(theirs[k]) for k in different),
            expected=", ".join(str(ours[k]) for k in different),
            remedy="Run `medmae prepare` with this plan into another folder.",
        )
    return cohort, problems


def split(cohort: Cohort, plan: Plan, seed: int) -> tuple[list[PreparedStudy], list[PreparedStudy]]:
    """Training and validation studies, by subject; only studies with a modality of the plan."""
    usable = [s for s in cohort.studies if set(s.modalities) & set(plan.modalities)]
    if not usable:
        raise InputError(
            "no study has a modality of the plan",
            where=cohort.path,
            found=", ".join(cohort.modalities) or "no study",
            expected=f"any of {', '.join(plan.modalities)}",
        )
    training, validation = split_subjects(usable, plan.training.validation_share, seed)
    return list(training), list(validation)


class Loop:
    """The state of one training: model, optimiser, step."""

    def __init__(
        self,
        fabric: Fabric,
        plan: Plan,
        run: Path,
        cohort: Cohort,
        training: list[PreparedStudy],
        validation: list[PreparedStudy],
        seed: int,
        init: str | Path | None,
    ) -> None:
        self.fabric, self.plan, self.run, self.cohort, self.seed = fabric, plan, run, cohort, seed
        torch.manual_seed(seed)
        self.network: MaskedAutoencoder = create(plan)
        if init is not None:
            load_weights(self.network, find_checkpoint(Path(init)) / "model.safetensors")
        self.network.save_memory(plan.training.recompute)
        compiled: Any = torch.compile(self.network) if plan.training.compile else self.network
        optimizer = make_optimizer(self.network, plan.training)
        self.model, self.optimizer = fabric.setup(compiled, optimizer)
        self.training, self.validation = Crops(training, plan, seed), Crops(validation, plan, seed)
        if plan.training.cohort_on_device:
            self.training.load_to(fabric.device)
            if validation:
                self.validation.load_to(fabric.device)
        self.step = 0
        per_step = plan.training.batch_size * plan.training.accumulate * fabric.world_size
        self.steps_per_epoch = plan.training.steps_per_epoch or max(1, -(-len(training) // per_step))
        self.total_steps = plan.training.epochs * self.steps_per_epoch
        if fabric.is_global_zero:
            ids = {"training": [s.id for s in training], "validation": [s.id for s in validation], "seed": seed}
            write_text(run / "split.json", json.dumps(ids, indent=2))

    def resume(self) -> None:
        """Continue from the newest whole checkpoint."""
        folder = find_checkpoint(self.run)
        state = read_state(folder)
        check_state(state, self.cohort.fingerprint, self.seed, folder)
        full = StateDictOptions(full_state_dict=True, broadcast_from_rank0=self.fabric.world_size > 1)
        probe = create(self.plan)
        load_weights(probe, folder / "model.safetensors")
        set_model_state_dict(self.model.module, probe.state_dict(), options=full)
        set_optimizer_state_dict(self.model.module, self.optimizer.optimizer, state["optimizer"], options=full)
        self.step = state["step"]

    def train(self, last: int, checkpoint_every: int, progress: bool) -> tuple[dict[str, float], bool]:
        """Optimise until step ``last``; the last metrics, and whether a signal cut it short."""
        settings, fabric = self.plan.training, self.fabric
        monitor = Monitor(self.run, self.step, last, self.steps_per_epoch, progress, fabric.is_global_zero)
        share = settings.batch_size * settings.accumulate
        starts = [
            (step * fabric.world_size + fabric.global_rank) * share + part * settings.batch_size
            for step in range(self.step, last)
            for part in range(settings.accumulate)
        ]
        batches = prefetch(self.training, starts, settings.batch_size)
        self.model.train()
        saved = self.step
        with stop_on_signal() as stopped, monitor:
            while self.step < last and not stopped.is_set():
                self.optimize(batches, monitor)
                done = self.step == last
                if done or self.step % settings.log_every == 0 or fabric.device.type == "cpu":
                    monitor.flush(self.lr(self.step - 1))
                epochs, rest = divmod(self.step, self.steps_per_epoch)
                if self.validation.studies and (done or (rest == 0 and epochs % settings.validate_every == 0)):
                    monitor.validation(self.step, self.validate())
                if done or (rest == 0 and epochs % settings.preview_every == 0):
                    self.preview()
                if done or self.step % checkpoint_every == 0:
                    monitor.flush(self.lr(self.step - 1))
                    self.save(monitor)
                    saved = self.step
            if saved != self.step or not (self.run / FOLDER).exists():
                monitor.flush(self.lr(max(self.step - 1, 0)))
                self.save(monitor)
            batches.close()  # type: ignore[attr-defined]
        return monitor.latest, self.step < last

    def lr(self, step: int) -> float:
        return self.plan.training.lr * lr_factor(self.plan.training, step, self.steps_per_epoch)

    def optimize(self, batches: Iterator[Batch], monitor: Monitor) -> None:
        """One optimiser step over ``accumulate`` batches."""
        settings, fabric = self.plan.training, self.fabric
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(self.step)
        for part in range(settings.accumulate):
            batch = next(batches)
            rngs = [sample_rng(self.seed, _AUGMENTATION, n) for n in batch.numbers]
            images = augment(to_device(batch.images, fabric.device), self.plan.augmentation, rngs)
            torch.manual_seed(derived(self.seed, _DROPOUT, batch.numbers[0]))
            with fabric.no_backward_sync(self.model, enabled=part + 1 < settings.accumulate):
                output = self.model(
                    images,
                    present=batch.present,
                    generator=self.generator(_MASKS, batch.numbers[0]),
                )
                fabric.backward(output.loss / settings.accumulate)
            monitor.step(self.step + 1, output.loss.detach(), batch.studies, settings.batch_size * fabric.world_size)
        if settings.clip_norm is not None:
            fabric.clip_gradients(self.model, self.optimizer, max_norm=settings.clip_norm, error_if_nonfinite=False)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1

    def generator(self, purpose: int, number: int) -> torch.Generator:
        """The device's generator for one batch."""
        return torch.Generator(self.fabric.device).manual_seed(derived(self.seed, purpose, number))

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean losses over the validation studies, the same crops and masks every time."""
        self.model.eval()
        names = self.plan.modalities
        total, count = torch.zeros(len(names)), torch.zeros(len(names))
        batches = self.validation.fixed_batches(
            self.plan.training.batch_size, self.fabric.global_rank, self.fabric.world_size
        )
        for batch, counts in batches:
            output = self.model(
                to_device(batch.images, self.fabric.device),
                present=batch.present,
                generator=self.generator(_VALIDATION, batch.numbers[0]),
            )
            there = torch.stack([batch.present[m].sum() for m in names]).float() * counts
            total += torch.stack([output.losses[m] for m in names]).float().cpu() * there
            count += there
        self.model.train()
        total = self.fabric.all_reduce(total.to(self.fabric.device), reduce_op="sum").cpu()  # type: ignore[union-attr]
        count = self.fabric.all_reduce(count.to(self.fabric.device), reduce_op="sum").cpu()  # type: ignore[union-attr]
        means = {m: float(t / c) for m, t, c in zip(names, total, count, strict=True) if c > 0}
        return {"validation_loss": sum(means.values()), **{f"validation_{m}": v for m, v in means.items()}}

    @torch.no_grad()
    def preview(self) -> None:
        """``previews/step-N.png`` from the first validation (or training) study."""
        if self.fabric.world_size > 1:
            return  # sharded weights cannot be run by one process alone; reconstruct shows the same afterwards
        crops = self.validation if self.validation.studies else self.training
        batch, layout = crops.mosaic()
        images = to_device(batch.images, self.fabric.device)
        self.model.eval()
        with self.fabric.autocast():
            output = self.network(
                images, return_prediction=True, present=batch.present, generator=self.generator(_VALIDATION, 0)
            )
            picture = self.run / "previews" / f"step-{self.step:07d}.png"
            write_preview(picture, self.network, images, batch.present, output, layout)
        self.model.train()

    def save(self, monitor: Monitor) -> None:
        """Write a checkpoint (every process takes part in gathering, the first writes)."""
        full = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights: Any = get_model_state_dict(self.model.module, options=full)
        optimizer = get_optimizer_state_dict(self.model.module, self.optimizer.optimizer, options=full)
        if self.fabric.is_global_zero:
            state = {
                "step": self.step,
                "optimizer": optimizer,
                "seed": self.seed,
                "fingerprint": self.cohort.fingerprint,
            }
            save_checkpoint(self.run, without_repeats(self.network, weights), self.metadata(monitor), state)
        self.fabric.barrier()

    def metadata(self, monitor: Monitor) -> dict[str, Any]:
        """What a checkpoint tells of itself: no paths, no study names."""
        return {
            **facts_of(self.plan),
            "intensity": self.cohort.typical_scales(),
            "data": {
                "fingerprint": self.cohort.fingerprint,
                "training_studies": len(self.training.studies),
                "validation_studies": len(self.validation.studies),
            },
            "step": self.step,
            "epoch": self.step / self.steps_per_epoch,
            "metrics": monitor.latest,
            "seed": self.seed,
            "versions": {
                "medmae": medmae.__version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
            "licence_note": "Weights carry the terms of the data they were trained on.",
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }


def derived(seed: int, purpose: int, number: int) -> int:
    """A 63-bit seed for one purpose and number."""
    return int(np.random.SeedSequence([seed, purpose, number]).generate_state(1, np.uint64)[0] >> 1)


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """An event that is set by Ctrl-C or SIGTERM (Slurm's warning): finish the step, save, leave. A second Ctrl-C
    interrupts at once."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def ask(number: int, frame: object) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()
        logger.warning("Stopping after this step; continue with --resume.")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
