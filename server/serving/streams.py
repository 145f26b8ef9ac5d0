"""The engine's side of one HTTP request: a stream of outputs for each of its prompts."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from ...core.errors import QueueFullError
from ...core.sampling_params import OutputKind, SamplingParams
from ...core.types import FinishReason, RequestOutput
from ..errors import DeadlineError
from ..metrics import RequestTimer
from ..router import ServedModel
from ..state import ServerState

logger = logging.getLogger(__name__)

# How long a stream's headers wait for the first output: an error that comes before (a full
# queue, a refused value) is an HTTP status then, and not an event of a stream.
SETTLE_SECONDS = 0.5

Item = tuple[int, RequestOutput]


class OutputStream(Protocol):
    """What `AsyncEngine.submit` returns."""

    request_id: str
    prompt_token_ids: list[int]

    def __aiter__(self) -> AsyncIterator[RequestOutput]: ...
    async def __anext__(self) -> RequestOutput: ...
    async def aclose(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class SubmitOptions:
    """What goes along with every prompt of a request."""

    request_id: str
    priority: int = 0
    cache_salt: str = ""
    key_id: bytes = b""
    timeout_ms: int | None = None


class RequestStreams:
    """Outputs of all prompts of a request as (prompt index, output), in the order they come.

    `aclose` ends everything: whatever the engine has not finished is aborted there. The owner
    calls it in a `finally`; calling it twice is harmless.
    """

    def __init__(self, state: ServerState, model: ServedModel, options: SubmitOptions) -> None:
        self.state = state
        self.model = model
        self.options = options
        self.streams: list[OutputStream] = []
        self.num_prompt = 0
        self.num_cached = 0
        self.num_generated = 0
        self._timers: list[RequestTimer] = []
        self._items: AsyncGenerator[Item, None] | None = None
        self._first: asyncio.Task[Item] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._aborting: asyncio.Task[None] | None = None
        self._expired = False
        self._streamed = False
        self._claimed = False

    async def open(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> None:
        """Hands every prompt to the engine; if one is refused, none stays. Raises what
        `AsyncEngine.submit` raises."""
        self.state.claim_id(self._id)
        self._claimed = True
        options = self.options
        try:
            for index, prompt in enumerate(prompts):
                request_id = options.request_id if len(prompts) == 1 else f"{self._id}-{index}"
                stream = await self.model.engine.submit(
                    prompt,
                    params,
                    request_id=request_id,
                    priority=options.priority,
                    cache_salt=options.cache_salt,
                    key_id=options.key_id,
                )
                self.streams.append(cast(OutputStream, stream))
                self._timers.append(RequestTimer(self.state.metrics, self.model))
                self.num_prompt += len(prompt)
        except BaseException as error:
            self.state.metrics.count_rejection(self.model, error)
            await self.aclose()
            raise
        self._streamed = params.output_kind == OutputKind.DELTA
        if options.timeout_ms is not None:
            loop = asyncio.get_running_loop()
            self._deadline = loop.call_later(options.timeout_ms / 1e3, self._expire)

    async def settle(self) -> None:
        """Waits a moment for the first output; raises if the engine refuses meanwhile."""
        self._items = self._merged() if len(self.streams) > 1 else self._single()
        self._first = asyncio.ensure_future(anext(self._items))
        await asyncio.wait({self._first}, timeout=SETTLE_SECONDS)
        error = self._first.exception() if self._first.done() else None
        if error is not None and not isinstance(error, StopAsyncIteration):
            self.state.metrics.count_rejection(self.model, error)
            raise error

    async def __aiter__(self) -> AsyncIterator[Item]:
        if self._items is None:
            self._items = self._merged() if len(self.streams) > 1 else self._single()
        try:
            if self._first is not None:
                first, self._first = self._first, None
                yield self._observe(await first)
            async for item in self._items:
                yield self._observe(item)
        except StopAsyncIteration:
            return
        except QueueFullError as error:
            self.state.metrics.count_rejection(self.model, error)
            raise

    async def aclose(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        if self._first is not None:
            self._first.cancel()
            await asyncio.gather(self._first, return_exceptions=True)
        if self._items is not None:
            await self._items.aclose()
        for stream in self.streams:
            await stream.aclose()
        if self._claimed:
            self._claimed = False
            self.state.request_ids.discard(self._id)

    @property
    def _id(self) -> str:
        return self.options.request_id

    async def _single(self) -> AsyncGenerator[Item, None]:
        async for output in self.streams[0]:
            yield 0, output

    async def _merged(self) -> AsyncGenerator[Item, None]:
        """All streams at once. One slot of queue each: an engine merges what is not read yet."""
        queue: asyncio.Queue[Item | BaseException | None] = asyncio.Queue(len(self.streams))
        tasks = [
            asyncio.ensure_future(self._pump(index, stream, queue))
            for index, stream in enumerate(self.streams)
        ]
        try:
            running = len(tasks)
            while running:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    running -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @staticmethod
    async def _pump(
        index: int, stream: OutputStream, queue: asyncio.Queue[Item | BaseException | None]
    ) -> None:
        try:
            async for output in stream:
                await queue.put((index, output))
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    def _observe(self, item: Item) -> Item:
        """Counts an output; raises for one that the deadline ended."""
        index, output = item
        timer = self._timers[index]
        count = sum(len(sequence.token_ids) for sequence in output.outputs)
        if self._streamed:
            timer.on_tokens(count)
            self.num_generated += count
        if output.num_cached_tokens > timer.num_cached:
            self.num_cached += output.num_cached_tokens - timer.num_cached
            timer.num_cached = output.num_cached_tokens
        if output.finished:
            if not self._streamed:
                timer.tokens = count
                self.num_generated += count
            self._hide_errors(output)
            reasons = [one.finish_reason or "" for one in output.outputs if one.finish_reason]
            timer.on_end(output.metrics, len(self.streams[index].prompt_token_ids), reasons)
            if self._expired and FinishReason.ABORT in reasons:
                raise DeadlineError(
                    f"The request did not finish within its timeout_ms of "
                    f"{self.options.timeout_ms}."
                )
        return item

    def _hide_errors(self, output: RequestOutput) -> None:
        """A failed sequence brings the engine's reason along: for the log, not for clients."""
        for sequence in output.outputs:
            if sequence.finish_reason == FinishReason.ERROR:
                extra = {"request_id": output.request_id}
                logger.error("a sequence failed: %s", sequence.stop_reason, extra=extra)
                sequence.stop_reason = None

    def _expire(self) -> None:
        self._expired = True
        self._aborting = asyncio.ensure_future(self._abort_all())

    async def _abort_all(self) -> None:
        for stream in self.streams:
            with contextlib.suppress(Exception):  # a dead engine has told the streams itself
                await self.model.engine.abort(stream.request_id)
