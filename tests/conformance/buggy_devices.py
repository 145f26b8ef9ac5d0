"""Platforms whose devices have one bug each: L0."""

from __future__ import annotations

import dataclasses
import queue
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from seeded_bugs import Quick, bug
from torch import Tensor

from trimaran.platforms.interface import (
    Capabilities,
    DeviceOutOfMemory,
    Event,
    Graph,
    KVRegion,
)
from trimaran.platforms.strict_device import StrictDevice, StrictEvent


class WideDevice(StrictDevice):
    """Its signature is changed below, after the definition."""


def _alloc(self: Any, shape: Any, dtype: Any, tag: str, pool: int = 0) -> Tensor:
    return StrictDevice.alloc(self, shape, dtype, tag)


WideDevice.alloc = _alloc  # type: ignore[method-assign]


@bug("L0/device/open")
class DeviceSignatureSetLater(Quick):
    """A device's member of another signature, set after its definition."""

    device_class = WideDevice


class FlatDevice(StrictDevice):
    def alloc(self, shape: Sequence[int], dtype: torch.dtype, tag: str) -> Tensor:
        return super().alloc(shape or (1,), dtype, tag)


@bug("L0/device/alloc")
class NoScalars(Quick):
    """Memory without dimensions has one."""

    device_class = FlatDevice


class PlainErrorDevice(StrictDevice):
    def alloc(self, shape: Sequence[int], dtype: torch.dtype, tag: str) -> Tensor:
        try:
            return super().alloc(shape, dtype, tag)
        except DeviceOutOfMemory as error:
            raise ValueError(str(error)) from None


@bug("L0/device/out of memory")
class OutOfMemoryIsAnother(Quick):
    """No room is told by another error than the contract's."""

    device_class = PlainErrorDevice


class SwappingQueue(queue.Queue[Any]):
    def _get(self) -> Any:
        if len(self.queue) > 10:
            self.queue[0], self.queue[1] = self.queue[1], self.queue[0]
        return super()._get()


class SwappingDevice(StrictDevice):
    def __init__(self, index: int, delay: float) -> None:
        super().__init__(index, delay)
        waited_for, self._queue = self._queue, SwappingQueue()  # type: ignore[assignment]
        first = StrictEvent()
        waited_for.put((lambda: None, first))
        first.wait()


@bug("L0/device/order")
class Overtakes(Quick):
    """Where much is queued, the second comes first."""

    device_class, delay = SwappingDevice, 0.001


class NoSynchronizeDevice(StrictDevice):
    def synchronize(self) -> None:
        pass


@bug("L0/device/synchronize")
class SynchronizeDoesNot(Quick):
    """Synchronising waits for nothing."""

    device_class, delay = NoSynchronizeDevice, 0.001


class ClosesOnceDevice(StrictDevice):
    def close(self) -> None:
        if self._closed:
            raise RuntimeError("closed already")
        super().close()


@bug("L0/device/close")
class ClosesOnce(Quick):
    """To close a second time is an error."""

    device_class = ClosesOnceDevice


class CapturingDevice(StrictDevice):
    def capture(self, work: Callable[[], None]) -> Graph | None:
        return Recording([])


@bug("L0/device/graph")
class CapturesUnclaimed(Quick):
    """Graphs, although it claims none."""

    device_class = CapturingDevice


class AlwaysDone(StrictEvent):
    def done(self) -> bool:
        return True


class AlwaysDoneDevice(StrictDevice):
    def _enqueue(self, work: Callable[[], None]) -> StrictEvent:
        event = super()._enqueue(work)
        event.__class__ = AlwaysDone
        return event


@bug("L0/device/events")
class EventAlwaysDone(Quick):
    """`done` does not ask the device."""

    device_class, delay = AlwaysDoneDevice, 0.001


class SwallowingDevice(StrictDevice):
    def launch(self, work: Callable[[], None]) -> Event:
        def guarded() -> None:
            try:
                work()
            except Exception:
                return

        return super().launch(guarded)


@bug("L0/device/errors")
class ErrorsSwallowed(Quick):
    """What a launch raises is never seen."""

    device_class = SwallowingDevice


class LateCopyDevice(StrictDevice):
    def to_device(self, host: Tensor) -> Tensor:
        target = torch.empty_like(host)
        if self._inside():
            return host.clone()
        self._enqueue(
            lambda: target.copy_(host) and None if host.numel() == 0 else into(target, host)
        )
        return target


def into(target: Tensor, source: Tensor) -> None:
    target.copy_(source)


@bug("L0/device/to_device")
class ToDeviceReadsLate(Quick):
    """The host's tensor is read when the copy runs, not when it is asked for."""

    device_class, delay = LateCopyDevice, 0.001


class LateReadDevice(StrictDevice):
    def to_host(self, tensor: Tensor) -> Tensor:
        if not self._inside():
            return super().to_host(tensor)
        copy = torch.empty_like(tensor)
        self._host_copies.append((copy, tensor))
        return copy


@bug("L0/device/to_host")
class ToHostReadsLate(Quick):
    """A host copy shows what the launch made of the tensor later."""

    device_class = LateReadDevice


class SequentialMoves(StrictDevice):
    def move_blocks(self, regions: Sequence[KVRegion], pairs: Sequence[tuple[int, int]]) -> None:
        for region in regions:
            for source, target in pairs:
                region.tensor[target] = region.tensor[source]


@bug("L0/device/move_blocks")
class MovesOneByOne(Quick):
    """In a chain of moves a block is read after it was written."""

    device_class = SequentialMoves


class DirtyKV(StrictDevice):
    def alloc_kv(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self.alloc(shape, dtype, "kv")


@bug("L0/device/alloc_kv")
class KvNotZeroed(Quick):
    """KV memory is handed out as it is found."""

    device_class = DirtyKV


class OneTag(StrictDevice):
    def alloc(self, shape: Sequence[int], dtype: torch.dtype, tag: str) -> Tensor:
        return super().alloc(shape, dtype, "weights" if tag == "second" else tag)


@bug("L0/device/memory")
class LedgerForgetsTag(Quick):
    """Memory under a tag it does not know is entered under another."""

    device_class = OneTag


class Keeping(StrictDevice):
    def account(self, owner: object, size: int, tag: str) -> None:
        self._kept = [*getattr(self, "_kept", []), owner]
        super().account(owner, size, tag)


@bug("L0/device/memory")
class LedgerKeepsOwner(Quick):
    """What a library held is never given back: the account keeps its owner alive."""

    device_class = Keeping


class LeavingDevice(StrictDevice):
    def close(self) -> None:
        self._closed = True


@bug("L0/kv_constraints")
class CloseLeavesThread(Quick):
    """A closed device's worker goes on waiting for work."""

    device_class = LeavingDevice


class Recording(Graph):
    """The results of the first run, copied over again."""

    def __init__(self, results: list[tuple[Tensor, Tensor]]) -> None:
        self._results = results

    def replay(self) -> None:
        for tensor, value in self._results:
            tensor.copy_(value)


class ReplayingDevice(StrictDevice):
    def __init__(self, index: int, delay: float) -> None:
        super().__init__(index, delay)
        self._allocated: list[weakref.ref[Tensor]] = []

    def alloc(self, shape: Sequence[int], dtype: torch.dtype, tag: str) -> Tensor:
        tensor = super().alloc(shape, dtype, tag)
        self._allocated.append(weakref.ref(tensor))
        return tensor

    def capture(self, work: Callable[[], None]) -> Graph | None:
        work()
        alive = [one for one in (ref() for ref in self._allocated) if one is not None]
        return Recording([(one, one.clone()) for one in alive[1:]])


@bug("L0/device/graph")
class ReplaysOldValues(Quick):
    """A replayed graph gives the results of its capture."""

    device_class = ReplayingDevice

    def capabilities(self, device: int = 0) -> Capabilities:
        return dataclasses.replace(super().capabilities(device), graph_replay=True)
