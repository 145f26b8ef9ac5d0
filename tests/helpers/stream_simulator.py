"""A simulator of `torch.cuda`: host memory posing as a device's, streams that are threads.

While a simulator is active, every torch op that touches its memory becomes work of the current
stream, done by a thread and late. Until then its results hold poison, and so does host memory that
a copy will fill: a missing wait shows as a wrong number. What needs a value waits, as it does on a
real device. Ops on the host's own tensors run at once.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from trimaran.platforms import torch_accelerator, transfers
from trimaran.platforms.strict_device import poison

DEVICE = torch.device("cpu", 0)
"""Tensors made here lie on the device; the host's are made on `cpu` without a number."""


class SimEvent:
    def __init__(self) -> None:
        self._reached = threading.Event()
        self._stream: SimStream | None = None

    def record(self, stream: SimStream) -> None:
        self._stream = stream
        stream.put(self._reached.set)

    def query(self) -> bool:
        return self._reached.is_set()

    def wait(self) -> None:
        assert self._reached.wait(30), "nothing reaches this event"

    def synchronize(self) -> None:
        self.wait()
        if self._stream is not None and self._stream.error is not None:
            raise self._stream.error


class SimStream:
    """A queue and the thread that works through it, `delay` seconds late each time."""

    def __init__(self, delay: float) -> None:
        self.error: BaseException | None = None
        self._delay = delay
        self._queue: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()
        threading.Thread(target=self._serve, daemon=True).start()

    def put(self, work: Callable[[], Any]) -> None:
        self._queue.put(work)

    def wait_stream(self, other: SimStream) -> None:
        event = SimEvent()
        event.record(other)
        self.put(event.wait)

    def synchronize(self) -> None:
        event = SimEvent()
        event.record(self)
        event.synchronize()

    def _serve(self) -> None:
        while True:
            work = self._queue.get()
            time.sleep(self._delay)
            try:
                with torch.no_grad():
                    work()
            except BaseException as error:  # told at the next synchronisation, as a device does
                self.error = error
            del work  # its tensors


class SimPools:
    """The allocator's book of graph pools, as `CUDACachingAllocator.cpp` keeps it: how many graphs
    hold each, and which captures are under way. `forgets`: ended by the driver's error, a capture
    stays open, as in torch up to 2.11; else the allocator ends it."""

    def __init__(self) -> None:
        self.forgets = True
        self.uses: dict[int, int] = {}
        self.open: set[int] = set()
        self._handles = itertools.count(1)

    def new(self) -> int:
        return next(self._handles)

    def begin(self, pool: int) -> None:
        if pool in self.open:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        if self.uses.get(pool, 1) == 0:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        self.uses[pool] = self.uses.get(pool, 0) + 1
        self.open.add(pool)

    def _cuda_endAllocateToPool(self, ordinal: int, pool: int) -> None:
        if pool not in self.open:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.open.remove(pool)

    def _cuda_releasePool(self, ordinal: int, pool: int) -> None:
        self.uses[pool] -= 1
        assert self.uses[pool] >= 0, "a pool is taken from graphs that are alive"


class SimGraph:
    """Work recorded instead of queued. Asking for a value spoils it: ending it then raises."""

    def __init__(self, simulator: StreamSimulator) -> None:
        self._simulator = simulator
        self._recorded: list[Callable[[], Any]] = []

    def capture_begin(self, pool: int, capture_error_mode: str) -> None:
        self._simulator.memory.begin(pool)
        self._pool = pool
        self._simulator.recording, self._simulator.spoiled = self._recorded, False

    def capture_end(self) -> None:
        simulator, pools = self._simulator, self._simulator.memory
        simulator.recording = None
        if not (simulator.spoiled and pools.forgets):
            pools._cuda_endAllocateToPool(0, self._pool)
        if simulator.spoiled:
            raise RuntimeError(
                "CUDA error: operation failed due to a previous error during capture"
            )
        weakref.finalize(self, pools._cuda_releasePool, 0, self._pool)

    def replay(self) -> None:
        for work in self._recorded:
            self._simulator.current.put(work)


class StreamSimulator:
    """What `TorchAccelerator` asks of `torch.cuda`. `limit`: bytes of memory, never given back.

    The first stream made is quick, the others and the default one slow (seconds a piece of work):
    who does not wait for these reads poison.
    """

    def __init__(
        self,
        quick: float = 0.001,
        slow: float = 0.02,
        default: float = 0.02,
        limit: int = 1 << 20,
    ) -> None:
        self.limit = limit
        self.recording: list[Callable[[], Any]] | None = None
        self.spoiled = False
        self.memory = SimPools()
        self._delays = [slow, quick]
        self._default = SimStream(default)
        self._thread = threading.local()
        self._storages: dict[int, torch.UntypedStorage] = {}

    @property
    def current(self) -> SimStream:
        return getattr(self._thread, "stream", self._default)

    @contextlib.contextmanager
    def stream(self, stream: SimStream) -> Iterator[None]:
        before, self._thread.stream = self.current, stream
        try:
            yield
        finally:
            self._thread.stream = before

    def Stream(self, device: int) -> SimStream:
        return SimStream(self._delays.pop() if len(self._delays) > 1 else self._delays[0])

    def Event(self) -> SimEvent:
        return SimEvent()

    def CUDAGraph(self) -> SimGraph:
        return SimGraph(self)

    def graph_pool_handle(self) -> int:
        return self.memory.new()

    def default_stream(self, ordinal: int) -> SimStream:
        return self._default

    def device(self, ordinal: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def mem_get_info(self, ordinal: int) -> tuple[int, int]:
        return self.limit - self.memory_reserved(ordinal), self.limit

    def memory_reserved(self, ordinal: int) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())

    memory_allocated = memory_reserved

    def empty_cache(self) -> None:
        if self.memory.open:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    def wait(self) -> None:
        """For the work of the current stream: the host wants a value."""
        if self.recording is not None:
            self.spoiled = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        self.current.synchronize()

    @contextlib.contextmanager
    def active(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """The calling thread's ops go to streams."""
        for module in (transfers, torch_accelerator):  # a build without accelerators pins nothing
            monkeypatch.setattr(module, "pinned_like", lambda x: torch.empty_like(x, device="cpu"))
        monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
        with _Streams(self):
            yield

    def queue(self, work: Callable[[], Any]) -> None:
        """`work` by the current stream: a kernel."""
        if self.recording is None:
            self.current.put(work)
        else:
            self.recording.append(work)

    def adopt(self, tensor: Tensor) -> Tensor:
        """`tensor` lies on the device."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._storages:
            if self.memory_reserved(0) + storage.nbytes() > self.limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate too much.")
            self._storages[storage.data_ptr()] = storage
        return tensor

    def holds(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._storages


class _Streams(TorchDispatchMode):
    def __init__(self, simulator: StreamSimulator) -> None:
        super().__init__()
        self._simulator = simulator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        simulator, kwargs = self._simulator, kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made_there = kwargs.get("device") == DEVICE
        if not (made_there or any(map(simulator.holds, tensors))):
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            return self._change(func, args, kwargs)
        if any(value.alias_info is not None for value in func._schema.returns):  # a view
            return func(*args, **kwargs)
        return self._compute(func, args, kwargs)

    def _change(self, func: Any, args: Any, kwargs: Any) -> Any:
        simulator, target = self._simulator, kwargs.get("out", args[0])
        to_host = func is torch.ops.aten.copy_.default and not simulator.holds(target)
        simulator.queue(lambda: func(*args, **kwargs))
        if not to_host:
            simulator.adopt(target)
        elif len(args) > 2 and args[2]:  # non_blocking
            poison(target)
        else:
            simulator.wait()
        return target

    def _compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        simulator = self._simulator
        to_host = kwargs.get("device") not in (None, DEVICE)

        def place(found: Any) -> Any:
            return found if to_host or not isinstance(found, Tensor) else simulator.adopt(found)

        try:
            shapes = func(*on_meta(args), **on_meta(kwargs))
            assert not to_host and all(isinstance(x, Tensor) for x in tree_leaves(shapes))
        except Exception:  # it yields a number, or something whose size depends on one
            simulator.wait()
            return tree_map(place, func(*args, **kwargs))
        empty = tree_map(lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype), shapes)
        return self._later(func, args, kwargs, place, empty)

    def _later(self, func: Any, args: Any, kwargs: Any, place: Any, targets: Any) -> Any:
        def work() -> None:
            found = tree_leaves(func(*args, **kwargs))
            for target, value in zip(tree_leaves(targets), found, strict=True):
                target.copy_(value)

        tree_map(poison, targets)
        self._simulator.queue(work)
        return tree_map(place, targets)


def on_meta(values: Any) -> Any:
    """`values` without content: what an op would make of them is asked of torch by these."""

    def meta(value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device("meta")
        return value.to("meta") if isinstance(value, Tensor) else value

    return tree_map(meta, values)
