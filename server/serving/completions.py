"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ...core.errors import InvalidRequestError
from ...core.sampling_params import SamplingParams
from ...core.types import CompletionOutput, RequestOutput
from ..protocol.completions import CompletionRequest
from ..responses import JSONResponse
from ..router import ServedModel
from ..sse import event
from ..state import ServerState
from . import common
from .beams import beam_choices
from .logprobs import completion_logprobs, prompt_logprobs
from .streams import RequestStreams


@dataclass
class _Prompt:
    token_ids: list[int]
    text: str | None


@dataclass
class _Call:
    """One request on its way."""

    fields: CompletionRequest
    model: ServedModel
    prompts: list[_Prompt]
    id: str
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def score_only(self) -> bool:
        """`max_tokens` 0: one token is computed and dropped, for the prompt's own sake."""
        return self.fields.max_tokens == 0

    def envelope(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.fields.model or self.model.name,
        }


class Completions:
    """The endpoint. Prompts of one request share their parameters; choices are numbered through."""

    def __init__(self, state: ServerState) -> None:
        self.state = state

    async def create(self, request: Request) -> Response:
        fields, headers = await common.read_request(request, CompletionRequest, self.state)
        common.check_combinations(fields)
        if fields.max_tokens == 0 and not fields.echo:
            raise InvalidRequestError("max_tokens may be 0 only with echo.", param="max_tokens")
        model = self.state.router.resolve(fields.model)
        prompts = await self._prompts(model, fields)
        call = _Call(fields, model, prompts, common.public_id("cmpl", fields.request_id))
        options = common.submit_options(request, model, fields, call.id)
        if fields.use_beam_search:
            tokens = [p.token_ids for p in prompts]
            work = beam_choices(self.state, model, tokens, fields, options)
            choices, usage = await common.unless_disconnected(request, work)
            return JSONResponse(
                {**call.envelope(), "choices": choices, "usage": usage}, 200, headers
            )
        streams = RequestStreams(self.state, model, options)
        await streams.open([p.token_ids for p in prompts], self._params(call))
        return await common.answer(
            request,
            streams,
            headers,
            collect=lambda: self._collect(call, streams),
            events=lambda: self._events(call, streams) if fields.stream else None,
        )

    async def _prompts(self, model: ServedModel, fields: CompletionRequest) -> list[_Prompt]:
        given: Any = fields.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        prompts = []
        for prompt in given:
            if not prompt:
                break
            if isinstance(prompt, str):
                ids = await model.engine.encode(
                    prompt, add_special_tokens=fields.add_special_tokens
                )
                prompts.append(
                    _Prompt(common.truncated(ids, fields.truncate_prompt_tokens), prompt)
                )
            else:
                await common.check_token_ids(model, prompt)
                ids = common.truncated(prompt, fields.truncate_prompt_tokens)
                prompts.append(_Prompt(ids, None))
        if not prompts or len(prompts) < len(given):
            raise InvalidRequestError("prompt is empty.", param="prompt")
        return prompts

    def _params(self, call: _Call) -> SamplingParams:
        fields = call.fields
        overrides: dict[str, Any] = {"logprobs": fields.logprobs}
        if fields.max_tokens is not None:
            overrides["max_tokens"] = max(1, fields.max_tokens)
        if fields.echo and fields.logprobs is not None and fields.prompt_logprobs is None:
            overrides["prompt_logprobs"] = fields.logprobs
        return common.sampling_params(call.model, fields, **overrides)

    async def _collect(self, call: _Call, streams: RequestStreams) -> dict[str, Any]:
        outputs: dict[int, RequestOutput] = {}
        async for index, output in streams:
            outputs[index] = output
        choices = []
        for index, output in sorted(outputs.items()):
            for sequence in sorted(output.outputs, key=lambda one: one.index):
                writer = _ChoiceWriter(call, index, sequence.index)
                choices.append(writer.whole(output, sequence))
        if call.score_only:
            streams.num_generated = 0
        return {
            **call.envelope(),
            "choices": choices,
            "usage": common.usage(streams, self.state),
            "system_fingerprint": common.FINGERPRINT,
        }

    async def _events(self, call: _Call, streams: RequestStreams) -> AsyncGenerator[bytes, None]:
        envelope = call.envelope()
        at_end, always = common.wants_usage(call.fields)
        writers: dict[tuple[int, int], _ChoiceWriter] = {}
        async for index, output in streams:
            for sequence in output.outputs:
                key = (index, sequence.index)
                if key not in writers:
                    writers[key] = _ChoiceWriter(call, *key)
                choice = writers[key].piece(output, sequence)
                if choice is None:
                    continue
                chunk = {**envelope, "choices": [choice]}
                if at_end:
                    chunk["usage"] = common.usage(streams, self.state) if always else None
                yield event(chunk)
        if at_end:
            if call.score_only:
                streams.num_generated = 0
            yield event({**envelope, "choices": [], "usage": common.usage(streams, self.state)})


class _ChoiceWriter:
    """Writes one choice, whole or piece by piece; knows how far its text has come."""

    def __init__(self, call: _Call, prompt: int, sequence: int) -> None:
        self.call = call
        self.prompt = call.prompts[prompt]
        self.tokenizer = call.model.engine.tokenizer
        self.index = prompt * call.fields.n + sequence
        self.offset = 0
        self.begun = False

    def whole(self, output: RequestOutput, sequence: CompletionOutput) -> dict[str, Any]:
        return self._choice(output, sequence, sequence.finish_reason)

    def piece(self, output: RequestOutput, sequence: CompletionOutput) -> dict[str, Any] | None:
        fields = self.call.fields
        news = sequence.text or sequence.finish_reason or sequence.logprobs
        if not news and not fields.return_token_ids and not (fields.echo and not self.begun):
            return None
        return self._choice(output, sequence, sequence.finish_reason)

    def _choice(
        self, output: RequestOutput, sequence: CompletionOutput, reason: str | None
    ) -> dict[str, Any]:
        fields, first = self.call.fields, not self.begun
        self.begun = True
        echoed = fields.echo and first
        text = "" if self.call.score_only else sequence.text
        if echoed:
            text = self._prompt_text() + text
        choice: dict[str, Any] = {
            "index": self.index,
            "text": text,
            "logprobs": self._logprobs(output, sequence, echoed),
            "finish_reason": "length" if self.call.score_only and reason else reason,
            "stop_reason": sequence.stop_reason,
        }
        if fields.prompt_logprobs is not None and first:
            choice["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        if fields.return_token_ids:
            choice["token_ids"] = [] if self.call.score_only else list(sequence.token_ids)
            if first:
                choice["prompt_token_ids"] = self.prompt.token_ids
        return choice

    def _prompt_text(self) -> str:
        if self.prompt.text is None or self.call.fields.truncate_prompt_tokens is not None:
            return self.tokenizer.decode(self.prompt.token_ids, skip_special_tokens=False)
        return self.prompt.text

    def _logprobs(
        self, output: RequestOutput, sequence: CompletionOutput, echoed: bool
    ) -> dict[str, Any] | None:
        count = self.call.fields.logprobs
        if count is None:
            return None
        token_ids: list[int] = []
        entries: list[Any] = []
        if echoed and output.prompt_logprobs is not None:
            token_ids += self.prompt.token_ids
            entries += output.prompt_logprobs
        if not self.call.score_only:
            token_ids += sequence.token_ids
            entries += sequence.logprobs or []
        block = completion_logprobs(token_ids, entries, count, self.tokenizer, self.offset)
        self.offset += sum(len(token) for token in block["tokens"])
        return block
