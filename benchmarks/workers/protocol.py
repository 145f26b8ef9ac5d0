"""A peer runs in a process of its own and answers one JSON line for each JSON line it reads.

`{"op": "load", "model": path, "threads": n, "kv_tokens": n, "max_len": n, "options": {…}}` →
`{"seconds": …, "flags": {…}}`, the flags being what the engine was really given;
`{"op": "run", "prompts": …, "outputs": …, "keep_prefix": …}` → a measurement (see `Clock`);
`{"op": "score", "prompts": …}` → the most probable next token of each prompt and its
log-probability, by which peers are checked against each other.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Clock:
    """Arrival times of the tokens of requests that were all given at once."""

    def __init__(self, num_requests: int) -> None:
        self.start = time.perf_counter()
        self.first: list[float | None] = [None] * num_requests
        self.last = [self.start] * num_requests
        self.counts = [0] * num_requests

    def tokens(self, request: int, count: int = 1) -> None:
        """`count` more tokens of a request are here."""
        self.last[request] = time.perf_counter()
        if self.first[request] is None:
            self.first[request] = self.last[request]
        self.counts[request] += count

    def measurement(self, cached_tokens: int = 0) -> dict[str, Any]:
        first = sorted(moment - self.start for moment in self.first if moment is not None)
        spans = [b - a for a, b in zip(self.first, self.last, strict=True) if a is not None]
        return measurement(max(self.last) - self.start, sum(self.counts), first, spans) | {
            "cached_tokens": cached_tokens
        }


def measurement(
    seconds: float, output_tokens: int, ttft: list[float], decode: list[float]
) -> dict[str, Any]:
    """What `run` answers: seconds of the whole, of the median first token, and of the longest
    decode; memory of the process so far."""
    return {
        "seconds": seconds,
        "output_tokens": output_tokens,
        "ttft": sorted(ttft)[len(ttft) // 2],
        "decode_seconds": max(decode),
        "cached_tokens": 0,
        **memory(),
    }


def memory() -> dict[str, float]:
    """Peak resident GiB of this process and its children, and the anonymous part of it now.

    The peak holds mapped files (libraries, checkpoints) too; the anonymous part is what the
    engine itself took.
    """
    peak = anonymous = 0
    for pid in _family(os.getpid()):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "VmHWM":
                peak += int(value.split()[0])
            elif name in ("RssAnon", "RssShmem"):
                anonymous += int(value.split()[0])
    return {"peak_rss_gib": peak / 2**20, "anonymous_gib": anonymous / 2**20}


def _family(pid: int) -> list[int]:
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += _family(int(child))
    return found


def serve(handlers: dict[str, Callable[..., Any]]) -> None:
    """Answer requests on the real stdout until stdin ends; stray prints go to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        op = request.pop("op")
        answers.write(json.dumps(handlers[op](**request)) + "\n")
