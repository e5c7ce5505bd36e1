"""``medmae benchmark``: what a plan costs on this machine, part by part.

Every figure is measured in one run, beside the machine's own matrix-multiply rate in that same run. The images are
made up (heads of the size that the plan's crop suggests, with noise), because time and memory do not depend on what
they show. ``tests/benchmarks`` compares with other implementations; ``docs/benchmarks.md`` holds the figures.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from medmae.errors import InputError
from medmae.files import explained
from medmae.measures import (
    PRECISIONS,
    loading,
    machine,
    made_up_study,
    matmul_peak,
    median_seconds,
    memory_of_process,
    memory_shortage_told,
    prepared,
    reconstruction_seconds,
    step_flops,
    training_step,
    usual_shape,
)
from medmae.models.zoo import check_plan
from medmae.plan import Plan, Triple
from medmae.training.pretrain import make_fabric

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BenchmarkResult:
    """What was measured. Rates are per second; a sample is one study's crop of all modalities; memory in bytes.

    ``peak_flops`` {precision: the best matrix-multiply rate of this machine}. ``step_flops``: floating-point
    operations of one training step a sample, multiplications and additions apart, each matrix product counted once
    (what a fused attention recomputes, or a device computes in vain, is not work). ``share`` of the peak in
    ``precision``. ``memory``: the process's peak during training on a CPU, with ``memory_before`` what the libraries
    alone take; the device's peak on a GPU. ``loader``, ``loop`` {"store" | "device memory": samples/s}: crops alone,
    and training with crops and augmentation. ``reconstruction_seconds``: one absent modality of a whole study of
    ``study_shape`` voxels, in ``reconstruction_precision``; None for methods that do not synthesise.
    ``refined_seconds``: the same with a refiner and the uncertainty, as after ``medmae finetune synthesis``.
    """

    plan: str
    plan_hash: str
    device: str
    precision: str
    batch_size: int
    compiled: bool
    peak_flops: dict[str, float]
    step_flops: float
    step_seconds: float
    memory: int | None
    memory_before: int | None
    loader: dict[str, float]
    loop: dict[str, float]
    study_shape: Triple
    reconstruction_seconds: float | None
    refined_seconds: float | None
    reconstruction_precision: str
    machine: dict[str, str] = field(default_factory=dict)

    @property
    def samples_per_second(self) -> float:
        return self.batch_size / self.step_seconds

    @property
    def achieved_flops(self) -> float:
        return self.samples_per_second * self.step_flops

    @property
    def share(self) -> float:
        return self.achieved_flops / self.peak_flops[self.precision]

    @property
    def loop_share(self) -> dict[str, float]:
        """{source of the crops: share of the peak that training with loader and augmentation reaches}."""
        return {name: rate * self.step_flops / self.peak_flops[self.precision] for name, rate in self.loop.items()}

    def to_json(self) -> dict[str, Any]:
        derived = ("samples_per_second", "achieved_flops", "share", "loop_share")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}

    def __str__(self) -> str:
        shape = " × ".join(map(str, self.study_shape))
        memory = "not known on this system" if self.memory is None else f"{self.memory / 1e9:.2f} GB at the peak"
        if self.memory is not None and self.memory_before is not None:
            memory += f", {(self.memory - self.memory_before) / 1e9:.2f} GB of it beyond the libraries"
        rows = [
            ("plan", f"{self.plan} ({self.plan_hash}){', compiled' if self.compiled else ''}"),
            ("machine", "; ".join(self.machine.values())),
            ("matrix multiply", ", ".join(f"{named(p)} {flops(rate)}" for p, rate in self.peak_flops.items())),
            (
                "training step",
                f"{self.samples_per_second:.3g} samples/s ({self.step_seconds:.3g} s for {self.batch_size}), "
                f"{named(self.precision)}: {flops(self.achieved_flops)}, {self.share:.0%} of the machine's",
            ),
            ("memory", memory),
            *((f"loader, {name}", f"{rate:.3g} samples/s") for name, rate in self.loader.items()),
            *(
                (f"training, {name}", f"{rate:.3g} samples/s with loader and augmentation, {self.loop_share[name]:.0%}")
                for name, rate in self.loop.items()
            ),
        ]
        if self.reconstruction_seconds is not None:
            precision = named(self.reconstruction_precision)
            text = f"{self.reconstruction_seconds:.3g} s for one modality of {shape} voxels, {precision}"
            text += f"; {self.refined_seconds:.3g} s refined and with its uncertainty"
            rows.append(("reconstruction", text))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def benchmark(
    plan: str | Path | Plan,
    *,
    device: str = "auto",
    precision: str | None = None,
    batch_size: int | None = None,
    seconds: float = 10.0,
    study_shape: Triple | None = None,
) -> BenchmarkResult:
    """Measure training, loader and whole-volume reconstruction of ``plan`` on this machine.

    ``precision`` "32" or "bf16", left out the plan's (for whole volumes 32, as ``reconstruct`` has it).
    ``batch_size`` left out: the plan's on a GPU, 1 on a CPU. ``seconds``: how long each rate is measured, after
    warming up. ``study_shape``: voxels of the made-up studies in the plan's spacing, left out as large against the
    crop as 240 × 240 × 155 is against 128³. Writes only to a temporary folder. Raises :class:`MedmaeError` for
    settings that are impossible here, and when memory is short.
    """
    plan = Plan.load(plan)
    check_plan(plan)
    check_options(device, precision, batch_size, seconds, study_shape)
    synthesis, precision = precision or "32", precision or plan.training.precision
    fabric = make_fabric(plan, device, precision, 1, 1, "auto")
    fabric.launch()
    on_gpu = fabric.device.type != "cpu"
    batch_size = batch_size or (plan.training.batch_size if on_gpu else 1)
    training = plan.training.model_copy(update={"precision": precision, "batch_size": batch_size, "accumulate": 1})
    plan = plan.model_copy(update={"training": training})
    shape = study_shape or usual_shape(plan)
    with memory_shortage_told(), explained(Path("a temporary folder")), TemporaryDirectory(prefix="medmae-") as folder:
        log.info("The machine's matrix-multiply rate")
        peaks = {name: matmul_peak(fabric.device, dtype) for name, dtype in PRECISIONS.items()}
        log.info("Memory of a training step")
        memory, before = (None, None) if on_gpu else memory_of_process(plan)
        log.info("Training steps")
        work = step_flops(plan)
        step = training_step(plan, fabric)
        step_seconds = median_seconds(step, fabric.device, seconds)
        if on_gpu:  # since training_step() began
            memory = torch.cuda.max_memory_allocated(fabric.device)
        del step
        log.info("Preparing made-up studies of %s voxels", " x ".join(map(str, shape)))
        studies = [made_up_study(plan, shape, seed) for seed in range(2)]
        cohort = prepared(studies, plan, Path(folder))
        loader, loop = loading(plan, cohort, fabric, Path(folder), seconds)
        log.info("Reconstruction of a whole study")
        whole = reconstruction_seconds(plan, studies[0], fabric.device, synthesis)
        refined = reconstruction_seconds(plan, studies[0], fabric.device, synthesis, refined=True)
    return BenchmarkResult(
        plan=plan.name,
        plan_hash=plan.hash(),
        device=str(fabric.device),
        precision=precision,
        batch_size=batch_size,
        compiled=plan.training.compile,
        peak_flops=peaks,
        step_flops=work,
        step_seconds=step_seconds,
        memory=memory,
        memory_before=before,
        loader=loader,
        loop=loop,
        study_shape=shape,
        reconstruction_seconds=whole,
        refined_seconds=refined,
        reconstruction_precision=synthesis,
        machine=machine(fabric.device),
    )


def check_options(
    device: str, precision: str | None, batch_size: int | None, seconds: float, study_shape: Triple | None
) -> None:
    """Raise :class:`InputError` for values that mean nothing."""
    for name, value, fine, expected in (
        ("device", device, device in ("auto", "cpu", "cuda"), "auto, cpu or cuda"),
        ("precision", precision, precision is None or precision in PRECISIONS, " or ".join(PRECISIONS)),
        ("batch_size", batch_size, batch_size is None or batch_size > 0, "at least 1"),
        ("seconds", seconds, seconds > 0, "more than 0"),
        ("study_shape", study_shape, study_shape is None or is_shape(study_shape), "three sizes, at least 8 voxels"),
    ):
        if not fine:
            raise InputError("this setting is not possible", field=name, found=value, expected=expected)


def is_shape(shape: Triple) -> bool:
    return len(shape) == 3 and min(shape) >= 8


def named(precision: str) -> str:
    return "fp32" if precision == "32" else precision


def flops(rate: float) -> str:
    """A rate with a readable unit."""
    return f"{rate / 1e12:.3g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.3g} GFLOP/s"
