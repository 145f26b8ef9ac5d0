"""Values that cross module and process borders. Plain dataclasses: msgspec encodes them typed."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a sequence ended, in the words of the OpenAI API."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class TokenSegment:
    """A run of token ids. Other kinds of segment (spans of embeddings with a content hash)
    come beside it; each of them knows how many positions it fills."""

    token_ids: list[int]

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model reads: segments in order, and the text they came from, if any."""

    segments: list[TokenSegment]
    text: str | None = None

    @classmethod
    def of_tokens(cls, token_ids: list[int], text: str | None = None) -> Prompt:
        return cls([TokenSegment(token_ids)], text)

    @property
    def token_ids(self) -> list[int]:
        if len(self.segments) == 1:
            return self.segments[0].token_ids
        return [token for segment in self.segments for token in segment.token_ids]

    def __len__(self) -> int:
        return sum(len(segment) for segment in self.segments)


@dataclass(slots=True)
class PositionLogprobs:
    """Log-probabilities at one position: the chosen token first, then the top ones by rank.

    `token_ids[0]` is the token that stands there, `ranks[0]` its rank (1 is the most probable);
    `token_ids[1:]` are the top tokens in order (the chosen one may stand there again).
    """

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]


@dataclass(frozen=True, slots=True)
class Logprob:
    """One entry of the user-facing map token id → Logprob."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(slots=True)
class RequestMetrics:
    """Times of one request: `time.monotonic()` seconds of the front end, 0.0 where unknown."""

    arrival: float = 0.0
    first_scheduled: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0
    num_preemptions: int = 0


@dataclass(slots=True)
class CompletionOutput:
    """One generated sequence of a request (`index` in 0..n-1)."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """What `LLM.generate` returns for a prompt, and what `AsyncEngine.generate` yields."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    metrics: RequestMetrics = field(default_factory=RequestMetrics)


@dataclass(slots=True)
class BeamSequence:
    """One beam: generated tokens, text, and the score it was ranked by."""

    token_ids: list[int]
    text: str
    cumulative_logprob: float
    score: float
    finish_reason: str | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """The result of a beam search, best sequence first."""

    sequences: list[BeamSequence]
