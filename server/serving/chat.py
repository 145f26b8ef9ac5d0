"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ...core.errors import InvalidRequestError
from ...core.sampling_params import SamplingParams
from ...core.text.tool_calls import MAX_CALLS, HermesParser, ToolCall
from ...core.types import CompletionOutput, RequestOutput
from ..protocol.chat import ChatRequest
from ..responses import JSONResponse
from ..router import ServedModel
from ..sse import event
from ..state import ServerState
from . import chat_prompt, common
from .beams import search, search_usage
from .logprobs import chat_logprobs, prompt_logprobs
from .streams import RequestStreams


@dataclass
class _Call:
    """One request on its way."""

    fields: ChatRequest
    model: ServedModel
    prompt: list[int]
    id: str
    role: str
    created: int = field(default_factory=lambda: int(time.time()))

    def envelope(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.fields.model or self.model.name,
            "system_fingerprint": common.FINGERPRINT,
        }

    @property
    def num_logprobs(self) -> int | None:
        return (self.fields.top_logprobs or 0) if self.fields.logprobs else None

    @property
    def max_tokens(self) -> int | None:
        """None: the rest of the context."""
        fields = self.fields
        return fields.max_completion_tokens or fields.max_tokens

    @property
    def echoed(self) -> str:
        """With echo, the last message's text, if this answer is its continuation."""
        last = self.fields.messages[-1]
        if not self.fields.echo or last.role != self.role or not isinstance(last.content, str):
            return ""
        return last.content

    def parser(self) -> HermesParser | None:
        if not self.fields.tools or self.fields.tool_choice == "none":
            return None
        return HermesParser(MAX_CALLS if self.fields.parallel_tool_calls else 1)


class ChatCompletions:
    """The endpoint."""

    def __init__(self, state: ServerState) -> None:
        self.state = state

    async def create(self, request: Request) -> Response:
        fields, headers = await common.read_request(request, ChatRequest, self.state)
        common.check_combinations(fields)
        if fields.top_logprobs and not fields.logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs.", param="top_logprobs")
        model = self.state.router.resolve(fields.model)
        prompt = await chat_prompt.prompt_ids(model, fields)
        prompt = common.truncated(prompt, fields.truncate_prompt_tokens)
        call_id = common.public_id("chatcmpl", fields.request_id)
        call = _Call(fields, model, prompt, call_id, self.state.args.response_role)
        if fields.use_beam_search:
            body = await common.unless_disconnected(request, self._search(call, request))
            return JSONResponse(body, 200, headers)
        options = common.submit_options(request, model, fields, call_id)
        streams = RequestStreams(self.state, model, options)
        await streams.open([prompt], self._params(call))
        return await common.answer(
            request,
            streams,
            headers,
            collect=lambda: self._collect(call, streams),
            events=lambda: self._events(call, streams) if fields.stream else None,
        )

    def _params(self, call: _Call) -> SamplingParams:
        return common.sampling_params(
            call.model, call.fields, logprobs=call.num_logprobs, max_tokens=call.max_tokens
        )

    async def _search(self, call: _Call, request: Request) -> dict[str, Any]:
        options = common.submit_options(request, call.model, call.fields, call.id)
        room = call.model.max_model_len - len(call.prompt)
        limit = call.max_tokens or max(1, room)
        outputs = await search(self.state, call.model, [call.prompt], call.fields, options, limit)
        choices = [
            {
                "index": rank,
                "message": {"role": call.role, "content": beam.text},
                "logprobs": None,
                "finish_reason": beam.finish_reason,
            }
            for rank, beam in enumerate(outputs[0].sequences)
        ]
        usage = search_usage([call.prompt], outputs)
        return {**call.envelope("chat.completion"), "choices": choices, "usage": usage}

    async def _collect(self, call: _Call, streams: RequestStreams) -> dict[str, Any]:
        final: RequestOutput | None = None
        async for _, output in streams:
            final = output
        sequences = sorted(final.outputs, key=lambda one: one.index) if final else []
        body = {
            **call.envelope("chat.completion"),
            "choices": [_whole_choice(call, sequence) for sequence in sequences],
            "usage": common.usage(streams, self.state),
        }
        if final is not None and call.fields.prompt_logprobs is not None:
            body["prompt_logprobs"] = prompt_logprobs(final.prompt_logprobs)
        if call.fields.return_token_ids:
            body["prompt_token_ids"] = call.prompt
        return body

    async def _events(self, call: _Call, streams: RequestStreams) -> AsyncGenerator[bytes, None]:
        envelope = call.envelope("chat.completion.chunk")
        at_end, always = common.wants_usage(call.fields)
        writers = [_ChoiceWriter(call, index) for index in range(call.fields.n)]

        def chunk(choices: list[dict[str, Any]]) -> bytes:
            body = {**envelope, "choices": choices}
            if at_end:
                body["usage"] = common.usage(streams, self.state) if always else None
            return event(body)

        for writer in writers:
            yield chunk([writer.role_choice()])
        async for _, output in streams:
            for sequence in output.outputs:
                for choice in writers[sequence.index].pieces(sequence):
                    yield chunk([choice])
        if at_end:
            yield event({**envelope, "choices": [], "usage": common.usage(streams, self.state)})


def _whole_choice(call: _Call, sequence: CompletionOutput) -> dict[str, Any]:
    text, calls, reason = sequence.text, list[ToolCall](), sequence.finish_reason
    parser = call.parser()
    if parser is not None:
        text, calls = parser.feed(text, last=True)
    text = call.echoed + text
    message: dict[str, Any] = {"role": call.role, "content": text or None if calls else text}
    if calls:
        message["tool_calls"] = [one.as_message() for one in calls]
        reason = "tool_calls" if reason == "stop" else reason
    choice: dict[str, Any] = {
        "index": sequence.index,
        "message": message,
        "logprobs": _logprobs(call, sequence),
        "finish_reason": reason,
        "stop_reason": sequence.stop_reason,
    }
    if call.fields.return_token_ids:
        choice["token_ids"] = list(sequence.token_ids)
    return choice


def _logprobs(call: _Call, sequence: CompletionOutput) -> dict[str, Any] | None:
    if call.num_logprobs is None or sequence.logprobs is None:
        return None
    tokenizer = call.model.engine.tokenizer
    return chat_logprobs(sequence.token_ids, sequence.logprobs, call.num_logprobs, tokenizer)


class _ChoiceWriter:
    """One choice of a stream: role, then deltas, then the finish reason in a chunk of its own."""

    def __init__(self, call: _Call, index: int) -> None:
        self.call = call
        self.index = index
        self.parser = call.parser()
        self.echo = call.echoed

    def role_choice(self) -> dict[str, Any]:
        choice = self._choice({"role": self.call.role, "content": self.echo})
        if self.call.fields.return_token_ids and self.index == 0:
            choice["prompt_token_ids"] = self.call.prompt
        return choice

    def pieces(self, sequence: CompletionOutput) -> list[dict[str, Any]]:
        finished = sequence.finish_reason is not None
        text, calls = sequence.text, list[ToolCall]()
        if self.parser is not None:
            text, calls = self.parser.feed(text, last=finished)
        delta: dict[str, Any] = {"content": text} if text else {}
        if calls:
            delta["tool_calls"] = [one.as_delta() for one in calls]
        logprobs = _logprobs(self.call, sequence)
        token_ids = sequence.token_ids if self.call.fields.return_token_ids else []
        choices = []
        if delta or token_ids or (logprobs is not None and logprobs["content"]):
            choice = self._choice(delta, logprobs)
            if token_ids:
                choice["token_ids"] = list(token_ids)
            choices.append(choice)
        if finished:
            choices.append(self._finish(sequence))
        return choices

    def _finish(self, sequence: CompletionOutput) -> dict[str, Any]:
        called = self.parser is not None and self.parser.num_calls > 0
        reason = sequence.finish_reason
        choice = self._choice({})
        choice["finish_reason"] = "tool_calls" if called and reason == "stop" else reason
        choice["stop_reason"] = sequence.stop_reason
        return choice

    def _choice(
        self, delta: dict[str, Any], logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return {"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
