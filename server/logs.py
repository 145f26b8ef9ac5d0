"""Log lines: one a record whatever is in it, and never in the way of a request.

A terminal that hangs, a full disk or a closed pipe must not stop the event loop, so records go
through a bounded queue to a thread; what does not fit, or cannot be written, is counted.
"""

from __future__ import annotations

import json
import logging
import queue
import re
import sys
import threading
import time
from typing import TextIO

QUEUE_LINES = 10_000
# C0 with CR, LF and ESC, DEL, C1, and the line separators that some viewers break at.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def escape(text: str) -> str:
    r"""`text` on one line: control characters as \xNN or \uNNNN."""

    def spell(match: re.Match[str]) -> str:
        code = ord(match.group())
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"

    return _CONTROL.sub(spell, text)


class TextFormatter(logging.Formatter):
    """`2026-01-31 12:00:00.123 INFO server.app [request id] message`."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        request_id = getattr(record, "request_id", None)
        tag = f" [{request_id}]" if request_id else ""
        head = f"{stamp}.{int(record.msecs):03d} {record.levelname} {_short(record.name)}{tag} "
        return head + escape(_message(self, record))


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, request_id, message."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, str | float] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": _short(record.name),
        }
        request_id = getattr(record, "request_id", None)
        if request_id:
            fields["request_id"] = str(request_id)
        fields["message"] = _message(self, record)
        return json.dumps(fields)  # ASCII: every control character is escaped


def _message(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    message = record.getMessage()
    if record.exc_info:
        message += "\n" + formatter.formatException(record.exc_info)
    return message


def _short(name: str) -> str:
    return name.removeprefix("trimaran.")


class DroppingHandler(logging.Handler):
    """Writes lines from a thread of its own; `dropped` counts those that were lost."""

    def __init__(self, stream: TextIO | None, capacity: int = QUEUE_LINES) -> None:
        super().__init__()
        self.stream = stream  # None where the process was started with it closed
        self.dropped = 0
        self._lines: queue.Queue[str | None] = queue.Queue(capacity)
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:  # a bad format string must not fail the request that logged it
            line = f"unprintable log record from {record.name}"
        self.put(line)

    def put(self, line: str) -> None:
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self.dropped += 1

    def finish(self, seconds: float = 1.0) -> bool:
        """Writes what is queued and ends the thread; False if the stream is stuck."""
        try:
            self._lines.put(None, timeout=seconds / 2)
        except queue.Full:
            return False
        self._thread.join(timeout=seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                if self.stream is None:
                    raise ValueError("closed")
                self.stream.write(line + "\n")
                if self._lines.empty():
                    self.stream.flush()
            except (OSError, ValueError):  # full disk, broken pipe, closed file
                self.dropped += 1


def configure(level: str, style: str, stream: TextIO | None = None) -> DroppingHandler:
    """Sends the records of this package and of uvicorn to `stream` (stderr)."""
    handler = DroppingHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    logging.raiseExceptions = False
    for name, threshold in (("trimaran", level.upper()), ("uvicorn", "WARNING")):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(threshold)
        logger.propagate = False
    return handler
