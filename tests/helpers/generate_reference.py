"""What `transformers.generate` yields on the tiny models: greedy tokens, beams, log-probabilities.

Prompts whose top two logits come within MIN_MARGIN somewhere on the way are rejected: there the
order of a sum decides, and equality means nothing.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from helpers import tiny_models
from torch import Tensor

MIN_MARGIN = 1e-4
LENGTHS = (2, 3, 9, 16, 24, 31, 49, 77)
"""Prompt lengths: around block and chunk borders, and beyond the sliding windows."""


class Case(NamedTuple):
    """A prompt, its greedy continuation, and the smallest margin on the way."""

    prompt: list[int]
    tokens: list[int]
    margin: float


def generate(model: Any, token_ids: Tensor, count: int, **options: Any) -> Any:
    """`model.generate` for exactly `count` tokens (`[batch, length]` prompts, no padding)."""
    values: dict[str, Any] = {
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    torch.set_num_threads(1)  # models this small gain nothing from a second one
    with torch.inference_mode():
        return model.generate(
            token_ids,
            attention_mask=torch.ones_like(token_ids),
            max_new_tokens=count,
            **(values | options),
        )


@functools.cache
def greedy_cases(name: str, count: int, num_tokens: int) -> tuple[Case, ...]:
    """`count` cases of a variant, of mixed lengths; rejected prompts are replaced."""
    model = tiny_models.reference(name)
    per_length = -(-count // len(LENGTHS))
    cases: list[Case] = []
    for length in LENGTHS:
        seeds = range(10_000 * length, 10_000 * length + 2 * per_length)
        prompts = torch.tensor([tiny_models.prompt(length, seed) for seed in seeds])
        found = generate(model, prompts, num_tokens)
        top = torch.stack(found.logits, dim=1).float().topk(2, dim=-1).values
        margins = (top[..., 0] - top[..., 1]).amin(-1).tolist()
        tokens = found.sequences[:, length:].tolist()
        rows = zip(prompts.tolist(), tokens, margins, strict=True)
        cases += [Case(*row) for row in rows if row[2] >= MIN_MARGIN][:per_length]
    return tuple(cases[:count])


def describe(cases: tuple[Case, ...]) -> str:
    """How much the comparison proves: how many tokens differ, and how clear they were."""
    distinct = sum(len(set(case.tokens)) for case in cases)
    total = sum(len(case.tokens) for case in cases)
    margin = min(case.margin for case in cases)
    return f"{len(cases)} prompts: {distinct} of {total} tokens differ, margin ≥ {margin:.1e}"


def logprobs(name: str, token_ids: list[int]) -> Tensor:
    """fp32 `[tokens, vocab]`: log softmax after each of the tokens."""
    model = tiny_models.reference(name)
    return tiny_models.reference_logits(model, token_ids).log_softmax(-1)
