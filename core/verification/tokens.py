"""Greedy tokens and their log-probabilities of whole engines, compared."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..types import CompletionOutput

MARGINS = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.25}
"""By element type: a difference of log-probabilities by which rounding may swap two tokens."""


@dataclass(frozen=True, slots=True)
class PromptAgreement:
    """One prompt's greedy tokens on both. `first`: the index of the first token that differs (None:
    none does), `margin`: the larger of the two platforms' leads of their own token over their
    second there. `logprob_error`: the largest difference before it."""

    prompt: int
    tokens: int
    agreed: int
    first: int | None
    margin: float | None
    logprob_error: float
    explained: bool
    error: str = ""


def compare_tokens(
    index: int, reference: CompletionOutput, other: CompletionOutput, margin: float
) -> PromptAgreement:
    """`explained`: they agree, or first differ where neither is sure by more than `margin`."""
    left, right = list(reference.token_ids), list(other.token_ids)
    pairs = enumerate(zip(left, right, strict=False))
    first = next((i for i, (a, b) in pairs if a != b), None)
    if first is None and len(left) != len(right):
        first = min(len(left), len(right))
    agreed = len(left) if first is None else first
    lead = None if first is None else max(_lead(reference, first), _lead(other, first))
    failed = [out.stop_reason for out in (reference, other) if out.finish_reason == "error"]
    return PromptAgreement(
        prompt=index,
        tokens=max(len(left), len(right)),
        agreed=agreed,
        first=first,
        margin=lead,
        logprob_error=_logprob_error(reference, other, agreed),
        explained=not failed and (lead is None or lead <= margin),
        error=f"failed: {failed[0]}" if failed else "",
    )


def _lead(output: CompletionOutput, position: int) -> float:
    """By how much the token at `position` leads the next likely one; inf where it has none."""
    entries = output.logprobs or []
    if position >= len(entries):
        return math.inf
    values = sorted((one.logprob for one in entries[position].values()), reverse=True)
    return values[0] - values[1] if len(values) > 1 else math.inf


def _logprob_error(reference: CompletionOutput, other: CompletionOutput, agreed: int) -> float:
    pairs = zip(reference.logprobs or [], other.logprobs or [], strict=False)
    tokens = list(reference.token_ids)[:agreed]
    errors = [
        abs(a[token].logprob - b[token].logprob)
        for token, (a, b) in zip(tokens, pairs, strict=False)
    ]
    return max(errors, default=0.0)
