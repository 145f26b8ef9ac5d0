"""The host's state, read from files that stand for /proc and /sys."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimaran.platforms import cpu_telemetry, host
from trimaran.platforms.cpu import CpuPlatform
from trimaran.platforms.cpu_telemetry import HostTelemetry


class Machine:
    def __init__(self, root: Path) -> None:
        self.root, self.now = root, 100.0

    def write(self, name: str, text: object) -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(f"{text}\n")

    def rapl(self, zone: str, name: str, microjoules: int) -> None:
        self.write(f"sys/class/powercap/{zone}/name", name)
        self.write(f"sys/class/powercap/{zone}/energy_uj", microjoules)
        self.write(f"sys/class/powercap/{zone}/max_energy_range_uj", 1_000_000_000)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path)
    monkeypatch.setattr(host, "ROOT", tmp_path)
    monkeypatch.setattr(cpu_telemetry.time, "monotonic", lambda: made.now)
    return made


def test_utilization_is_that_since_the_last_reading(machine: Machine) -> None:
    machine.write("proc/stat", "cpu  100 0 100 700 100 0 0 0 50 0\ncpu0 1 1")
    telemetry = HostTelemetry()
    machine.write("proc/stat", "cpu  160 10 130 790 110 0 0 0 90 0\ncpu0 1 1")
    assert telemetry.read().utilization == pytest.approx(0.5)
    assert telemetry.read().utilization is None  # no time has passed


def test_watts_are_those_of_all_packages(machine: Machine) -> None:
    machine.rapl("intel-rapl:0", "package-0", 5_000_000)
    machine.rapl("intel-rapl:0:0", "core", 1_000_000)
    machine.rapl("intel-rapl:1", "package-1", 990_000_000)
    machine.rapl("intel-rapl:2", "psys", 1_000_000)
    telemetry = HostTelemetry()
    assert telemetry.read().power is None
    machine.now += 2
    machine.rapl("intel-rapl:0", "package-0", 105_000_000)
    machine.rapl("intel-rapl:0:0", "core", 91_000_000)
    machine.rapl("intel-rapl:1", "package-1", 40_000_000)  # it began again
    machine.rapl("intel-rapl:2", "psys", 901_000_000)
    assert telemetry.read().power == pytest.approx((100 + 50) / 2)


def test_the_clock_is_the_mean_of_all(machine: Machine) -> None:
    machine.write("proc/cpuinfo", "cpu MHz\t\t: 1000.0\nflags : a\ncpu MHz\t\t: 3000.5")
    assert HostTelemetry().read().clock == pytest.approx(2000.25)
    for cpu, kilohertz in enumerate((2_400_000, 3_600_000)):
        machine.write(f"sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_cur_freq", kilohertz)
    assert HostTelemetry().read().clock == pytest.approx(3000)


def test_what_cannot_be_read_is_none(machine: Machine) -> None:
    machine.write("sys/class/powercap/intel-rapl:0/name", "package-0")  # and no counter
    found = HostTelemetry().read()
    assert (found.power, found.utilization, found.clock) == (None, None, None)


def test_the_device_tells_of_this_host() -> None:
    device = CpuPlatform().open(num_threads=1)
    found = device.telemetry()
    device.close()
    assert found.memory_used is not None and 0 < found.memory_used < host.total_memory()
    assert found.utilization is None or 0 <= found.utilization <= 1
