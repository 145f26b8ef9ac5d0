"""The outputs of one request on their way to a reader that may be slow."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Generic, Self, TypeVar

from .sampling_params import OutputKind
from .types import BeamSearchOutput, CompletionOutput, RequestOutput

Item = TypeVar("Item", RequestOutput, BeamSearchOutput)


class Mailbox(Generic[Item]):
    """Holds at most one output: what is not read yet is merged, so that a slow reader costs no
    more memory than what it has not read. Used by one event loop."""

    def __init__(self, merge: Callable[[Item, Item], Item]) -> None:
        self._merge: Callable[[Item, Item], Item] = merge
        self._item: Item | None = None
        self._error: Exception | None = None
        self._event = asyncio.Event()

    def put(self, item: Item) -> None:
        self._item = item if self._item is None else self._merge(self._item, item)
        self._event.set()

    def fail(self, error: Exception) -> None:
        """`get` returns what is there first, then raises."""
        self._error = self._error or error
        self._event.set()

    async def get(self) -> Item:
        await self._event.wait()
        if self._item is not None:
            item, self._item = self._item, None
            if self._error is None:
                self._event.clear()
            return item
        assert self._error is not None
        raise self._error


class RequestStream:
    """An asynchronous iterator over a request's outputs; ends after the finished one.

    Leave it by `aclose` (or iterate to the end): an unfinished request is then aborted, and its
    memory is free by the end of the step in flight.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        kind: OutputKind,
        abandon: Callable[[str], None],
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self.mailbox: Mailbox[RequestOutput] = Mailbox(
            merge_deltas if kind == OutputKind.DELTA else take_newer
        )
        self._abandon = abandon
        self._done = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._done:
            raise StopAsyncIteration
        try:
            output = await self.mailbox.get()
        except asyncio.CancelledError:
            raise  # the reader may wait again (a time-out of its own), or close
        except Exception:
            self._done = True
            raise
        self._done = output.finished
        return output

    async def aclose(self) -> None:
        if not self._done:
            self._done = True
            self._abandon(self.request_id)


def take_newer(_: RequestOutput, newer: RequestOutput) -> RequestOutput:
    return newer


def merge_deltas(older: RequestOutput, newer: RequestOutput) -> RequestOutput:
    """Both deltas as one."""
    merged = {output.index: output for output in older.outputs}
    for output in newer.outputs:
        before = merged.get(output.index)
        merged[output.index] = output if before is None else _join(before, output)
    prompt_logprobs = older.prompt_logprobs or newer.prompt_logprobs
    outputs = [output for _, output in sorted(merged.items())]
    return dataclasses.replace(newer, outputs=outputs, prompt_logprobs=prompt_logprobs)


def _join(older: CompletionOutput, newer: CompletionOutput) -> CompletionOutput:
    # In place: the older delta is nobody else's, and joining stays linear.
    older.text += newer.text
    older.token_ids += newer.token_ids
    if newer.logprobs is not None:
        older.logprobs = (older.logprobs or []) + newer.logprobs
    older.cumulative_logprob = newer.cumulative_logprob
    older.finish_reason = newer.finish_reason
    older.stop_reason = newer.stop_reason
    return older
