"""The workloads of the comparison: what is asked, of every peer alike."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """Requests given to a peer all at once: prompt token ids, and tokens to generate."""

    name: str
    prompts: list[list[int]]
    outputs: list[int]

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def output_tokens(self) -> int:
        return sum(self.outputs)


def _prompt(rng: random.Random, length: int, vocab: int) -> list[int]:
    return [rng.randrange(10, vocab) for _ in range(length)]


def batch_one(vocab: int, prompt: int = 128, output: int = 128, seed: int = 0) -> Workload:
    """One request alone: latency of decode."""
    rng = random.Random(seed)
    return Workload(f"batch1_{prompt}_{output}", [_prompt(rng, prompt, vocab)], [output])


def mixed(vocab: int, count: int = 32, seed: int = 1) -> Workload:
    """`count` requests at once: 64–256 tokens in, 64–128 out."""
    rng = random.Random(seed)
    prompts = [_prompt(rng, rng.randint(64, 256), vocab) for _ in range(count)]
    return Workload(f"mixed{count}", prompts, [rng.randint(64, 128) for _ in range(count)])


def prefill(vocab: int, length: int = 2048, seed: int = 2) -> Workload:
    """A long prompt and one token: the rate of prefill."""
    rng = random.Random(seed)
    return Workload(f"prefill{length}", [_prompt(rng, length, vocab)], [1])


def shared_prefix(
    vocab: int, prefix: int = 1024, suffix: int = 32, seed: int = 3
) -> list[Workload]:
    """Two requests, one after the other, whose first `prefix` tokens are equal."""
    rng = random.Random(seed)
    head = _prompt(rng, prefix, vocab)
    return [
        Workload(f"prefix_{which}", [head + _prompt(rng, suffix, vocab)], [16])
        for which in ("first", "second")
    ]
