"""`trimaran bench serve`: load on a running server, over HTTP."""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import TrimaranError
from .flags import number
from .http_client import Client
from .workload import Job, add_number, add_workload_arguments, make_jobs, mean, percentile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_workload_arguments(parser, num_prompts=100)
    parser.add_argument(
        "--url", default="http://127.0.0.1:8000", help="The server (default: %(default)s)."
    )
    parser.add_argument("--api-key", help="Its API key (or TRIMARAN_API_KEY).")
    parser.add_argument("--model", help="Name the server knows it by (the first it lists).")
    rate_help = "Requests a second, Poisson; 0 sends all at once."
    add_number(parser, "request-rate", number(float, 0), 0.0, rate_help)
    add_number(parser, "max-concurrency", number(int, 1), 64, "Most requests open at once.")
    add_number(parser, "vocab-size", number(int, 1), 1_000, "Prompt ids are below it.")


@dataclass
class Trace:
    """One request: when it began, when tokens came, and what the server billed."""

    start: float = 0.0
    times: list[float] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def gaps(self) -> list[float]:
        return [later - sooner for sooner, later in zip(self.times, self.times[1:], strict=False)]


def run(namespace: argparse.Namespace) -> dict[str, Any]:
    jobs = make_jobs(namespace, namespace.vocab_size)
    traces, seconds = asyncio.run(_drive(namespace, jobs))
    return summarize(traces, seconds)


async def _drive(namespace: argparse.Namespace, jobs: list[Job]) -> tuple[list[Trace], float]:
    client = Client.from_flags(namespace)
    model = namespace.model or (await client.get("/v1/models"))["data"][0]["id"]
    slots = asyncio.Semaphore(namespace.max_concurrency)
    draw = random.Random(namespace.workload_seed)
    traces = [Trace() for _ in jobs]

    async def one(job: Job, trace: Trace) -> None:
        async with slots:
            await _measure(client, model, job, trace)

    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for job, trace in zip(jobs, traces, strict=True):
            group.create_task(one(job, trace))
            if namespace.request_rate > 0:
                await asyncio.sleep(draw.expovariate(namespace.request_rate))
    return traces, time.perf_counter() - start


async def _measure(client: Client, model: str, job: Job, trace: Trace) -> None:
    body = {
        "model": model,
        "prompt": job.prompt,
        "max_tokens": job.output_len,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    trace.start = time.perf_counter()
    try:
        async for event in client.events("/v1/completions", body):
            if event.get("usage"):
                trace.usage = event["usage"]
            elif event["choices"]:
                trace.times.append(time.perf_counter())
    except TrimaranError as error:
        trace.error = error.message


def summarize(traces: list[Trace], seconds: float) -> dict[str, Any]:
    """Times in milliseconds; tokens as the server's usage counts them."""
    good = [trace for trace in traces if trace.error is None and trace.times]
    first = [1e3 * (trace.times[0] - trace.start) for trace in good]
    gaps = [1e3 * gap for trace in good for gap in trace.gaps]
    whole = [1e3 * (trace.times[-1] - trace.start) for trace in good]
    prompt = sum(trace.usage.get("prompt_tokens", 0) for trace in good)
    output = sum(trace.usage.get("completion_tokens", 0) for trace in good)
    result: dict[str, Any] = {
        "requests": len(traces),
        "failed": len(traces) - len(good),
        "seconds": seconds,
        "prompt_tokens": prompt,
        "output_tokens": output,
        "requests_per_second": len(good) / seconds,
        "output_tokens_per_second": output / seconds,
        "total_tokens_per_second": (prompt + output) / seconds,
    }
    for name, values in (("ttft", first), ("itl", gaps), ("e2e", whole)):
        result[f"{name}_ms_mean"] = mean(values)
        result[f"{name}_ms_p50"] = percentile(values, 0.5)
        result[f"{name}_ms_p99"] = percentile(values, 0.99)
    errors = sorted({trace.error for trace in traces if trace.error})
    if errors:
        result["errors"] = "; ".join(errors[:5])
    return result
