"""Facts about the host, read from /proc and /sys; nothing here starts a thread or a device."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

ROOT = Path("/")
"""Where /proc and /sys lie."""
_ISA = (("amx_bf16", "amx"), ("avx512f", "avx512"), ("avx2", "avx2"))


def cpu_flags() -> frozenset[str]:
    """The feature flags of the first core (`avx2`, `avx512_bf16`, `amx_bf16`…)."""
    for line in cpuinfo():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def cpu_name() -> str:
    for line in cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown processor"


def isa(flags: frozenset[str]) -> str:
    """The widest instruction set the kernels tell apart."""
    return next((name for flag, name in _ISA if flag in flags), "baseline")


class Core(NamedTuple):
    """A physical core: its NUMA node, and its logical CPUs that this process may use."""

    node: int
    cpus: tuple[int, ...]


def allowed_cpus() -> frozenset[int]:
    """The logical CPUs that the calling thread may run on: its affinity, within the cpuset."""
    return frozenset(os.sched_getaffinity(0))


def topology(cpus: Iterable[int]) -> tuple[Core, ...]:
    """The physical cores of `cpus` by node, then by number. Raises OSError where the system does
    not say which CPUs share one."""
    nodes = _nodes()
    cores: dict[tuple[int, tuple[str, str]], list[int]] = {}
    for cpu in sorted(cpus):
        cores.setdefault((nodes.get(cpu, 0), _read_core(cpu)), []).append(cpu)
    return tuple(sorted(Core(node, tuple(cpus)) for (node, _), cpus in cores.items()))


def physical_cores() -> int:
    """Physical cores this process may use: its affinity, without hyper-threads, within its
    control group's quota. Two hyper-threads share the units a matrix product is bound by."""
    cpus = allowed_cpus()
    try:
        cores = len(topology(cpus))
    except OSError:
        cores = len(cpus)
    return max(1, min(cores, quota() or cores))


def quota() -> int | None:
    """Whole cores of the least CPU quota of the control group and those it is in; None: none."""
    found = [one for one in map(_quota_of, _control_groups()) if one is not None]
    return min(found, default=None)


def parse_cpus(text: str) -> list[int]:
    """CPUs of a list in the kernel's format (`0-3,8`), in its order. Raises ValueError."""
    cpus: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, dash, last = part.partition("-")
        cpus.extend(range(int(first), int(last if dash else first) + 1))
    return cpus


def format_cpus(cpus: Iterable[int]) -> str:
    """The list in the kernel's format: `0-3,8`."""
    spans: list[list[int]] = []
    for cpu in sorted(cpus):
        if spans and spans[-1][-1] == cpu - 1:
            spans[-1].append(cpu)
        else:
            spans.append([cpu])
    return ",".join(f"{one[0]}-{one[-1]}" if len(one) > 1 else str(one[0]) for one in spans)


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


def cpuinfo() -> list[str]:
    """Lines of /proc/cpuinfo."""
    try:
        return (ROOT / "proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def _read_core(cpu: int) -> tuple[str, str]:
    """The package, and the core in it."""
    folder = ROOT / f"sys/devices/system/cpu/cpu{cpu}/topology"
    package = (folder / "physical_package_id").read_text().strip()
    # Cores of one package may have the same number on different dies.
    siblings = folder / "thread_siblings_list"
    core = siblings if siblings.exists() else folder / "core_id"
    return package, core.read_text().strip()


def _nodes() -> dict[int, int]:
    """CPU → NUMA node; empty where the kernel knows none."""
    folders = (ROOT / "sys/devices/system/node").glob("node[0-9]*")
    return {
        cpu: int(folder.name.removeprefix("node"))
        for folder in folders
        for cpu in parse_cpus((folder / "cpulist").read_text())
    }


def _control_groups() -> Iterator[Path]:
    """The folders of this process's control group and of those it is in, as far as they are to be
    seen: a container has a view of its own, in which it may be the root."""
    mounted = ROOT / "sys/fs/cgroup"
    try:
        lines = (ROOT / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for number, controllers, path in (line.split(":", 2) for line in lines):
        if number == "0" or "cpu" in controllers.split(","):
            top = mounted if number == "0" else mounted / "cpu"
            inside = Path(path.lstrip("/"))
            yield from (top / one for one in (inside, *inside.parents) if (top / one).is_dir())


def _quota_of(group: Path) -> int | None:
    """Whole cores of one control group's quota, of version 2 or 1; None: no quota."""
    try:
        if (group / "cpu.max").exists():
            limit, period = (group / "cpu.max").read_text().split()
        else:
            limit = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        return max(1, int(limit) // int(period)) if int(limit) > 0 else None
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _cgroup_number(name: str) -> int | None:
    try:
        return int((ROOT / "sys/fs/cgroup" / name).read_text())
    except (OSError, ValueError):  # no control group, or "max"
        return None
