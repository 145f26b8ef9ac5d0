"""OpenVINO GenAI as a peer: its continuous-batching pipeline, stepped here to see each token come.

The settings are those of its serving documents: the LATENCY hint with all threads, prompts split
over steps, prefix caching. Where the processor has bf16 instructions the plugin computes in bf16
by itself; the KV cache of 16-bit models is kept in 16 bits, that of quantized ones is the
plugin's own choice (u8).
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai
from protocol import Clock, serve

STATE: dict[str, Any] = {"next_id": 0}
BLOCK = 32  # the CPU plugin's


def load(
    model: str, threads: int, kv_tokens: int, max_len: int, options: dict[str, Any]
) -> dict[str, Any]:
    """`options` may hold plugin properties, e.g. KV_CACHE_PRECISION or INFERENCE_PRECISION_HINT."""
    properties = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        **options,
    }
    flags = {
        "max_num_batched_tokens": 2048,
        "num_kv_blocks": kv_tokens // BLOCK,
        "dynamic_split_fuse": True,
        "enable_prefix_caching": True,
        "max_num_seqs": 64,
    }
    scheduler = genai.SchedulerConfig()
    for name, value in flags.items():
        setattr(scheduler, name, value)
    start = time.perf_counter()
    STATE["pipeline"] = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)
    return {"seconds": time.perf_counter() - start, "flags": flags | properties}


def _generate(
    prompts: list[list[int]], outputs: list[int], scored: bool = False
) -> tuple[Clock, list[Any]]:
    pipeline = STATE["pipeline"]
    clock, handles = Clock(len(prompts)), []
    answers: list[list[Any]] = [[] for _ in prompts]
    for prompt, count in zip(prompts, outputs, strict=True):
        config = genai.GenerationConfig()
        config.max_new_tokens = count
        config.ignore_eos = True
        config.do_sample = False
        config.logprobs, config.echo = int(scored), scored
        STATE["next_id"] += 1
        ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
        handles.append(pipeline.add_request(STATE["next_id"], ids, config))
    while pipeline.has_non_finished_requests():
        pipeline.step()
        for request, handle in enumerate(handles):
            if handle.can_read():
                for output in handle.read().values():
                    clock.tokens(request, len(output.generated_ids))
                    answers[request].append(output)
    return clock, answers


def run(prompts: list[list[int]], outputs: list[int], keep_prefix: bool) -> dict[str, Any]:
    clock, _ = _generate(prompts, outputs)
    return clock.measurement()


def score(prompts: list[list[int]]) -> list[dict[str, Any]]:
    _, answers = _generate(prompts, [1] * len(prompts), scored=True)
    found = []
    for outputs in answers:
        token = outputs[-1].generated_ids[-1]
        logprobs = [value for output in outputs for value in output.generated_log_probs]
        print("SCORE", len(logprobs), [len(o.generated_ids) for o in outputs], logprobs[:4])
        found.append({"token": token, "logprob": logprobs[-1], "prompt_logprobs": logprobs[1:-1]})
    return found


if __name__ == "__main__":
    serve({"load": load, "run": run, "score": score})
