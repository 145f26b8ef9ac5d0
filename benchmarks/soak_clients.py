"""The load of the soak: streaming chat clients of which a share vanishes at a random moment.

Runs in a process of its own and prints one JSON line of counts when its time is over.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections import Counter

import httpx

PROMPTS = (
    "What is the capital of France?",
    "What is 12 plus 7?",
    "Count from 1 to 20.",
    "Who are you?",
    "Tell me about the months of the year.",
)


def request_body(rng: random.Random, model: str) -> dict[str, object]:
    """A request of one of the kinds that use different paths of the engine."""
    filler = " ".join(rng.choice(PROMPTS) for _ in range(rng.choice((0, 0, 2, 20))))
    body: dict[str, object] = {
        "model": model,
        "messages": [{"role": "user", "content": f"{filler} {rng.choice(PROMPTS)}".strip()}],
        "stream": True,
        "max_tokens": rng.randint(8, 160),
        "temperature": rng.choice((0.0, 0.7, 1.0)),
        "ignore_eos": rng.random() < 0.5,
    }
    if rng.random() < 0.15:
        body["n"] = rng.randint(2, 4)
    if rng.random() < 0.15:
        body |= {"logprobs": True, "top_logprobs": 3}
    if rng.random() < 0.15:
        body |= {"presence_penalty": 0.5, "top_p": 0.9, "stop": ["7", "Paris"]}
    return body


async def client(
    number: int, http: httpx.AsyncClient, args: argparse.Namespace, counts: Counter[str]
) -> None:
    rng = random.Random(f"{args.seed}-{number}")
    deadline = time.monotonic() + args.seconds
    while time.monotonic() < deadline:
        aborts = rng.random() < args.abort
        # A vanishing client leaves in the queue, in prefill, or after some chunks.
        leave_after = rng.choice((0.0, 0.005, 0.05, 0.3, 1.0)) if aborts else 60.0
        counts["started"] += 1
        try:
            async with asyncio.timeout(leave_after):
                await consume(http, request_body(rng, args.model), counts)
        except TimeoutError:
            counts["aborted" if aborts else "hung"] += 1
        except httpx.HTTPError as error:
            counts[f"transport {type(error).__name__}"] += 1


async def consume(http: httpx.AsyncClient, body: dict[str, object], counts: Counter[str]) -> None:
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            await response.aread()
            counts[f"status {response.status_code}"] += 1
            await asyncio.sleep(0.05)
            return
        last = ""
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                counts["chunks"] += 1
                last = line
                if '"error"' in line:
                    counts["error events"] += 1
        counts["finished" if last == "data: [DONE]" else "cut short"] += 1


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--abort", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    counts: Counter[str] = Counter()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=args.clients)
    async with httpx.AsyncClient(base_url=args.url, timeout=120, limits=limits) as http:
        await asyncio.gather(*(client(i, http, args, counts) for i in range(args.clients)))
    print(json.dumps(counts))


if __name__ == "__main__":
    asyncio.run(main())
