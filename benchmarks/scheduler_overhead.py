"""What the scheduler costs per running request and step: schedule and update, with no model.

Usage: python -m trimaran.benchmarks.scheduler_overhead or python benchmarks/scheduler_overhead.py
[--running 256 1024] [--steps 300] [--output FILE]
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from run import commit

from trimaran.core.config import CacheConfig, CacheGroupConfig, SchedulerConfig
from trimaran.core.engine.messages import EngineRequest
from trimaran.core.plan import StepOutput, StepPlan
from trimaran.core.sampling_params import SamplingParams
from trimaran.core.scheduler import Scheduler
from trimaran.core.types import Prompt

BLOCK_SIZE = 32
PROMPT = 100


def open_scheduler(num_running: int, steps: int, run_ahead: int) -> Scheduler:
    length = PROMPT + steps + 64
    num_blocks = 1 + num_running * (length // BLOCK_SIZE + 1)
    group = CacheGroupConfig(name="full", layers=(0,), block_size=BLOCK_SIZE, num_blocks=num_blocks)
    config = SchedulerConfig(
        max_model_len=length,
        max_num_seqs=num_running,
        max_num_batched_tokens=max(8192, num_running),
        run_ahead=run_ahead,
    )
    scheduler = Scheduler(config, CacheConfig(groups=(group,), dtype=torch.float32))
    for i in range(num_running):
        tokens = [(i * 7919 + position) % 50_000 for position in range(PROMPT)]
        params = SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True, seed=i)
        root = i.to_bytes(32, "little")
        scheduler.add(EngineRequest(f"r{i}", Prompt.of_tokens(tokens), params, cache_root=root))
    return scheduler


def null_output(plan: StepPlan) -> StepOutput:
    return StepOutput(plan.step_id, [[17] if emits else [] for emits in plan.emits])


def measure(num_running: int, steps: int, run_ahead: int) -> dict[str, float | int]:
    """Median over steps of a full batch of decodes, in microseconds a request."""
    scheduler = open_scheduler(num_running, steps, run_ahead)
    in_flight: list[StepPlan] = []
    planning, updating = [], []
    gc.collect()
    while len(planning) < steps:
        start = time.perf_counter()
        plan = scheduler.schedule()
        planned = time.perf_counter()
        in_flight.append(plan)
        if len(in_flight) <= run_ahead:
            continue
        output = null_output(in_flight[0])
        before = time.perf_counter()
        scheduler.update(in_flight.pop(0), output)
        updated = time.perf_counter()
        if len(plan.rows) == num_running and plan.num_tokens == num_running:
            planning.append((planned - start) / num_running * 1e6)
            updating.append((updated - before) / num_running * 1e6)
    totals = [a + b for a, b in zip(planning, updating, strict=True)]
    return {
        "running": num_running,
        "run_ahead": run_ahead,
        "schedule_us": round(statistics.median(planning), 3),
        "update_us": round(statistics.median(updating), 3),
        "total_us": round(statistics.median(totals), 3),
        "mean_us": round(statistics.fmean(totals), 3),
        "p99_us": round(sorted(totals)[int(len(totals) * 0.99)], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--running", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    results = []
    for num_running in args.running:
        for run_ahead in (0, 1):
            result = measure(num_running, args.steps, run_ahead)
            results.append(result)
            print(
                f"{num_running:5d} running, run_ahead {run_ahead}: "
                f"schedule {result['schedule_us']:.2f} + update {result['update_us']:.2f} = "
                f"{result['total_us']:.2f} µs a request (mean {result['mean_us']:.2f}, "
                f"p99 {result['p99_us']:.2f})"
            )
    if args.output:
        report = {
            "benchmark": "scheduler_overhead",
            "command": " ".join(sys.argv),
            "commit": commit(),
            "finished": True,
            "python": platform.python_version(),
            "block_size": BLOCK_SIZE,
            "steps": args.steps,
            "results": results,
        }
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
