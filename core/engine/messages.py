"""What a front end and an engine say to each other. Typed dataclasses; msgspec carries them
between processes, in one process they are passed as they are. Never pickle."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..sampling_params import BeamSearchParams, SamplingParams
from ..types import FinishReason, PositionLogprobs, Prompt


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A request as the engine takes it: tokenised, every default resolved by the front end.

    `params.max_tokens` and `params.seed` are concrete. `cache_root` is the 32-byte root of the
    request's prefix-hash chain (`core.kv.hashing.prefix_root`). `priority`: lower is served
    first. `beam`: search instead of sampling (then `params` only carries its limits).
    """

    request_id: str
    prompt: Prompt
    params: SamplingParams
    eos_token_ids: list[int] = field(default_factory=list)
    bad_words_ids: list[list[int]] = field(default_factory=list)
    cache_root: bytes = b"\0" * 32
    priority: int = 0
    beam: BeamSearchParams | None = None

    @property
    def suppress_ids(self) -> list[int]:
        """What would end a sequence, and is banned until it has `min_tokens` tokens."""
        params = self.params
        if params.min_tokens == 0:
            return []
        ends = [] if params.ignore_eos else self.eos_token_ids
        return sorted({*ends, *params.stop_token_ids})

    def own_bans(self, generated: list[int]) -> set[int]:
        """The ids that the request bans behind what it generated: the host's copy of what the
        sampler does, to tell a request that leaves itself no token."""
        banned = {
            word[-1]
            for word in self.bad_words_ids
            if word and generated[max(0, len(generated) - len(word) + 1) :] == word[:-1]
        }
        if len(generated) < self.params.min_tokens:
            banned.update(self.suppress_ids)
        return banned


@dataclass(slots=True)
class SequenceOutput:
    """What one sequence of one request gained in one step.

    `num_cached` is set on the first output; `finish_reason` on the last. `prompt_logprobs` come
    in order of position, possibly over several steps. `first_scheduled`: `time.monotonic()` (one
    clock for all processes of a host) when a step first took it in; 0.0 where it is not said.
    """

    request_id: str
    index: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] | None = None
    prompt_logprobs: list[PositionLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    error: str | None = None
    num_cached: int = 0
    num_preemptions: int = 0
    first_scheduled: float = 0.0


@dataclass(slots=True)
class BeamOutput:
    """A finished beam search: sequences best first."""

    request_id: str
    token_ids: list[list[int]]
    cumulative_logprobs: list[float]
    scores: list[float]
    finish_reasons: list[FinishReason]


@dataclass(slots=True)
class RejectedRequest:
    """A request that was refused at admission; `kind` is the error's class name in core.errors."""

    request_id: str
    kind: str
    message: str
    param: str | None = None
    retry_after: float | None = None


@dataclass(slots=True)
class EngineStats:
    """Gauges now, counters since start. `kv_*` are blocks over all cache groups;
    `generation_tokens` are those that rows yielded; `discarded_tokens`, the part of them that a
    stop string cut off later, are not billed.
    """

    step_id: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    kv_used: int = 0
    kv_total: int = 0
    num_preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    discarded_tokens: int = 0
    last_step_tokens: int = 0
    num_quarantined: int = 0


@dataclass(slots=True)
class StepMessage:
    """One message a step for the whole batch, engine → front end."""

    outputs: list[SequenceOutput] = field(default_factory=list)
    beams: list[BeamOutput] = field(default_factory=list)
    rejected: list[RejectedRequest] = field(default_factory=list)
    stats: EngineStats | None = None


@dataclass(frozen=True, slots=True)
class AddRequests:
    requests: list[EngineRequest]


@dataclass(frozen=True, slots=True)
class AbortRequests:
    request_ids: list[str]


@dataclass(frozen=True, slots=True)
class FinishSequence:
    """A stop string was found at the edge: the sequence ends after `at_token` generated tokens;
    what was generated beyond is discarded and not billed."""

    request_id: str
    index: int
    at_token: int


@dataclass(frozen=True, slots=True)
class UtilityCall:
    """A rare, synchronous question: `ping`, `stats`, `check`, `reset_prefix_cache`."""

    call_id: int
    method: str


@dataclass(slots=True)
class UtilityResult:
    call_id: int
    value: dict[str, int | str | bool] = field(default_factory=dict)
    error: str | None = None
