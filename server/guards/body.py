"""Bodies: JSON only, never more bytes than allowed, however they are sent, and not for ever."""

from __future__ import annotations

import asyncio

from ...core.args import ServerArgs
from ..errors import HTTPError
from .asgi import ASGIApp, Message, Receive, Scope, Send, header, header_values

BODY_METHODS = frozenset({"POST", "PUT", "PATCH"})
# What has arrived buys more time, so that a large body may come over a slow line, but a trickle
# may not keep a request open.
SLOWEST_BYTES_PER_SECOND = 16_384


class BodyMiddleware:
    """413 as soon as more than `limit` bytes are announced or have arrived; 415 for a body that
    does not say that it is JSON; 400 for announcements that cannot be; 408 for one that has not
    arrived within `seconds` and the time that its bytes may take."""

    def __init__(self, app: ASGIApp, args: ServerArgs) -> None:
        self.app = app
        self.limit = args.max_body_bytes
        self.seconds = args.receive_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        self._check_length(scope)
        if scope["method"] in BODY_METHODS:
            _check_type(scope)
        received, complete = 0, False
        start = asyncio.get_running_loop().time()

        async def bounded() -> Message:
            nonlocal received, complete
            if complete:  # what comes now is the client's leaving
                return await receive()
            deadline = start + self.seconds + received / SLOWEST_BYTES_PER_SECOND
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise self._too_slow() from None
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self.limit:
                    raise self._too_large()
            complete = not message.get("more_body", False)
            return message

        await self.app(scope, bounded, send)

    def _check_length(self, scope: Scope) -> None:
        values = header_values(scope, b"content-length")
        if not values:
            return
        if len(values) > 1 or not values[0].isdigit() or len(values[0]) > 18:
            raise HTTPError(400, "The Content-Length header is malformed.", code="bad_request")
        if int(values[0]) > self.limit:
            raise self._too_large()

    def _too_large(self) -> HTTPError:
        return HTTPError(
            413,
            f"The request body exceeds {self.limit} bytes.",
            code="body_too_large",
        )

    def _too_slow(self) -> HTTPError:
        return HTTPError(
            408,
            f"The request body did not arrive in time ({self.seconds:g} s, and one more for each "
            f"{SLOWEST_BYTES_PER_SECOND} bytes).",
            code="body_too_slow",
            headers={"connection": "close"},
        )


def _check_type(scope: Scope) -> None:
    kind = (header(scope, b"content-type") or b"").split(b";")[0].strip().lower()
    if kind != b"application/json":
        raise HTTPError(
            415,
            "The body must be JSON, with `Content-Type: application/json`.",
            code="unsupported_media_type",
        )
