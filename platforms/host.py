"""Facts about the host, read from /proc and /sys; nothing here starts a thread or a device."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import psutil

_CPU = Path("/sys/devices/system/cpu")
_ISA = (("amx_bf16", "amx"), ("avx512f", "avx512"), ("avx2", "avx2"))


def cpu_flags() -> frozenset[str]:
    """The feature flags of the first core (`avx2`, `avx512_bf16`, `amx_bf16`…)."""
    for line in _cpuinfo():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def cpu_name() -> str:
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown processor"


def isa(flags: frozenset[str]) -> str:
    """The widest instruction set the kernels tell apart."""
    return next((name for flag, name in _ISA if flag in flags), "baseline")


def physical_cores() -> int:
    """Physical cores this process may use: its affinity, without hyper-threads, within its
    control group's quota. Two hyper-threads share the units a matrix product is bound by."""
    logical = os.sched_getaffinity(0)
    cores = {_core_id(cpu) for cpu in logical}
    return max(1, min(len(cores), _quota() or len(cores)))


def available_memory() -> int:
    """Bytes that can be allocated without swapping, within the control group's limit."""
    available = int(psutil.virtual_memory().available)
    limit, used = _cgroup_number("memory.max"), _cgroup_number("memory.current")
    return available if limit is None or used is None else max(0, min(available, limit - used))


def trim_heap() -> None:
    """Give back to the system what the C library keeps of memory that was freed: after a load
    with its copies, hundreds of megabytes. Nothing where that library has no such call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def total_memory() -> int:
    total = int(psutil.virtual_memory().total)
    return min(total, _cgroup_number("memory.max") or total)


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def _core_id(cpu: int) -> tuple[str, str]:
    topology = _CPU / f"cpu{cpu}" / "topology"
    try:
        package = (topology / "physical_package_id").read_text().strip()
        return package, (topology / "core_id").read_text().strip()
    except OSError:
        return "", str(cpu)


def _quota() -> int | None:
    """Whole cores of the control group's CPU quota; None: no quota."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return None


def _cgroup_number(name: str) -> int | None:
    try:
        return int(Path("/sys/fs/cgroup", name).read_text())
    except (OSError, ValueError):  # no control group, or "max"
        return None
