"""Messages between processes: a kind and one typed msgpack body. Never pickle."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec

from ..args import EngineArgs
from ..log_lines import LogStyle
from ..model_info import ModelInfo
from .client import EngineInfo, FromEngine, ToEngine
from .messages import (
    AbortRequests,
    AddRequests,
    FinishSequence,
    StepMessage,
    UtilityCall,
    UtilityResult,
)

KINDS: dict[type, bytes] = {
    AddRequests: b"A",
    AbortRequests: b"B",
    FinishSequence: b"F",
    UtilityCall: b"C",
    StepMessage: b"S",
    UtilityResult: b"R",
}
_DECODERS: dict[bytes, msgspec.msgpack.Decoder[Any]] = {
    kind: msgspec.msgpack.Decoder(cls) for cls, kind in KINDS.items()
}


class WireError(ValueError):
    """A message that is none of ours."""


def encode(message: ToEngine | FromEngine) -> list[bytes]:
    """The message's frames."""
    return [KINDS[type(message)], msgspec.msgpack.encode(message)]


def decode(frames: list[bytes]) -> Any:
    """The message again. Raises `WireError` for anything that is not exactly one of ours."""
    if len(frames) != 2 or frames[0] not in _DECODERS:
        raise WireError(f"unknown message of {len(frames)} frames")
    try:
        return _DECODERS[frames[0]].decode(frames[1])
    except msgspec.MsgspecError as error:
        raise WireError(f"malformed message of kind {frames[0]!r}: {error}") from error


class Launch(msgspec.Struct, frozen=True):
    """The first line an engine process reads: what to run, and how to reach its parent."""

    args: EngineArgs
    parent_pid: int
    status_fd: int
    directory: str
    to_engine: str
    from_engine: str
    log: LogStyle


class Status(msgspec.Struct, omit_defaults=True):
    """A line an engine process writes: ready (`info`), or why it ends (`kind`, `message`)."""

    info: dict[str, Any] | None = None
    kind: str | None = None
    message: str = ""
    param: str | None = None


def encode_line(line: Launch | Status) -> bytes:
    return msgspec.json.encode(line) + b"\n"


def decode_launch(line: bytes) -> Launch:
    return msgspec.json.decode(line, type=Launch)


def decode_status(line: bytes) -> Status:
    return msgspec.json.decode(line, type=Status)


def info_to_wire(info: EngineInfo) -> dict[str, Any]:
    """Plain JSON values; of the engine's own model no more than a front end knows."""
    model = {field.name: getattr(info.model, field.name) for field in dataclasses.fields(ModelInfo)}
    known = dataclasses.replace(info, model=ModelInfo(**model))
    return dict(msgspec.to_builtins(known, enc_hook=str))


def info_from_wire(value: dict[str, Any]) -> EngineInfo:
    return msgspec.convert(value, EngineInfo, dec_hook=_revive)


def _revive(cls: type, value: Any) -> Any:
    if issubclass(cls, Path):
        return Path(value)
    raise NotImplementedError(cls.__name__)
