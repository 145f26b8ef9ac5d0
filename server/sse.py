"""Server-sent events: a bounded buffer between the engine and a client that may read slowly."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import describe, log_failure
from .http_protocol import CUT_OFF
from .responses import encode

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
# A client that takes nothing for this long is gone, however little is left to send.
STALL_SECONDS = 60.0


def event(content: Any) -> bytes:
    return b"data: " + encode(content) + b"\n\n"


class EventStream(Response):
    """Sends what `events` yields, then `[DONE]`.

    `events` is drained at its own pace; what the client has not taken is kept up to `limit`
    bytes. Beyond that, or after `STALL_SECONDS` without progress, the connection is cut.
    `close` is awaited whatever the end: it aborts what the engine still computes (a generator
    that was never begun would not).
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        limit: int,
        headers: Mapping[str, str],
        close: Callable[[], Awaitable[None]],
        on_cut: Callable[[], None],
    ) -> None:
        super().__init__(media_type="text/event-stream", headers=headers)
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self._events = events
        self._limit = limit
        self._close = close
        self._on_cut = on_cut
        self._waiting: list[bytes] = []
        self._size = 0
        self._changed = asyncio.Event()
        self._finished = False
        self._overflow = asyncio.Event()
        self._sending_since = 0.0
        self._request_id = ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._request_id = scope.get("state", {}).get("request_id", "")
        tasks = [
            asyncio.ensure_future(work)
            for work in (
                self._write(send),
                self._produce(),
                disconnected(receive),
                self._too_slow(),
            )
        ]
        writer, _, gone, slow = tasks
        try:
            await asyncio.wait({writer, gone, slow}, return_when=asyncio.FIRST_COMPLETED)
            if slow.done() and not writer.done():
                self._cut(scope)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._events.aclose()
            await self._close()
        if writer.done() and not writer.cancelled():
            writer.result()

    async def _produce(self) -> None:
        try:
            async for chunk in self._events:
                self._put(chunk)
        except Exception as error:
            self._put(event(self._describe(error)))
        self._put(DONE)
        self._finished = True

    def _put(self, chunk: bytes) -> None:
        self._waiting.append(chunk)
        self._size += len(chunk)
        self._changed.set()
        if self._size > self._limit:
            self._overflow.set()

    async def _write(self, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        while True:
            await self._changed.wait()
            self._changed.clear()
            finished, body = self._finished, b"".join(self._waiting)
            self._waiting.clear()
            self._sending_since = time.monotonic()
            await send({"type": "http.response.body", "body": body, "more_body": not finished})
            # Counted until it has left, or one huge event could hide behind a stuck client.
            self._size -= len(body)
            self._sending_since = 0.0
            if finished:
                return

    async def _too_slow(self) -> None:
        """Returns once the client lags too far behind."""
        while True:
            with contextlib.suppress(TimeoutError):  # the time-out is the period of the check
                await asyncio.wait_for(self._overflow.wait(), timeout=STALL_SECONDS / 4)
                return
            if self._sending_since and time.monotonic() - self._sending_since > STALL_SECONDS:
                return

    def _cut(self, scope: Scope) -> None:
        logger.warning("a slow reader was cut off", extra={"request_id": self._request_id})
        self._on_cut()
        cut_off = scope.get(CUT_OFF)
        if cut_off is not None:
            cut_off()

    def _describe(self, error: Exception) -> dict[str, Any]:
        log_failure(logger, "stream failed", error, self._request_id)
        _, body, _ = describe(error)
        return body


async def disconnected(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        continue
