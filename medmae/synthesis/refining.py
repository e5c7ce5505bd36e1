"""``medmae finetune synthesis``: a refiner on top of a checkpoint, and intervals that can be trusted.

The pre-trained model stays as it is. What it says of each training study, for some combinations of given modalities, is
computed once, over whole volumes as in use, and kept in ``OUT/coarse``; the refiner learns from crops of that. At the
end the weights that did best on the validation studies stay, the intervals are calibrated on those studies, and the
training cohort is remembered by its features, so that a study unlike it is noticed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import medmae
from medmae.cohort.prepared import PreparedStudy
from medmae.errors import CheckpointError, InputError, Problem
from medmae.files import write_atomically, write_text
from medmae.models.base import MaskedAutoencoder, without_repeats
from medmae.models.refiner import Refiner, pattern, refining_loss
from medmae.plan import Plan, Refining, Triple
from medmae.progress import progress_callback
from medmae.synthesis.familiar import remember
from medmae.synthesis.floors import brain_of
from medmae.synthesis.predicting import as_input, inside, predict_study
from medmae.synthesis.trust import Errors, calibrate
from medmae.synthesis.windows import predict_volume
from medmae.training.batches import sample_rng
from medmae.training.checkpoint import (
    METADATA,
    check_state,
    facts_of,
    find_checkpoint,
    read_companion,
    read_state,
    save_refined,
)
from medmae.training.monitor import Monitor
from medmae.training.pretrain import begin_run, make_fabric, open_cohort, split, stop_on_signal
from medmae.training.schedules import parameter_groups, warmed

_CHOICE, _CROP, _ORDER = 11, 12, 13  # purposes of random numbers
_RIDGE = 0.01  # of the blend, in variances of a normalised image


@dataclass
class RefinedRun:
    """What a refining left: ``run`` folder, ``steps`` done, ``metrics`` of the weights that stayed (mean absolute error
    of the validation studies, ``validation_coarse`` before and ``validation_l1`` after refining), ``coverage`` {level:
    share} of the calibrated intervals, studies left out and what is doubtful."""

    run: Path
    steps: int
    metrics: dict[str, float]
    coverage: dict[str, float] | None = None
    problems: list[Problem] = field(default_factory=list)
    interrupted: bool = False

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "run": str(self.run), "problems": [str(p) for p in self.problems]}

    def __str__(self) -> str:
        lines = [str(self.run)]
        if "validation_l1" in self.metrics:
            before, after = self.metrics["validation_coarse"], self.metrics["validation_l1"]
            lines.append(f"validation: mean absolute error {before:.3f} sd before, {after:.3f} after")
        if self.coverage:
            told = ", ".join(f"{float(level):.0%}: {share:.1%}" for level, share in self.coverage.items())
            lines.append(f"intervals hold the truth of subjects left out: {told}")
        return "\n".join(lines)


def finetune_synthesis(
    data: str | Path,
    checkpoint: str | Path,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    init: str | Path | None = None,
    max_steps: int | None = None,
    device: str = "auto",
    precision: str | None = None,
    resume: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> RefinedRun:
    """Train a refiner for ``checkpoint`` on ``data`` (a prepared cohort or any layout) and calibrate its intervals.

    ``out`` becomes a run that everything takes as a checkpoint: the model unchanged, the refiner, the calibration.
    ``overrides``: ``key=value`` for the plan's ``refining`` section. ``init``: begin with the refiner of another such
    run, for a cohort too small to learn one from. The subjects held back for validation are those
    that pre-training held back, and more, when the data and the seed are the same; calibrate on subjects that
    pre-training saw, and the intervals may be too narrow. ``resume`` continues ``out``; a seed gives the same run.
    Raises :class:`MedmaeError` for a model that cannot synthesise, data without two modalities in one study, and an
    ``init`` without a refiner of these modalities and sizes.
    """
    model = medmae.load(checkpoint)
    full = [o if o.startswith("refining.") else f"refining.{o}" for o in overrides]
    plan = Plan.load(model.plan, full)
    run = Path(out)
    if len(model.modalities) < 2:
        raise CheckpointError(
            "a model of one modality has nothing to synthesise",
            where=checkpoint,
            found=", ".join(model.modalities),
            remedy="Pre-train with several modalities.",
        )
    fabric = make_fabric(plan, device, precision, 1, 1, "auto")
    fabric.launch()
    resume = begin_run(run, plan, resume, fabric)
    cohort, problems = open_cohort(Path(data), plan, run, fabric, progress)
    settings = plan.refining
    held = plan.model_copy(
        update={"training": plan.training.model_copy(update={"validation_share": settings.validation_share})}
    )
    training, validation = split(cohort, held, seed)
    parts = {"training": training, "validation": validation}
    samples = {name: samples_of(studies, model, settings, seed) for name, studies in parts.items()}
    if not samples["training"]:
        raise InputError(
            "no training study has two of the model's modalities",
            where=data,
            found=f"{len(training)} studies for training",
            expected=", ".join(model.modalities),
        )
    arithmetic = precision or plan.training.precision
    coarse = Coarse(run / "coarse", model, str(model.metadata.get("weights_sha256") or "0" * 8)[:8])
    with progress_callback("predicting", progress) as report:
        coarse.make([*samples["training"], *samples["validation"]], fabric.device, arithmetic, report)
    loop = Loop(fabric, model, plan, run, coarse, samples, seed, cohort.fingerprint)
    if init is not None:
        loop.begin_with(init)
    if resume:
        loop.resume()
    else:
        fit_blend(loop.refiner, samples["training"], coarse)
    total = settings.epochs * settings.steps_per_epoch
    metrics, interrupted = loop.train(total if max_steps is None else min(max_steps, total), progress)
    result = RefinedRun(run, loop.step, metrics, None, problems, interrupted)
    if not interrupted:
        result.metrics |= loop.keep_best()
        if result.metrics.get("validation_l1", 0) > result.metrics.get("validation_coarse", 0):
            result.problems.append(unrefined(run, result.metrics))
        with progress_callback("calibrating", progress) as report:
            result.coverage = loop.finish(training, samples["validation"], result.metrics, arithmetic, report)
    return result


def unrefined(run: Path, metrics: dict[str, float]) -> Problem:
    before, after = metrics["validation_coarse"], metrics["validation_l1"]
    return Problem(
        "refining did not bring the validation studies nearer to their truth",
        str(run),
        found=f"mean absolute error {before:.3f} sd before, {after:.3f} after",
        remedy="Refine on more studies, or begin with the refiner of a larger cohort (--init).",
        fatal=False,
    )


@dataclass(frozen=True)
class Best:
    """The weights that did best on the validation studies: ``error``, the validation's absolute error and weighted
    1 - SSIM; the ``step`` and all its ``metrics``."""

    error: float
    step: int
    metrics: dict[str, float]
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class Sample:
    """A study and the modalities ``shown`` of it."""

    study: PreparedStudy
    shown: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.study.id}/{'+'.join(self.shown)}"


def samples_of(
    studies: Sequence[PreparedStudy], model: MaskedAutoencoder, settings: Refining, seed: int
) -> list[Sample]:
    """The combinations that are practised: of each study, those that leave one of its modalities to be predicted."""
    found = []
    for study in studies:
        names = [m for m in model.modalities if m in study.modalities]
        every = [c for n in range(1, len(names)) for c in combinations(names, n)]
        if settings.combinations and settings.combinations < len(every):
            number = int.from_bytes(study.id.encode()[-6:], "big")
            picked = sample_rng(seed, _CHOICE, number).choice(len(every), settings.combinations, replace=False)
            every = [every[i] for i in sorted(picked)]
        found += [Sample(study, shown) for shown in every]
    return found


class Coarse:
    """What the pre-trained model says of each sample, kept as ``folder/<weights>/<study>/<shown>.npy``: float16
    (2 A + 1, D, H, W), predictions and their spread for the A modalities not shown, and where something is."""

    def __init__(self, folder: Path, model: MaskedAutoencoder, key: str) -> None:
        self.folder, self.model = folder / key, model

    def absent(self, sample: Sample) -> list[str]:
        return [m for m in self.model.modalities if m not in sample.shown]

    def file(self, sample: Sample) -> Path:
        return self.folder / f"{sample.name}.npy"

    def make(
        self,
        samples: Sequence[Sample],
        device: torch.device,
        precision: str,
        on_progress: Callable[[int, int, str], None] | None,
    ) -> None:
        """Predict what is not there yet; every file is whole, so a stopped run goes on."""
        self.model.to(device).eval()
        for done, sample in enumerate(samples):
            if on_progress:
                on_progress(done, len(samples), sample.study.id)
            if self.file(sample).is_file():
                continue
            given = {m: sample.study.array(m).astype(np.float32) for m in sample.shown}
            seen = inside(given, self.model)
            found = predict_volume(
                self.model, given, self.absent(sample), foreground=seen, device=device, precision=precision
            )
            rows = [*found.arrays.values(), *found.spread.values(), seen]
            stacked = np.stack([np.asarray(row, np.float16) for row in rows])
            write_atomically(self.file(sample), lambda path, stacked=stacked: save_array(path, stacked))  # type: ignore[misc]
        if on_progress:
            on_progress(len(samples), len(samples), "")

    def crop(self, sample: Sample, corner: Sequence[int], size: Triple) -> dict[str, np.ndarray]:
        """What :class:`Batch` is put together from, of one crop: ``values``, ``spread``, ``truth`` (M, ...) float32,
        ``shown``, ``counted`` (M,) and ``inside`` bool."""
        names, absent = self.model.modalities, self.absent(sample)
        stored = cut(np.load(self.file(sample), mmap_mode="r"), corner, size).astype(np.float32)
        acquired = {m: sample.study.crop(m, corner, size) for m in names if m in sample.study.modalities}
        coarse, spreads = (dict(zip(absent, part, strict=True)) for part in np.split(stored[:-1], 2))
        values, spread = as_input(names, {m: acquired[m] for m in sample.shown}, coarse, spreads)
        truth, _ = as_input(names, acquired, {}, {})
        return {
            "values": values,
            "spread": spread,
            "truth": truth,
            "shown": np.array([m in sample.shown for m in names]),
            "counted": np.array([m in sample.study.modalities and m not in sample.shown for m in names]),
            "inside": stored[-1] > 0,
        }


def weights_of(refiner: Refiner) -> dict[str, Tensor]:
    return {k: v.detach().cpu().clone() for k, v in refiner.state_dict().items()}


def save_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as stream:
        np.save(stream, array)


def cut(array: np.ndarray, corner: Sequence[int], size: Triple) -> np.ndarray:
    """(C, *size) of (C, D, H, W) from ``corner``, zeros beyond the edges."""
    found = np.zeros((len(array), *size), array.dtype)
    low = [max(0, c) for c in corner]
    high = [min(n, c + s) for n, c, s in zip(array.shape[1:], corner, size, strict=True)]
    if all(a < b for a, b in zip(low, high, strict=True)):
        to = tuple(slice(a - c, b - c) for a, b, c in zip(low, high, corner, strict=True))
        found[(slice(None), *to)] = array[(slice(None), *(slice(a, b) for a, b in zip(low, high, strict=True)))]
    return found


def fit_blend(refiner: Refiner, samples: Sequence[Sample], coarse: Coarse) -> None:
    """Least squares of each absent modality on the given ones and its coarse prediction, over the brain voxels of
    ``samples``, one fit a set of given modalities; sets that no sample shows stay as they are.

    A ridge pulls towards the coarse prediction alone: where few studies practise a set, given images and the
    prediction made from them are nearly collinear.
    """
    names = refiner.modalities
    size = len(names) + 1
    sums: dict[tuple[tuple[bool, ...], int], tuple[np.ndarray, np.ndarray]] = {}
    for sample in samples:
        found = coarse.crop(sample, (0, 0, 0), sample.study.shape)
        brain = brain_of(sample.study, found["inside"]) & found["inside"]
        columns = np.concatenate([found["values"][:, brain], np.ones((1, int(brain.sum())))]).astype(np.float64)
        products = columns @ columns.T
        for target in np.flatnonzero(found["counted"]).tolist():
            key = tuple(found["shown"].tolist()), target
            before = sums.get(key, (np.zeros((size, size)), np.zeros(size)))
            truth = found["truth"][target][brain].astype(np.float64)
            sums[key] = before[0] + products, before[1] + columns @ truth
    for (shown, target), (products, crossed) in sums.items():
        used = [*np.flatnonzero(shown), target, size - 1]
        ridge = _RIDGE * products[-1, -1]  # the last product is the number of voxels
        towards = np.array([float(i == target) for i in used])
        weights = np.linalg.solve(
            products[np.ix_(used, used)] + ridge * np.eye(len(used)), crossed[used] + ridge * towards
        )
        row = torch.zeros(size)
        row[used] = torch.from_numpy(weights).float()
        refiner.blend[pattern(torch.tensor([shown])), target] = row


class Loop:
    """The state of one refining: network, optimiser, step."""

    def __init__(
        self,
        fabric: Any,
        model: MaskedAutoencoder,
        plan: Plan,
        run: Path,
        coarse: Coarse,
        samples: dict[str, list[Sample]],
        seed: int,
        fingerprint: str,
    ) -> None:
        self.fabric, self.model, self.plan, self.run, self.coarse = fabric, model, plan, run, coarse
        self.settings, self.samples, self.seed, self.fingerprint = plan.refining, samples, seed, fingerprint
        torch.manual_seed(seed)
        self.refiner = Refiner(model.modalities, plan.refining)
        groups = parameter_groups(self.refiner, plan.refining.weight_decay)
        self.network, self.optimizer = fabric.setup(self.refiner, torch.optim.AdamW(groups, plan.refining.lr))
        self.step = 0
        self.best: Best | None = None
        self.last_weights: dict[str, Tensor] | None = None
        ids = {name: sorted({s.study.id for s in some}) for name, some in samples.items()}
        write_text(run / "split.json", json.dumps({**ids, "seed": seed}, indent=2))

    def begin_with(self, init: str | Path) -> None:
        """Take over the refiner of the run ``init``."""
        folder = find_checkpoint(Path(init))
        facts = json.loads((folder / METADATA).read_text(encoding="utf-8")).get("refiner")
        mine = (list(self.model.modalities), self.settings.width, self.settings.levels)
        theirs = facts and (list(facts["modalities"]), facts["settings"]["width"], facts["settings"]["levels"])
        if theirs != mine:
            raise CheckpointError(
                "its refiner is none that this one can begin with",
                where=folder,
                field="modalities, width, levels",
                found=theirs or "no refiner",
                expected=mine,
                remedy="Begin with a run of `medmae finetune synthesis` of the same modalities, width and levels.",
            )
        self.refiner.load_state_dict(read_companion(folder, "refiner", facts).state_dict())

    def resume(self) -> None:
        folder = find_checkpoint(self.run)
        state = read_state(folder)
        check_state(state, self.fingerprint, self.seed, folder)
        self.refiner.load_state_dict(state["last_weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.best = Best(**state["best"]) if state["best"] else None

    def train(self, last: int, progress: bool) -> tuple[dict[str, float], bool]:
        """Optimise until step ``last``; the last metrics, and whether a signal cut it short."""
        per_epoch = self.settings.steps_per_epoch
        every = max(1, self.settings.epochs // 8) * per_epoch
        monitor = Monitor(self.run, self.step, last, per_epoch, progress, True)
        self.network.train()
        if self.step == 0 and self.samples["validation"]:  # what it begins with may be the best there will be
            self.note_best(self.validate())
        with stop_on_signal() as stopped, monitor:
            while self.step < last and not stopped.is_set():
                self.optimize(monitor)
                done = self.step == last
                if done or self.step % 10 == 0:
                    monitor.flush(self.rate(self.step - 1))
                if done or self.step % every == 0:
                    if self.samples["validation"]:
                        found = self.validate()
                        self.note_best(found)
                        monitor.validation(self.step, found)
                    self.preview()
                    monitor.flush(self.rate(self.step - 1))
                    self.save(monitor.latest)
            if stopped.is_set():
                monitor.flush(self.rate(max(self.step - 1, 0)))
                self.save(monitor.latest)
        return monitor.latest, self.step < last

    def rate(self, step: int) -> float:
        total = self.settings.epochs * self.settings.steps_per_epoch
        return self.settings.lr * warmed(step, total, self.settings.warmup)

    def optimize(self, monitor: Monitor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.step)
        size = self.settings.batch_size
        numbers = range(self.step * size, (self.step + 1) * size)
        chosen = [self.sample(n) for n in numbers]
        batch = self.batch([self.crop(s, n) for s, n in zip(chosen, numbers, strict=True)])
        losses = self.losses(batch)
        self.fabric.backward(losses["loss"])
        self.fabric.clip_gradients(self.network, self.optimizer, max_norm=1.0, error_if_nonfinite=False)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        monitor.step(self.step, losses["loss"].detach(), [s.study.id for s in chosen], size)

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        refined, scale = self.network(batch["values"], batch["shown"], batch["spread"])
        return refining_loss(
            refined.float(), scale.float(), batch["truth"], batch["counted"], batch["inside"], self.settings.ssim
        )

    def sample(self, number: int) -> Sample:
        """Every sample once an epoch of them, in a new order each time."""
        samples = self.samples["training"]
        epoch, place = divmod(number, len(samples))
        return samples[sample_rng(self.seed, _ORDER, epoch).permutation(len(samples))[place]]

    def crop(self, sample: Sample, number: int) -> dict[str, np.ndarray]:
        """A random crop, flipped as the plan says."""
        rng, size = sample_rng(self.seed, _CROP, number), self.settings.crop
        corner = [
            int(rng.integers(-(s // 4), n - s + s // 4 + 1)) if n > s else -((s - n) // 2)
            for n, s in zip(sample.study.shape, size, strict=True)
        ]
        found = self.coarse.crop(sample, corner, size)
        axes = tuple(axis - 3 for axis in range(3) if rng.random() < self.plan.augmentation.flip[axis])
        return {k: np.flip(v, axes) if v.ndim >= 3 and axes else v for k, v in found.items()}

    def batch(self, crops: Sequence[dict[str, np.ndarray]]) -> dict[str, Tensor]:
        device = self.fabric.device
        return {k: torch.from_numpy(np.stack([c[k] for c in crops])).to(device) for k in crops[0]}

    def fixed(self) -> Iterator[dict[str, Tensor]]:
        """The centre crop of every validation sample."""
        size = self.settings.crop
        for sample in self.samples["validation"]:
            corner = [(n - s) // 2 for n, s in zip(sample.study.shape, size, strict=True)]
            yield self.batch([self.coarse.crop(sample, corner, size)])

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Means over the validation samples; ``coarse`` is the absolute error without the refiner."""
        self.network.eval()
        found: dict[str, list[float]] = {}
        for batch in self.fixed():
            losses = self.losses(batch)
            where = batch["counted"][:, :, None, None, None] & batch["inside"][:, None]
            error = (batch["values"] - batch["truth"]).abs()
            losses["coarse"] = (error * where).sum() / where.sum().clamp(min=1)
            for name, value in losses.items():
                found.setdefault(f"validation_{name}", []).append(float(value))
        self.network.train()
        return {name: float(np.mean(values)) for name, values in found.items()}

    def note_best(self, found: dict[str, float]) -> None:
        error = found["validation_l1"] + self.settings.ssim * found["validation_ssim"]
        if self.best is None or error < self.best.error:
            self.best = Best(error, self.step, found, weights_of(self.refiner))

    def keep_best(self) -> dict[str, float]:
        """The best weights become the refiner; their metrics, nothing without validation studies."""
        if self.best is None:
            return {}
        self.last_weights = weights_of(self.refiner)  # what a longer training would go on with
        self.refiner.load_state_dict(self.best.weights)
        return self.best.metrics

    @torch.no_grad()
    def preview(self) -> None:
        """``previews/step-N.png``: of one sample, what is predicted before and after, the truth, the doubt."""
        name = "validation" if self.samples["validation"] else "training"
        sample = max(self.samples[name], key=lambda s: (len(s.study.modalities) - len(s.shown), s.name))
        corner = [(n - s) // 2 for n, s in zip(sample.study.shape, self.settings.crop, strict=True)]
        batch = self.batch([self.coarse.crop(sample, corner, self.settings.crop)])
        self.network.eval()
        refined, scale = self.network(batch["values"], batch["shown"], batch["spread"])
        self.network.train()
        rows = [i for i, counted in enumerate(batch["counted"][0].tolist()) if counted]
        inside_ = batch["inside"][0].cpu().numpy()
        panels = {}
        for i in rows:
            arrays = [batch["values"][0, i], refined[0, i], batch["truth"][0, i], scale[0, i]]
            panels[self.model.modalities[i]] = [np.where(inside_, a.float().cpu().numpy(), 0) for a in arrays]
        title = f"from {', '.join(sample.shown)}"
        draw(self.run / "previews" / f"step-{self.step:07d}.png", panels, title)

    def save(
        self,
        metrics: dict[str, float],
        more: dict[str, Any] | None = None,
        familiar: dict[str, dict[str, Tensor]] | None = None,
    ) -> None:
        """The checkpoint: model, refiner, where the training stands, and ``more`` of metadata."""
        facts = {
            "modalities": list(self.model.modalities),
            "settings": self.settings.model_dump(mode="json"),
            "step": self.step,
            "best_step": self.best.step if self.best else None,
            "metrics": metrics,
            "data": {
                "fingerprint": self.fingerprint,
                **{f"{k}_studies": len({s.study.id for s in v}) for k, v in self.samples.items()},
            },
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        state = {
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "seed": self.seed,
            "fingerprint": self.fingerprint,
            "best": vars(self.best) if self.best else None,
            "last_weights": self.last_weights or weights_of(self.refiner),
        }
        before = {k: v for k, v in self.model.metadata.items() if k not in ("familiar", "calibration")}
        metadata = {**facts_of(self.plan), **before, "plan": self.plan.model_dump(mode="json")}
        metadata = {**metadata, "plan_hash": self.plan.hash(), "refiner": facts, **(more or {})}
        weights = without_repeats(self.model, self.model.state_dict())
        companions = {"refiner": self.refiner.state_dict(), **(familiar or {})}
        save_refined(self.run, weights, companions, metadata, state)

    def finish(
        self,
        training: Sequence[PreparedStudy],
        validation: Sequence[Sample],
        metrics: dict[str, float],
        precision: str,
        on_progress: Callable[[int, int, str], None] | None,
    ) -> dict[str, float] | None:
        """Calibrate on the validation samples, remember the training studies, and write both."""
        self.model.companions["refiner"] = self.refiner.eval()
        errors = Errors()
        for done, sample in enumerate(validation):
            if on_progress:
                on_progress(done, len(validation), sample.study.id)
            gather(errors, sample, self.model, self.fabric.device, precision)
        if on_progress:
            on_progress(len(validation), len(validation), "")
        trust = calibrate(errors) if errors.pairs else None
        familiar = remember(self.model, training, self.fabric.device)
        self.save(dict(metrics), {"calibration": None if trust is None else trust.to_json()}, {"familiar": familiar})
        return None if trust is None else trust.coverage


def gather(errors: Errors, sample: Sample, model: MaskedAutoencoder, device: torch.device, precision: str) -> None:
    """Doubt and error of one sample's brain voxels."""
    study = sample.study
    given = {m: study.array(m).astype(np.float32) for m in sample.shown}
    seen = inside(given, model)
    targets = [m for m in model.modalities if m in study.modalities and m not in sample.shown]
    found = predict_study(model, given, targets, foreground=seen, device=device, precision=precision, doubt=True)
    assert found.doubt is not None
    brain = brain_of(study, seen) & seen
    for m in targets:
        error = np.abs(found.arrays[m] - study.array(m).astype(np.float32))
        errors.add(study.subject, m, len(sample.shown), found.doubt[m][brain], error[brain])


def draw(path: Path, panels: dict[str, list[np.ndarray]], title: str) -> None:
    """One row a modality: before, refined, truth, expected error; middle slices across the last axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heads = ("pre-trained model", "refined", "truth", "expected error")
    figure = Figure(figsize=(2.4 * 4, 2.5 * len(panels) + 0.3), facecolor="black", layout="compressed")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 4, squeeze=False)
    for row, (name, arrays) in zip(axes, panels.items(), strict=True):
        slices = [a[:, :, a.shape[2] // 2].T for a in arrays]
        low, high = np.percentile(slices[2], (1, 99.5))
        for ax, picture, head in zip(row, slices, heads, strict=True):
            doubt = head == heads[3]
            limits = {"vmin": 0, "vmax": max(float(picture.max()), 1e-6)} if doubt else {"vmin": low, "vmax": high}
            ax.imshow(picture, cmap="magma" if doubt else "gray", origin="lower", **limits)
            ax.set_xticks([])
            ax.set_yticks([])
            if row is axes[0]:
                ax.set_title(head, color="white", fontsize=9)
        row[0].set_ylabel(name, color="white")
    figure.suptitle(title, color="white", fontsize=9)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))
