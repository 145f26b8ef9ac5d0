"""Bounded JSON: malformed, deep or huge documents are refused, and big ones read off the loop.

msgspec refuses NaN, infinities, bad UTF-8, lone surrogates and overlong numbers by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from ..core.errors import InvalidRequestError

T = TypeVar("T")

MAX_DEPTH = 64
MAX_KEYS = 10_000
MAX_VALUES = 4_000_000
# Up to this many bytes, parsing and checking take less than handing them to a thread.
INLINE_BYTES = 65_536
# The same for token ids that are compared, or turned into text.
INLINE_TOKENS = 8_192

_decode = msgspec.json.Decoder().decode


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`; raises `InvalidRequestError` for anything else."""
    if not body.strip():
        raise _bad("The body is empty; it must be a JSON object.")
    try:
        value = _decode(body)
    except RecursionError:
        raise _bad(f"The JSON body is nested deeper than {MAX_DEPTH} levels.") from None
    except (msgspec.MsgspecError, ValueError, OverflowError) as error:
        raise _bad(f"The body is not valid JSON: {_reason(error)}.") from None
    if not isinstance(value, dict):
        raise _bad("The body must be a JSON object.")
    check_bounds(value)
    return value


async def off_loop(big: bool, work: Callable[[], T]) -> T:
    """What `work` returns; computed in a thread if it is `big`, so that the loop goes on."""
    return await asyncio.to_thread(work) if big else work()


def check_bounds(value: Any) -> None:
    """Raises beyond `MAX_DEPTH` levels, `MAX_KEYS` keys an object, or `MAX_VALUES` in all."""
    level, depth, count = [value], 0, 0
    while level:
        count += len(level)
        if depth > MAX_DEPTH:
            raise _bad(f"The JSON body is nested deeper than {MAX_DEPTH} levels.")
        if count > MAX_VALUES:
            raise _bad(f"The JSON body holds more than {MAX_VALUES} values.")
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                if len(item) > MAX_KEYS:
                    raise _bad(f"An object in the JSON body has more than {MAX_KEYS} keys.")
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
        level, depth = below, depth + 1


def _reason(error: Exception) -> str:
    return "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)[:200]


def _bad(message: str) -> InvalidRequestError:
    error = InvalidRequestError(message)
    error.code = "invalid_json"
    return error
