"""Synthetic prompts and the statistics of what came of them."""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    """One request: prompt tokens, and how many to generate."""

    prompt: list[int]
    output_len: int


def add_workload_arguments(parser: argparse.ArgumentParser, num_prompts: int) -> None:
    parser.add_argument("--num-prompts", type=int, default=num_prompts)
    parser.add_argument("--input-len", type=int, default=128, help="Prompt tokens, on average.")
    parser.add_argument("--output-len", type=int, default=128, help="Tokens to generate.")
    parser.add_argument(
        "--range-ratio",
        type=float,
        default=0.0,
        help="Lengths are drawn from [length * (1 - R), length * (1 + R)].",
    )
    parser.add_argument(
        "--shared-prefix-len", type=int, default=0, help="Tokens all prompts share."
    )
    parser.add_argument("--workload-seed", type=int, default=0)


def make_jobs(namespace: argparse.Namespace, vocab_size: int) -> list[Job]:
    """The same jobs for the same arguments. Ids below 256 are left out: often special ones."""
    draw = random.Random(namespace.workload_seed)
    low = min(256, vocab_size // 2)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(low, vocab_size) for _ in range(count)]

    def length(mean: int) -> int:
        spread = int(mean * namespace.range_ratio)
        return max(1, draw.randint(mean - spread, mean + spread))

    shared = tokens(namespace.shared_prefix_len)
    return [
        Job(shared + tokens(length(namespace.input_len)), length(namespace.output_len))
        for _ in range(namespace.num_prompts)
    ]


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile; 0.0 of nothing."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
