"""`AsyncEngine`: an engine for asyncio programs, such as the HTTP server."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from .args import EngineArgs
from .engine.intake import Intake, PromptInput
from .engine.link import EngineLink
from .engine.messages import AbortRequests, AddRequests, EngineRequest, EngineStats, StepMessage
from .errors import (
    EngineDeadError,
    InvalidRequestError,
    QueueFullError,
)
from .model_info import ModelInfo
from .outputs import OutputProcessor, Processed
from .sampling_params import BeamSearchParams, SamplingParams
from .streams import Mailbox, RequestStream
from .text.render_pool import MAX_PROCESSES
from .text.templates import ChatTemplate
from .text.tokenizer import Tokenizer
from .types import BeamSearchOutput, RequestOutput

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

PREPARE_THREADS = 2
RETRY_AFTER = 1.0  # seconds, when the queue is full


class AsyncEngine:
    """An engine that many tasks share. One event loop uses it: the one that called `start`.

    A thread beside the loop polls the engine (or, in process, runs it) and turns its tokens into
    text, so that the loop only hands outputs to their readers.
    """

    tokenizer: Tokenizer  # these three: once started (no template until then)
    model: ModelInfo
    chat_template: ChatTemplate | None

    def __init__(
        self, args: EngineArgs, *, in_process: bool = False, chat_template: str | None = None
    ) -> None:
        """`chat_template`: a file with the one to use instead of the model's own."""
        self._args = args
        self._template_file = chat_template
        self._link = EngineLink(args, in_process)
        self._pool = ThreadPoolExecutor(PREPARE_THREADS, thread_name_prefix="prepare")
        # Apart, so that templates that loop until they are ended hold up nothing but chats.
        self._renderers = ThreadPoolExecutor(MAX_PROCESSES, thread_name_prefix="render")
        self._processor: OutputProcessor | None = None
        self._intake: Intake | None = None
        self._streams: dict[str, RequestStream] = {}
        self._beams: dict[str, Mailbox[BeamSearchOutput]] = {}
        self._stats = EngineStats()
        self._closed = False
        self.chat_template = None

    @classmethod
    def from_args(
        cls, args: EngineArgs, *, in_process: bool = False, chat_template: str | None = None
    ) -> AsyncEngine:
        return cls(args, in_process=in_process, chat_template=chat_template)

    # ---------------------------------------------------------------------------- life cycle

    async def start(self) -> None:
        """Start the engine and wait until the model is loaded.

        Raises what the engine raised: `ModelLoadError`, `KVMemoryError`, `ConfigError`, …
        """
        info = await self._link.start(self._step, self._die)
        try:
            await self._off_loop(self._load_text, info.model)
        except BaseException:
            await self._link.close()
            raise
        self._intake = Intake(info, self.tokenizer, clamp=False)
        self._link.run()

    async def restart(self) -> None:
        """After a death: start a new engine. Open streams have got their error."""
        await self._link.close()
        self._fail_all(EngineDeadError("the engine was restarted"))
        self._link = self._link.fresh()
        await self.start()

    async def close(self) -> None:
        """End the engine; open streams raise `EngineDeadError`. May be called again."""
        self._closed = True
        await self._link.close()
        self._fail_all(EngineDeadError("the engine was closed"))
        for pool in (self._pool, self._renderers):
            pool.shutdown(wait=False, cancel_futures=True)
        if self.chat_template is not None:
            self.chat_template.close()

    async def __aenter__(self) -> AsyncEngine:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # ------------------------------------------------------------------------------ questions

    @property
    def description(self) -> Mapping[str, Any]:
        """What the engine says of itself: platform, device, ops. For humans."""
        return self._ready().info.description

    @property
    def num_unfinished(self) -> int:
        """Requests that are open."""
        return len(self._streams) + len(self._beams)

    def health(self) -> None:
        """Raises `EngineDeadError` if the engine has ended or is stuck."""
        self._link.check()

    def stats(self) -> EngineStats:
        """The latest statistics the engine sent (it sends them with every step)."""
        return self._stats

    def default_sampling_params(self, **overrides: Any) -> SamplingParams:
        """The model's generation defaults (generation_config), then `overrides`."""
        return self._ready().default_sampling_params(**overrides)

    async def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes. Always done (True): running requests keep the blocks they hold,
        and publish nothing more."""
        return bool((await self._link.call("reset_prefix_cache"))["done"])

    async def check(self) -> Mapping[str, int | str | bool]:
        """The engine's statistics of this moment and its count of live objects, for leak hunts.
        It collects garbage first, which takes it some milliseconds."""
        return await self._link.call("check")

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Tokenise off the event loop; `ContextLengthError` for what can never fit."""
        return await self._off_loop(self._ready().encode, text, add_special_tokens)

    async def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """`ChatTemplate.render` off the event loop."""
        if self.chat_template is None:
            raise InvalidRequestError(
                f"the model {self.model.name!r} has no chat template: set --chat-template, or use "
                "completions.",
                param="messages",
            )
        render = functools.partial(self.chat_template.render, messages, **options)
        return await asyncio.get_running_loop().run_in_executor(self._renderers, render)

    # ------------------------------------------------------------------------------- requests

    async def submit(
        self,
        prompt: PromptInput,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        key_id: bytes = b"",
    ) -> RequestStream:
        """Validate and hand over a request; the stream of its outputs.

        Everything this front end can know is raised here, before the first token: bad values,
        context length, a full queue, a dead engine. What only the engine knows is raised by the
        stream's first `__anext__`.
        """
        options = {"priority": priority, "cache_salt": cache_salt, "key_id": key_id}
        intake = self._ready()
        request = await self._prepare(
            request_id, prompt, params or intake.default_sampling_params(), options
        )
        stream = RequestStream(
            request.request_id,
            request.prompt.token_ids,
            request.params.output_kind,
            self._abandon,
        )
        self._open(request, self._streams, stream)
        return stream

    async def generate(
        self,
        prompt: PromptInput,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        key_id: bytes = b"",
    ) -> AsyncGenerator[RequestOutput, None]:
        """`submit` and iterate; closing or cancelling the generator aborts the request.

        `prompt`: a string (tokenised with special tokens), token ids, or a mapping with `prompt`
        or `prompt_token_ids` (and `add_special_tokens`). With `OutputKind.DELTA` an output holds
        the sequences that changed, with what is new; deltas merge while nobody reads. A sequence
        that failed ends with finish_reason "error" and the reason in `stop_reason`.
        """
        stream = await self.submit(
            prompt,
            params,
            request_id=request_id,
            priority=priority,
            cache_salt=cache_salt,
            key_id=key_id,
        )
        try:
            async for output in stream:
                yield output
        finally:
            await stream.aclose()

    async def beam_search(
        self,
        prompt: PromptInput,
        params: BeamSearchParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        key_id: bytes = b"",
    ) -> BeamSearchOutput:
        """The best sequences. Raises as `submit` does, and `StepError` for a search that failed or
        was aborted; cancelling aborts it."""
        options = {"priority": priority, "cache_salt": cache_salt, "key_id": key_id, "beam": params}
        limits = SamplingParams(
            max_tokens=params.max_tokens,
            temperature=params.temperature,
            ignore_eos=params.ignore_eos,
        )
        request = await self._prepare(request_id, prompt, limits, options)
        mailbox: Mailbox[BeamSearchOutput] = Mailbox(lambda _, newer: newer)
        self._open(request, self._beams, mailbox)
        try:
            return await mailbox.get()
        finally:
            self._abandon(request.request_id)

    async def abort(self, request_id: str) -> None:
        """End a request; its stream gets a last output with finish_reason "abort", a beam search
        raises `StepError`."""
        if request_id in self._streams or request_id in self._beams:
            self._link.send(AbortRequests([request_id]))

    # ------------------------------------------------------------------------------- inside

    async def _prepare(
        self,
        request_id: str | None,
        prompt: PromptInput,
        params: SamplingParams,
        options: dict[str, Any],
    ) -> EngineRequest:
        self._admit(request_id)
        name = request_id or uuid.uuid4().hex
        intake = self._ready()
        request = await self._off_loop(
            functools.partial(intake.prepare, prompt, params, name, **options)
        )
        self._admit(request_id)  # again: other requests came in the meantime
        return request

    def _admit(self, request_id: str | None) -> None:
        """What can be refused without asking the engine; the scheduler has the last word."""
        self._link.check()
        if request_id is not None and (request_id in self._streams or request_id in self._beams):
            raise InvalidRequestError(
                f"request_id {request_id!r:.100} is in use by an unfinished request.",
                param="request_id",
            )
        info = self._ready().info
        room = info.max_num_queued_reqs + info.max_num_seqs
        if self.num_unfinished >= room:
            raise QueueFullError(
                f"{self.num_unfinished} requests are open, and {info.max_num_queued_reqs} may "
                "wait: try again later.",
                retry_after=RETRY_AFTER,
            )

    def _open(self, request: EngineRequest, table: dict[str, Any], reader: object) -> None:
        assert self._processor is not None
        table[request.request_id] = reader
        self._processor.add(request, time.monotonic())
        try:
            self._link.send(AddRequests([request]))
        except BaseException:
            self._forget(request.request_id)
            raise

    def _abandon(self, request_id: str) -> None:
        """Nobody reads a request any more."""
        if self._forget(request_id):
            with contextlib.suppress(EngineDeadError):  # then there is nothing to abort
                self._link.send(AbortRequests([request_id]))

    def _forget(self, request_id: str) -> bool:
        known = self._streams.pop(request_id, None) or self._beams.pop(request_id, None)
        if self._processor is not None:
            self._processor.discard(request_id)
        return known is not None

    def _step(self, message: StepMessage) -> Callable[[], None]:
        """In the polling thread: the text of a step; what it returns runs in the event loop."""
        assert self._processor is not None
        processed = self._processor.process(message)
        for finish in processed.finishes:
            self._link.send(finish)
        return functools.partial(self._deliver, processed, message.stats)

    def _deliver(self, processed: Processed, stats: EngineStats | None) -> None:
        self._stats = stats or self._stats
        for output in processed.outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                stream.mailbox.put(output)
                if output.finished:
                    self._forget(output.request_id)
        for request_id, beams in processed.beams:
            if request_id in self._beams:
                self._beams[request_id].put(beams)
                self._forget(request_id)
        for request_id, error in processed.failures:
            self._fail(request_id, error)

    def _fail(self, request_id: str, error: Exception) -> None:
        if request_id in self._streams:
            self._streams[request_id].mailbox.fail(error)
        elif request_id in self._beams:
            self._beams[request_id].fail(error)
        self._forget(request_id)

    def _fail_all(self, error: EngineDeadError) -> None:
        for request_id in [*self._streams, *self._beams]:
            # An exception of its own for each: a traceback grows with every raise.
            self._fail(request_id, EngineDeadError(error.message, cause=error.cause))

    def _die(self, error: EngineDeadError) -> None:
        logger.error("%s", error)
        self._stats = EngineStats()
        self._fail_all(error)

    def _load_text(self, model: ModelInfo) -> None:
        self.model = model
        if self._processor is None:  # an engine that starts again has them already
            self.tokenizer = Tokenizer.from_path(model.tokenizer_path)
            self.tokenizer.check_vocabulary(model.vocab_size)
            self.chat_template = ChatTemplate.from_path(
                self._template_file or model.tokenizer_path, self.tokenizer.special_tokens
            )
            if self.chat_template is not None:
                self.chat_template.warm()
                if self._closed:  # meanwhile, after `start` was cancelled: `close` found nothing
                    self.chat_template.close()
        self._processor = OutputProcessor(self.tokenizer)

    def _ready(self) -> Intake:
        if self._intake is None:
            raise EngineDeadError("the engine has not been started")
        return self._intake

    async def _off_loop(self, work: Callable[..., Result], *arguments: Any) -> Result:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, work, *arguments)
