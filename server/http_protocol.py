"""uvicorn's HTTP/1.1 protocol with bounds on headers, on the time they take, and a way to cut off.

httptools itself puts no limit on a header block, so it is counted here before it is parsed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from .errors import error_body
from .responses import encode

MAX_HEADERS = 100
HEADER_SECONDS = 20.0
# An answer may leave while its request still arrives (413); this much of the rest is read and
# dropped, so that the client sees the answer and not a reset.
MAX_DISCARDED = 268_435_456
CUT_OFF = "trimaran.cut_off"


class GuardedProtocol(HttpToolsProtocol):
    """Refuses header blocks beyond `max_header_bytes` or `MAX_HEADERS` with 431, slow ones by
    closing; `scope[CUT_OFF]` closes the connection without waiting for its reader."""

    max_header_bytes = 65_536

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._reading_head = True
        self._head_bytes = 0
        self._discarded = 0
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HEADER_SECONDS, self._head_too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if not self._reading_head:
            super().data_received(data)
            return
        # Fed in slices, so that a body sent along with its head is not counted as one.
        room = self.max_header_bytes - self._head_bytes
        self._head_bytes += min(len(data), room)
        super().data_received(data[:room])
        if self._reading_head and self._head_bytes >= self.max_header_bytes:
            self._refuse(431, f"The request's headers exceed {self.max_header_bytes} bytes.")
        elif len(data) > room and self.parser is not None:
            self.data_received(data[room:])

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEADER_SECONDS, self._head_too_slow)

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self._reading_head = False
        # Bytes are counted as they arrive, but of a request behind another only roughly.
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self.max_header_bytes:
            self._refuse(431, f"The request's headers exceed {self.max_header_bytes} bytes.")
            return
        if len(self.headers) > MAX_HEADERS:
            self._refuse(431, f"The request has more than {MAX_HEADERS} headers.")
            return
        self.scope[CUT_OFF] = self.transport.abort  # type: ignore[literal-required]
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self.cycle is None:
            return
        if self.cycle.response_complete:
            self._discarded += len(body)
            if self._discarded > MAX_DISCARDED:
                self.transport.abort()
                return
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._reading_head, self._head_bytes, self._discarded = True, 0, 0
        if self.cycle is not None:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def _refuse(self, status: int, message: str) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            # Another request's answer is due first; this one would be taken for it.
            self.transport.abort()
            return
        body = encode(error_body(message, type="invalid_request_error", code="bad_request"))
        head = (
            b"content-type: application/json\r\n"
            b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        )
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()

    def _head_too_slow(self) -> None:
        if not self.transport.is_closing():
            self._refuse(408, f"The request's headers took longer than {HEADER_SECONDS:.0f} s.")

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def protocol_class(max_header_bytes: int) -> Callable[..., GuardedProtocol]:
    """The protocol with this server's limit."""
    return type("Protocol", (GuardedProtocol,), {"max_header_bytes": max_header_bytes})
