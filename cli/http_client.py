"""A small HTTP/1.1 client for asyncio: one request a connection, answers as they arrive.

It exists so that commands need no further package, and so that measuring a server costs little.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

from ..core.env import read_environment
from ..core.errors import TrimaranError

LINE_LIMIT = 1 << 20


class RemoteError(TrimaranError):
    """The server answered with an error, or not at all."""


class Client:
    """Speaks to one server. `url` with or without `/v1` at its end."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RemoteError(f"--url {url} is not an http address.")
        self.host = parts.hostname
        self.tls = parts.scheme == "https"
        self.port = parts.port or (443 if self.tls else 80)
        self.root = parts.path.rstrip("/").removesuffix("/v1")
        self.api_key = api_key

    @classmethod
    def from_flags(cls, namespace: argparse.Namespace) -> Client:
        """By --url and --api-key; the key may also come from the environment, as the server's."""
        keys = (namespace.api_key, *read_environment().api_keys)
        return cls(namespace.url, next(filter(None, keys), None))

    async def get(self, path: str) -> Any:
        return json.loads(b"".join([piece async for piece in self._request("GET", path, None)]))

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        return json.loads(b"".join([piece async for piece in self._request("POST", path, body)]))

    async def events(self, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The events of a stream, decoded, without the closing `[DONE]`."""
        buffer = b""
        async for piece in self._request("POST", path, body):
            *complete, buffer = (buffer + piece).split(b"\n\n")
            for one in complete:
                data = one.removeprefix(b"data: ")
                if data == b"[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    raise RemoteError(event["error"]["message"])
                yield event
        raise RemoteError("The server ended the stream before it was complete.")

    async def _request(
        self, method: str, path: str, body: dict[str, Any] | None
    ) -> AsyncIterator[bytes]:
        context = ssl.create_default_context() if self.tls else None
        try:
            reader, writer = await asyncio.open_connection(
                self.host, self.port, ssl=context, limit=LINE_LIMIT
            )
        except OSError as error:
            raise RemoteError(f"No server answers at {self.host}:{self.port}: {error}.") from None
        try:
            writer.write(self._head_and_body(method, path, body))
            await writer.drain()
            status, headers = await self._read_head(reader)
            pieces = _body_pieces(reader, headers)
            if status >= 300:
                raise _refusal(status, b"".join([piece async for piece in pieces]))
            async for piece in pieces:
                yield piece
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise RemoteError(f"The server closed the connection: {error}.") from None
        finally:
            writer.close()

    def _head_and_body(self, method: str, path: str, body: dict[str, Any] | None) -> bytes:
        data = b"" if body is None else json.dumps(body).encode()
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [
            f"{method} {self.root}{path} HTTP/1.1",
            f"Host: {host}:{self.port}",
            "Connection: close",
            f"Content-Length: {len(data)}",
        ]
        if body is not None:
            lines.append("Content-Type: application/json")
        if self.api_key:
            lines.append(f"Authorization: Bearer {self.api_key}")
        return "\r\n".join([*lines, "", ""]).encode() + data

    @staticmethod
    async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
        status = (await reader.readuntil(b"\r\n")).split(b" ", 2)[1]
        headers = {}
        while (line := await reader.readuntil(b"\r\n")) != b"\r\n":
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.strip().lower()] = value.strip()
        return int(status), headers


async def _body_pieces(
    reader: asyncio.StreamReader, headers: dict[str, str]
) -> AsyncIterator[bytes]:
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            yield (await reader.readexactly(size + 2))[:-2]
    elif "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
    else:
        yield await reader.read()


def _refusal(status: int, body: bytes) -> RemoteError:
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = body[:200].decode(errors="replace")
    if status == 401:
        message += " Give one with --api-key, or in TRIMARAN_API_KEY."
    return RemoteError(f"The server answered {status}: {message}")
