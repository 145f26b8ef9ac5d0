"""Errors as OpenAI shapes them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException

from ..core.errors import EngineDeadError, InvalidRequestError, QueueFullError, TrimaranError
from .responses import JSONResponse

MAX_MESSAGE = 2_000
# A server that starts again, or drains, is worth another try after about this many seconds.
RETRY_UNAVAILABLE = 5

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable",
    504: "timeout_error",
}


class HTTPError(Exception):
    """An answer other than 2xx, decided by the HTTP layer itself."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})


class DeadlineError(TrimaranError):
    """The request's own `timeout_ms` passed."""

    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"


def error_body(
    message: str, *, type: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    if len(message) > MAX_MESSAGE:
        message = message[:MAX_MESSAGE] + "…"
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def describe(error: BaseException) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and extra headers for any exception; foreign ones reveal nothing."""
    if isinstance(error, HTTPError):
        kind = _TYPES.get(error.status, "internal_error")
        body = error_body(error.message, type=kind, param=error.param, code=error.code)
        return error.status, body, error.headers
    if isinstance(error, StarletteHTTPException):
        headers = dict(error.headers or {})
        kind = _TYPES.get(error.status_code, "internal_error")
        code = "method_not_allowed" if error.status_code == 405 else None
        body = error_body(f"{error.detail}.", type=kind, code=code)
        return error.status_code, body, headers
    if isinstance(error, TrimaranError) and error.status < 500:
        body = error_body(error.message, type=error.type, param=error.param, code=error.code)
        return error.status, body, _retry_header(error)
    if isinstance(error, TrimaranError) and error.status in (503, 504):
        body = error_body(_public(error), type=error.type, code=error.code)
        headers = {"retry-after": str(RETRY_UNAVAILABLE)} if error.status == 503 else {}
        return error.status, body, headers
    code = error.code if isinstance(error, TrimaranError) else "internal_error"
    message = "The server failed on this request; its log has the details under the request id."
    return 500, error_body(message, type="internal_error", code=code), {}


def log_failure(logger: logging.Logger, what: str, error: BaseException, request_id: str) -> None:
    """A line about an answer of 500 or more that the HTTP layer has not decided itself. Only
    what nobody raised on purpose comes with its traceback."""
    status, _, _ = describe(error)
    if status < 500 or isinstance(error, HTTPError):
        return
    levels = {503: logging.WARNING, 504: logging.INFO}
    logger.log(
        levels.get(status, logging.ERROR),
        "%s: %s",
        what,
        error,
        exc_info=None if isinstance(error, TrimaranError) else error,
        extra={"request_id": request_id},
    )


def error_response(error: BaseException) -> JSONResponse:
    status, body, headers = describe(error)
    return JSONResponse(body, status=status, headers=headers)


def from_validation(error: ValidationError, tags: frozenset[str]) -> InvalidRequestError:
    """The first finding of pydantic, as one sentence that names the field.

    `tags` are names of union branches, which users did not write and need not see.
    """
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = [str(part) for part in first["loc"] if part not in tags]
    name = _field_name(path)
    more = error.error_count() - 1
    tail = f" ({more} more problems)" if more else ""
    message = f"{name}: {first['msg']}{tail}." if name else f"{first['msg']}{tail}."
    return InvalidRequestError(message[:MAX_MESSAGE], param=name or None)


def _field_name(path: list[str]) -> str:
    """`messages[0].content` for ("messages", "0", "content"), never longer than a line."""
    text = ""
    for part in path[:8]:
        part = part[:64]
        text += f"[{part}]" if part.isdigit() else f".{part}" if text else part
    return text


def _public(error: TrimaranError) -> str:
    """The engine's own exception may hold paths; what clients read does not."""
    if isinstance(error, EngineDeadError):
        cause = f": {error.cause}" if error.cause else ""
        return f"The engine is not running{cause}. It may be starting again; retry shortly."
    return error.message


def _retry_header(error: TrimaranError) -> dict[str, str]:
    if isinstance(error, QueueFullError):
        return {"retry-after": str(max(1, math.ceil(error.retry_after)))}
    return {}
