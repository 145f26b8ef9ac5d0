"""What completions and chat do alike: read, check, sample, count."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from ... import __version__
from ...core.errors import InvalidRequestError
from ...core.sampling_params import OutputKind, SamplingParams
from ..json_body import INLINE_BYTES, INLINE_TOKENS, off_loop, parse
from ..protocol.base import M, parse_request
from ..protocol.sampling import SamplingFields
from ..responses import JSONResponse
from ..router import ServedModel
from ..sse import EventStream, disconnected
from ..state import ServerState
from .streams import RequestStreams, SubmitOptions

T = TypeVar("T")

FINGERPRINT = f"trimaran-{__version__}"
IGNORED_HEADER = "x-trimaran-ignored"
_UNSAFE = re.compile(r"[^A-Za-z0-9_.\[\]-]")
# Sampling fields that pass to the engine when the request gives them, under the same name.
_PASSED = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "prompt_logprobs",
    "allowed_token_ids",
)
_ALWAYS = (
    "n",
    "stop",
    "stop_token_ids",
    "bad_words",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
)


async def read_request(
    request: Request, model: type[M], state: ServerState
) -> tuple[M, dict[str, str]]:
    """The validated body, and the headers of its answer."""
    body = await request.body()
    return await off_loop(len(body) > INLINE_BYTES, lambda: validated(parse(body), model, state))


def validated(body: dict[str, Any], model: type[M], state: ServerState) -> tuple[M, dict[str, str]]:
    """Raises `InvalidRequestError`, also for unknown fields where --strict-params is set."""
    parsed, ignored = parse_request(model, body)
    if not ignored:
        return parsed, {}
    names = [_UNSAFE.sub("?", name[:64]) for name in ignored]
    if state.args.strict_params:
        raise InvalidRequestError(f"Unknown fields: {', '.join(names)}.", param=names[0])
    return parsed, {IGNORED_HEADER: ",".join(names)}


def public_id(prefix: str, asked: str | None) -> str:
    return f"{prefix}-{asked or uuid.uuid4().hex}"


def sampling_params(model: ServedModel, fields: SamplingFields, **overrides: Any) -> SamplingParams:
    """The request's fields over the model's generation defaults; `overrides` above both."""
    values = {name: getattr(fields, name) for name in _ALWAYS}
    for name in _PASSED:
        if (value := getattr(fields, name)) is not None:
            values[name] = value
    if fields.logit_bias:
        values["logit_bias"] = {int(key): bias for key, bias in fields.logit_bias.items()}
    kind = OutputKind.DELTA if fields.stream else OutputKind.FINAL_ONLY
    return model.engine.default_sampling_params(**{**values, "output_kind": kind, **overrides})


def submit_options(
    request: Request, model: ServedModel, fields: SamplingFields, request_id: str
) -> SubmitOptions:
    if fields.priority and model.args.scheduling_policy != "priority":
        raise InvalidRequestError(
            "priority has a meaning only under --scheduling-policy priority.", param="priority"
        )
    return SubmitOptions(
        request_id=request_id,
        priority=fields.priority,
        cache_salt=fields.cache_salt,
        key_id=request.scope.get("state", {}).get("key_id", b""),
        timeout_ms=fields.timeout_ms,
    )


def check_combinations(fields: SamplingFields) -> None:
    """Pairs of fields that contradict each other."""
    if fields.stream_options is not None and not fields.stream:
        raise InvalidRequestError(
            "stream_options is only allowed together with stream.", param="stream_options"
        )
    if fields.length_penalty is not None and not fields.use_beam_search:
        raise InvalidRequestError(
            "length_penalty belongs to use_beam_search.", param="length_penalty"
        )
    if fields.use_beam_search and fields.stream:
        raise InvalidRequestError("A beam search cannot be streamed.", param="stream")


async def check_token_ids(model: ServedModel, token_ids: list[int], param: str = "prompt") -> None:
    vocab_size = model.engine.model.vocab_size
    highest = await off_loop(len(token_ids) > INLINE_TOKENS, lambda: max(token_ids, default=0))
    if highest >= vocab_size:
        raise InvalidRequestError(
            f"{param}: token id {highest} is outside the vocabulary of {vocab_size}.",
            param=param,
        )


def truncated(token_ids: list[int], limit: int | None) -> list[int]:
    """The last `limit` tokens of a prompt."""
    return token_ids if limit is None else token_ids[-limit:]


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Runs `work`; cancels it, and raises `ClientDisconnect`, when the client goes away first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def answer(
    request: Request,
    streams: RequestStreams,
    headers: dict[str, str],
    *,
    collect: Callable[[], Coroutine[Any, Any, dict[str, Any]]],
    events: Callable[[], AsyncGenerator[bytes, None] | None],
) -> Response:
    """The response to a submitted request: `events` as a stream, or without them `collect`.

    Whatever happens, the streams are closed: here, or by the stream that was handed over.
    """
    handed_over = False
    try:
        generator = events()
        if generator is None:
            body = await unless_disconnected(request, collect())
            return JSONResponse(body, 200, headers)
        await unless_disconnected(request, streams.settle())
        state, model = streams.state, streams.model
        response = EventStream(
            generator,
            limit=state.args.max_stream_buffer,
            headers=headers,
            close=streams.aclose,
            on_cut=state.metrics.slow_readers.labels(model.name, str(model.index)).inc,
        )
        handed_over = True
        return response
    finally:
        if not handed_over:
            await streams.aclose()


def usage(streams: RequestStreams, state: ServerState) -> dict[str, Any]:
    return usage_of(
        streams.num_prompt,
        streams.num_generated,
        streams.num_cached if state.args.enable_prompt_tokens_details else None,
    )


def usage_of(prompt: int, generated: int, cached: int | None) -> dict[str, Any]:
    details = None if cached is None else {"cached_tokens": cached}
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": details,
    }


def wants_usage(fields: SamplingFields) -> tuple[bool, bool]:
    """Whether a stream ends with usage, and whether each of its chunks carries it."""
    options = fields.stream_options
    return (
        (False, False)
        if options is None
        else (
            options.include_usage,
            options.include_usage and options.continuous_usage_stats,
        )
    )
