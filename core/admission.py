"""What may enter the scheduler: checks that a request can be served at all, and is not poison."""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from .errors import ContextLengthError, InvalidRequestError, QueueFullError, StepError
from .request import Request

if TYPE_CHECKING:
    from .config import SchedulerConfig
    from .engine.messages import EngineRequest
    from .kv.manager import KVManager
    from .waiting import WaitingQueue

QUARANTINE_SECONDS = 600.0
"""How long a prompt is refused that failed a step of its own; then it may try again, alone."""
QUARANTINE_SIZE = 1024
"""Prompts that are remembered as having been part of a failed step."""


@dataclass(slots=True)
class _Record:
    failures: int = 0
    refused_until: float = 0.0  # seconds of the scheduler's clock
    expires: float = 0.0  # likewise


class Quarantine:
    """Prompts that were part of failed steps. Which of a batch was it?

    When one comes again its steps are its own (`watch`): after one failure those of its prompt,
    after more all of them. If such a step fails, the culprit is known and is refused for a while;
    whoever was only a bystander is served, at worst slower, and cleared. A prompt is known by its
    content, since a retry comes under another id. Nothing is hashed as long as no step has failed,
    and then every request once; a prompt is forgotten when nothing was heard of it for a while.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._records: OrderedDict[bytes, _Record] = OrderedDict()
        self.num_quarantined = 0

    @property
    def empty(self) -> bool:
        return not self._records

    def check(self, children: list[Request]) -> None:
        """Raises `StepError` for a prompt that is known to fail."""
        record = self._find(children)
        if record and record.refused_until > self._clock():
            raise StepError(
                f"request {children[0].request_id!r} is quarantined for "
                f"{record.refused_until - self._clock():.0f} s: the forward failed "
                f"{record.failures} times with this prompt, at last in a step of its own; see the "
                "server's log."
            )

    def watch(self, children: list[Request]) -> None:
        """Set a suspect's sequences apart from others. No more than they need: with one failure
        until their first token, since nearly all that can be wrong with a request shows by then.
        """
        record = self._find(children)
        if record:
            for child in children:
                child.party = child.request_id
                child.alone_until = child.num_prompt if record.failures == 1 else child.max_total

    def failed(self, request: Request, alone: bool) -> bytes:
        """A step failed; `alone`: nobody else had a part in it. The prompt's digest."""
        self._drop_expired()
        digest = _digest(request)
        record = self._records.pop(digest, _Record())
        self._records[digest] = record
        record.failures += 1
        record.expires = self._clock() + QUARANTINE_SECONDS
        if alone and record.failures > 1:
            record.refused_until = record.expires
            record.expires += QUARANTINE_SECONDS  # so that it tries again alone
            self.num_quarantined += 1
        if len(self._records) > QUARANTINE_SIZE:
            self._records.popitem(last=False)
        return digest

    def served(self, request: Request) -> None:
        if request.alone_until:
            self._records.pop(_digest(request), None)

    def _drop_expired(self) -> None:
        """In the order of their failures: one behind another that was refused may stay longer."""
        while self._records:
            digest, record = next(iter(self._records.items()))
            if record.expires > self._clock():
                return
            del self._records[digest]

    def _find(self, children: list[Request]) -> _Record | None:
        self._drop_expired()
        if self.empty:
            return None
        digest = _digest(children[0])
        for child in children:
            child.digest = digest
        return self._records.get(digest)


def _digest(request: Request) -> bytes:
    """SHA-256 of the prompt and the root of its prefix chain."""
    if request.digest is None:
        tokens = request.origin.prompt.token_ids
        packed = struct.pack(f"<{len(tokens)}q", *tokens)
        request.digest = hashlib.sha256(request.origin.cache_root + packed).digest()
    return request.digest


class Admission:
    """Turns an `EngineRequest` into sequences, or says why it is refused."""

    def __init__(
        self,
        config: SchedulerConfig,
        kv: KVManager,
        queue: WaitingQueue,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._kv = kv
        self._queue = queue
        self._arrivals = count()
        self.quarantine = Quarantine(clock)

    def admit(self, origin: EngineRequest) -> list[Request]:
        """The sequences of a new request, index 0 first. Raises `InvalidRequestError`,
        `ContextLengthError`, `QueueFullError` or `StepError`, and then nothing has changed."""
        if len(origin.prompt) == 0:
            raise InvalidRequestError(
                "The prompt is empty: give at least one token.", param="prompt"
            )
        self._check_width(origin)
        self._check_context(origin)
        self._check_queue(origin)
        num_children = origin.beam.beam_width if origin.beam else origin.params.n
        children = [self._child(origin, index) for index in range(num_children)]
        self._check_pool(children[0])
        self.quarantine.check(children)
        self.quarantine.watch(children)
        return children

    def _child(self, origin: EngineRequest, index: int) -> Request:
        # Log-probabilities of the prompt need the prompt computed: then nothing is looked up.
        reuse = origin.params.prompt_logprobs is None
        return Request(
            origin,
            index,
            self._kv.sequence(origin.cache_root, reuse=reuse),
            max_model_len=self._config.max_model_len,
            arrival_order=next(self._arrivals),
        )

    def _check_width(self, origin: EngineRequest) -> None:
        if origin.beam and origin.params.n > 1:
            raise InvalidRequestError(
                f"n is {origin.params.n} with beam search: beam_width says how many.", param="n"
            )

    def _check_context(self, origin: EngineRequest) -> None:
        num_prompt, limit = len(origin.prompt), self._config.max_model_len
        if num_prompt >= limit:
            raise ContextLengthError(
                f"The prompt has {num_prompt} tokens; this model's context is {limit} tokens, "
                "and at least one must be left to generate. Shorten the prompt.",
                param="prompt",
            )
        budget = self._config.max_num_batched_tokens
        if not self._config.enable_chunked_prefill and num_prompt > budget:
            raise ContextLengthError(
                f"The prompt has {num_prompt} tokens; a step computes at most {budget} and chunked "
                "prefill is off. Shorten the prompt, raise --max-num-batched-tokens or use "
                "--enable-chunked-prefill.",
                param="prompt",
            )

    def _check_pool(self, request: Request) -> None:
        # The last token is sampled, never computed: it needs no place in the cache.
        num_tokens = request.max_total - 1
        whole = not self._config.enable_chunked_prefill
        fits = self._kv.can_ever_hold(num_tokens, 1)
        if whole:
            fits = fits and self._kv.can_ever_hold(request.num_prompt, request.num_prompt)
        if not fits:
            raise ContextLengthError(
                f"The request may come to {request.max_total} tokens ({request.num_prompt} of "
                "prompt), more than the KV cache holds. Shorten it, lower max_tokens, or raise "
                "--kv-cache-memory-bytes.",
                param="max_tokens",
            )

    def _check_queue(self, origin: EngineRequest) -> None:
        queue, config = self._queue, self._config
        requests = queue.num_new + 1 - config.max_num_queued_reqs
        tokens = queue.num_new_tokens + len(origin.prompt) - config.max_num_queued_tokens
        if requests > 0 or tokens > 0:
            raise QueueFullError(
                f"The queue is full: {queue.num_new} requests with {queue.num_new_tokens} tokens "
                f"wait (limits {config.max_num_queued_reqs} and {config.max_num_queued_tokens}). "
                "Try again later.",
                retry_after=queue.retry_after(max(0, requests), max(0, tokens)),
            )
