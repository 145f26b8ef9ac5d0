"""`trimaran bench throughput`: many prompts at once through `LLM`."""

from __future__ import annotations

import argparse
import time
from typing import Any

from ..core.args import EngineArgs
from .flags import add_flags, build
from .serve import add_model, take_model
from .workload import add_workload_arguments, make_jobs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_workload_arguments(parser, num_prompts=64)
    add_flags(parser, EngineArgs, skip=("model",))


def run(namespace: argparse.Namespace) -> dict[str, Any]:
    from ..core.llm import LLM
    from ..core.sampling_params import SamplingParams

    take_model(namespace)
    with LLM.from_engine_args(build(EngineArgs, namespace)) as llm:
        jobs = make_jobs(namespace, llm.get_tokenizer().vocab_size)
        params = [
            SamplingParams(max_tokens=job.output_len, ignore_eos=True, temperature=1.0, seed=index)
            for index, job in enumerate(jobs)
        ]
        prompts = [{"prompt_token_ids": job.prompt} for job in jobs]
        llm.generate(prompts[:2], params[:2], use_tqdm=False)  # warm-up
        llm.reset_prefix_cache()  # its prompts are measured again
        start = time.perf_counter()
        outputs = llm.generate(prompts, params)
        seconds = time.perf_counter() - start
    generated = sum(len(one.token_ids) for output in outputs for one in output.outputs)
    prompt = sum(len(job.prompt) for job in jobs)
    return {
        "requests": len(jobs),
        "seconds": seconds,
        "prompt_tokens": prompt,
        "output_tokens": generated,
        "requests_per_second": len(jobs) / seconds,
        "output_tokens_per_second": generated / seconds,
        "total_tokens_per_second": (prompt + generated) / seconds,
    }
