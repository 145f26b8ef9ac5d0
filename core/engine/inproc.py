"""An engine in this process: whoever polls its client steps it."""

from __future__ import annotations

import queue
from collections import deque
from typing import Self

from ..args import EngineArgs
from ..config import EngineConfig
from ..errors import EngineDeadError
from ..executor import Executor
from ..resolve import resolve
from .client import EngineInfo, FromEngine, ToEngine
from .engine import Engine
from .faults import one_line


class QueueInbox:
    """Messages from other threads of this process."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[ToEngine | None] = queue.SimpleQueue()

    def put(self, message: ToEngine | None) -> None:
        """None only wakes the engine."""
        self._queue.put(message)

    def take(self, timeout: float | None) -> list[ToEngine]:
        messages = []
        try:
            messages.append(self._queue.get(timeout != 0.0, timeout or None))
            while True:
                messages.append(self._queue.get_nowait())
        except queue.Empty:
            return [message for message in messages if message is not None]


class InprocClient:
    """The client of an engine in this process."""

    def __init__(self, config: EngineConfig, executor: Executor | None = None) -> None:
        self._inbox = QueueInbox()
        self._outbox: deque[FromEngine] = deque()
        self._death: EngineDeadError | None = None
        self._closed = False
        self.engine = Engine(config, executor, inbox=self._inbox, outbox=self._outbox.append)
        self._info = describe_engine(self.engine)

    @classmethod
    def from_args(cls, args: EngineArgs) -> Self:
        """Raises what loading raises: `ModelLoadError`, `KVMemoryError`, `ConfigError`, …"""
        return cls(resolve(args))

    @property
    def info(self) -> EngineInfo:
        return self._info

    def send(self, message: ToEngine) -> None:
        self._check()
        self._inbox.put(message)

    def poll(self, timeout: float | None) -> FromEngine | None:
        if not self._outbox:
            self._check()
            try:
                self.engine.step(timeout)
            except Exception as error:
                self._death = EngineDeadError(f"the engine ended: {one_line(error)}")
                raise self._death from error
        return self._outbox.popleft() if self._outbox else None

    def stop(self, reason: str = "the engine was closed") -> None:
        self._death = self._death or EngineDeadError(reason)
        self._inbox.put(None)

    def close(self) -> None:
        self.stop()
        if not self._closed:
            self._closed = True
            self.engine.close()

    def _check(self) -> None:
        if self._death is not None:
            raise self._death


def describe_engine(engine: Engine) -> EngineInfo:
    """What a front end needs to know of an engine that has loaded its model."""
    config = engine.config
    return EngineInfo(
        model=config.model,
        kv_dtype=str(config.cache.dtype).removeprefix("torch."),
        kv_tokens=min(g.block_size * (g.num_blocks - 1) for g in config.cache.groups),
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_queued_reqs=config.scheduler.max_num_queued_reqs,
        description=dict(engine.executor.description),
    )
