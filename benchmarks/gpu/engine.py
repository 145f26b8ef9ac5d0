"""The engine as a whole, in this process: many requests at once, one alone, how both scale with
concurrency and context. Models have random bf16 weights in real shapes (`shapes.py`)."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import figures
import peers
import shapes
import trimaran_worker
import workloads
from limits import WEIGHTS, Limits, kv_bytes

from trimaran import LLM

from .part import Bench, Found, Piece, Record, Skip

ROUNDS = 3
SWEEP = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
CONTEXTS = (4096, 16_384, 32_768, 65_536, 131_072)
LONG_OUTPUT = 64

Prompts = list[list[int]]


def checkpoint(bench: Bench) -> Path:
    """Written once on this machine."""
    return shapes.make_checkpoint(bench.shape, bench.out if bench.tiny else peers.CACHE)


def engine_args(bench: Bench, **changes: Any) -> dict[str, Any]:
    found = {"model": str(checkpoint(bench)), "platform": bench.platform, "dtype": "bfloat16"}
    if bench.tiny:
        found |= {"num_threads": 1, "kv_cache_memory_bytes": "32M"}
    return found | changes


def opened(bench: Bench, **changes: Any) -> Callable[[], Any]:
    """An `LLM` that is opened when it is first asked for."""

    return bench.opened(lambda: LLM(**engine_args(bench, **changes)))


def run(llm: Any, prompts: Prompts, outputs: Sequence[int], **options: Any) -> Found:
    """All at once; what every peer of the comparison answers, too (`workers/protocol.py`)."""
    trimaran_worker.STATE["llm"] = llm
    keep = options.pop("keep_prefix", False)
    found = trimaran_worker.run(prompts, list(outputs), keep, **options)
    return found | {"output_tok_s": found["output_tokens"] / found["seconds"]}


def limits_of(bench: Bench) -> Limits | None:
    """None where the canary found nothing."""
    rates, sizes = bench.rates(), shapes.SHAPES[bench.shape]
    return Limits(sizes, rates["read_gb_s"], rates["gemm_gflop_s"]) if rates else None


def percent(figure: float, limit: float | None) -> Found:
    return {} if limit is None else {"percent_of_limit": 100 * figure / limit}


def mixed_lengths(count: int, shortest: int, longest: int) -> tuple[Prompts, list[int]]:
    """The lengths, and in prompts the tokens, of nano-vllm's benchmark (GeeeekExplorer/nano-vllm,
    bench.py) with its seed: at 256, 100 and 1024 there are 133,966 tokens to generate."""
    rng = random.Random(0)
    prompts = [
        [rng.randint(0, 10_000) for _ in range(rng.randint(shortest, longest))]
        for _ in range(count)
    ]
    return prompts, [rng.randint(shortest, longest) for _ in range(count)]


def batch_seconds(limits: Limits, prompts: Prompts, outputs: Sequence[int]) -> float:
    """The least time of requests that are all there at once: each of the decode steps reads the
    weights, and what is cached of the sequences that are not over; the prompts are computed."""
    sizes = limits.sizes
    steps = max(outputs)
    cached = sum(
        n * len(p) + n * (n - 1) / 2 for p, n in zip(prompts, outputs, strict=True)
    )  # tokens read, over all steps
    read = steps * WEIGHTS[limits.weights].weight_bytes(sizes) + cached * kv_bytes(sizes, limits.kv)
    computed = sum(len(p) / limits.prefill_tokens_per_second(len(p)) for p in prompts)
    return read / (limits.read_gb_s * 1e9) + computed


def throughput(bench: Bench) -> Iterator[Piece]:
    """nano-vllm's benchmark. The first round also compiles and records: the others are kept."""
    count, lengths = (6, (4, 12)) if bench.tiny else (256, (100, 1024))
    prompts, outputs = mixed_lengths(count, *lengths)
    prompts = [[token % shapes.SHAPES[bench.shape]["vocab_size"] for token in p] for p in prompts]
    flags: dict[str, Any] = {"max_model_len": "4096", "max_num_seqs": count}
    flags |= {"max_model_len": "128"} if bench.tiny else {"max_num_batched_tokens": 16_384}
    llm = opened(bench, **flags)  # as there

    def work() -> Found:
        found = run(llm(), prompts, outputs, temperature=0.6) | {"flags": flags}
        limits = limits_of(bench)
        least = batch_seconds(limits, prompts, outputs) if limits else None
        return found | percent(1 / found["seconds"], 1 / least if least else None)

    for number in range(2 if bench.tiny else ROUNDS):
        yield f"round {number}", work


def batch_one(bench: Bench) -> Iterator[Piece]:
    """One request at a time, with steps compiled and recorded, and without."""
    room = {"max_num_seqs": 8, "max_model_len": "128" if bench.tiny else "2048"}
    if not bench.tiny:
        room["kv_cache_memory_bytes"] = "4G"
    llm = opened(bench, **room)
    shapes_of_it = ((8, 8),) if bench.tiny else ((128, 128), (1024, 128))
    for prompt, output in shapes_of_it:
        yield f"{prompt}/{output}", partial(_alone, bench, llm, prompt, output)
    plain = opened(bench, **room, enforce_eager=True)
    for prompt, output in shapes_of_it:
        yield f"{prompt}/{output} without recordings", partial(_alone, bench, plain, prompt, output)


def _alone(bench: Bench, llm: Callable[[], Any], prompt: int, output: int) -> Found:
    vocab = shapes.SHAPES[bench.shape]["vocab_size"]
    rates, firsts = [], []
    for seed in range(-2, 1 if bench.tiny else ROUNDS):  # two to warm up
        work = workloads.batch_one(vocab, seed, prompt, output)
        found = run(llm(), work.prompts, work.outputs)
        if seed >= 0:
            rates.append((output - 1) / found["decode_seconds"])
            firsts.append(found["ttft"])
    rate, limits = statistics.median(rates), limits_of(bench)
    most = limits.decode_tokens_per_second(1, prompt + output / 2) if limits else None
    return {
        "decode_tok_s": rate,
        "tpot_ms": 1e3 / rate,
        "ttft_s": statistics.median(firsts),
        "range": [min(rates), max(rates)],
    } | percent(rate, most)


def sweep(bench: Bench) -> Iterator[Piece]:
    """So many at once, 128 tokens in and 128 out (16 and 8 of the tiny model)."""
    counts = SWEEP[:3] if bench.tiny else SWEEP
    prompt, output = (16, 8) if bench.tiny else (128, 128)
    llm = opened(bench, max_model_len="64" if bench.tiny else "512", max_num_seqs=max(counts))
    for count in counts:
        yield f"{count} at once", partial(_at_once, bench, llm, count, prompt, output)


def _at_once(bench: Bench, llm: Callable[[], Any], count: int, prompt: int, output: int) -> Found:
    vocab = shapes.SHAPES[bench.shape]["vocab_size"]
    for seed in (-1, 0):  # the first compiles and records
        one = [workloads.batch_one(vocab, seed * count + i, prompt, 1) for i in range(count)]
        found = run(llm(), [work.prompts[0] for work in one], [output] * count)
    limits = limits_of(bench)
    rate = count * (output - 1) / found["decode_seconds"]
    most = limits.decode_tokens_per_second(count, prompt + output / 2) if limits else None
    return found | {"decode_tok_s": rate} | percent(rate, most)


def long_context(bench: Bench) -> Iterator[Piece]:
    """Seconds a token (ITL) over the context, of one prompt that each context extends."""
    contexts = (32, 64, 96) if bench.tiny else CONTEXTS
    longest = contexts[-1] + 2 * LONG_OUTPUT
    # The shape's own limit of positions is below: what is beyond costs the same.
    llm = opened(
        bench,
        max_model_len=str(longest),
        max_num_seqs=4,
        hf_overrides={"max_position_embeddings": longest},
    )
    for context in contexts:
        yield f"context {context}", partial(_context, bench, llm, context)
    yield "fit", partial(_fit, bench, contexts)


def _context(bench: Bench, llm: Callable[[], Any], context: int) -> Found:
    vocab, output = shapes.SHAPES[bench.shape]["vocab_size"], 8 if bench.tiny else LONG_OUTPUT
    rng = random.Random("long")
    prompt = [rng.randrange(10, vocab) for _ in range(context)]
    first = run(llm(), [prompt], [1])
    run(llm(), [prompt], [output], keep_prefix=True)  # compiles and records
    found = run(llm(), [prompt], [output], keep_prefix=True)
    limits = limits_of(bench)
    rate = context / first["ttft"]
    most = limits.prefill_tokens_per_second(context) if limits else None
    return {
        "ttft_s": first["ttft"],
        "prefill_tok_s": rate,
        "itl_s": found["decode_seconds"] / (output - 1),
        "cached_tokens": found["cached_tokens"],
    } | percent(rate, most)


def _fit(bench: Bench, contexts: Sequence[int]) -> Found:
    """From what is on disk: an earlier process may have measured it."""
    found = Record(bench.out, "long").results
    measured = {c: found.get(f"context {c}", {}).get("itl_s") for c in contexts}
    half = (8 if bench.tiny else LONG_OUTPUT) / 2
    points = [[context + half, itl] for context, itl in measured.items() if itl is not None]
    limits = limits_of(bench)
    if limits is None or len(points) < 2:
        raise Skip(f"{len(points)} contexts and {'no' if limits is None else 'a'} bandwidth known")
    fitted = figures.growth_figures(points, limits)
    return fitted | {"percent_of_limit": 100 / fitted["slope_over_limit"]}
