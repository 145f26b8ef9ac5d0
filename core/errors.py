"""The one error hierarchy. A message says what was wrong, where, and what to change."""

from __future__ import annotations


class TrimaranError(Exception):
    """Base of every error the engine raises on purpose.

    `status`, `type` and `code` are the HTTP status and the OpenAI error fields it maps to.
    """

    status = 500
    type = "internal_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class ConfigError(TrimaranError, ValueError):
    """A flag or configuration value that cannot be honoured."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_config"


class InvalidRequestError(TrimaranError, ValueError):
    """A request that can never be served as asked: the client has to change it."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class ContextLengthError(InvalidRequestError):
    """Prompt (plus the tokens asked for) exceeds the context or the KV pool."""

    code = "context_length_exceeded"


class ModelNotFoundError(TrimaranError, LookupError):
    """The request names a model that this server does not serve."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class QueueFullError(TrimaranError):
    """The waiting queue is at its limit; `retry_after` is in seconds."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ModelLoadError(TrimaranError):
    """A model directory, file or tensor that is missing, corrupt or misshapen."""

    code = "model_load_failed"


class KVMemoryError(TrimaranError, MemoryError):
    """The KV cache does not fit: says how much is needed and which flag to change."""

    code = "kv_memory"


class PlatformError(TrimaranError):
    """A platform is missing, broken, or lacks something required."""

    code = "platform"


class EngineDeadError(TrimaranError):
    """The engine process ended; the message carries its own exception.

    `cause` is what clients may read of it: an exception's own words may hold paths.
    """

    status = 503
    type = "service_unavailable"
    code = "engine_dead"

    def __init__(self, message: str, *, param: str | None = None, cause: str = "") -> None:
        super().__init__(message, param=param)
        self.cause = cause


class DeviceLostError(EngineDeadError):
    """The device cannot be used any more: the engine on it has ended."""


class StepError(TrimaranError):
    """The forward of one step failed; the requests of that batch end with `error`."""

    code = "step_failed"
