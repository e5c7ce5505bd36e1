"""``medmae benchmark``: its figures are what they say, and what cannot be measured is said without a traceback."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import medmae
from medmae.benchmark import BenchmarkResult, benchmark
from medmae.cli import app
from medmae.errors import InputError, MedmaeError
from medmae.measures import (
    machine,
    made_up_study,
    matmul_peak,
    median_seconds,
    memory_of_process,
    peak_resident,
    step_flops,
    tell_memory,
    usual_shape,
)
from medmae.plan import Plan

PLAN: dict[str, Any] = {
    "name": "small",
    "method": "bm-mae",
    "modalities": ["t1", "t1c", "t2", "flair"],
    "image": {"crop": [16, 16, 16], "spacing": [2, 2, 2]},
    "model": {
        "patch": [4, 4, 4],
        "width": 24,
        "depth": 2,
        "heads": 2,
        "mlp_width": 48,
        "decoder_width": 12,
        "decoder_depth": 2,
        "decoder_heads": 2,
        "decoder_mlp_width": 36,
    },
    "training": {"batch_size": 3, "precision": "32"},
    "reconstruction": {"shifts": 1},
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def result() -> BenchmarkResult:
    return benchmark(Plan.load(PLAN), device="cpu", batch_size=2, seconds=0.05)


def test_every_part_is_measured(result: BenchmarkResult) -> None:
    assert (result.device, result.precision, result.batch_size) == ("cpu", "32", 2)
    assert set(result.peak_flops) == {"32", "bf16"}
    assert set(result.loader) == set(result.loop) == {"store"}
    assert result.study_shape == (30, 30, 19)
    measured = [*result.peak_flops.values(), result.step_seconds, *result.loader.values(), *result.loop.values()]
    assert min(measured) > 0
    assert result.reconstruction_seconds is not None and result.reconstruction_seconds > 0
    assert result.refined_seconds is not None and result.refined_seconds > 0


def test_rates_follow_from_each_other(result: BenchmarkResult) -> None:
    told = json.loads(json.dumps(result.to_json()))
    assert told["samples_per_second"] == pytest.approx(2 / told["step_seconds"])
    assert told["achieved_flops"] == pytest.approx(told["step_flops"] * told["samples_per_second"])
    assert told["share"] == pytest.approx(told["achieved_flops"] / told["peak_flops"]["32"])
    assert 0 < told["share"] < 1
    assert told["loop_share"]["store"] == pytest.approx(
        told["loop"]["store"] * told["step_flops"] / told["peak_flops"]["32"]
    )


def test_the_table_names_every_part_and_unit(result: BenchmarkResult) -> None:
    text = str(result)
    for part in ("matrix multiply", "training step", "memory", "loader, store", "training, store", "reconstruction"):
        assert part in text
    assert "FLOP/s" in text and "samples/s" in text and "30 × 30 × 19" in text


def test_work_of_a_step_is_that_of_the_formulas() -> None:
    """Each linear layer and attention by hand: 2·m·n·k a product; backward twice the forward, but no gradient for
    the input images."""
    places, seen, voxels, width, decoder = 4 * 4**3, 4**3, 4**3, 24, 12

    def block(length: int, queries: int, width: int, mlp: int) -> float:
        projections = 2 * width * width * (queries + 2 * length + queries)  # q, k and v, output
        return projections + 2 * 2 * queries * length * width + 2 * 2 * queries * width * mlp

    tokenizer = 2 * seen * voxels * width
    hidden = places - seen
    forward = 2 * block(1 + seen, 1 + seen, width, 48) + 2 * (1 + seen) * width * decoder
    forward += block(1 + places, 1 + places, decoder, 36) + block(1 + places, hidden, decoder, 36)
    forward += 2 * hidden * decoder * voxels
    assert step_flops(Plan.load(PLAN)) == pytest.approx(3 * forward + 2 * tokenizer)


def test_base_plan_needs_a_third_of_a_teraflop() -> None:
    assert step_flops(Plan.load("bm-mae-base")) == pytest.approx(0.34e12, rel=0.03)


def test_median_is_of_calls_after_warming_up() -> None:
    calls: list[float] = []

    def slow_at_first() -> None:
        calls.append(0)
        time.sleep(0.2 if len(calls) <= 3 else 0.01)

    assert 0.01 <= median_seconds(slow_at_first, CPU, 0.05) < 0.1
    assert len(calls) >= 3 + 3


def test_matmul_peak_is_not_beaten_by_a_matmul() -> None:
    """A rate that is off by a factor (of 2 for the additions, of 1000 for a unit) would be noticed."""
    a = torch.randn(1024, 1024)
    begun = time.perf_counter()
    for _ in range(5):
        a @ a
    rate = 5 * 2 * 1024**3 / (time.perf_counter() - begun)
    assert 0.7 * rate < matmul_peak(CPU, torch.float32) < 50 * rate


def test_memory_is_that_of_the_training_alone() -> None:
    """What this process holds does not count; the parameters, gradients and moments do."""
    ballast = np.ones(1_500_000_000 // 8)
    plan = Plan.load(
        {**PLAN, "model": {**PLAN["model"], "width": 768, "heads": 12, "mlp_width": 1536}},
        ["training.batch_size=1"],
    )
    peak, before = memory_of_process(plan)
    parameters = sum(p.numel() for p in medmae.create(plan).parameters())
    own = peak_resident()
    assert own is not None and own > ballast.nbytes
    assert peak is not None and before is not None
    assert 4 * 4 * parameters < peak - before < 4 * 4 * parameters + 5e8
    assert peak < 1.5e9 + before


def test_usual_study_is_a_brats_volume_for_the_papers_crop() -> None:
    assert usual_shape(Plan.load("bm-mae-base")) == (240, 240, 155)
    study = made_up_study(Plan.load(PLAN), (30, 30, 19), 0)
    assert list(study) == PLAN["modalities"]
    first = next(iter(study.values()))
    assert first.orientation == "LPS" and tuple(first.spacing) == (2, 2, 2)
    assert all(np.array_equal(v.array == 0, first.array == 0) for v in study.values())
    assert 0.15 < (first.array > 0).mean() < 0.3


@pytest.mark.parametrize(
    "options",
    [
        {"device": "tpu"},
        {"precision": "16"},
        {"batch_size": 0},
        {"seconds": 0},
        {"study_shape": (100, 100)},
        {"study_shape": (100, 100, 2)},
    ],
)
def test_impossible_settings_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        benchmark(Plan.load(PLAN), **{"device": "cpu", **options})


def test_command_prints_json_and_no_traceback(monkeypatch: pytest.MonkeyPatch, result: BenchmarkResult) -> None:
    monkeypatch.setitem(vars(medmae), "benchmark", lambda *_, **__: result)
    shown = CliRunner().invoke(app, ["benchmark", "--plan", "bm-mae-base", "--json"])
    assert shown.exit_code == 0
    assert json.loads(shown.stdout)["step_flops"] == result.step_flops
    monkeypatch.delitem(vars(medmae), "benchmark")
    for arguments in (["--plan", "bm-mae-bas"], ["--plan", "bm-mae-base", "--set", "training.lrr=1"]):
        shown = CliRunner().invoke(app, ["benchmark", *arguments])
        assert shown.exit_code == 2 and "Traceback" not in shown.output and "Did you mean" in shown.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_said() -> None:
    with pytest.raises(MedmaeError, match="no CUDA device"):
        benchmark(Plan.load(PLAN), device="cuda")


@pytest.mark.parametrize(("precision", "expected"), [("bf16", "bf16-mixed"), ("32", "32-true")])
def test_memory_is_measured_in_the_precision_it_is_labelled_with(
    precision: str, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where training itself would turn bf16 into fp32, because the processor only imitates it."""
    monkeypatch.setattr("medmae.training.pretrain.computes_in_bf16", lambda: False)
    monkeypatch.setattr("sys.stdin", io.StringIO(Plan.load(PLAN, [f"training.precision={precision}"]).to_json()))
    used = []
    monkeypatch.setattr("medmae.measures.training_step", lambda _, fabric: lambda: used.append(fabric))
    tell_memory()
    assert used and {fabric._precision.precision for fabric in used} == {expected}
    peak, before = json.loads(capsys.readouterr().out)
    assert peak >= before > 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="address space limits are Linux's")
def test_too_little_memory_is_told_with_a_remedy() -> None:
    code = (
        "import resource, medmae.measures as m, medmae\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (3 * 10**9, 3 * 10**9))\n"
        f"plan = medmae.Plan.load({PLAN!r}, ['image.crop=[512, 512, 512]'])\n"
        "try:\n    m.memory_of_process(plan)\nexcept MemoryError:\n    print('told')\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.strip() == "told", ran.stderr


def test_machine_is_described_without_its_name() -> None:
    import socket

    told = machine(CPU)
    assert told["torch"].endswith(torch.__version__) and "threads" in told["processor"]
    assert socket.gethostname() not in " ".join(told.values())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_memory_is_the_devices_and_crops_come_from_it_too() -> None:
    result = benchmark(Plan.load(PLAN), device="cuda", seconds=0.2)
    assert result.batch_size == 3 and result.memory_before is None
    assert result.memory is not None and result.memory > 0
    assert set(result.loader) == set(result.loop) == {"store", "device memory"}
    assert "device memory" in str(result)
