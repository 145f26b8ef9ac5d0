"""`trimaran bench latency`: the time one batch takes from its prompts to its last tokens."""

from __future__ import annotations

import argparse
import time
from typing import Any

from ..core.args import EngineArgs
from .flags import add_flags, build, number
from .serve import add_model, take_model
from .workload import add_number, add_workload_arguments, make_jobs, mean, percentile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_workload_arguments(parser, num_prompts=1)
    add_number(parser, "iterations", number(int, 1), 10, "Batches to measure.")
    add_number(parser, "warmup", number(int, 0), 2, "Batches before them.")
    add_flags(parser, EngineArgs, skip=("model",))


def run(namespace: argparse.Namespace) -> dict[str, Any]:
    from ..core.llm import LLM
    from ..core.sampling_params import SamplingParams

    take_model(namespace)
    seconds: list[float] = []
    with LLM.from_engine_args(build(EngineArgs, namespace)) as llm:
        vocab_size = llm.get_tokenizer().vocab_size
        params = SamplingParams(max_tokens=namespace.output_len, ignore_eos=True, temperature=0.0)
        for iteration in range(namespace.warmup + namespace.iterations):
            # New prompts each time: none may be found in the prefix cache.
            namespace.workload_seed += 1
            jobs = make_jobs(namespace, vocab_size)
            start = time.perf_counter()
            llm.generate([{"prompt_token_ids": job.prompt} for job in jobs], params, use_tqdm=False)
            if iteration >= namespace.warmup:
                seconds.append(time.perf_counter() - start)
    return {
        "batch_size": namespace.num_prompts,
        "iterations": len(seconds),
        "mean_seconds": mean(seconds),
        "p50_seconds": percentile(seconds, 0.5),
        "p99_seconds": percentile(seconds, 0.99),
        "seconds_per_token": mean(seconds) / namespace.output_len,
    }
