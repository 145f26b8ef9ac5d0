"""Recording work through torch's accelerator API, into one pool of memory.

What torch leaves to its callers: a pool is gone with the last of its graphs, and a capture that
fails stays open in the allocator.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

_BROKEN: list[Any] = []
"""Graphs whose capture failed. Torch's allocator of host memory keeps a question to each of them,
which it asks in later captures (`CUDAGraph::create_allocate_filter`), and nothing takes it back."""


class GraphPool:
    """Graphs that share memory, and so are replayed one at a time. `accelerator` is `torch.cuda`
    (or a simulator of it), `ordinal` the device's number there."""

    def __init__(self, accelerator: Any, ordinal: int) -> None:
        self._accelerator = accelerator
        self._ordinal = ordinal
        self._handle: Any = None
        self._alive: weakref.WeakSet[Any] = weakref.WeakSet()

    def record(self, work: Callable[[], object]) -> tuple[Any, int]:
        """The graph of what `work` launches on the current stream, which must not be the default
        one, and the bytes that torch took from the driver for it. Raises what `work` raised, or
        torch's RuntimeError where that cannot be recorded; work can be recorded afterwards all the
        same."""
        graph = self._accelerator.CUDAGraph()
        handle = self._open()
        before = self._accelerator.memory_reserved(self._ordinal)
        try:
            # thread_local: other threads may ask the driver for memory meanwhile
            graph.capture_begin(pool=handle, capture_error_mode="thread_local")
        except BaseException:
            self._abandon(graph)
            raise
        try:
            work()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # what was raised first says more
                self._end(graph)
            raise
        self._end(graph)
        self._alive.add(graph)
        return graph, max(0, int(self._accelerator.memory_reserved(self._ordinal) - before))

    def _open(self) -> Any:
        """The pool of the graphs that are alive. Without any torch has given it up: a capture into
        it would raise. Its memory goes back first, which cannot happen while one is under way."""
        if not len(self._alive):
            if self._handle is not None:
                self._accelerator.empty_cache()
            self._handle = self._accelerator.graph_pool_handle()
        return self._handle

    def _end(self, graph: Any) -> None:
        try:
            graph.capture_end()
        except BaseException:
            self._abandon(graph)
            raise

    def _abandon(self, graph: Any) -> None:
        """Later captures take another pool: of this one nobody knows who else holds it.

        Where the driver refused to end a capture, torch up to 2.11 leaves it open in the allocator,
        which then gives nothing back to the driver and takes no other capture into that pool
        (pytorch #180395 mended it in 2.12). Ended a second time it raises; then torch's own count
        of the pool is left alone, too: one use too few would take the memory of graphs that are
        alive, one too many (pytorch #190308) only keeps what this capture took."""
        _BROKEN.append(graph)
        handle, self._handle = self._handle, None
        self._alive = weakref.WeakSet()
        memory = self._accelerator.memory
        with contextlib.suppress(RuntimeError):
            memory._cuda_endAllocateToPool(self._ordinal, handle)
            memory._cuda_releasePool(self._ordinal, handle)
