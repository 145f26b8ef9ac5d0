"""Log records as lines, one a record whatever is in it; and children that log as their parent."""

from __future__ import annotations

import json
import logging
import re
import time
from dataclasses import dataclass

PACKAGE = "trimaran"
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


@dataclass(frozen=True, slots=True)
class LogStyle:
    """How a process logs."""

    level: int
    json: bool

    @classmethod
    def of_this_process(cls) -> LogStyle:
        logger = logging.getLogger(PACKAGE)
        handlers = logger.handlers or logging.getLogger().handlers
        in_json = any(isinstance(one.formatter, JsonFormatter) for one in handlers)
        return cls(logger.getEffectiveLevel(), in_json)

    def apply(self) -> None:
        """Send every record of this process, and Python's warnings, to the standard error."""
        handler = logging.StreamHandler()
        handler.setFormatter(JsonFormatter() if self.json else TextFormatter())
        logging.basicConfig(level=self.level, handlers=[handler])
        logging.captureWarnings(True)


def _message(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    message = record.getMessage()
    if record.exc_info:
        message += "\n" + formatter.formatException(record.exc_info)
    return message


def _short(name: str) -> str:
    return name.removeprefix(f"{PACKAGE}.")
