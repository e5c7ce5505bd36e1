"""What a process has of its CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from medmae.processor import computes_in_bf16, usable_cores, usable_threads


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not tie processes to cores")
def test_cores_are_those_of_the_process() -> None:
    core = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, [{core}]); from medmae.processor import *; print(usable_threads())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "1"


@pytest.mark.parametrize(("asked", "most"), [("1", 1), ("0", None), ("2,1", None), ("100000", None), ("", None)])
def test_threads_are_no_more_than_asked_for(asked: str, most: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert usable_threads() == (most or usable_cores())


def test_bf16_is_where_the_system_names_its_instructions() -> None:
    listed = Path("/proc/cpuinfo")
    flags = listed.read_text().split() if listed.exists() else []
    if "flags" not in flags:
        pytest.skip("this system does not list an x86 processor's instructions")
    assert computes_in_bf16() == ("avx512_bf16" in flags)
