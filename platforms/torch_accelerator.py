"""A GPU through torch's accelerator API, the same for both vendors (ROCm's torch answers to
`torch.cuda` too).

Three streams: `launch` works on one, copies to the device that are made between launches on a
second, so that the next step's inputs travel while a step runs, and what shared code does outside
of any launch (loading weights) goes to torch's default stream. A launch waits for the other two.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .graph_pool import GraphPool
from .interface import (
    Device,
    DeviceLost,
    Event,
    Graph,
    KVRegion,
    MemoryInfo,
    Telemetry,
)
from .ledger import MemoryLedger
from .torch_errors import translated
from .transfers import move_blocks, pinned_like, upload


class AcceleratorEvent(Event):
    """A point on the compute stream. `error`: what the launched work raised on the host."""

    def __init__(self, device: TorchAccelerator, event: Any, error: BaseException | None) -> None:
        self._device = device
        self._event = event
        self._error = error

    def done(self) -> bool:
        """Also where the device is lost: nothing more will come, and `wait` says why."""
        if self._event is None:
            return True
        try:
            with self._device.guard():
                return bool(self._event.query())
        except DeviceLost:
            return True

    def wait(self) -> None:
        if self._event is not None:
            with self._device.guard():
                self._event.synchronize()
        if self._error is not None:
            raise self._error


class AcceleratorGraph(Graph):
    def __init__(self, device: TorchAccelerator, graph: Any) -> None:
        self._device = device
        self._graph = graph

    def replay(self) -> None:
        if not self._device.inside:
            raise RuntimeError("A graph is replayed inside a launch.")
        with self._device.guard():
            self._graph.replay()


class TorchAccelerator(Device):
    """One GPU. `accelerator` is `torch.cuda` (or a simulator of it), `ordinal` the device's number
    there, `index` its number on the platform."""

    def __init__(
        self,
        accelerator: Any,
        index: int,
        ordinal: int,
        read_telemetry: Callable[[], Telemetry],
        torch_device: torch.device | None = None,
    ) -> None:
        self.index = index
        self.torch_device = torch_device or torch.device("cuda", ordinal)
        self._accelerator = accelerator
        self._ordinal = ordinal
        self._read_telemetry = read_telemetry
        self._ledger = MemoryLedger()
        self._lost: DeviceLost | None = None
        self._closed = False
        self._running = threading.local()
        self._graphs = GraphPool(accelerator, ordinal)
        with self.guard():
            self._compute = accelerator.Stream(device=ordinal)
            self._copies = accelerator.Stream(device=ordinal)

    # -- memory --------------------------------------------------------------------------------

    def alloc(self, shape: Sequence[int], dtype: torch.dtype, tag: str) -> Tensor:
        with self._open():
            tensor = torch.empty(tuple(shape), dtype=dtype, device=self.torch_device)
            return self._ledger.add(tag, self._kept(tensor))

    def alloc_kv(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        with self._open():
            tensor = torch.zeros(tuple(shape), dtype=dtype, device=self.torch_device)
            return self._ledger.add("kv", self._kept(tensor))

    def account(self, owner: object, size: int, tag: str) -> None:
        self._ledger.enter(owner, size, tag)

    def memory(self) -> MemoryInfo:
        """Free is also what torch holds and has given to nobody."""
        with self._open():
            free, total = self._accelerator.mem_get_info(self._ordinal)
            held = self._accelerator.memory_reserved(self._ordinal)
            used = self._accelerator.memory_allocated(self._ordinal)
        return MemoryInfo(int(total), int(free + held - used), self._ledger.by_tag())

    # -- work ----------------------------------------------------------------------------------

    @property
    def inside(self) -> bool:
        """Is the calling thread inside a launch?"""
        return bool(getattr(self._running, "launch", False))

    def launch(self, work: Callable[[], None]) -> Event:
        if self.inside:
            raise RuntimeError("A launch inside a launch.")
        error: BaseException | None = None
        with self._open():
            self._compute.wait_stream(self._accelerator.default_stream(self._ordinal))
            self._compute.wait_stream(self._copies)
        self._running.launch = True
        try:
            with self._accelerator.stream(self._compute), torch.no_grad():
                work()
        except Exception as raised:  # raised again where the event is waited for
            error = self._noted(raised)
        finally:
            self._running.launch = False
        if self._lost is not None:
            return AcceleratorEvent(self, None, error)
        with self.guard():
            event = self._accelerator.Event()
            event.record(self._compute)
        return AcceleratorEvent(self, event, error)

    def to_device(self, host: Tensor) -> Tensor:
        stream = self._compute if self.inside else self._copies
        with self._open(), self._accelerator.stream(stream):
            return self._kept(upload(host, self.torch_device))

    def to_host(self, tensor: Tensor) -> Tensor:
        with self._open():
            if self.inside:
                return pinned_like(tensor).copy_(tensor, non_blocking=True)
            self.synchronize()
            with self._accelerator.stream(self._compute):
                copy = torch.empty_like(tensor, device="cpu").copy_(tensor)
            self._compute.synchronize()
            return copy

    def move_blocks(self, regions: Sequence[KVRegion], pairs: Sequence[tuple[int, int]]) -> None:
        if not self.inside:
            raise RuntimeError("move_blocks outside a launch.")
        if not pairs:
            return
        with self._open():
            host = torch.tensor(pairs, dtype=torch.int64)
            move_blocks(regions, upload(host, self.torch_device))

    def capture(self, work: Callable[[], None]) -> Graph | None:
        """Graphs of one device share a pool of memory: they are replayed one at a time."""
        if not self.inside:
            raise RuntimeError("capture outside a launch.")
        with self._open():
            graph, grown = self._graphs.record(work)
            captured = AcceleratorGraph(self, graph)
            self._ledger.enter(captured, grown, "graphs")
            return captured

    def telemetry(self) -> Telemetry:
        return self._read_telemetry()

    def synchronize(self) -> None:
        if self.inside:
            raise RuntimeError("synchronize inside a launch.")
        with self.guard():
            self._accelerator.default_stream(self._ordinal).synchronize()
            self._copies.synchronize()
            self._compute.synchronize()

    def close(self) -> None:
        if self._closed:
            return
        with contextlib.suppress(DeviceLost):
            self.synchronize()
        self._closed = True
        with contextlib.suppress(RuntimeError):  # nothing is to be had from a lost device
            self._accelerator.empty_cache()

    # -- errors --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Calls to the device: its errors become the contract's, and once it is lost it is."""
        if self._lost is not None:
            raise self._lost
        try:
            with self._accelerator.device(self._ordinal):
                yield
        except Exception as error:
            noted = self._noted(error)
            if noted is error:
                raise
            raise noted from error

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        if self._closed:
            raise RuntimeError(f"Device {self.index} is closed.")
        with self.guard():
            yield

    def _noted(self, error: BaseException) -> BaseException:
        found = translated(error)
        if isinstance(found, DeviceLost):
            self._lost = self._lost or found
        return found

    def _kept(self, tensor: Tensor) -> Tensor:
        """Memory of another stream that launches use is not given away before they are over."""
        if not self.inside:
            tensor.record_stream(self._compute)
        return tensor
