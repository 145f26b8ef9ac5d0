"""A line of statistics in the log, as long as there is anything to say."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from ..core.engine.messages import EngineStats
from .router import EngineRouter, ServedModel

logger = logging.getLogger(__name__)

INTERVAL = 10.0  # seconds


class StatsLog:
    """What each engine has done since the line before, and what it is at."""

    def __init__(
        self,
        router: EngineRouter,
        interval: float = INTERVAL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._router = router
        self._interval = interval
        self._clock = clock
        self._time = clock()
        self._before: dict[str, EngineStats] = {}

    async def run(self) -> None:
        failed = False
        while True:
            await asyncio.sleep(self._interval)
            try:
                self.write()
            except Exception:  # of whatever kind: the next lines may come out well
                if not failed:
                    logger.exception("the statistics could not be written; said only once")
                failed = True

    def write(self) -> None:
        now = self._clock()
        seconds, self._time = max(now - self._time, 1e-3), now
        for model in self._router:
            self._write_one(model, seconds)

    def _write_one(self, model: ServedModel, seconds: float) -> None:
        stats = model.stats()
        before = self._before.get(model.name, EngineStats())
        self._before[model.name] = stats
        prompt = _since(before.prompt_tokens, stats.prompt_tokens)
        generated = _since(before.generation_tokens, stats.generation_tokens)
        if not (prompt or generated or stats.num_running or stats.num_waiting):
            return
        looked_up = _since(before.prefix_queries, stats.prefix_queries)
        found = _since(before.prefix_hits, stats.prefix_hits)
        logger.info(
            "%s: prompt %.1f tokens/s, generation %.1f tokens/s, running %d, waiting %d, "
            "KV cache %.1f %% used, prefix cache %.1f %% hits",
            model.name,
            prompt / seconds,
            generated / seconds,
            stats.num_running,
            stats.num_waiting,
            100 * stats.kv_used / max(1, stats.kv_total),
            100 * found / max(1, looked_up),
        )


def _since(before: int, now: int) -> int:
    """How far a counter has come; one that is lower now has begun again, with its engine."""
    return now - before if now >= before else now
