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

import canary

GROWTH_CONTEXTS = (512, 2048, 4096, 8192, 16_384, 24_576, 32_000)
GROWTH_TOKENS, GROWTH_PASSES = 16, 5
GROWTH_BUDGET = 1800.0
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


def run_growth(
    peer: Runner,
    vocab: int,
    seed: int,
    *,
    longest: int = GROWTH_CONTEXTS[-1],
    budget: float = GROWTH_BUDGET,
    probe: Callable[[], float] = lambda: canary.read_bandwidth(),
    say: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Seconds a token (ITL) over the context, of one prompt that a peer with a prefix cache
    computes once.

    The cache is filled in rising order, each context extending the last, as long as `budget`
    seconds are likely to hold the next one. Then come passes over all contexts that were reached:
    each decodes a few tokens at every one, within seconds of each other and between two probes of
    the bandwidth, which may change in the minutes that filling takes. A pass that the budget ends
    is dropped, unless it is the first.

    Returns what `Runner.run` found last and `contexts` (those reached), `seconds`, and `passes`:
    `read_gb_s` beside `points`, (context in the middle of the decode, seconds a token) each.
    """
    begin = time.monotonic()
    prompt = _prompt(_random("growth", seed), longest, vocab)
    reached: list[int] = []
    for context in [c for c in GROWTH_CONTEXTS if c < longest] + [longest]:
        spent = time.monotonic() - begin
        # What is computed grows with the square of the context at most.
        if reached and spent * (context / reached[-1]) ** 2 > budget:
            say(f"stopped after {spent:.0f} s: {context} tokens may not fit into {budget:.0f} s")
            break
        found = peer.run(Workload("growth", [prompt[:context]], [1]), keep_prefix=bool(reached))
        reached.append(context)
        say(f"context {context} after {time.monotonic() - begin:.0f} s")
    passes: list[dict[str, Any]] = []
    rate = probe()
    while len(passes) < GROWTH_PASSES:
        points, before = [], rate
        for context in reversed(reached):
            work = Workload("growth", [prompt[:context]], [GROWTH_TOKENS])
            found = peer.run(work, keep_prefix=True)
            itl = found["decode_seconds"] / (GROWTH_TOKENS - 1)
            points.append((context + GROWTH_TOKENS / 2, itl))
            if passes and time.monotonic() - begin > budget:
                break
        if len(points) < len(reached):
            break
        rate = probe()
        passes.append({"read_gb_s": max(before, rate), "points": sorted(points)})
        say(f"pass {len(passes)} after {time.monotonic() - begin:.0f} s")
    seconds = time.monotonic() - begin
    return found | {"contexts": reached, "passes": passes, "seconds": seconds}


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
