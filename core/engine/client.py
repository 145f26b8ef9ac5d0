"""How a front end reaches an engine, wherever it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..model_info import ModelInfo
from .messages import (
    AbortRequests,
    AddRequests,
    FinishSequence,
    StepMessage,
    UtilityCall,
    UtilityResult,
)

ToEngine = AddRequests | AbortRequests | FinishSequence | UtilityCall
FromEngine = StepMessage | UtilityResult


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """What an engine says of itself once it is ready.

    `kv_dtype` is the cache's element type by name; `kv_tokens` how many tokens fit in it;
    `description` is for humans (platform, device, chosen ops) and holds plain JSON values.
    """

    model: ModelInfo
    kv_dtype: str
    kv_tokens: int
    max_num_seqs: int
    max_num_queued_reqs: int
    description: Mapping[str, Any] = field(default_factory=dict)


class EngineClient(Protocol):
    """One engine. `send` and `stop` may be called from any thread, `poll` from one at a time."""

    @property
    def info(self) -> EngineInfo: ...

    def send(self, message: ToEngine) -> None:
        """Pass a message on; never blocks. Raises `EngineDeadError` if the engine has ended."""

    def poll(self, timeout: float | None) -> FromEngine | None:
        """The next message, or None after `timeout` seconds (None waits for ever).

        Raises `EngineDeadError`, with the engine's own exception in its message, once the engine
        has ended and everything it said before has been returned.
        """

    def stop(self, reason: str = "the engine was closed") -> None:
        """End the engine: `poll` raises `EngineDeadError(reason)` soon. Blocks for some seconds at
        most."""

    def close(self) -> None:
        """Stop, and free everything; no `poll` may be under way. May be called again."""
