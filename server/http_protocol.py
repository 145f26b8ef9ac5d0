"""uvicorn's HTTP/1.1 protocol with bounds on headers, on time and on connections, and a way to cut
off.

httptools itself puts no limit on a header block, so it is counted here before it is parsed.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from collections.abc import Callable
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from ..core.args import ServerArgs
from .errors import error_body
from .responses import encode

logger = logging.getLogger(__name__)

MAX_HEADERS = 100
# An answer may leave while its request still arrives (413); this much of the rest is read and
# dropped, so that the client sees the answer and not a reset.
MAX_DISCARDED = 268_435_456
# … and for so long. A connection beyond the limit stays as long after its answer.
LINGER_SECONDS = 10.0
# Of connections beyond the limit, as many as this share of it are told so; more are just closed,
# before the process has no file left to open.
SURPLUS_SHARE = 0.25
TURNED_AWAY_SECONDS = 5.0  # between two lines about those
# Files that are no connections: the model, sockets and pipes to other processes, logs.
OTHER_FILES = 512
CUT_OFF = "trimaran.cut_off"
SURPLUS = "trimaran.surplus"


class TurnedAway:
    """Connections that were closed without an answer: a line for the first, then one for those of
    each `TURNED_AWAY_SECONDS`."""

    def __init__(self) -> None:
        self._count = 0
        self._quiet = False

    def add(self, loop: asyncio.AbstractEventLoop) -> None:
        self._count += 1
        if not self._quiet:
            self._tell(loop)

    def _tell(self, loop: asyncio.AbstractEventLoop) -> None:
        self._quiet = self._count > 0
        if self._quiet:
            logger.warning("far beyond --max-connections: %d closed without an answer", self._count)
            self._count = 0
            loop.call_later(TURNED_AWAY_SECONDS, self._tell, loop)


class GuardedProtocol(HttpToolsProtocol):
    """Refuses header blocks beyond `max_header_bytes` or `MAX_HEADERS` with 431, and those that
    take longer than `receive_timeout` with 408.

    `scope[CUT_OFF]` closes the connection without waiting for its reader; `scope[SURPLUS]` says
    that it is one more than `max_connections`.
    """

    limits = ServerArgs()
    max_connections = limits.max_connections
    turned_away = TurnedAway()

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
        self._surplus = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        excess = len(self.connections) - self.max_connections
        if excess > self.max_connections * SURPLUS_SHARE:
            self.turned_away.add(self.loop)
            transport.abort()
            return
        self._surplus = excess > 0
        self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_lingering()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if not self._reading_head:
            super().data_received(data)
            return
        if self.cycle is None or self.cycle.response_complete:
            self._time_head()  # also for what begins no message: empty lines
        # Fed in slices, so that a body sent along with its head is not counted as one.
        room = self.limits.max_header_bytes - self._head_bytes
        self._head_bytes += min(len(data), room)
        super().data_received(data[:room])
        if self._reading_head and self._head_bytes >= self.limits.max_header_bytes:
            self._refuse(431, f"The request's headers exceed {self.limits.max_header_bytes} bytes.")
        elif len(data) > room and self.parser is not None:
            self.data_received(data[room:])

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._time_head()

    def on_headers_complete(self) -> None:
        self._stop_head_timer()
        self._reading_head = False
        # Bytes are counted as they arrive, but of a request behind another only roughly.
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self.limits.max_header_bytes:
            self._refuse(431, f"The request's headers exceed {self.limits.max_header_bytes} bytes.")
            return
        if len(self.headers) > MAX_HEADERS:
            self._refuse(431, f"The request has more than {MAX_HEADERS} headers.")
            return
        self.scope[CUT_OFF] = self.transport.abort  # type: ignore[literal-required]
        self.scope[SURPLUS] = self._surplus  # type: ignore[literal-required]
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
        if not self._surplus:
            self._stop_lingering()
        if self.cycle is not None:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        unread = not self._reading_head and not self.pipeline
        super().on_response_complete()
        # uvicorn's own timer ends with every byte that comes; this one does not.
        if (unread or self._surplus) and self._linger_timer is None:
            self._linger_timer = self.loop.call_later(LINGER_SECONDS, self.transport.close)

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

    def _time_head(self) -> None:
        if self._head_timer is None:
            seconds = self.limits.receive_timeout
            if self._surplus:
                seconds = min(seconds, LINGER_SECONDS)
            self._head_timer = self.loop.call_later(seconds, self._head_too_slow, seconds)

    def _head_too_slow(self, seconds: float) -> None:
        if not self.transport.is_closing():
            self._refuse(408, f"The request's headers took longer than {seconds:g} s.")

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_lingering(self) -> None:
        if self._linger_timer is not None:
            self._linger_timer.cancel()
            self._linger_timer = None


def protocol_class(args: ServerArgs) -> Callable[..., GuardedProtocol]:
    """The protocol with this server's limits. Fewer connections than `max_connections` are let in
    where the process may not open so many files."""
    files = open_files_limit(round(args.max_connections * (1 + SURPLUS_SHARE)) + OTHER_FILES)
    # Under a very low limit half of it is for connections: to refuse all would be no help.
    room = int(max(files - OTHER_FILES, files / 2) / (1 + SURPLUS_SHARE))
    if room < args.max_connections:
        asked = args.max_connections != ServerArgs.max_connections  # who did not, minds little
        logger.log(
            logging.WARNING if asked else logging.DEBUG,
            "at most %d connections, not %d: the limit on open files (ulimit -n) is %d",
            *(room, args.max_connections, files),
        )
    values = {
        "limits": args,
        "max_connections": min(room, args.max_connections),
        "turned_away": TurnedAway(),
    }
    return type("Protocol", (GuardedProtocol,), values)


def open_files_limit(wanted: int) -> int:
    """How many files this process may open, after raising the limit towards `wanted`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft
