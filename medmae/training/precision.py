"""Whether a processor computes in bf16 or only imitates it, which is up to thirty times slower than fp32."""

from __future__ import annotations

import platform

import torch


def computes_in_bf16() -> bool:
    """Whether this CPU has instructions for bf16 (AVX-512 BF16, AMX, or Arm's)."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
