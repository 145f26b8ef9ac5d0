"""What the machine gives at this moment: read bandwidth and a GEMM rate.

Taken before and after every round; a round in which either moved by more than 5 % is dropped. Both
are the best of torch and of `peak.c`, which reads with prefetch and multiplies in registers (in
tiles, where the processor has them); without gcc they are torch's.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

TARGETS = {
    None: ["-march=native"],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4"],
}


@cache
def peak_library(isa: str | None = None) -> ctypes.CDLL | None:
    """`peak.c` for this processor, or for a cap of its instructions; None without gcc."""
    if not shutil.which("gcc"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "peak.so"
        source = Path(__file__).with_name("peak.c")
        command = ["gcc", "-O3", *TARGETS[isa], "-shared", "-fPIC", source, "-o", target]
        subprocess.run(command, check=True)
        library = ctypes.CDLL(str(target))
    library.peak_read.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    for loop in (library.peak_fma, library.peak_tiles):
        loop.argtypes = [ctypes.c_long, ctypes.POINTER(ctypes.c_float)]
        loop.restype = ctypes.c_double
    return library


def read_bandwidth(isa: str | None = None, gigabytes: float = 1.0, repeats: int = 5) -> float:
    """GB/s of the best of `repeats` reads of a buffer far larger than any cache."""
    buffer = _huge_pages(int(gigabytes * 1e9))
    loops: list[Callable[[], object]] = [buffer.sum]
    if library := peak_library(isa):
        share = buffer.nbytes // torch.get_num_threads() // 512 * 512
        parts = [buffer.data_ptr() + i * share for i in range(torch.get_num_threads())]
        parts = [part + -part % 64 for part in parts]  # aligned; the last bytes are left out
        loops.append(lambda: _on_threads(library.peak_read, [(p, share - 512) for p in parts]))
    return max(buffer.nbytes / seconds(loop) for loop in loops for _ in range(repeats)) / 1e9


def _huge_pages(size: int) -> torch.Tensor:
    """fp32 in memory as fast as the system gives it: without a missed translation every 4 KiB."""
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.float32).fill_(1)


def gemm_rate(isa: str | None = None, size: int = 1024, repeats: int = 5) -> float:
    """GFLOP/s of the best of `repeats` products of `size`² matrices by torch (in bf16 where the
    processor has instructions for it, in fp32 elsewhere), or of the loops of `peak.c`. Torch is
    left out under a cap, which this process does not have."""
    rates, library = [], peak_library(isa)
    if library:
        rates += [_loop_rate(library.peak_fma, 5_000_000), _loop_rate(library.peak_tiles, 10**6)]
    if not library or isa is None:
        dtype = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
        a = torch.randn(2 * size, size).to(dtype)
        b = torch.randn(size, size).to(dtype)
        rates += [4 * size**3 / seconds(lambda: a @ b) for _ in range(repeats)]
    return max(rates) / 1e9


def _loop_rate(loop: Callable[..., float], rounds: int) -> float:
    """Operations a second of a loop on every thread at once, the best of three."""
    sinks = [ctypes.c_float(0.0) for _ in range(torch.get_num_threads())]
    calls = [(rounds, ctypes.byref(sink)) for sink in sinks]
    rates = []
    for _ in range(3):
        start = time.perf_counter()
        operations = sum(_on_threads(loop, calls))
        rates.append(operations / (time.perf_counter() - start))
    return max(rates)


def _on_threads(function: Callable[..., float], calls: list[tuple[object, ...]]) -> list[float]:
    """The answers of calls into C, which run side by side."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(lambda call: function(*call), calls))


def canary(isa: str | None = None) -> dict[str, float]:
    return {"read_gb_s": read_bandwidth(isa), "gemm_gflop_s": gemm_rate(isa)}


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


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
