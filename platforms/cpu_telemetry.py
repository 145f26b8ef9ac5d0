"""The host's state as a device's: from /proc, and its power where RAPL's counters are readable."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from . import host
from .interface import Telemetry


class _Counters(NamedTuple):
    """What only grows; shares and watts are differences of two readings. Seconds; clock ticks of
    all CPUs, idle and in all; microjoules of each package by its folder."""

    at: float
    idle: int
    ticks: int
    energy: dict[Path, int]


class HostTelemetry:
    """Utilization and power are means since the last reading, the first since this was made."""

    def __init__(self) -> None:
        self._last = _counters()

    def read(self) -> Telemetry:
        last, self._last = self._last, _counters()
        ticks = self._last.ticks - last.ticks
        return Telemetry(
            power=_watts(last, self._last),
            utilization=1 - (self._last.idle - last.idle) / ticks if ticks > 0 else None,
            memory_used=host.total_memory() - host.available_memory(),
            clock=_megahertz(),
        )


def _counters() -> _Counters:
    idle, ticks = _ticks()
    return _Counters(time.monotonic(), idle, ticks, _energy())


def _ticks() -> tuple[int, int]:
    """Waiting for a disk is idle (proc(5): user nice system idle iowait irq softirq steal)."""
    try:
        with open(host.ROOT / "proc/stat") as file:
            counts = [int(one) for one in file.readline().split()[1:9]]
        return counts[3] + counts[4], sum(counts)
    except (OSError, ValueError, IndexError):
        return 0, 0


def _energy() -> dict[Path, int]:
    """Of whole packages; the domains inside them are part of that (Linux's powercap framework)."""
    found = {}
    for zone in (host.ROOT / "sys/class/powercap").glob("intel-rapl:*"):
        try:
            if (zone / "name").read_text().startswith("package"):
                found[zone] = int((zone / "energy_uj").read_text())
        except (OSError, ValueError):  # readable by root alone, in most systems
            continue
    return found


def _watts(last: _Counters, now: _Counters) -> float | None:
    seconds = now.at - last.at
    if not now.energy or now.energy.keys() != last.energy.keys() or seconds <= 0:
        return None
    used = 0
    for zone, energy in now.energy.items():
        used += energy - last.energy[zone]
        if energy < last.energy[zone]:  # the counter began again
            used += int((zone / "max_energy_range_uj").read_text())
    return used / 1e6 / seconds


def _megahertz() -> float | None:
    """The mean of all CPUs."""
    folders = (host.ROOT / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq")
    try:
        kilohertz = [int((folder / "scaling_cur_freq").read_text()) for folder in folders]
    except (OSError, ValueError):
        kilohertz = []
    if kilohertz:
        return fmean(kilohertz) / 1000
    lines = (line.partition(":") for line in host.cpuinfo() if line.startswith("cpu MHz"))
    found = [float(value) for _, _, value in lines]
    return fmean(found) if found else None
