"""What the machine gives at this moment: read bandwidth and a GEMM rate.

Taken before and after every round; a round in which either moved by more than 5 % is dropped.
"""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import torch


def read_bandwidth(gigabytes: float = 1.0, repeats: int = 5) -> float:
    """GB/s of the best of `repeats` reads of a buffer far larger than any cache."""
    buffer = torch.ones(int(gigabytes * 1e9) // 4)
    return max(buffer.nbytes / seconds(buffer.sum) for _ in range(repeats)) / 1e9


def gemm_rate(size: int = 1024, repeats: int = 5) -> float:
    """GFLOP/s of the best of `repeats` products of `size`² matrices, by torch: in bf16 where the
    processor has instructions for it, in fp32 elsewhere."""
    dtype = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    a = torch.randn(2 * size, size).to(dtype)
    b = torch.randn(size, size).to(dtype)
    return max(4 * size**3 / seconds(lambda: a @ b) for _ in range(repeats)) / 1e9


def canary() -> dict[str, float]:
    return {"read_gb_s": read_bandwidth(), "gemm_gflop_s": gemm_rate()}


def moved(before: dict[str, float], after: dict[str, float], limit: float = 0.05) -> bool:
    """Did the machine's speed change by more than `limit` during the round?"""
    return any(abs(after[key] / before[key] - 1) > limit for key in before)


def describe_machine() -> dict[str, object]:
    """Processor, memory and library versions that a result is bound to."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "")
    flags = next((x.split(":", 1)[1].split() for x in lines if x.startswith("flags")), [])
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "isa": [flag for flag in wanted if flag in flags],
        "memory_gib": round(memory / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def seconds(work: object) -> float:
    start = time.perf_counter()
    work()  # type: ignore[operator]
    return time.perf_counter() - start
