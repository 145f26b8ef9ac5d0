"""What the ranks of a parallel group say to each other: length-prefixed msgpack over a socket pair.

The first rank sends `Boot`, then step plans; the others answer with `Report`s. Typed, never
pickled. Needs msgspec, which comes with the `server` extra.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch

from ..platforms.interface import GroupSpec
from .config import EngineConfig
from .dtypes import dtype_name
from .log_lines import LogStyle

_LENGTH = struct.Struct("<Q")
MAX_FRAME = 1 << 31

T = TypeVar("T")


class Boot(msgspec.Struct, frozen=True):
    """What a rank is built from."""

    config: EngineConfig
    group: GroupSpec
    log: LogStyle


class Report(msgspec.Struct, frozen=True):
    """How a rank fares: `state` is "ready", "step" (that step is over; `error` says how, if not
    well), or the rank ends for the reason `error`: "failed" (it cannot start) or "lost" (its device
    is gone)."""

    state: str
    step_id: int = -1
    error: str | None = None


class LinkClosed(ConnectionError):
    """The other side is gone."""


def _encode_other(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(f"{type(value).__name__} does not travel between ranks")


def _decode_other(kind: type, value: Any) -> Any:
    if kind is torch.dtype:
        return getattr(torch, value)
    if issubclass(kind, Path):
        return Path(value)
    raise NotImplementedError(f"{kind.__name__} does not travel between ranks")


class Link:
    """One end of a socket pair. Sending and receiving may happen on two threads."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._encoder = msgspec.msgpack.Encoder(enc_hook=_encode_other)
        self._decoders: dict[Any, msgspec.msgpack.Decoder[Any]] = {}

    def send(self, message: Any) -> None:
        self.send_frame(self.encode(message))

    def encode(self, message: Any) -> bytes:
        body = self._encoder.encode(message)
        return _LENGTH.pack(len(body)) + body

    def send_frame(self, frame: bytes) -> None:
        """Send what `encode` made; raises LinkClosed."""
        try:
            self._socket.sendall(frame)
        except OSError as error:
            raise LinkClosed(str(error)) from error

    def receive(self, kind: type[T]) -> T:
        """The next message, which is a `kind`; raises LinkClosed at the end."""
        if kind not in self._decoders:
            self._decoders[kind] = msgspec.msgpack.Decoder(kind, dec_hook=_decode_other)
        (size,) = _LENGTH.unpack(self._read(_LENGTH.size))
        if size > MAX_FRAME:
            raise LinkClosed(f"a frame of {size} bytes: the stream is broken")
        return self._decoders[kind].decode(self._read(size))

    def _read(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            try:
                part = self._socket.recv(size - len(parts))
            except OSError as error:
                raise LinkClosed(str(error)) from error
            if not part:
                raise LinkClosed("the other end is closed")
            parts += part
        return bytes(parts)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # never connected, or the other end went first
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
