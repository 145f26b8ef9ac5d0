"""Synthetic prompts and the statistics of what came of them."""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .flags import number


@dataclass(frozen=True)
class Job:
    """One request: prompt tokens, and how many to generate."""

    prompt: list[int]
    output_len: int


def add_workload_arguments(parser: argparse.ArgumentParser, num_prompts: int) -> None:
    for name, low, default, help in (
        ("num-prompts", 1, num_prompts, "Prompts in all."),
        ("input-len", 1, 128, "Prompt tokens, on average."),
        ("output-len", 1, 128, "Tokens to generate."),
        ("shared-prefix-len", 0, 0, "Tokens that all prompts begin with."),
    ):
        add_number(parser, name, number(int, low), default, help)
    ratio_help = "Lengths are drawn from [length * (1 - R), length * (1 + R)]."
    add_number(parser, "range-ratio", number(float, 0, 1), 0.0, ratio_help)
    add_number(parser, "workload-seed", int, 0, "Seed of prompts and lengths.")


def add_number(
    parser: argparse.ArgumentParser,
    name: str,
    kind: Callable[[str], float],
    default: float,
    help: str,
) -> None:
    """A flag that always has a value, which its help shows."""
    shown = f"{help} (default: {default})"
    metavar = kind.__name__.upper()
    parser.add_argument(f"--{name}", type=kind, default=default, metavar=metavar, help=shown)


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
