"""medmae beside plain implementations of the same mathematics, in one run: ``python tests/benchmarks/run.py``.

Contestants live in processes of their own and take turns (A B C A B C ...), so that whatever else the machine does
falls on all of them; the ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # `python tests/benchmarks/run.py` from anywhere

from tests.benchmarks.contestants import PLAN, difference_of_crops, difference_of_losses, write_material  # noqa: E402


@dataclass(frozen=True)
class Row:
    """One figure. ``value`` of medmae, ``baseline`` of what it is compared with, ``ratio`` of the two with the lowest
    and highest of the rounds; it should be on the side of ``target`` that ``wanted`` ("<=" or ">=") says. Without a
    baseline the target is for the value."""

    what: str
    unit: str
    value: float
    baseline: float | None = None
    ratio: float | None = None
    lowest: float | None = None
    highest: float | None = None
    wanted: str | None = None
    target: float | None = None

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        judged = self.value if self.ratio is None else self.ratio
        return judged <= self.target if self.wanted == "<=" else judged >= self.target

    def cells(self) -> list[str]:
        spread = "" if self.lowest == self.highest else f" ({self.lowest:.3g} to {self.highest:.3g})"
        return [
            self.what,
            f"{self.value:.3g} {self.unit}".strip(),
            "" if self.baseline is None else f"{self.baseline:.3g} {self.unit}".strip(),
            "" if self.ratio is None else f"{self.ratio:.3g}{spread}",
            "" if self.target is None else f"{self.wanted} {self.target:g}: {'met' if self.met else 'missed'}",
        ]


HEAD = ("what", "medmae", "plain", "ratio (rounds)", "target")


class Worker:
    """A contestant's process."""

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.worker", name, json.dumps(options)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.answer("ready")

    def answer(self, expected: str | None = None) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line or (expected and line != expected):
            raise SystemExit(f"{self.name} ended with {self.process.wait()}; what it said is above")
        return None if expected else json.loads(line)

    def work(self) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        measured: dict[str, float] = self.answer()
        return measured

    def close(self) -> None:
        self.process.communicate()


def take_turns(contestants: dict[str, tuple[str, dict[str, Any]]], rounds: int) -> dict[str, list[dict[str, float]]]:
    """{label: what each round measured}, every contestant once a round."""
    with ExitStack() as stack:
        workers = {}
        for label, (name, options) in contestants.items():
            say(f"starting {label}")
            workers[label] = Worker(name, options)
            stack.callback(workers[label].close)
        measured: dict[str, list[dict[str, float]]] = {label: [] for label in workers}
        for number in range(rounds):
            for label, worker in workers.items():
                time.sleep(0.3)  # the threads of the one before have gone to sleep
                measured[label].append(worker.work())
            last = ", ".join(f"{label} {m[-1]['seconds']:.3g} s" for label, m in measured.items())
            say(f"round {number + 1} of {rounds}: {last}")
    return measured


def compared(
    what: str, unit: str, ours: Sequence[float], plain: Sequence[float], wanted: str | None, target: float | None
) -> Row:
    ratios = [a / b for a, b in zip(ours, plain, strict=True)]
    medians = statistics.median(ours), statistics.median(plain), statistics.median(ratios)
    return Row(what, unit, *medians, min(ratios), max(ratios), wanted, target)


def training(args: argparse.Namespace, folder: Path) -> list[Row]:
    """Steps of the base plan: time and peak memory; the loss is the same."""
    say("comparing losses")
    apart = difference_of_losses(folder)
    rows = [
        Row("loss, relative difference", "", apart["loss"], wanted="<=", target=1e-5),
        Row("gradient, relative difference", "", apart["gradient"], wanted="<=", target=1e-4),
    ]
    on_gpu = args.device == "cuda"
    options = {"device": args.device, "batch": args.batch or (6 if on_gpu else 1), "overrides": args.set}
    measured = take_turns(
        {
            "plain": ("step_of_plain", options),
            "fp32": ("step_of_ours", {**options, "precision": "32"}),
            "bf16": ("step_of_ours", {**options, "precision": "bf16"}),
        },
        args.rounds,
    )
    seconds = {label: [m["seconds"] for m in rounds] for label, rounds in measured.items()}
    for label, most in (("fp32", 0.30), ("bf16", 0.17)):
        if on_gpu:
            rates = {k: [1 / s for s in v] for k, v in seconds.items()}
            least = 8.0 if label == "bf16" else None
            rows.append(compared(f"training, {label}", "samples/s", rates[label], rates["plain"], ">=", least))
        else:
            rows.append(compared(f"training, {label}", "s/sample", seconds[label], seconds["plain"], "<=", most))
    return rows + memory(measured, None if on_gpu else 0.45)


def memory(measured: dict[str, list[dict[str, float]]], most: float | None) -> list[Row]:
    """Peaks of the processes (of the device, on a GPU), and what of them is not the libraries."""
    last = {label: rounds[-1] for label, rounds in measured.items()}
    if any(m["peak"] is None for m in last.values()):
        return []  # this system does not tell
    rows = []
    for label in ("fp32", "bf16"):
        whole, beyond = ({k: [(m["peak"] - less * m["libraries"]) / 1e9] for k, m in last.items()} for less in (0, 1))
        rows.append(compared(f"peak memory, {label}", "GB", whole[label], whole["plain"], "<=", most))
        if most is not None:
            what = f"peak memory beyond the libraries, {label}"
            rows.append(compared(what, "GB", beyond[label], beyond["plain"], None, None))
    return rows


def loader(args: argparse.Namespace, folder: Path) -> list[Row]:
    """Crops of 4 x 128^3: the prepared store against NIfTI files."""
    say("writing and preparing made-up studies")
    write_material(folder)
    rows = [Row("crops, largest difference", "SD", difference_of_crops(folder), wanted="<=", target=0.01)]
    options = {"folder": str(folder)}
    measured = take_turns(
        {"MONAI": ("loader_of_monai", options), "store": ("loader_of_ours", options)}, max(3, args.rounds // 2)
    )
    rates = {label: [1 / m["seconds"] for m in rounds] for label, rounds in measured.items()}
    return [*rows, compared("loader", "samples/s", rates["store"], rates["MONAI"], ">=", 20)]


def methods(args: argparse.Namespace, folder: Path) -> list[Row]:
    """Forward and backward of the other methods: Hi-End-MAE beside timm's blocks, ResEnc and SparK beside the bare
    network."""
    on_gpu = args.device == "cuda"
    rows = []
    for plan, plain, batch, wanted in (
        ("hi-end-mae-base", "method_of_timm", 4, {"32": (1.0, None), "bf16": (0.5, None)}),
        ("resenc-mae-tiny", "bare_network", 4, {"32": (1.05, None)}),
        ("spark-tiny", "bare_network", 4, {"32": (1.5, 1.3)}),
        *([("resenc-mae-l", "bare_network", 2, {"bf16": (1.1, None)})] if on_gpu else []),
    ):
        options = {"plan": plan, "device": args.device, "batch": args.batch or batch}
        own = "32" if plain == "method_of_timm" else next(iter(wanted))
        contestants = {"plain": (plain, {**options, "precision": own})}
        contestants |= {p: ("method_of_ours", {**options, "precision": p}) for p in wanted}
        measured = take_turns(contestants, args.rounds)
        for precision, (time_most, memory_most) in wanted.items():
            label = f"{plan}, {'bf16' if precision == 'bf16' else 'fp32'}"
            ours, theirs = ([m["seconds"] for m in measured[k]] for k in (precision, "plain"))
            rows.append(compared(label, "s/sample", ours, theirs, "<=", time_most))
            peaks = [measured[k][-1]["peak"] for k in (precision, "plain")]
            if None not in peaks:
                gigabytes = [[p / 1e9] for p in peaks]
                rows.append(compared(f"{label}, peak memory", "GB", *gigabytes, "<=", memory_most))
    return rows


def start(args: argparse.Namespace, folder: Path) -> list[Row]:
    """How long a user waits before anything happens."""
    rows = []
    program = Path(sys.executable).with_name("medmae")
    help_command = [str(program)] if program.exists() else [sys.executable, "-m", "medmae.cli"]
    for what, command, most in (
        ("import medmae", [sys.executable, "-c", "import medmae"], 2.0),
        ("medmae --help", [*help_command, "--help"], 1.0),
    ):
        times = []
        for _ in range(5):
            begun = time.perf_counter()
            subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
            times.append(time.perf_counter() - begun)
        rows.append(Row(what, "s", statistics.median(times), wanted="<=", target=most))
    return rows


def parts(args: argparse.Namespace, folder: Path) -> list[Row]:
    """``medmae benchmark`` of the base plan in both precisions; on a GPU 40 % of its peak is asked for."""
    import medmae

    rows = []
    on_gpu = args.device == "cuda"
    for precision, label in (("32", "fp32"), ("bf16", "bf16")):
        say(f"medmae benchmark --plan {PLAN}, {label}")
        plan = medmae.Plan.load(PLAN, args.set)
        found = medmae.benchmark(plan, device=args.device, precision=precision, batch_size=args.batch)
        rows += [
            Row(f"{label}: matrix multiply", "GFLOP/s", found.peak_flops[precision] / 1e9),
            Row(f"{label}: training step", "samples/s", found.samples_per_second),
            Row(f"{label}: training step, share of matrix multiply", "", found.share),
        ]
        if found.memory is not None:
            rows.append(Row(f"{label}: peak memory", "GB", found.memory / 1e9))
        if found.memory is not None and found.memory_before is not None:
            beyond = (found.memory - found.memory_before) / 1e9
            rows.append(Row(f"{label}: peak memory beyond the libraries", "GB", beyond))
        rows += [Row(f"{label}: loader, {name}", "samples/s", rate) for name, rate in found.loader.items()]
        rows += [Row(f"{label}: training from {name}", "samples/s", rate) for name, rate in found.loop.items()]
        for name, share in found.loop_share.items():
            asked = on_gpu and precision == "bf16" and name == "device memory"
            what = f"{label}: training from {name}, share of matrix multiply"
            rows.append(Row(what, "", share, wanted=">=", target=0.4 if asked else None))
        if found.reconstruction_seconds is not None:
            shape = " x ".join(map(str, found.study_shape))
            rows.append(Row(f"{label}: whole-volume synthesis, {shape}", "s", found.reconstruction_seconds))
            rows.append(Row(f"{label}: the same, refined and with its uncertainty", "s", found.refined_seconds))
    return rows


SECTIONS: dict[str, Callable[[argparse.Namespace, Path], list[Row]]] = {
    f.__name__: f for f in (training, methods, loader, start, parts)
}


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="measure these only")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of the comparison (default: 9)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, help="studies a step (default: 1 on a CPU, 6 on a GPU)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change medmae's plan")
    parser.add_argument("--markdown", action="store_true", help="print a table for docs/benchmarks.md")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything here")
    return parser.parse_args(arguments)


def measure(args: argparse.Namespace) -> list[Row]:
    """The rows of the sections asked for."""
    rows = []
    for name in args.only:
        say(f"--- {name}")
        with TemporaryDirectory(prefix="medmae-benchmark-") as folder:
            rows += SECTIONS[name](args, Path(folder))
    return rows


def conditions(device: str) -> dict[str, str]:
    """When, on what and with what the figures were measured."""
    import monai
    import torch

    from medmae.measures import machine

    described = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    commit = subprocess.run(described, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    told = machine(torch.device(device))
    return {"date": time.strftime("%Y-%m-%d"), **told, "monai": f"MONAI {monai.__version__}", "commit": commit or "?"}


def table(rows: Sequence[Row], told: dict[str, str], markdown: bool) -> str:
    body = [list(HEAD), *(row.cells() for row in rows)]
    facts = f"{told['date']}; " + "; ".join(v for k, v in told.items() if k not in ("date", "commit"))
    facts += f"; commit {told['commit']}."
    if markdown:
        lines = [f"| {' | '.join(cells)} |" for cells in body]
        return "\n".join([facts, "", lines[0], "|" + "---|" * len(HEAD), *lines[1:]])
    widths = [max(len(cells[i]) for cells in body) for i in range(len(HEAD))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) for cells in body]
    return "\n".join([facts, "", *(line.rstrip() for line in lines)])


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    args = parsed()
    rows, told = measure(args), conditions(args.device)
    print(table(rows, told, args.markdown))
    if args.json:
        found = {"conditions": told, "rows": [{**asdict(row), "met": row.met} for row in rows]}
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return int(any(row.met is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
