"""Host memory behind a queue that behaves like a foreign device's, at its most unforgiving."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import host
from .host_device import no_room_is_told
from .interface import Device, Event, KVRegion, MemoryInfo
from .ledger import MemoryLedger
from .transfers import move_blocks

SENTINEL = -(2**30)
"""What integer memory holds before it is written (the dtype's least value if it is narrower)."""


def poison(tensor: Tensor) -> Tensor:
    """Fill with NaN, or for integers with the sentinel: what nobody may have read."""
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    limits = torch.iinfo(tensor.dtype)
    return tensor.fill_(SENTINEL if limits.min <= SENTINEL else limits.max)


class StrictEvent(Event):
    def __init__(self) -> None:
        self._reached = threading.Event()
        self.error: BaseException | None = None

    def reach(self) -> None:
        self._reached.set()

    def done(self) -> bool:
        return self._reached.is_set()

    def wait(self) -> None:
        self._reached.wait()
        if self.error is not None:
            raise self.error


class StrictDevice(Device):
    """One worker thread runs what was queued, in order, `delay` seconds late (up to twice that,
    at random). Tensors hold poison until the work that fills them has run; host copies too."""

    torch_device = torch.device("cpu")

    def __init__(self, index: int, delay: float) -> None:
        self.index = index
        self._delay = delay
        self._random = random.Random(index)
        self._ledger = MemoryLedger()
        self._queue: queue.SimpleQueue[tuple[Callable[[], None], StrictEvent] | None] = (
            queue.SimpleQueue()
        )
        self._last: StrictEvent | None = None
        self._last_launch: StrictEvent | None = None
        self._host_copies: list[tuple[Tensor, Tensor]] = []
        self._closed = False
        self._worker = threading.Thread(target=self._serve, name=f"strict:{index}", daemon=True)
        self._worker.start()

    def alloc(self, shape: Sequence[int], dtype: torch.dtype, tag: str) -> Tensor:
        with no_room_is_told(shape, dtype, tag):
            return self._ledger.add(tag, poison(torch.empty(tuple(shape), dtype=dtype)))

    def alloc_kv(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        with no_room_is_told(shape, dtype, "kv"):
            return self._ledger.add("kv", torch.zeros(tuple(shape), dtype=dtype))

    def account(self, owner: object, size: int, tag: str) -> None:
        self._ledger.enter(owner, size, tag)

    def memory(self) -> MemoryInfo:
        return MemoryInfo(host.total_memory(), host.available_memory(), self._ledger.by_tag())

    def launch(self, work: Callable[[], None]) -> Event:
        if self._inside():
            raise RuntimeError("A launch inside a launch: the queue would wait for itself.")
        self._last_launch = self._enqueue(work)
        return self._last_launch

    def to_device(self, host: Tensor) -> Tensor:
        snapshot = host.clone()
        if self._inside():
            return snapshot
        target = poison(torch.empty_like(snapshot))
        self._enqueue(lambda: _fill(target, snapshot))
        return target

    def to_host(self, tensor: Tensor) -> Tensor:
        if not self._inside():
            if self._last_launch is not None and not self._last_launch.done():
                raise RuntimeError("to_host outside a launch while another one still runs.")
            self.synchronize()
            return tensor.clone()
        # The value as of now arrives when the launch ends, as a copy engine's would.
        copy = poison(torch.empty_like(tensor))
        self._host_copies.append((copy, tensor.clone()))
        return copy

    def move_blocks(self, regions: Sequence[KVRegion], pairs: Sequence[tuple[int, int]]) -> None:
        if not self._inside():
            raise RuntimeError("move_blocks outside a launch.")
        if pairs:
            move_blocks(regions, torch.tensor(pairs, dtype=torch.int64))

    def synchronize(self) -> None:
        if self._last is not None and not self._inside():
            self._last._reached.wait()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._queue.put(None)
            self._worker.join()

    def _inside(self) -> bool:
        return threading.current_thread() is self._worker

    def _enqueue(self, work: Callable[[], None]) -> StrictEvent:
        if self._closed:
            raise RuntimeError(f"strict device {self.index} is closed.")
        event = self._last = StrictEvent()
        self._queue.put((work, event))
        return event

    def _serve(self) -> None:
        while (item := self._queue.get()) is not None:
            work, event = item
            if self._delay:
                time.sleep(self._delay * (1 + self._random.random()))
            try:
                with torch.no_grad():
                    work()
            except BaseException as error:  # raised again where the event is waited for
                event.error = error
            for copy, value in self._host_copies:
                copy.copy_(value)
            self._host_copies.clear()
            event.reach()
            del item, work, event  # a closure would keep its tensors until the next launch


def _fill(target: Tensor, source: Tensor) -> None:
    target.copy_(source)
