"""Trimaran as a peer: `LLM` in process, the requests all at once."""

from __future__ import annotations

import resource
import time
from typing import Any

from protocol import serve

from trimaran import LLM, SamplingParams

STATE: dict[str, Any] = {}


def load(model: str, dtype: str, threads: int, **engine_args: Any) -> dict[str, float]:
    start = time.perf_counter()
    STATE["llm"] = LLM(model=model, dtype=dtype, num_threads=threads, **engine_args)
    return {"seconds": time.perf_counter() - start}


def run(prompts: list[list[int]], outputs: list[int], keep_prefix: bool = False) -> dict[str, Any]:
    llm: LLM = STATE["llm"]
    if not keep_prefix:
        llm.reset_prefix_cache()
    params = [
        SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False)
        for n in outputs
    ]
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    start = time.perf_counter()
    results = llm.generate(requests, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    first = [r.metrics.first_token - r.metrics.arrival for r in results]
    decode = [r.metrics.last_token - r.metrics.first_token for r in results]
    return {
        "seconds": seconds,
        "output_tokens": sum(len(r.outputs[0].token_ids) for r in results),
        "ttft": sorted(first)[len(first) // 2],
        "decode_seconds": max(decode),
        "cached_tokens": sum(r.num_cached_tokens for r in results),
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def score(prompts: list[list[int]]) -> list[dict[str, float]]:
    params = SamplingParams(
        temperature=0.0, max_tokens=1, logprobs=1, ignore_eos=True, detokenize=False
    )
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    answers = []
    for result in STATE["llm"].generate(requests, params, use_tqdm=False):
        output = result.outputs[0]
        token = output.token_ids[0]
        answers.append({"token": token, "logprob": output.logprobs[0][token].logprob})
    return answers


if __name__ == "__main__":
    serve({"load": load, "run": run, "score": score})
