"""What is compared: a contestant sets itself up and returns one unit of work to be timed.

``work()`` does ``units`` samples. The plain ones are what a careful user would write without medmae: MONAI's
transformer blocks, every token embedded and every patch predicted; MONAI's transforms on the NIfTI files.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PLAN = "bm-mae-base"
# medmae's names and those of the published code that the plain model uses.
NAMES = {"t1": "t1", "t1c": "t1ce", "t2": "t2", "flair": "flair"}


@dataclass
class Contestant:
    work: Callable[[], object]
    units: int
    device: torch.device
    libraries: int | None = None  # bytes that the process holds when everything is imported


def peak_resident() -> int | None:
    """The most this process has held (bytes; Linux): read here, so that no contestant imports what it does not use."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


def step_of_ours(options: dict[str, Any]) -> Contestant:
    """One training step as ``pretrain`` does it."""
    from medmae.measures import training_step
    from medmae.plan import Plan
    from medmae.training.pretrain import make_fabric

    libraries = peak_resident()
    settings = [f"training.batch_size={options['batch']}", f"training.precision={options['precision']}"]
    plan = Plan.load(PLAN, [*settings, *options["overrides"]])
    fabric = make_fabric(plan, options["device"], plan.training.precision, 1, 1, "auto")
    return repeated(training_step(plan, fabric), fabric.device, options["batch"], libraries)


def step_of_plain(options: dict[str, Any]) -> Contestant:
    """One training step of the plain model in fp32, masks drawn the same way."""
    from medmae.masking import sample_mask
    from medmae.plan import Plan
    from tests.plain_bm_mae import PlainBMMAE

    libraries = peak_resident()
    plan, device = Plan.load(PLAN), torch.device(options["device"])
    model = PlainBMMAE().to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.training.lr, weight_decay=plan.training.weight_decay)
    images = {name: torch.randn(options["batch"], 1, 128, 128, 128, device=device) for name in NAMES.values()}
    everything = torch.ones(1, len(NAMES), dtype=torch.bool, device=device)

    def step() -> None:
        hidden = sample_mask(plan.masking, everything, 8**3)[0]
        model(images, dict(zip(NAMES.values(), hidden, strict=True))).backward()
        optimizer.step()
        optimizer.zero_grad()

    return repeated(step, device, options["batch"], libraries)


def repeated(step: Callable[[], object], device: torch.device, batch: int, libraries: int | None) -> Contestant:
    """One step on a CPU; ten on a GPU, which nothing waits for between the steps of a training."""
    times = 10 if device.type == "cuda" else 1

    def work() -> None:
        for _ in range(times):
            step()

    return Contestant(work, times * batch, device, libraries)


def loader_of_ours(options: dict[str, Any]) -> Contestant:
    """Training batches of one study each from the prepared store, read ahead as in training."""
    from medmae.cohort.store import Cohort
    from medmae.plan import Plan
    from medmae.training.batches import Crops, prefetch

    crops = Crops(Cohort.open(Path(options["folder"]) / "cohort").studies, Plan.load(PLAN), seed=0)
    samples = 200

    def work() -> None:
        for batch in prefetch(crops, range(samples), 1):
            assert batch.images["t1"].shape == (1, 1, 128, 128, 128)

    return Contestant(work, samples, torch.device("cpu"))


def loader_of_monai(options: dict[str, Any]) -> Contestant:
    """The published pre-processing on the NIfTI files, in as many worker processes as there are cores."""
    from monai.data import DataLoader, Dataset

    studies = sorted((Path(options["folder"]) / "scans").iterdir())
    items = [{name: str(study / f"{name}.nii.gz") for name in NAMES} for study in studies] * 2
    workers = torch.get_num_threads()
    loader = DataLoader(
        Dataset(items, monai_transforms()), batch_size=1, shuffle=True, num_workers=workers, persistent_workers=True
    )

    def work() -> None:
        for batch in loader:
            assert batch["t1"].shape == (1, 1, 128, 128, 128)

    return Contestant(work, len(items), torch.device("cpu"))


def monai_transforms() -> Callable[[dict[str, str]], dict[str, Tensor]]:
    """Load, orient, cut to the foreground, z-score over non-zero voxels, 128^3 at the centre. No resampling: the
    files are at 1 mm already."""
    from monai import transforms as T

    keys = list(NAMES)
    transform: Callable[[dict[str, str]], dict[str, Tensor]] = T.Compose(
        [
            T.LoadImaged(keys),
            T.EnsureChannelFirstd(keys),
            T.Orientationd(keys, axcodes="RAS", labels=(("L", "R"), ("P", "A"), ("I", "S"))),
            T.CropForegroundd(keys, source_key=keys[0]),
            T.NormalizeIntensityd(keys, nonzero=True),
            T.ResizeWithPadOrCropd(keys, spatial_size=(128, 128, 128)),
        ]
    )
    return transform


def method_of_ours(options: dict[str, Any]) -> Contestant:
    """Masks, forward and backward of a plan's model on images at hand; no optimiser, as in the ones below."""
    from medmae.measures import random_images
    from medmae.models.zoo import create
    from medmae.plan import Plan

    libraries = peak_resident()
    plan, device = Plan.load(options["plan"]), torch.device(options["device"])
    model = create(plan).to(device).train()
    images = random_images(plan, options["batch"], device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=options["precision"] == "bf16"):
            loss = model(images).loss
        loss.backward()
        model.zero_grad()

    return repeated(step, device, options["batch"], libraries)


def method_of_timm(options: dict[str, Any]) -> Contestant:
    """Hi-End-MAE from timm's blocks in fp32, every patch embedded and predicted."""
    from medmae.masking import sample_mask
    from medmae.plan import Plan
    from tests.plain_hi_end_mae import PlainHiEndMAE

    libraries = peak_resident()
    plan, device = Plan.load(options["plan"]), torch.device(options["device"])
    model = PlainHiEndMAE().to(device).train()
    image = torch.randn(options["batch"], 1, *plan.image.crop, device=device)

    def step() -> None:
        hidden = sample_mask(plan.masking, torch.ones(1, 1, dtype=torch.bool, device=device), 216)[0, 0]
        model(image, hidden).backward()
        model.zero_grad()

    return repeated(step, device, options["batch"], libraries)


def bare_network(options: dict[str, Any]) -> Contestant:
    """The plan's U-Net itself: the mean squared error of its output, forward and backward."""
    from medmae.models.zoo import create
    from medmae.plan import Plan

    libraries = peak_resident()
    plan, device = Plan.load(options["plan"]), torch.device(options["device"])
    network = create(plan).network.to(device).train()
    image = torch.randn(options["batch"], len(plan.modalities), *plan.image.crop, device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=options["precision"] == "bf16"):
            predicted = network(image)
        torch.nn.functional.mse_loss(predicted.float(), image).backward()
        network.zero_grad()

    return repeated(step, device, options["batch"], libraries)


CONTESTANTS: dict[str, Callable[[dict[str, Any]], Contestant]] = {
    f.__name__: f
    for f in (
        step_of_ours,
        step_of_plain,
        loader_of_ours,
        loader_of_monai,
        method_of_ours,
        method_of_timm,
        bare_network,
    )
}


def difference_of_losses(folder: Path) -> dict[str, float]:
    """How far the two models are apart with the same weights, images and mask and without dropout: the loss, and the
    gradient of one parameter that everything flows back to, relative to the plain one's."""
    from medmae.masking import sample_mask
    from medmae.plan import Plan
    from medmae.weights.importing import load
    from tests.plain_bm_mae import PlainBMMAE

    torch.manual_seed(0)
    plain = PlainBMMAE(dropout=0.0)
    torch.save(plain.state_dict(), folder / "plain.pth")
    ours = load(folder / "plain.pth").train()
    for module in ours.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0  # type: ignore[assignment]
    images = {name: torch.randn(1, 1, 128, 128, 128) for name in NAMES}
    hidden = sample_mask(Plan.load(PLAN).masking, torch.ones(1, len(NAMES), dtype=torch.bool), 8**3)[0]
    expected = plain({NAMES[m]: x for m, x in images.items()}, dict(zip(NAMES.values(), hidden, strict=True)))
    mask = {m: h.view(1, 8, 8, 8) for m, h in zip(NAMES, hidden, strict=True)}
    loss = ours(images, mask=mask).loss
    expected.backward()
    loss.backward()
    theirs, own = plain.cls_token.grad, ours.cls_token.grad
    assert theirs is not None and isinstance(own, Tensor)
    return {
        "loss": abs(loss.item() / expected.item() - 1),
        "gradient": float((own - theirs).norm() / theirs.norm()),
    }


def difference_of_crops(folder: Path) -> float:
    """The largest difference between a crop from the store and the same crop by MONAI, in standard deviations."""
    from medmae.cohort.store import Cohort
    from medmae.plan import Plan
    from medmae.training.batches import Crops

    study = Cohort.open(folder / "cohort").studies[0]
    crops = Crops([study], Plan.load(PLAN), seed=0)
    images = crops.batch([(study, crops.corner(study, None))], [0]).images
    theirs = monai_transforms()({name: str(folder / "scans" / study.id / f"{name}.nii.gz") for name in NAMES})
    return max(float(np.abs(images[name][0].float().numpy() - theirs[name].numpy()).max()) for name in NAMES)


def write_material(folder: Path, studies: int = 4) -> None:
    """Made-up studies shaped as BraTS's (4 x 240 x 240 x 155 at 1 mm, int16, gzip), and a cohort prepared from them."""
    from medmae.cohort.store import prepare
    from medmae.imaging.nifti import write_nifti
    from medmae.measures import made_up_study, usual_shape
    from medmae.plan import Plan

    plan = Plan.load(PLAN)
    for number in range(studies):
        place = folder / "scans" / f"study-{number}"
        place.mkdir(parents=True)
        for name, volume in made_up_study(plan, usual_shape(plan), number).items():
            write_nifti(volume, place / f"{name}.nii.gz", dtype=np.int16)
    result = prepare(folder / "scans", plan, folder / "cohort", jobs=1)
    if len(result.done) != studies:
        sys.exit(f"the made-up studies could not be prepared: {result.failed}")
