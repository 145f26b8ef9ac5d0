"""The host as the cpu platform's device: its threads on CPUs of their own, its telemetry."""

from __future__ import annotations

from collections.abc import Callable

from .cpu_telemetry import HostTelemetry
from .cpu_threads import Binding, BoundThreads
from .host_device import HostDevice
from .interface import Event, Telemetry


class CpuDevice(HostDevice):
    def __init__(self, index: int = 0) -> None:
        super().__init__(index)
        self._threads = BoundThreads(Binding("not bound"))
        self._telemetry = HostTelemetry()

    def bind(self, binding: Binding) -> None:
        """Hold the compute threads to their CPUs until `close`. Called by the thread that loads
        the weights."""
        self._threads.release()
        self._threads = BoundThreads(binding)

    def launch(self, work: Callable[[], None]) -> Event:
        with self._threads.computing():
            return super().launch(work)

    def telemetry(self) -> Telemetry:
        """Of the whole host, other processes included; shares and watts since the last call."""
        return self._telemetry.read()

    def close(self) -> None:
        self._threads.release()
        super().close()
