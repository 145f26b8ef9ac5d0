"""Sampling parameters, with the names and defaults that users know from other engines."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from .errors import InvalidRequestError

MAX_N = 128
MAX_STOP = 64
MAX_STOP_CHARS = 1_024
MAX_BAD_WORDS = 256
MAX_BIAS_ENTRIES = 1_024
MAX_SEED = 2**63 - 1


class OutputKind(StrEnum):
    """What each streamed output carries: all so far, only what is new, or one at the end."""

    CUMULATIVE = "cumulative"
    DELTA = "delta"
    FINAL_ONLY = "final_only"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens, and when to stop.

    `top_k` 0 (or -1) means the whole vocabulary; `temperature` 0 is greedy; `seed` None draws one.
    `logprobs` / `prompt_logprobs`: how many of the most probable tokens to report beside the
    chosen one (-1: the whole vocabulary, None: nothing). `max_tokens` None: the rest of the
    context. Raises `InvalidRequestError` naming the field for every value out of bounds.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    bad_words: list[str] = field(default_factory=list)
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: OutputKind = OutputKind.CUMULATIVE
    stream_interval: int = 1
    logit_bias: dict[int, float] = field(default_factory=dict)
    allowed_token_ids: list[int] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):  # users write stop="\n"; a frozen instance is mended once
            object.__setattr__(self, "stop", [self.stop])
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        _check_range("n", self.n, 1, MAX_N)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("repetition_penalty", self.repetition_penalty, 1e-3, 100.0)
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_range("top_k", self.top_k, 0, 2**31 - 1)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("min_tokens", self.min_tokens, 0, 2**31 - 1)
        _check_range("stream_interval", self.stream_interval, 1, 2**31 - 1)
        if self.seed is not None:
            _check_range("seed", self.seed, -MAX_SEED - 1, MAX_SEED)
        if self.max_tokens is not None:
            _check_range("max_tokens", self.max_tokens, 1, 2**31 - 1)
            if self.min_tokens > self.max_tokens:
                raise InvalidRequestError(
                    f"min_tokens is {self.min_tokens} but max_tokens is {self.max_tokens}: "
                    "min_tokens must not exceed it.",
                    param="min_tokens",
                )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _check_range(name, value, -1, 2**31 - 1)
        self._check_lists()

    def _check_lists(self) -> None:
        _check_strings("stop", self.stop, MAX_STOP)
        _check_strings("bad_words", self.bad_words, MAX_BAD_WORDS)
        _check_count("stop_token_ids", self.stop_token_ids, MAX_STOP)
        _check_count("logit_bias", self.logit_bias, MAX_BIAS_ENTRIES)
        for token, bias in self.logit_bias.items():
            _check_range(f"logit_bias[{token}]", bias, -100.0, 100.0)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InvalidRequestError(
                "allowed_token_ids is empty: give at least one id, or leave the field out.",
                param="allowed_token_ids",
            )
        if self.stop and not self.detokenize:
            raise InvalidRequestError(
                "stop strings need the text: set detokenize=True or use stop_token_ids.",
                param="stop",
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchParams:
    """Beam search: keep the `beam_width` best sequences by
    cumulative log-probability / length ** length_penalty (as `transformers` scores them).

    `temperature` above 0 divides the logits before their log-probabilities are taken; no token is
    drawn. `include_stop_str_in_output`: the text keeps the end-of-sequence token, where that has a
    text (the token ids have it always).
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        _check_range("beam_width", self.beam_width, 1, 64)
        _check_range("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("length_penalty", self.length_penalty, -10.0, 10.0)


def _check_range(
    name: str, value: float, low: float, high: float, *, low_open: bool = False
) -> None:
    bad_type = isinstance(value, bool) or not isinstance(value, int | float)
    if bad_type or math.isnan(value) or value > high or value < low or (low_open and value == low):
        bracket = "(" if low_open else "["
        raise InvalidRequestError(
            f"{name} is {value!r}; it must be in {bracket}{low}, {high}].", param=name
        )


def _check_count(name: str, values: Any, limit: int) -> None:
    if len(values) > limit:
        raise InvalidRequestError(
            f"{name} has {len(values)} entries; at most {limit} are allowed.", param=name
        )


def _check_strings(name: str, values: list[str], limit: int) -> None:
    _check_count(name, values, limit)
    for value in values:
        if not isinstance(value, str) or not value:
            raise InvalidRequestError(
                f"{name} holds {value!r}: every entry must be a non-empty string.", param=name
            )
        if len(value) > MAX_STOP_CHARS:
            raise InvalidRequestError(
                f"{name} holds a string of {len(value)} characters; "
                f"at most {MAX_STOP_CHARS} are allowed.",
                param=name,
            )
