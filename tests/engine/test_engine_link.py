"""When a silent engine counts as stuck: the link's watch, with a scripted engine and clock."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from trimaran.core.args import EngineArgs
from trimaran.core.engine import link
from trimaran.core.engine.link import IDLE_TIMEOUT, EngineLink
from trimaran.core.engine.messages import AbortRequests, UtilityCall, UtilityResult
from trimaran.core.errors import EngineDeadError

HANGS_AT = 100.0  # seconds


class SilentEngine:
    """Answers pings at once until `HANGS_AT`. `sends_at`: then the front end sends a message."""

    def __init__(self, sends_at: float | None, idle: bool) -> None:
        self.now = 0.0
        self.reason = ""
        self._idle = idle
        self._answers: list[UtilityResult] = []
        self._sends_at = sends_at
        self.link: EngineLink | None = None

    def send(self, message: Any) -> None:
        if isinstance(message, UtilityCall) and self.now < HANGS_AT:
            self._answers.append(UtilityResult(message.call_id, {"idle": self._idle}))

    def poll(self, timeout: float) -> UtilityResult | None:
        if self.reason:
            raise EngineDeadError(self.reason)
        if self._answers:
            return self._answers.pop()
        self.now += timeout
        if self.now == self._sends_at:
            assert self.link is not None
            self.link.send(AbortRequests([]))
        return None

    def kill(self, reason: str) -> None:
        self.reason = reason


@pytest.mark.parametrize(
    ("sends_at", "idle", "step_timeout", "expected"),
    [
        (None, True, 600.0, IDLE_TIMEOUT),
        (None, True, 5.0, 5.0),
        (None, False, 600.0, 600.0),
        (50.0, True, 600.0, IDLE_TIMEOUT),  # a ping has been answered since
        (HANGS_AT - 1, True, 600.0, 600.0),
        (HANGS_AT + 10, True, 600.0, 600.0),
    ],
)
def test_an_idle_engine_is_stuck_sooner(
    monkeypatch: pytest.MonkeyPatch,
    sends_at: float | None,
    idle: bool,
    step_timeout: float,
    expected: float,
) -> None:
    """While it may be at work it has the time of a step; what it was sent may be work."""
    engine = SilentEngine(sends_at, idle)
    monkeypatch.setattr(link, "time", SimpleNamespace(monotonic=lambda: engine.now))
    watched = engine.link = EngineLink(EngineArgs(step_timeout=step_timeout), False)
    watched._client = engine  # type: ignore[assignment]
    watched._loop = asyncio.new_event_loop()
    watched._poll_for_ever(engine)  # type: ignore[arg-type]
    watched._loop.close()
    assert HANGS_AT + expected <= engine.now <= HANGS_AT + expected + 4
    assert ("--step-timeout" in engine.reason) == (expected == step_timeout)
