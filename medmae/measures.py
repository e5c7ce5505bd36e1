"""The single measurements behind ``medmae benchmark``, each on its own: rates, work, memory, crops, whole volumes."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import medmae
from medmae.cohort.store import Cohort, prepare
from medmae.errors import InputError, MedmaeError
from medmae.imaging.nifti import write_nifti
from medmae.imaging.volume import Volume
from medmae.models.base import MaskedAutoencoder
from medmae.models.refiner import Refiner
from medmae.models.zoo import create
from medmae.plan import Plan, Triple
from medmae.synthesis.trust import LEVELS, Calibration
from medmae.synthesis.volumes import reconstruct_volumes
from medmae.training.batches import prefetch
from medmae.training.pretrain import Loop, make_fabric
from medmae.training.schedules import make_optimizer

PRECISIONS = {"32": torch.float32, "bf16": torch.bfloat16}
_WARM_UP = 3  # calls before the clock runs: memory is allocated, graphs are compiled, caches filled
_LEAST = 3  # measurements, however long one takes


def wait_for(device: torch.device) -> None:
    """Until a GPU has done what it was given; a CPU has already."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The median time of ``call`` over about ``seconds``; on a GPU ten calls are timed together, as nothing waits for
    the device between training steps."""
    together = 10 if device.type == "cuda" else 1
    for _ in range(_WARM_UP):
        call()
    wait_for(device)
    times: list[float] = []
    while sum(times) * together < seconds or len(times) < _LEAST:
        begun = time.perf_counter()
        for _ in range(together):
            call()
        wait_for(device)
        times.append((time.perf_counter() - begun) / together)
    return statistics.median(times)


def matmul_peak(device: torch.device, dtype: torch.dtype, repeats: int = 10) -> float:
    """FLOP/s of the fastest product of two square matrices, the best of several sizes and repeats."""
    best = 0.0
    for size in (4096, 8192, 16384) if device.type == "cuda" else (1024, 2048):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        for _ in range(repeats + 2):  # the best of all: warming up cannot spoil it
            wait_for(device)
            begun = time.perf_counter()
            torch.mm(a, b)
            wait_for(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - begun))
    return best


def random_images(plan: Plan, batch: int, device: torch.device) -> dict[str, torch.Tensor]:
    shape = (batch, 1, *plan.image.crop)
    return {name: torch.randn(shape, device=device) for name in plan.modalities}


def step_flops(plan: Plan) -> float:
    """Floating-point operations of forward and backward for one sample.

    Counted on the CPU, where only visible patches are embedded, and with attention as plain products, so that what
    fused kernels compute twice is not counted twice.
    """
    model = create(plan).train()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(random_images(plan, 1, torch.device("cpu"))).loss.backward()
    return float(counter.get_total_flops())


def training_step(plan: Plan, fabric: Fabric) -> Callable[[], None]:
    """A function that does one training step (masks, forward, backward, clipping, optimiser) as ``pretrain`` does it,
    on images that are on the device already."""
    gc.collect()
    if fabric.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(fabric.device)
    network = create(plan).train()
    network.save_memory(plan.training.recompute)
    compiled: Any = torch.compile(network) if plan.training.compile else network
    model, optimizer = fabric.setup(compiled, make_optimizer(network, plan.training))
    images = random_images(plan, plan.training.batch_size, fabric.device)
    present = {name: torch.ones(plan.training.batch_size, dtype=torch.bool) for name in images}
    generator = torch.Generator(fabric.device).manual_seed(0)

    def step() -> None:
        fabric.backward(model(images, present=present, generator=generator).loss)
        if plan.training.clip_norm is not None:
            fabric.clip_gradients(model, optimizer, max_norm=plan.training.clip_norm, error_if_nonfinite=False)
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_resident() -> int | None:
    """The most memory this process has held so far, in bytes; None where the system does not tell.

    On Linux from ``VmHWM``: ``ru_maxrss`` would count what the parent held when it started this process.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) * (1 if sys.platform == "darwin" else 1024)


def memory_of_process(plan: Plan) -> tuple[int | None, int | None]:
    """(peak of a fresh process that trains on the CPU, peak after only loading the libraries), in bytes."""
    folders = [str(Path(medmae.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    child = subprocess.run(
        [sys.executable, "-c", "from medmae.measures import tell_memory; tell_memory()"],
        input=plan.to_json(),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))},
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode < 0:  # killed, which is what Linux does to a process that takes more than there is
        raise MemoryError
    try:
        peak, before = json.loads(child.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        if "alloc" in child.stderr or "MemoryError" in child.stderr:
            raise MemoryError from None
        lines = child.stderr.strip().splitlines() or ["nothing"]
        raise MedmaeError("the training step failed in a process of its own", found=lines[-1]) from None
    return peak, before


def tell_memory() -> None:
    """The child of :func:`memory_of_process`: a plan on stdin, the two figures on stdout."""
    before = peak_resident()
    plan = Plan.load(json.load(sys.stdin))
    step = training_step(plan, make_fabric(plan, "cpu", plan.training.precision, 1, 1, "auto"))
    for _ in range(_WARM_UP):
        step()
    print(json.dumps([peak_resident(), before]))


@contextmanager
def memory_shortage_told() -> Iterator[None]:
    """Too little memory as an error with a remedy."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        remedy = "Use a smaller batch or crop (--set image.crop=...), or --precision bf16."
        raise MedmaeError("not enough memory for this plan", remedy=remedy) from None


def usual_shape(plan: Plan) -> Triple:
    """Voxels of a study as large against the plan's crop as a BraTS study (240 x 240 x 155) is against 128^3."""
    d, h, w = (max(8, round(c * n / 128)) for c, n in zip(plan.image.crop, (240, 240, 155), strict=True))
    return d, h, w


def made_up_study(plan: Plan, shape: Triple, seed: int) -> dict[str, Volume]:
    """{modality: a head of smooth contrast and noise, 0 outside}, in LPS order with the plan's spacing, so that it
    has to be reoriented as most scans do. It fills what a skull-stripped head fills of a BraTS volume."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape), indexing="ij", sparse=True)
    inside = sum((a / r) ** 2 for a, r in zip(axes, (0.58, 0.73, 0.92), strict=True)) < 1
    affine = np.diag([*(-s if i < 2 else s for i, s in enumerate(plan.image.spacing)), 1.0])
    volumes = {}
    for number, name in enumerate(plan.modalities):
        smooth = sum(np.sin(4 * a + number + i + seed) for i, a in enumerate(axes))
        values = 400 + 80 * smooth + 20 * rng.standard_normal(shape, dtype=np.float32)
        volumes[name] = Volume(np.where(inside, np.maximum(values, 1), 0).astype(np.float32), affine)
    return volumes


def prepared(studies: list[dict[str, Volume]], plan: Plan, folder: Path) -> Cohort:
    """``studies`` written under ``folder`` and prepared with ``plan``, as a user's are."""
    for number, volumes in enumerate(studies):
        place = folder / "scans" / f"study-{number}"
        place.mkdir(parents=True)
        for name, volume in volumes.items():
            write_nifti(volume, place / f"{name}.nii", dtype=np.int16)
    result = prepare(folder / "scans", plan, folder / "cohort", jobs=1)
    if result.failed:
        raise InputError("made-up studies cannot be prepared with this plan", problems=result.failed)
    return Cohort.open(folder / "cohort")


def loading(
    plan: Plan, cohort: Cohort, fabric: Fabric, folder: Path, seconds: float
) -> tuple[dict[str, float], dict[str, float]]:
    """({source: samples/s of crops alone}, {source: samples/s of training with crops and augmentation}).

    From the store always, from the device's memory on a GPU or when the plan wants it. Files are in the system's
    cache, as those of a cohort that fits into memory are from the second epoch on.
    """
    batch, endless = plan.training.batch_size, range(0, sys.maxsize, plan.training.batch_size)
    training = plan.training.model_copy(update={"cohort_on_device": False})
    loop = Loop(
        fabric, plan.model_copy(update={"training": training}), folder, cohort, list(cohort.studies), [], 0, None
    )
    loop.model.train()
    monitor: Any = SimpleNamespace(step=lambda *_: None)
    alone, trained = {}, {}
    for source in ("store", "device memory"):
        if source == "device memory":
            if fabric.device.type == "cpu" and not plan.training.cohort_on_device:
                continue
            loop.training.load_to(fabric.device)
        crops: Any = prefetch(loop.training, endless, batch)
        alone[source] = batch / mean_seconds(lambda crops=crops: next(crops), fabric.device, seconds)  # type: ignore[misc]
        crops.close()
        crops = prefetch(loop.training, endless, batch)
        trained[source] = batch / mean_seconds(
            lambda crops=crops: loop.optimize(crops, monitor),  # type: ignore[misc]
            fabric.device,
            seconds,
        )
        crops.close()
    return alone, trained


def mean_seconds(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The mean time of ``call`` over about ``seconds``: what is read ahead makes single calls uneven."""
    for _ in range(_WARM_UP + 2):  # more than are read ahead
        call()
    wait_for(device)
    begun, calls = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds or calls < _LEAST:
        call()
        calls += 1
    wait_for(device)
    return (time.perf_counter() - begun) / calls


def reconstruction_seconds(
    plan: Plan, study: dict[str, Volume], device: torch.device, precision: str, refined: bool = False
) -> float | None:
    """Seconds from the volumes of all modalities but the last to the last, on the study's own grid; None when the
    method does not synthesise, or knows one modality only. ``refined``: as from ``medmae finetune synthesis``, with a
    refiner and the uncertainty."""
    model = create(plan)
    target = plan.modalities[-1]
    if len(plan.modalities) == 1 or type(model).reconstruct is MaskedAutoencoder.reconstruct:
        return None
    if refined:
        model.companions["refiner"] = Refiner(plan.modalities, plan.refining)
        anything = dict.fromkeys(["doubt", *map(str, LEVELS)], [0.0, 1.0])
        model.metadata["calibration"] = Calibration({target: anything}, None, 0).to_json()
    volumes = {name: volume for name, volume in study.items() if name != target}
    for _ in range(2 if device.type == "cuda" else 1):  # a GPU is warmed up
        begun = time.perf_counter()
        reconstruct_volumes(model, volumes, [target], device=device, precision=precision, uncertainty=refined)
        taken = time.perf_counter() - begun
    return taken


def machine(device: torch.device) -> dict[str, str]:
    """What the figures hold for: processor, device and versions; nothing that names the machine."""
    processor = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file():
        named = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        processor = named[0] if named else processor
    found = {"processor": f"{processor}, {torch.get_num_threads()} threads"}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["cuda"] = f"CUDA {torch.version.cuda}"
    found["python"] = f"Python {platform.python_version()}"
    found["torch"] = f"torch {torch.__version__}"
    found["medmae"] = f"medmae {medmae.__version__}"
    return found
