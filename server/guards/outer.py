"""The outermost layer: a request id, a log line, and an OpenAI-shaped answer to every failure."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.requests import ClientDisconnect

from ..errors import HTTPError, error_response, log_failure
from ..http_protocol import CUT_OFF, SURPLUS
from ..state import ServerState
from .asgi import ASGIApp, Message, Receive, Scope, Send, header, route_path

logger = logging.getLogger(__name__)

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# Answered at any time, so that whoever supervises the process can look into it.
PROBES = frozenset({"/livez", "/readyz", "/health", "/ping", "/metrics", "/version", "/load"})


class OuterMiddleware:
    """Wraps everything else; what escapes from inside is logged with the request id."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self.app = app
        self.state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = _Exchange(scope, send)
        probe = route_path(scope) in PROBES
        if not probe:
            self.state.num_in_flight += 1
        try:
            if self.state.draining and not probe:
                raise HTTPError(
                    503,
                    "The server is shutting down and takes no new requests.",
                    code="shutting_down",
                    headers={"retry-after": "5", "connection": "close"},
                )
            if scope.get(SURPLUS) and not probe:
                raise HTTPError(
                    503,
                    "The server has as many connections as it takes; use one that is open.",
                    code="too_many_connections",
                    headers={"retry-after": "1"},
                )
            await self.app(scope, receive, request.send)
        except ClientDisconnect:
            request.gone = True
        except Exception as error:
            await self._answer(error, request, scope, receive)
        finally:
            if not probe:
                self.state.num_in_flight -= 1
            request.log(quiet=probe)

    async def _answer(
        self, error: Exception, request: _Exchange, scope: Scope, receive: Receive
    ) -> None:
        log_failure(logger, "request failed", error, request.id)
        if not request.status:
            await error_response(error)(scope, receive, request.send)
            return
        # Too late for an answer. Closing tells the client that what it has is not whole.
        cut_off = scope.get(CUT_OFF)
        if cut_off is not None:
            cut_off()


class _Exchange:
    """One request and its answer, as far as the log and the headers care."""

    def __init__(self, scope: Scope, send: Send) -> None:
        given = (header(scope, b"x-request-id") or b"").decode("latin-1")
        self.id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = self.id
        self.status = 0
        self.gone = False
        self._scope = scope
        self._send = send
        self._start = time.monotonic()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            extra = [(b"x-request-id", self.id.encode()), (b"x-content-type-options", b"nosniff")]
            message = {**message, "headers": [*message.get("headers", []), *extra]}
        await self._send(message)

    def log(self, *, quiet: bool) -> None:
        logger.log(
            logging.DEBUG if quiet else logging.INFO,
            "%s %s %s %.1f ms",
            self._scope["method"],
            self._scope["path"],
            "client went away" if self.gone else self.status or "no answer",
            (time.monotonic() - self._start) * 1e3,
            extra={"request_id": self.id},
        )
