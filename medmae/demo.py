"""The demonstration: everything medmae does, on a cohort made on the spot, in minutes on two CPU cores.

It calls the same public functions as everybody else; ``pipelines/demo.py`` is the same without the words.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import medmae
from medmae.files import write_atomically
from medmae.imaging.geometry import reorient
from medmae.imaging.nifti import read_image
from medmae.progress import progress_callback, stderr

PLAN, TARGET = "bm-mae-tiny", "flair"


@dataclass
class DemoResult:
    """Where the demonstration's results are, the scores' table, and the seconds each step took."""

    out: Path
    picture: Path
    reports: list[Path]
    scores: dict[str, Any]
    table: str
    seconds: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "picture": str(self.picture),
            "reports": [str(path) for path in self.reports],
            "seconds": self.seconds,
            "scores": self.scores,
        }

    def __str__(self) -> str:
        beaten = self.scores["beats_everywhere"]
        verdict = {True: "yes", False: "no", None: "not measured"}
        return "\n".join(
            [
                self.table,
                f"Better than the mean of the training subjects for every combination: {verdict[beaten['mean']]}.",
                f"Better than per-voxel linear regression for every combination: {verdict[beaten['regression']]}.",
                "",
                f"Look first at  {self.picture}",
                f"then at        {self.reports[0]}  (opens in any browser, works offline)",
                f"scores         {self.out / 'scores' / 'scores.csv'}, {self.out / 'scores' / 'plot.png'}",
                f"the model      {self.out / 'run'}  (previews/ shows it learning)",
                f"the cohort     {self.out / 'scans'}",
                f"Took {sum(self.seconds.values()) / 60:.1f} minutes.",
            ]
        )


def demo(out: str | Path = "medmae-demo", *, seed: int = 0, device: str = "auto") -> DemoResult:
    """Make a cohort, pre-train on it, synthesise FLAIR for held-out studies, score it and write reports.

    A stopped demonstration goes on where it was when it is called again. Raises :class:`MedmaeError` as the functions
    it calls do.
    """
    out, seconds = Path(out), {}
    say = stderr().print
    say(
        f"""[bold]medmae demo[/bold]: a masked autoencoder learns brain MRI and fills in a modality never acquired.
  1. make 24 + 6 studies with real anatomy (MNI152) in four contrasts, a third of the 24 lacking one: ~1 minute
  2. pre-train [cyan]{PLAN}[/cyan] on the 24: ~4 minutes
  3. synthesise FLAIR for the 6 held-out studies as if it were missing, with reports: ~1 minute
  4. score every combination of inputs beside two floors: ~2 minutes
Everything goes to [cyan]{out}[/cyan]. Stop at any time and call it again: it goes on. The same with your scans:
  medmae pretrain SCANS --plan {PLAN} -o RUN
  medmae reconstruct STUDY --checkpoint RUN -o OUT --report
""",
        soft_wrap=True,
    )

    began = time.monotonic()

    def done(step: str) -> None:
        nonlocal began
        seconds[step] = round(time.monotonic() - began, 1)
        began = time.monotonic()
        say(f"{step}: {seconds[step]:.0f} s")

    with progress_callback("making studies") as report:
        cohort = medmae.make_demo_cohort(out / "scans", seed=seed, on_progress=report)
    done("cohort")
    run = medmae.pretrain(cohort.train, PLAN, out / "run", resume=True, seed=seed, device=device).run
    done("pre-training")
    with progress_callback("synthesising") as report:
        synthesis = medmae.reconstruct(
            cohort.held_out, run, out / "synthesis", targets=[TARGET], report=True, device=device, on_progress=report
        )
    picture = draw(out / "demo.png", cohort.held_out, out / "synthesis")
    done("synthesis")
    with progress_callback("scoring") as report:
        scores = medmae.evaluate_synthesis(
            cohort.held_out, run, out / "scores", targets=[TARGET], device=device, on_progress=report
        )
    done("evaluation")
    return DemoResult(out, picture, synthesis.reports, scores.to_json(), str(scores), seconds)


def draw(path: Path, studies: Path, synthesis: Path, rows: int = 3) -> Path:
    """One row a study: what was given, what was made of it, and the truth."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folders = sorted(p for p in studies.iterdir() if p.is_dir())[:rows]
    titles = ["T1", "T1c", "T2", "FLAIR, synthesised", "FLAIR, acquired"]
    figure = Figure(figsize=(2.2 * len(titles), 2.7 * len(folders)), facecolor="black", layout="compressed")
    axes = figure.subplots(len(folders), len(titles), squeeze=False)
    for row, folder in enumerate(folders):
        files = [folder / f"{m}.nii.gz" for m in ("t1", "t1c", "t2")]
        files += [synthesis / f"{folder.name}_{TARGET}.nii.gz", folder / f"{TARGET}.nii.gz"]
        label = reorient(read_image(folder / "seg.nii.gz"), "RAS").array
        level = int(np.argmax((label > 0).sum((0, 1)))) if label.any() else label.shape[2] // 2
        for column, file in enumerate(files):
            slice_ = reorient(read_image(file), "RAS").array[:, :, level].T
            ax = axes[row, column]
            inside = slice_[slice_ > 0]
            ax.imshow(
                slice_, cmap="gray", origin="lower", vmin=0, vmax=np.percentile(inside, 99.5) if inside.size else 1
            )
            ax.axis("off")
            if row == 0:
                ax.set_title(titles[column], color="orange" if "synth" in titles[column] else "white", fontsize=10)
    FigureCanvasAgg(figure)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))
    return path
