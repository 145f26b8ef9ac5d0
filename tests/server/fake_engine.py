"""An `AsyncEngine` without a model: it answers at once, with tokens that are characters."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from types import SimpleNamespace

from trimaran.core.engine.messages import EngineStats
from trimaran.core.errors import ContextLengthError, EngineDeadError, InvalidRequestError
from trimaran.core.sampling_params import OutputKind, SamplingParams
from trimaran.core.text.messages import normalise_messages
from trimaran.core.types import (
    BeamSearchOutput,
    BeamSequence,
    CompletionOutput,
    Logprob,
    RequestMetrics,
    RequestOutput,
)

VOCAB = 1_000
CONTEXT = 512


class FakeTokenizer:
    """Ids are code points, modulo the vocabulary."""

    vocab_size = VOCAB
    eos_token_id = 0

    def encode(self, text, add_special_tokens=True):
        return [ord(char) % VOCAB for char in text]

    def decode(self, ids, skip_special_tokens=True):
        return "".join(map(chr, ids))

    def token_text(self, token_id):
        return chr(token_id)

    def token_bytes(self, token_id):
        return chr(token_id).encode()


def logprob_entry(token_id, count):
    entry = {token_id: Logprob(-0.5, 1, chr(token_id))}
    for rank in range(2, count + 1):
        entry[ord("A") + rank] = Logprob(float("-inf"), rank, chr(ord("A") + rank))
    return entry


class FakeStream:
    def __init__(self, engine, request_id, prompt, params):
        self.engine = engine
        self.request_id = request_id
        self.prompt_token_ids = list(prompt)
        self.params = params
        self.finished = False
        self.aborted = asyncio.Event()
        self._outputs = self._run()

    def __aiter__(self):
        return self

    async def __anext__(self):
        return await self._outputs.__anext__()

    async def aclose(self):
        if not self.finished:
            self.finished = True
            self.engine.aborted.append(self.request_id)
        self.engine.open.discard(self.request_id)

    async def _run(self):
        engine, params = self.engine, self.params
        if engine.fail_first is not None:
            raise engine.fail_first
        answer = engine.answer[: params.max_tokens]
        reason = "stop" if len(answer) == len(engine.answer) else "length"
        reason = engine.end_reason or reason
        times = RequestMetrics(*(time.monotonic() + step / 1e3 for step in range(4)))
        pieces = [answer]
        if params.output_kind == OutputKind.DELTA:
            pieces = [answer[i : i + engine.piece] for i in range(0, len(answer), engine.piece)]
        for number, piece in enumerate(pieces):
            await self._wait(number)
            if self.aborted.is_set():
                break
            last = number == len(pieces) - 1
            sequences = [
                self._sequence(i, piece, reason if last else None) for i in range(params.n)
            ]
            self.finished = last
            yield RequestOutput(
                self.request_id,
                None,
                self.prompt_token_ids,
                sequences,
                last,
                prompt_logprobs=self._prompt_logprobs() if number == 0 else None,
                num_cached_tokens=engine.num_cached,
                metrics=times,
            )
        if self.aborted.is_set():
            self.finished = True
            ended = [self._sequence(i, "", "abort") for i in range(params.n)]
            yield RequestOutput(self.request_id, None, self.prompt_token_ids, ended, True)

    async def _wait(self, number):
        engine = self.engine
        if number and engine.fail_later is not None:
            raise engine.fail_later
        if engine.hold is not None:
            waits = [asyncio.ensure_future(one.wait()) for one in (engine.hold, self.aborted)]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for one in waits:
                    one.cancel()
        await asyncio.sleep(engine.pause)

    def _sequence(self, index, text, reason):
        ids = [ord(char) % VOCAB for char in text]
        count = self.params.logprobs
        logprobs = None if count is None else [logprob_entry(one, count) for one in ids]
        return CompletionOutput(index, text, ids, None, logprobs, reason, None)

    def _prompt_logprobs(self):
        count = self.params.prompt_logprobs
        if count is None:
            return None
        return [None, *(logprob_entry(one, count) for one in self.prompt_token_ids[1:])]


class FakeTemplate:
    pass


class FakeEngine:
    """`hold`: an event that every token waits for. `fail_*`: raised before the first token, or
    after it. `submit_error`: raised at once."""

    def __init__(self, answer="Hello there!", piece=3, pause=0.0):
        self.answer = answer
        self.piece = piece
        self.pause = pause
        self.hold = None
        self.submit_error = self.fail_first = self.fail_later = None
        self.end_reason = None  # whatever the tokens say
        self.num_cached = 0
        self.dead = False
        self.description = {"memory": {"planned": {"weights": 100}, "actual": {"weights": 103}}}
        self.submitted = []
        self.aborted = []
        self.rendered = []
        self.open = set()
        self.streams = {}
        self.tokenizer = FakeTokenizer()
        self.chat_template = FakeTemplate()
        self.model = SimpleNamespace(
            name="org/fake", max_model_len=CONTEXT, vocab_size=VOCAB, generation={"top_k": 7}
        )

    async def start(self):
        pass

    async def close(self):
        pass

    async def restart(self):
        self.dead = False

    def health(self):
        if self.dead:
            raise EngineDeadError("it stopped at /some/where/secret.py")

    def stats(self):
        return EngineStats(num_running=len(self.open), kv_used=len(self.open), kv_total=10)

    def default_sampling_params(self, **overrides):
        return SamplingParams(**{"top_k": 7, **overrides})

    async def encode(self, text, *, add_special_tokens=True):
        if len(text) > 100 * self.model.max_model_len:
            raise ContextLengthError("The prompt is too long.", param="prompt")
        return self.tokenizer.encode(text)

    async def render_chat(self, messages, **options):
        messages = normalise_messages(messages)  # as the template does
        self.rendered.append((messages, options))
        if any("loop" in message["content"] for message in messages):
            raise InvalidRequestError("The chat template took too long.", param="messages")
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)

    async def submit(
        self, prompt, params=None, *, request_id=None, priority=0, cache_salt="", key_id=b""
    ):
        self.health()
        if self.submit_error is not None:
            raise self.submit_error
        room = self.model.max_model_len - len(prompt)
        if room < (params.max_tokens or 1):
            raise ContextLengthError(f"The prompt leaves {room} tokens.", param="prompt")
        if params.max_tokens is None:
            params = dataclasses.replace(params, max_tokens=room)
        self.submitted.append(
            SimpleNamespace(
                prompt=list(prompt), params=params, request_id=request_id, key_id=key_id
            )
        )
        self.open.add(request_id)
        stream = FakeStream(self, request_id, prompt, params)
        self.streams[request_id] = stream
        return stream

    async def abort(self, request_id):
        self.streams[request_id].aborted.set()

    async def beam_search(self, prompt, params, **options):
        if self.submit_error is not None:
            raise self.submit_error
        if self.hold is not None:
            await self.hold.wait()
        beams = [
            BeamSequence([97] * (rank + 1), "a" * (rank + 1), -1.0, -1.0, "length")
            for rank in range(params.beam_width)
        ]
        return BeamSearchOutput(beams)
