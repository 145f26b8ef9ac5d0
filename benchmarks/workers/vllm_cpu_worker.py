"""vLLM's CPU backend as a peer: `LLM`, compiled, with the settings that its CPU page advises.

Threads are bound to cores and none is reserved (the harness waits while the engine works); the
KV cache, which its page wants sized by hand, is the same as every peer's.
"""

from __future__ import annotations

import os
import time
from typing import Any

from protocol import measurement, serve

STATE: dict[str, Any] = {}


def load(
    model: str, threads: int, kv_tokens: int, max_len: int, options: dict[str, Any]
) -> dict[str, Any]:
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    os.environ.update(environment)  # read when the package is imported
    flags = {
        "dtype": "bfloat16",
        "max_model_len": max_len,
        "kv_cache_memory_bytes": kv_tokens * _kv_bytes_per_token(model),
        "max_num_seqs": 64,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,  # the times of a request's tokens are among these statistics
        **options,
    }
    start = time.perf_counter()
    from vllm import LLM

    STATE["llm"] = LLM(model=model, **flags)
    return {"seconds": time.perf_counter() - start, "flags": flags | environment}


def _kv_bytes_per_token(model: str) -> int:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2


def run(prompts: list[list[int]], outputs: list[int], keep_prefix: bool) -> dict[str, Any]:
    from vllm import SamplingParams

    llm = STATE["llm"]
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
    return measurement(
        seconds,
        sum(len(r.outputs[0].token_ids) for r in results),
        [r.metrics.first_token_latency for r in results],
        [r.metrics.last_token_ts - r.metrics.first_token_ts for r in results],
    ) | {"cached_tokens": sum(r.num_cached_tokens or 0 for r in results)}


def score(prompts: list[list[int]]) -> list[dict[str, Any]]:
    from vllm import SamplingParams

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
