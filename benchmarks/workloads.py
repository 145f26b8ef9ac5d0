"""The workloads of the comparison: what is asked, of every peer alike, and what is kept of it.

Prompts are random token ids, drawn anew for each workload and round: no peer finds in its prefix
cache what another left there. (Not every peer can be told to forget.)
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

GROWTH_CONTEXTS = (512, 2048, 4096, 8192, 16_384, 32_000)
GROWTH_TOKENS = 16
SHARED_PREFIX = 1024


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


class Runner(Protocol):
    """A peer, as far as workloads know it."""

    def run(self, work: Workload, keep_prefix: bool = False) -> dict[str, Any]: ...
    def start(self) -> Any: ...
    def close(self) -> None: ...


def _random(name: str, seed: int) -> random.Random:
    return random.Random(f"{name} {seed}")


def _prompt(rng: random.Random, length: int, vocab: int) -> list[int]:
    return [rng.randrange(10, vocab) for _ in range(length)]


def batch_one(vocab: int, seed: int, prompt: int = 128, output: int = 128) -> Workload:
    """One request alone: latency of decode."""
    name = f"batch1_{prompt}"
    return Workload(name, [_prompt(_random(name, seed), prompt, vocab)], [output])


def mixed(vocab: int, seed: int, count: int = 32) -> Workload:
    """`count` requests at once: 64–256 tokens in, 64–128 out."""
    rng = _random("mixed", seed)
    prompts = [_prompt(rng, rng.randint(64, 256), vocab) for _ in range(count)]
    return Workload(f"mixed{count}", prompts, [rng.randint(64, 128) for _ in range(count)])


def prefill(vocab: int, seed: int, length: int = 2048) -> Workload:
    """A long prompt and one token: the rate of prefill."""
    return Workload(f"prefill{length}", [_prompt(_random("prefill", seed), length, vocab)], [1])


def shared_prefix(
    vocab: int, seed: int, count: int = 16, suffix: int = 32, name: str = "shared_prefix"
) -> Workload:
    """`count` requests at once whose first tokens are equal, none of them seen before."""
    rng = _random(name, seed)
    head = _prompt(rng, SHARED_PREFIX, vocab)
    prompts = [head + _prompt(rng, suffix, vocab) for _ in range(count)]
    return Workload(name, prompts, [16] * count)


def run_prefix_reuse(peer: Runner, vocab: int, seed: int) -> dict[str, Any]:
    """Two requests, one after the other, whose first tokens are equal."""
    first, second = (
        Workload("prefix_reuse", [prompt], [16])
        for prompt in shared_prefix(vocab, seed, count=2, name="prefix_reuse").prompts
    )
    a, b = peer.run(first), peer.run(second, keep_prefix=True)
    return b | {
        "seconds": a["seconds"] + b["seconds"],
        "output_tokens": a["output_tokens"] + b["output_tokens"],
        "first_ttft": a["ttft"],
        "second_ttft": b["ttft"],
    }


def run_growth(peer: Runner, vocab: int, seed: int, budget: float = 900.0) -> dict[str, Any]:
    """Seconds a token (ITL) at growing contexts of one request, each prompt extending the last.

    A peer that keeps the prefix computes only what is new. `points` are (context in the middle of
    the decode, seconds a token); growing ends early when the next context would take the peer
    beyond `budget` seconds, taking its last one as the measure.
    """
    prompt = _prompt(_random("growth", seed), GROWTH_CONTEXTS[-1], vocab)
    points, found, begin, last = [], {}, time.monotonic(), 0.0
    for context in GROWTH_CONTEXTS:
        if points and time.monotonic() - begin + 3 * last > budget:
            break
        work = Workload("growth", [prompt[:context]], [GROWTH_TOKENS])
        found = peer.run(work, keep_prefix=bool(points))
        last = found["seconds"]
        itl = found["decode_seconds"] / (GROWTH_TOKENS - 1)
        points.append([context + GROWTH_TOKENS / 2, itl])
    return found | {"points": points, "seconds": time.monotonic() - begin}


def run_start(peer: Runner, vocab: int, seed: int) -> dict[str, Any]:
    """From the start of a fresh process to its first token, imports and load included."""
    peer.close()
    begin = time.monotonic()
    peer.start()
    found = peer.run(Workload("start", [_prompt(_random("start", seed), 16, vocab)], [1]))
    return found | {"seconds": time.monotonic() - begin}


def _runner(make: Callable[..., Workload], **sizes: int) -> Callable[..., dict[str, Any]]:
    def run(peer: Runner, vocab: int, seed: int) -> dict[str, Any]:
        return peer.run(make(vocab, seed, **sizes))

    return run


# By name, what runs it on a peer; in this order a round takes them.
WORKLOADS: dict[str, Callable[..., dict[str, Any]]] = {
    "batch1": _runner(batch_one),
    "batch1_1k": _runner(batch_one, prompt=1024),
    "mixed32": _runner(mixed),
    "prefill2048": _runner(prefill),
    "shared_prefix": _runner(shared_prefix),
    "prefix_reuse": run_prefix_reuse,
    "growth": run_growth,
    "start": run_start,
}
