"""An engine on the platform under test, in this process, driven as its front ends drive it."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..core.args import EngineArgs
from ..core.engine.inproc import InprocClient
from ..core.engine.messages import AddRequests, EngineRequest, StepMessage
from ..core.plan import StepPlan
from ..core.sampling_params import SamplingParams
from ..core.types import PositionLogprobs, Prompt
from ..platforms.interface import Device, StepLimits
from .attention_specs import block_sizes, spec_for
from .base import Failed, Subject
from .models import MODELS, oracle

MAX_POLLS = 20_000
MAX_LEN = 192  # tokens of a sequence where blocks are small, unless a check says otherwise
SMALL_BLOCK = 32
"""Tokens. Where the smallest block that a platform allows is larger, sequences are longer in the
same proportion, so that they still fill blocks and go on in others."""


@dataclass
class Found:
    """All that one sequence yielded."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    num_cached: int = 0
    num_preemptions: int = 0


class RowShape(NamedTuple):
    """A row of a step: it computes `num_tokens` tokens of its sequence, from `start` on."""

    start: int
    num_tokens: int
    num_prompt: int

    @property
    def decodes(self) -> bool:
        return self.start >= self.num_prompt


class Session:
    """Runs requests to their end. `plans`: the shape of each step."""

    def __init__(self, args: EngineArgs) -> None:
        self.client = InprocClient.from_args(args)
        self.config = self.client.engine.config
        self.plans: list[list[RowShape]] = []
        self._num_prompt: dict[int, int] = {}  # by row
        self.found: dict[tuple[str, int], Found] = {}
        self._submit = self.client.engine.executor.submit
        self.client.engine.executor.submit = self._note_plan  # type: ignore[method-assign]

    @property
    def device(self) -> Device:
        """That of the only rank."""
        device: Device = self.client.engine.executor.device  # type: ignore[attr-defined]
        return device

    @property
    def largest_batch(self) -> int:
        return max(map(len, self.plans), default=0)

    def _note_plan(self, plan: StepPlan) -> Any:
        self._num_prompt.update((new.row, new.num_prompt) for new in plan.added)
        if plan.rows:
            rows = zip(plan.rows, plan.starts, plan.counts, strict=True)
            self.plans.append(
                [RowShape(start, count, self._num_prompt[row]) for row, start, count in rows]
            )
        return self._submit(plan)

    def run(
        self, requests: Sequence[EngineRequest], arrivals: random.Random | None = None
    ) -> dict[tuple[str, int], Found]:
        """(request id, child index) → what it yielded. `arrivals`: requests come in random order,
        a few between steps; otherwise all at once."""
        waiting = list(requests)
        if arrivals is not None:
            arrivals.shuffle(waiting)
        self.found = {}
        for _ in range(MAX_POLLS):
            count = len(waiting) if arrivals is None else min(len(waiting), arrivals.randint(0, 3))
            if count:
                self.client.send(AddRequests(waiting[:count]))
                del waiting[:count]
            self.poll()
            if not (waiting or self.client.engine.has_work):
                while self.poll():
                    continue
                return self.found
        raise Failed(f"The engine does not come to an end: {MAX_POLLS} turns were not enough.")

    def poll(self) -> bool:
        """One turn of the engine; False if it had nothing to say."""
        message = self.client.poll(0.0)
        if isinstance(message, StepMessage):
            self._note(message)
        return message is not None

    def _note(self, message: StepMessage) -> None:
        for output in message.outputs:
            found = self.found.setdefault((output.request_id, output.index), Found())
            found.tokens += output.token_ids
            found.logprobs += output.logprobs or []
            found.prompt_logprobs += output.prompt_logprobs or []
            found.finish_reason = output.finish_reason
            found.error = output.error
            found.num_cached = max(found.num_cached, output.num_cached)
            found.num_preemptions = max(found.num_preemptions, output.num_preemptions)
        for refused in message.rejected:
            self.found[refused.request_id, 0] = Found(
                finish_reason="error", error=f"refused: {refused.message}"
            )

    def close(self) -> None:
        self.client.close()


def dtype_of(subject: Subject) -> str:
    """fp32 where the platform has it: only there is equality of tokens a fair demand."""
    known = subject.platform().capabilities(subject.device).dtypes
    return next(name for name in ("float32", "bfloat16", "float16") if name in known)


def limits_of(subject: Subject) -> StepLimits:
    """Those of an engine with the usual settings, asked as `core.resolve` asks."""
    return subject.platform().step_limits(dataclasses.asdict(_usual_args(subject)))


def most_tokens(subject: Subject, wanted: int) -> int:
    """`wanted` tokens a step, or as many as the platform allows."""
    limits = limits_of(subject)
    bounds = [*([limits.max_tokens] if limits.max_tokens else []), *limits.token_buckets[-1:]]
    return min([wanted, *bounds])


def block_size_of(subject: Subject, at_least: int = 8) -> int:
    """A block that the platform allows, small so that sequences cross many borders."""
    spec = spec_for(subject, dtype=getattr(torch, dtype_of(subject)))
    smallest = min(block_sizes(subject.platform(), spec))
    return smallest * -(-at_least // smallest)


def scaled(subject: Subject, tokens: int) -> int:
    """`tokens`, or more where blocks cannot be small."""
    return tokens * max(block_size_of(subject), SMALL_BLOCK) // SMALL_BLOCK


def scaled_all(subject: Subject, lengths: Sequence[int]) -> tuple[int, ...]:
    return tuple(scaled(subject, length) for length in lengths)


def engine_args(subject: Subject, model: str, **settings: Any) -> EngineArgs:
    """`model` is one of `MODELS`; `settings` are fields of `EngineArgs`."""
    values = {"model": oracle(model).path if model in MODELS else model, **settings}
    if values.get("max_num_batched_tokens"):
        values["max_num_batched_tokens"] = most_tokens(subject, values["max_num_batched_tokens"])
    return dataclasses.replace(_usual_args(subject), **values)


def _usual_args(subject: Subject) -> EngineArgs:
    return EngineArgs(
        platform=subject.reference,
        device=subject.device,
        dtype=dtype_of(subject),
        max_model_len=str(scaled(subject, MAX_LEN)),
        max_num_seqs=16,
        kv_cache_memory_bytes=f"{scaled(subject, 16)}M",
        num_threads=1,
    )


@contextmanager
def open_session(subject: Subject, model: str, **settings: Any) -> Iterator[Session]:
    session = Session(engine_args(subject, model, **settings))
    try:
        yield session
    finally:
        session.close()


def request(
    request_id: str, prompt: Sequence[int], count: int, params: Mapping[str, Any] | None = None
) -> EngineRequest:
    """For exactly `count` tokens, greedy unless `params` say otherwise."""
    values: dict[str, Any] = {"temperature": 0.0, "seed": 0, "max_tokens": count}
    return EngineRequest(
        request_id=request_id,
        prompt=Prompt.of_tokens(list(prompt)),
        params=SamplingParams(**(values | {"ignore_eos": True} | dict(params or {}))),
    )
