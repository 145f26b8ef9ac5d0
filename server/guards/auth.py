"""API keys: deny by default, keys held as digests, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from ..errors import HTTPError
from .asgi import ASGIApp, Receive, Scope, Send, header, route_path

PUBLIC_PATHS = frozenset({"/livez", "/readyz", "/health", "/ping"})
SAFE_METHODS = frozenset({"GET", "HEAD"})
MAX_KEY_BYTES = 1_024


def digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class KeyRing:
    """The accepted keys. Empty: everybody is let in, as one tenant.

    Space around a key is no part of it, here as in what is presented.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [digest(key.encode().strip()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def identify(self, authorization: bytes | None) -> bytes | None:
        """The key's digest, or None. Every stored digest is compared, whichever matches."""
        scheme, _, key = (authorization or b"").partition(b" ")
        key = key.strip()
        if scheme.lower() != b"bearer" or not 0 < len(key) <= MAX_KEY_BYTES:
            return None
        given, found = digest(key), None
        for known in self._digests:
            if hmac.compare_digest(known, given):
                found = known
        return found


class AuthMiddleware:
    """401 for everything but the public probes; `scope["state"]["key_id"]` for the rest."""

    def __init__(self, app: ASGIApp, keys: KeyRing, *, public_metrics: bool) -> None:
        self.app = app
        self.keys = keys
        self.public = PUBLIC_PATHS | ({"/metrics"} if public_metrics else set())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        key_id = b""
        if self.keys and not self._is_public(scope):
            key_id = self.keys.identify(header(scope, b"authorization")) or b""
            if not key_id:
                raise HTTPError(
                    401,
                    "A valid API key is needed: send it as `Authorization: Bearer KEY`.",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
        scope.setdefault("state", {})["key_id"] = key_id
        await self.app(scope, receive, send)

    def _is_public(self, scope: Scope) -> bool:
        # The very path that the router compares: percent-decoded once by the HTTP server, and
        # without the root path that it put in front. So no path is public here and another there.
        return scope["method"] in SAFE_METHODS and route_path(scope) in self.public
