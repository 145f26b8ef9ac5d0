"""`use_beam_search`: a request's `n` best sequences by beam search."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

from ...core.errors import InvalidRequestError, QueueFullError, StepError
from ...core.sampling_params import BeamSearchParams
from ...core.types import BeamSearchOutput, FinishReason, RequestMetrics
from ..errors import DeadlineError
from ..metrics import RequestTimer
from ..protocol.sampling import MAX_BEAMS, SamplingFields
from ..router import ServedModel
from ..state import ServerState
from .common import usage_of
from .streams import SubmitOptions

# Fields of sampling, which a search does not do.
_MEANINGLESS = (
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "prompt_logprobs",
    "logprobs",
    "return_token_ids",
    "echo",
)


async def search(
    state: ServerState,
    model: ServedModel,
    prompts: list[list[int]],
    fields: SamplingFields,
    options: SubmitOptions,
    max_tokens: int,
) -> list[BeamSearchOutput]:
    """One search a prompt, one after the other. Raises `DeadlineError` after `timeout_ms`."""
    for name in _MEANINGLESS:
        if getattr(fields, name, None):
            raise InvalidRequestError(
                f"{name} cannot be combined with use_beam_search.", param=name
            )
    if fields.n > MAX_BEAMS:
        raise InvalidRequestError(f"A beam search has at most {MAX_BEAMS} beams.", param="n")
    params = BeamSearchParams(
        beam_width=fields.n,
        max_tokens=max_tokens,
        ignore_eos=fields.ignore_eos,
        temperature=fields.temperature or 0.0,
        length_penalty=1.0 if fields.length_penalty is None else fields.length_penalty,
        include_stop_str_in_output=fields.include_stop_str_in_output,
    )
    deadline = None
    if options.timeout_ms is not None:
        deadline = asyncio.get_running_loop().time() + options.timeout_ms / 1e3
    outputs = []
    state.claim_id(options.request_id)
    try:
        for index, prompt in enumerate(prompts):
            timer = RequestTimer(state.metrics, model)
            one = dataclasses.replace(options, request_id=f"{options.request_id}-{index}")
            outputs.append(await _search_one(timer, prompt, params, one, deadline))
    except QueueFullError as error:
        state.metrics.count_rejection(model, error)
        raise
    finally:
        state.request_ids.discard(options.request_id)
    return outputs


async def _search_one(
    timer: RequestTimer,
    prompt: list[int],
    params: BeamSearchParams,
    options: SubmitOptions,
    deadline: float | None,
) -> BeamSearchOutput:
    """Counted like a request with as many sequences, also when the deadline (the loop's time) or
    the engine ends it; like any request, not when its client goes away."""
    reasons: list[str] = []
    try:
        async with asyncio.timeout_at(deadline):
            output = await timer.model.engine.beam_search(
                prompt,
                params,
                request_id=options.request_id,
                priority=options.priority,
                cache_salt=options.cache_salt,
                key_id=options.key_id,
            )
        timer.tokens = sum(len(beam.token_ids) for beam in output.sequences)
        reasons = [beam.finish_reason or "" for beam in output.sequences]
        return output
    except TimeoutError:
        reasons = [FinishReason.ABORT] * params.beam_width
        raise DeadlineError(
            f"The request did not finish within its timeout_ms of {options.timeout_ms}."
        ) from None
    except StepError:
        reasons = [FinishReason.ERROR] * params.beam_width
        raise
    finally:
        if reasons:
            timer.on_end(RequestMetrics(), len(prompt), reasons)


def search_usage(prompts: list[list[int]], outputs: list[BeamSearchOutput]) -> dict[str, Any]:
    generated = sum(len(beam.token_ids) for output in outputs for beam in output.sequences)
    return usage_of(sum(map(len, prompts)), generated, None)


async def beam_choices(
    state: ServerState,
    model: ServedModel,
    prompts: list[list[int]],
    fields: Any,
    options: SubmitOptions,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Choices and usage of a completions request."""
    max_tokens = 16 if fields.max_tokens is None else max(1, fields.max_tokens)
    outputs = await search(state, model, prompts, fields, options, max_tokens)
    choices = [
        {
            "index": prompt_index * fields.n + rank,
            "text": beam.text,
            "logprobs": None,
            "finish_reason": beam.finish_reason,
            "stop_reason": None,
            "cumulative_logprob": beam.cumulative_logprob,
        }
        for prompt_index, output in enumerate(outputs)
        for rank, beam in enumerate(output.sequences)
    ]
    return choices, search_usage(prompts, outputs)
