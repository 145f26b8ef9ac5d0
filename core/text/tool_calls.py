"""Tool calls in the Hermes form, `<tool_call>{"name": …, "arguments": {…}}</tool_call>`.

The parser is incremental and linear; a whole answer is one long delta to it, so that streamed
calls equal those that are not.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from typing import Any

OPEN = "<tool_call>"
CLOSE = "</tool_call>"
MAX_CALLS = 128


@dataclass(frozen=True)
class ToolCall:
    """A call the model asks for; `arguments` is JSON text."""

    index: int
    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def as_message(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}

    def as_delta(self) -> dict[str, Any]:
        return {"index": self.index, **self.as_message()}


@dataclass
class HermesParser:
    """Splits an answer into text and calls. What looks like a call but is none stays text."""

    limit: int = MAX_CALLS
    num_calls: int = 0
    _pending: list[str] = field(default_factory=list)
    _tail: str = ""
    _space: list[str] = field(default_factory=list)
    _inside: bool = False

    def feed(self, text: str, *, last: bool = False) -> tuple[str, list[ToolCall]]:
        """The text and the calls that `text` completes; `last` flushes what is held back."""
        content: list[str] = []
        calls: list[ToolCall] = []
        text, start = self._tail + text, 0
        self._tail = ""
        while start < len(text):
            marker = CLOSE if self._inside else OPEN
            end = text.find(marker, start)
            found = end >= 0
            if not found:
                end = len(text) - (0 if last else _overlap(text, start, marker))
                self._tail = text[end:]
            self._take(content, text[start:end])
            start = end + len(marker) if found else len(text)
            if found and self._inside:
                self._finish(content, calls, closed=True)
            elif found:
                self._inside = True
        if last:
            self._end(content, calls)
        return "".join(content), calls

    def _take(self, content: list[str], text: str) -> None:
        if self._inside:
            self._pending.append(text)
            return
        # White space is held back: between calls, and around them, it belongs to no message.
        kept = text.rstrip()
        if kept:
            content += [*self._space, kept]
            self._space.clear()
        self._space.append(text[len(kept) :])

    def _finish(self, content: list[str], calls: list[ToolCall], *, closed: bool) -> None:
        """The body of a call is complete (or, at the end of an answer, simply over)."""
        body = "".join(self._pending)
        self._pending.clear()
        self._inside = False
        parsed = _parse_call(body)
        if parsed is None:
            self._take(content, f"{OPEN}{body}{CLOSE if closed else ''}")
            return
        self._space.clear()
        if self.num_calls < self.limit:
            calls.append(ToolCall(self.num_calls, *parsed))
            self.num_calls += 1

    def _end(self, content: list[str], calls: list[ToolCall]) -> None:
        if self._inside:
            self._finish(content, calls, closed=False)
        if not self.num_calls:
            content += self._space
        self._space.clear()


def _overlap(text: str, start: int, marker: str) -> int:
    """How many of the last characters of `text` may be the beginning of `marker`."""
    for size in range(min(len(marker) - 1, len(text) - start), 0, -1):
        if text.endswith(marker[:size]):
            return size
    return 0


def _parse_call(body: str) -> tuple[str, str] | None:
    """Name and arguments of a call, or None if the text is not one."""
    try:
        value = json.loads(body)
        name = value.get("name") if isinstance(value, dict) else None
        if not isinstance(name, str) or not name:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        if not isinstance(arguments, str):
            arguments = json.dumps(
                arguments, ensure_ascii=False, separators=(",", ":"), allow_nan=False
            )
        (name + arguments).encode()  # a lone surrogate is no text that could be sent on
    except (ValueError, RecursionError):
        return None
    return name, arguments
