"""One contestant in a process of its own: ``python -m tests.benchmarks.worker NAME OPTIONS``.

Says ``ready`` when it is warm. For every line on stdin it does one unit of work untimed and one timed, and answers with
time and memory.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time

import torch

from tests.benchmarks.contestants import CONTESTANTS, peak_resident


def main(name: str, options: str) -> None:
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # libraries print
        contestant = CONTESTANTS[name](json.loads(options))
        for _ in range(2):
            contestant.work()
        on_gpu = contestant.device.type == "cuda"
        wait = torch.cuda.synchronize if on_gpu else lambda: None
        wait()
        print("ready", file=answers, flush=True)
        for _ in sys.stdin:
            contestant.work()  # untimed: a process that waited for its turn has lost caches and pages
            wait()
            begun = time.perf_counter()
            contestant.work()
            wait()
            seconds = (time.perf_counter() - begun) / contestant.units
            peak = torch.cuda.max_memory_allocated() if on_gpu else peak_resident()
            libraries = 0 if on_gpu else contestant.libraries
            told = {"seconds": seconds, "peak": peak, "libraries": libraries}
            print(json.dumps(told), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
