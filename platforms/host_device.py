"""The host's memory and cores as a device whose launches run at once."""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from . import host
from .interface import Device, DeviceOutOfMemory, Event, KVRegion, MemoryInfo
from .ledger import MemoryLedger
from .transfers import move_blocks

OWN_PAGES = 1 << 20
"""Bytes from which memory has pages of its own, which go back to the system when it ends. In the
heap the weights that are packed one after the other would leave holes that the next do not fit."""


class FinishedEvent(Event):
    """The work is over; what it raised waits for the one who asks."""

    def __init__(self, error: BaseException | None = None) -> None:
        self._error = error

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        if self._error is not None:
            raise self._error


class HostDevice(Device):
    """Work runs on the calling thread, on torch's pool."""

    torch_device = torch.device("cpu")

    def __init__(self, index: int = 0) -> None:
        self.index = index
        self._ledger = MemoryLedger()

    def alloc(self, shape: Sequence[int], dtype: torch.dtype, tag: str) -> Tensor:
        with no_room_is_told(shape, dtype, tag):
            large = math.prod(shape) * dtype.itemsize >= OWN_PAGES
            make = huge_pages if large else torch.empty
            return self._ledger.add(tag, make(tuple(shape), dtype=dtype))

    def alloc_kv(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        with no_room_is_told(shape, dtype, "kv"):
            return self._ledger.add("kv", huge_pages(shape, dtype))

    def account(self, owner: object, size: int, tag: str) -> None:
        self._ledger.enter(owner, size, tag)

    def memory(self) -> MemoryInfo:
        host.trim_heap()
        return MemoryInfo(host.total_memory(), host.available_memory(), self._ledger.by_tag())

    def launch(self, work: Callable[[], None]) -> Event:
        try:
            with torch.no_grad():
                work()
        except Exception as error:
            return FinishedEvent(error)
        return FinishedEvent()

    def to_device(self, host: Tensor) -> Tensor:
        return host.clone()

    def to_host(self, tensor: Tensor) -> Tensor:
        return tensor.clone()

    def move_blocks(self, regions: Sequence[KVRegion], pairs: Sequence[tuple[int, int]]) -> None:
        if pairs:
            move_blocks(regions, torch.tensor(pairs, dtype=torch.int64))

    def synchronize(self) -> None:
        pass

    def close(self) -> None:
        pass


@functools.cache
def onednn_multiplies_bfloat16() -> bool:
    """Does torch hand bfloat16 products to oneDNN on this processor? Yes as well where a torch
    without this (internal) question leaves it open: callers then take the road that is right
    everywhere, or try."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return True


@contextlib.contextmanager
def no_room_is_told(shape: Sequence[int], dtype: torch.dtype, tag: str) -> Iterator[None]:
    """What torch and the system raise when the host's memory is used up, as `DeviceOutOfMemory`."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError, OverflowError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        size = math.prod(shape) * dtype.itemsize
        raise DeviceOutOfMemory(f"{size} bytes for {tag!r} cannot be allocated.") from error


def huge_pages(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeroed memory of which the system provides each page when it is first written, huge ones
    where it has them: a large cache costs nothing at start, and weights are read from end to end
    without a page fault or a missed translation every 4 KiB."""
    size = math.prod(shape) * dtype.itemsize
    if size == 0:
        return torch.zeros(tuple(shape), dtype=dtype)
    # Private: shared memory, Python's default, gets no huge pages. The tensor keeps it alive.
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(tuple(shape))
