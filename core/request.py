"""One sequence of a request, and the state machine it lives by."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from .plan import RowSampling
from .types import FinishReason, PositionLogprobs

if TYPE_CHECKING:
    from .engine.messages import BeamOutput, EngineRequest
    from .kv.sequence import SequenceKV

UINT64 = (1 << 64) - 1


class Status(Enum):
    """A preempted sequence is waiting again."""

    WAITING = "waiting"
    RUNNING = "running"
    BLOCKED = "blocked"
    FINISHED = "finished"


TRANSITIONS: dict[Status, frozenset[Status]] = {
    Status.WAITING: frozenset({Status.RUNNING, Status.BLOCKED, Status.FINISHED}),
    Status.RUNNING: frozenset({Status.WAITING, Status.BLOCKED, Status.FINISHED}),
    Status.BLOCKED: frozenset({Status.WAITING, Status.FINISHED}),
    Status.FINISHED: frozenset(),
}


class Controller(Protocol):
    """A feature that looks after several sequences of one request (fork, beam search).

    The scheduler tells it what happened; it answers by calling the scheduler's `Sequences`.
    """

    def computed(self, request: Request, num_computed: int) -> None:
        """The first `num_computed` tokens of a running sequence are in the cache, for good."""

    def reported(self, request: Request, logprobs: list[PositionLogprobs]) -> BeamOutput | None:
        """A sequence that yields no tokens reported log-probabilities. May end the search."""

    def ended(self, request: Request) -> None:
        """A sequence ended, for whatever reason."""


class IllegalTransitionError(RuntimeError):
    """A defect of the engine, never of a request."""


class Request:
    """One sequence (child `index`) of an `EngineRequest`.

    `tokens` are the known ones: prompt, then generated. `num_computed` counts the tokens whose KV
    values exist or are being written by a step in flight, `num_pending` the sampled tokens that
    are still in flight. So a step computes tokens[num_computed : len(tokens) + num_pending], or a
    part of it: that is the one rule of the scheduler. It never has to hold more than `max_total`
    tokens. `num_verified` tokens are known to have given sane logits; `last_step` is the last step
    that was planned with this sequence, and so the one its blocks have to outlive.
    """

    __slots__ = (
        "alone_until",
        "arrival_order",
        "block_reason",
        "controller",
        "digest",
        "finish_reason",
        "first_scheduled",
        "index",
        "is_new",
        "kv",
        "last_step",
        "max_total",
        "min_total",
        "num_cached",
        "num_computed",
        "num_pending",
        "num_preemptions",
        "num_prompt",
        "num_prompt_logprobs",
        "num_verified",
        "order",
        "origin",
        "party",
        "priority",
        "queue_entry",
        "reported_cached",
        "request_id",
        "row",
        "sampling",
        "status",
        "stop_ids",
        "stop_reason",
        "tokens",
        "yields",
    )

    def __init__(
        self,
        origin: EngineRequest,
        index: int,
        kv: SequenceKV,
        *,
        max_model_len: int,
        arrival_order: int,
    ) -> None:
        limits = origin.beam or origin.params
        self.origin = origin
        self.request_id = origin.request_id
        self.index = index
        self.kv = kv
        self.priority = origin.priority
        self.arrival_order = arrival_order
        self.tokens = list(origin.prompt.token_ids)
        self.num_prompt = len(self.tokens)
        self.max_total = max_model_len
        if limits.max_tokens is not None:
            self.max_total = min(max_model_len, self.num_prompt + limits.max_tokens)
        self.min_total = self.num_prompt + origin.params.min_tokens
        # token id → what the user is told: nothing for an end-of-sequence token, else the id.
        self.stop_ids: dict[int, int | None] = {t: t for t in origin.params.stop_token_ids}
        if not limits.ignore_eos:
            self.stop_ids.update(dict.fromkeys(origin.eos_token_ids))
        self.sampling = row_sampling(origin, index)
        # Tokens that a step which reaches the end of the known ones will yield.
        self.yields = 0 if origin.beam else 1
        self.status = Status.WAITING
        self.block_reason: str | None = None
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | None = None
        self.row: int | None = None
        # The feature that looks after this sequence beside others (fork, beam search).
        self.controller: Controller | None = None
        self.order: tuple[int, ...] = ()
        # Place in the waiting queue (0: none), and whether it still counts as a queued request.
        self.queue_entry = 0
        self.is_new = False
        self.num_computed = 0
        self.num_pending = 0
        self.num_verified = 0
        self.num_cached = 0
        self.reported_cached = False
        self.first_scheduled = 0.0  # seconds of the scheduler's clock
        self.num_preemptions = 0
        self.num_prompt_logprobs = 0
        self.last_step = -1
        # Who shares steps with it: everybody's is "", a suspect's its own (see `Quarantine`), until
        # it has more than `alone_until` tokens.
        self.party = ""
        self.alone_until = 0
        self.digest: bytes | None = None  # of its prompt, once the quarantine has asked

    @property
    def blocks(self) -> list[list[int]]:
        """The block table of each cache group."""
        return self.kv.tables

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def finished(self) -> bool:
        return self.status is Status.FINISHED

    def move_to(self, status: Status, reason: str | None = None) -> None:
        """Change state; `reason` says what a blocked sequence waits for."""
        if status not in TRANSITIONS[self.status]:
            raise IllegalTransitionError(
                f"request {self.request_id!r}[{self.index}]: {self.status.value} → {status.value}"
            )
        self.status = status
        self.block_reason = reason if status is Status.BLOCKED else None

    def append(self, token: int) -> FinishReason | None:
        """Take a generated token. Says whether the sequence ends with it, and why."""
        tokens = self.tokens
        tokens.append(token)
        total = len(tokens)
        if token in self.stop_ids and total > self.min_total:
            self.stop_reason = self.stop_ids[token]
            return FinishReason.STOP
        return FinishReason.LENGTH if total >= self.max_total else None

    def truncate(self, num_generated: int) -> int:
        """Cut what was generated beyond `num_generated` tokens; returns how many went."""
        keep = self.num_prompt + max(0, num_generated)
        dropped = max(0, len(self.tokens) - keep)
        del self.tokens[keep:]
        return dropped

    def __repr__(self) -> str:
        state = self.status.value + (f"({self.block_reason})" if self.block_reason else "")
        return (
            f"Request({self.request_id!r}[{self.index}] {state} row={self.row} "
            f"tokens={len(self.tokens)}+{self.num_pending} computed={self.num_computed})"
        )


def row_sampling(origin: EngineRequest, index: int) -> RowSampling:
    """What the sampler has to know of one child; every default is resolved here."""
    params = origin.params
    sampling = RowSampling(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=dict(params.logit_bias),
        allowed_token_ids=params.allowed_token_ids,
        bad_words_ids=origin.bad_words_ids,
        min_tokens=params.min_tokens,
        suppress_ids=origin.suppress_ids,
        seed=(params.seed or 0) & UINT64,
        child_index=index,
        logprobs=params.logprobs,
        # The prompt is the same for all children: the first one reports it.
        prompt_logprobs=params.prompt_logprobs if index == 0 else None,
    )
    if origin.beam is None:
        return sampling
    num_ends = 0 if origin.beam.ignore_eos else len(set(origin.eos_token_ids))
    width = origin.beam.beam_width
    # So many that `width` of them go on even if every beam could end in each of the ways.
    return replace(sampling, beam_width=width, logprobs=max(2, 1 + num_ends) * width)
