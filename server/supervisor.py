"""Watches an engine, and starts it again when it has died."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque

from ..core.errors import EngineDeadError
from .router import ServedModel
from .state import ServerState

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2
WINDOW_SECONDS = 600.0
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 10.0


class Supervisor:
    """At most `limit` restarts in `WINDOW_SECONDS`, each after a longer pause than the last."""

    def __init__(
        self,
        model: ServedModel,
        state: ServerState,
        limit: int,
    ) -> None:
        self.model = model
        self.state = state
        self.limit = limit
        self._restarts: deque[float] = deque()

    async def run(self) -> None:
        """Returns once the engine is dead and may not be started again."""
        while True:
            try:
                self.model.engine.health()
            except EngineDeadError as error:
                logger.error("the engine died: %s", error)
                self.model.down = True
                if not await self._restart():
                    return
            await asyncio.sleep(POLL_SECONDS)

    async def _restart(self) -> bool:
        while True:
            now = time.monotonic()
            while self._restarts and now - self._restarts[0] > WINDOW_SECONDS:
                self._restarts.popleft()
            if len(self._restarts) >= self.limit:
                logger.error("the engine died %d times; giving up", len(self._restarts) + 1)
                return False
            await asyncio.sleep(min(FIRST_PAUSE * 2 ** len(self._restarts), LONGEST_PAUSE))
            self._restarts.append(now)
            logger.warning("starting the engine again, %d of %d", len(self._restarts), self.limit)
            self.state.metrics.restarts.labels(self.model.name, str(self.model.index)).inc()
            try:
                await self.model.engine.restart()
                self.model.down = False
            except Exception as error:  # of whatever kind: a failed attempt, and counted as one
                logger.error("the engine did not start again: %s", error)
                continue
            logger.info("the engine runs again")
            return True
