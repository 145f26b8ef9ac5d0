"""Bodies: JSON only, and never more bytes than allowed, however they are sent."""

from __future__ import annotations

from ..errors import HTTPError
from .asgi import ASGIApp, Message, Receive, Scope, Send, header, header_values

BODY_METHODS = frozenset({"POST", "PUT", "PATCH"})


class BodyMiddleware:
    """413 as soon as more than `limit` bytes are announced or have arrived; 415 for a body that
    does not say that it is JSON; 400 for announcements that cannot be."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        self._check_length(scope)
        if scope["method"] in BODY_METHODS:
            _check_type(scope)
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self.limit:
                    raise self._too_large()
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


def _check_type(scope: Scope) -> None:
    kind = (header(scope, b"content-type") or b"").split(b";")[0].strip().lower()
    if kind != b"application/json":
        raise HTTPError(
            415,
            "The body must be JSON, with `Content-Type: application/json`.",
            code="unsupported_media_type",
        )
