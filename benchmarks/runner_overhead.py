"""What the runner costs the host in a step in which all rows decode: with a model that computes
nothing, out of a recording whose replay does nothing, and on the plain way.

Usage: python benchmarks/runner_overhead.py [--running 64 256] [--steps 300] [--drawing]
[--output FILE]

On the plain way torch's own work on a processor is in the figure (gathering the batch, one argmax);
out of a recording only what the host does is.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from run import commit
from torch import Tensor

from trimaran.core.args import EngineArgs
from trimaran.core.executor import UniExecutor
from trimaran.core.plan import NewRow, RowSampling, StepPlan
from trimaran.core.resolve import resolve
from trimaran.platforms.attention_torch import TorchPagedAttention
from trimaran.platforms.cpu import CpuPlatform
from trimaran.platforms.cpu_device import CpuDevice
from trimaran.platforms.interface import (
    AttentionImpl,
    AttentionSpec,
    Capabilities,
    Device,
    Graph,
    LayerKV,
    OpImpl,
    OpSignature,
    Support,
)

PROMPT = 100
NULL = f"{__name__}:NullPlatform"


class NullGraph(Graph):
    def replay(self) -> None:
        pass


class NullDevice(CpuDevice):
    def capture(self, work: Callable[[], None]) -> Graph:
        return NullGraph()


class NullAttention(TorchPagedAttention):
    name = "null"
    priority = 1000

    def plan_recorded(self, spec: AttentionSpec, block_tables: Tensor, seq_lens: Tensor) -> Any:
        return block_tables, seq_lens

    def run(self, query: Tensor, kv: LayerKV, spec: AttentionSpec, metadata: Any) -> Tensor:
        return query


class NullDraw(OpImpl):
    op = "draw"
    name = "null"
    priority = 1000

    def supports(self, sig: OpSignature) -> Support:
        return Support.yes()

    def __call__(self, *args: Any) -> Any:
        logits, floats = args[:2]
        return logits.argmax(-1), torch.zeros_like(floats[0])


class NullPlatform(CpuPlatform):
    def capabilities(self, device: int = 0) -> Capabilities:
        return dataclasses.replace(
            super().capabilities(device), graph_replay=True, compiles_steps=False
        )

    def open(self, device: int = 0, num_threads: int | None = None) -> Device:
        return NullDevice(device)

    def ops(self) -> Mapping[str, Sequence[OpImpl]]:
        return {**super().ops(), "draw": [NullDraw()]}

    def attention(self, spec: AttentionSpec) -> Sequence[AttentionImpl]:
        return (NullAttention(),)


def open_executor(running: int, steps: int) -> UniExecutor:
    args = EngineArgs(
        model="default",
        platform=NULL,
        dtype="float32",
        max_model_len=str(PROMPT + steps + 16),
        max_num_seqs=running,
        max_num_batched_tokens=max(2048, running),
        num_gpu_blocks_override=running * 2 + 1,
        num_threads=1,
    )
    return UniExecutor(resolve(args))


def measure(running: int, steps: int, drawing: bool, recorded: bool) -> dict[str, Any]:
    """Median over steps, in microseconds: `submit`, and reading the result."""
    executor = open_executor(running, steps)
    runner = executor._rank.runner  # type: ignore[union-attr]
    if not recorded:
        runner._recorded = None
        decoder = runner._decoder
        hidden = torch.zeros(running, decoder.spec.hidden_size)
        logits = torch.zeros(running, decoder.spec.vocab_size)
        decoder.forward, decoder.logits = lambda: hidden, lambda rows: logits
    groups = len(runner._regions)
    sampling = RowSampling(temperature=1.0 if drawing else 0.0, top_k=20)
    rows = list(range(running))
    added = [NewRow(row, [5] * PROMPT, PROMPT, [[1]] * groups, sampling) for row in rows]
    submits, results = [], []
    for step in range(steps):
        starts, ones = [PROMPT + step] * running, [1] * running
        plan = StepPlan(step, rows=rows, starts=starts, counts=ones, emits=[True] * running)
        if step == 0:
            plan.added = added
        begin = time.perf_counter()
        handle = runner.submit(plan)
        submitted = time.perf_counter()
        assert handle.result().error is None
        done = time.perf_counter()
        if step >= 3:
            submits.append((submitted - begin) * 1e6)
            results.append((done - submitted) * 1e6)
    executor.close()
    return {
        "running": running,
        "drawing": drawing,
        "recorded": recorded,
        "submit_us": round(statistics.median(submits), 1),
        "result_us": round(statistics.median(results), 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--running", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--drawing", action="store_true")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = [
        measure(running, args.steps, args.drawing, recorded)
        for running in args.running
        for recorded in (False, True)
    ]
    report = {"commit": commit(), "machine": platform.processor(), "steps": found}
    print(json.dumps(report, indent=1))
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
