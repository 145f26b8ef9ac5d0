"""Memory, a queue, copies. VENDOR: your runtime's allocator and streams."""

import math
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from trimaran.platforms import interface as tri


class AcmeEvent(tri.Event):
    """VENDOR: recorded behind the work; `wait` raises `DeviceLost` once the card is gone."""

    def __init__(self, work: Future[None]) -> None:
        self._work = work

    def done(self) -> bool:
        return self._work.done()

    def wait(self) -> None:
        self._work.result()  # raises what the work raised


class AcmeDevice(tri.Device):
    torch_device = torch.device("cpu")  # VENDOR: torch.device("acme", index)

    def __init__(self, index: int, size: int) -> None:
        self.index, self._size = index, size
        self._held: dict[object, tuple[str, int]] = {}  # key of an allocation -> tag, bytes
        # VENDOR: make a stream. Here one thread runs the work in order, without gradients.
        self._queue = ThreadPoolExecutor(1, f"acme-{index}", torch.set_grad_enabled, (False,))
        self._worker = self._queue.submit(threading.get_ident).result()

    def alloc(self, shape: Sequence[int], dtype: torch.dtype, tag: str) -> Tensor:
        size, free = math.prod(shape) * dtype.itemsize, self.memory().free
        if size > free:
            raise tri.DeviceOutOfMemory(f"{size} bytes wanted for {tag}, {free} are free")
        tensor = torch.empty(tuple(shape), dtype=dtype, device=self.torch_device)
        self.account(tensor, size, tag)
        return tensor

    def alloc_kv(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self.alloc(shape, dtype, "kv").zero_()

    def account(self, owner: object, size: int, tag: str) -> None:
        key = object()
        self._held[key] = (tag, size)
        weakref.finalize(owner, self._held.pop, key)  # the bytes end with their owner

    def memory(self) -> tri.MemoryInfo:
        # VENDOR: `free` is the driver's answer: other processes use the card, too.
        by_tag: Counter[str] = Counter()
        for tag, size in list(self._held.values()):
            by_tag[tag] += size
        return tri.MemoryInfo(self._size, max(0, self._size - by_tag.total()), dict(by_tag))

    def launch(self, work: Callable[[], None]) -> tri.Event:
        # VENDOR: call `work` with your stream current, which queues what it does; then record an
        # event. What it raises is kept for the event's `wait`.
        return AcmeEvent(self._queue.submit(work))

    def to_device(self, host: Tensor) -> Tensor:
        return host.clone()  # VENDOR: in the stream's order, by way of pinned memory

    def to_host(self, tensor: Tensor) -> Tensor:
        self.synchronize()  # VENDOR: inside a launch, a copy that is there at the launch's event
        return tensor.clone()

    def move_blocks(
        self, regions: Sequence[tri.KVRegion], pairs: Sequence[tuple[int, int]]
    ) -> None:
        # VENDOR: one kernel for all regions. Every source is read before a target is written.
        sources, targets = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(1)
        for region in regions:
            region.tensor[targets] = region.tensor[sources]

    def synchronize(self) -> None:
        if threading.get_ident() != self._worker:  # inside a launch, all before it is done
            self._queue.submit(lambda: None).result()

    def close(self) -> None:
        self._queue.shutdown()
