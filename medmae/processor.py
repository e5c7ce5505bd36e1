"""What this process has of a CPU: cores it may use, and whether they compute in bf16."""

from __future__ import annotations

import os
import platform


def usable_cores() -> int:
    """Cores of this process, which on a cluster or in a container are fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_threads() -> int:
    """Threads for arithmetic: one a core, or fewer where ``OMP_NUM_THREADS`` says so."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(usable_cores(), int(asked)) if asked.isdigit() and int(asked) else usable_cores()


def computes_in_bf16() -> bool:
    """Whether this CPU has instructions for bf16 (AVX-512 BF16, AMX, or Arm's); where it has none, bf16 is imitated and
    up to thirty times slower than fp32."""
    import torch

    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
