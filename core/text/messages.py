"""Chat messages as templates want them: text content, tool arguments as objects."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InvalidRequestError

TEXT_PART_TYPES = ("text", "input_text", "output_text", "refusal")


def normalise_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Plain dictionaries with a `role` and a string `content`.

    The role `developer` becomes `system`, the older name of the same thing, which templates know.
    Content parts are joined by newlines, a missing content becomes the empty string, and a tool
    call's `arguments` (a JSON string on the wire) become an object. Raises `InvalidRequestError`
    naming the message and field.
    """
    if isinstance(messages, Mapping | str) or not messages:
        raise InvalidRequestError(
            "messages must be a non-empty list of objects with `role` and `content`.",
            param="messages",
        )
    return [_normalise(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _normalise(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidRequestError(f"{where} must be an object with a `role`.", param=where)
    result = dict(message)
    if result["role"] == "developer":
        result["role"] = "system"
    result["content"] = _text_of(message.get("content"), f"{where}.content")
    calls = message.get("tool_calls")
    if calls:
        result["tool_calls"] = [
            _tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)
        ]
    else:
        result.pop("tool_calls", None)
    return result


def _text_of(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        return "\n".join(_part_text(part, f"{where}[{i}]") for i, part in enumerate(content))
    raise InvalidRequestError(f"{where} must be a string or a list of parts.", param=where)


def _part_text(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in TEXT_PART_TYPES:
        raise InvalidRequestError(
            f"{where} is of type {kind!r}: this model reads text only.", param=where
        )
    text = part.get("refusal" if kind == "refusal" else "text")
    if not isinstance(text, str):
        raise InvalidRequestError(f"{where} has no text.", param=where)
    return text


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise InvalidRequestError(f"{where} must be an object.", param=where)
    result = dict(call)
    function = call.get("function")
    if isinstance(function, Mapping):
        result["function"] = {
            **function,
            "arguments": _arguments(function.get("arguments"), f"{where}.function.arguments"),
        }
    return result


def _arguments(value: Any, where: str) -> Mapping[str, Any]:
    if value is None or value == "":
        return {}
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{where} is not valid JSON: {error}", param=where) from None
    if not isinstance(value, Mapping):
        raise InvalidRequestError(f"{where} is not a JSON object.", param=where)
    return value
