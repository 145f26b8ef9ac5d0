"""Trimaran as a peer: `LLM` in process, the requests all at once."""

from __future__ import annotations

import time
from typing import Any

from protocol import measurement, serve

from trimaran import LLM, SamplingParams

STATE: dict[str, Any] = {}
BLOCK = 32


def load(
    model: str, threads: int, kv_tokens: int, max_len: int, options: dict[str, Any]
) -> dict[str, Any]:
    flags = {
        "num_threads": threads,
        "block_size": BLOCK,
        "num_gpu_blocks_override": kv_tokens // BLOCK + 1,
        "max_model_len": max_len,
        **options,
    }
    start = time.perf_counter()
    STATE["llm"] = LLM(model=model, **flags)
    return {"seconds": time.perf_counter() - start, "flags": flags}


def run(
    prompts: list[list[int]], outputs: list[int], keep_prefix: bool, temperature: float = 0.0
) -> dict[str, Any]:
    llm: LLM = STATE["llm"]
    if not keep_prefix:
        llm.reset_prefix_cache()
    params = [
        SamplingParams(temperature=temperature, max_tokens=n, ignore_eos=True, detokenize=False)
        for n in outputs
    ]
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    start = time.perf_counter()
    results = llm.generate(requests, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    return measurement(
        seconds,
        sum(len(r.outputs[0].token_ids) for r in results),
        [r.metrics.first_token - r.metrics.arrival for r in results],
        [r.metrics.last_token - r.metrics.first_token for r in results],
    ) | {"cached_tokens": sum(r.num_cached_tokens for r in results)}


def score(prompts: list[list[int]]) -> list[dict[str, Any]]:
    params = SamplingParams(
        temperature=0.0,
        max_tokens=1,
        logprobs=1,
        prompt_logprobs=0,
        ignore_eos=True,
        detokenize=False,
    )
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    answers = []
    results = STATE["llm"].generate(requests, params, use_tqdm=False)
    for prompt, result in zip(prompts, results, strict=True):
        output = result.outputs[0]
        token = output.token_ids[0]
        given = zip(prompt[1:], result.prompt_logprobs[1:], strict=True)
        answers.append(
            {
                "token": token,
                "logprob": output.logprobs[0][token].logprob,
                "prompt_logprobs": [entry[known].logprob for known, entry in given],
            }
        )
    return answers


if __name__ == "__main__":
    serve({"load": load, "run": run, "score": score})
