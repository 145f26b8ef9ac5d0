"""Log lines that are never in the way of a request.

A terminal that hangs, a full disk or a closed pipe must not stop the event loop, so records go
through a bounded queue to a thread; what does not fit, or cannot be written, is counted.
"""

from __future__ import annotations

import logging
import queue
import sys
import threading
from typing import TextIO

from ..core.log_lines import PACKAGE, JsonFormatter, TextFormatter

QUEUE_LINES = 10_000


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
    for name, threshold in ((PACKAGE, level.upper()), ("uvicorn", "WARNING")):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(threshold)
        logger.propagate = False
    return handler
